"""Points in time, as they are shown: seconds since 1970, as text."""

from __future__ import annotations

import time


def local_time(seconds: float | None) -> str:
    """For people, in their own time zone; of an unknown one, that it is not known."""
    return "not known" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def iso_time(seconds: float | None) -> str | None:
    """For programs, by ISO 8601, in UTC, to the second; None of an unknown one."""
    return None if seconds is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
