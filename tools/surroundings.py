"""The environment of this process, and that of the programs that it starts for the user."""

from __future__ import annotations

import os

# For linear algebra, which nothing here uses, numpy would start a thread for each processor: a third of its import.
_ONE_THREAD = "OPENBLAS_NUM_THREADS"

_added: set[str] = set()


def spare_threads() -> None:
    """Has numpy, when it is imported, start no threads; unless the user says how many."""
    if _ONE_THREAD not in os.environ:
        os.environ[_ONE_THREAD] = "1"
        _added.add(_ONE_THREAD)


def given(*, without: str | None = None) -> dict[str, str]:
    """The environment as the user gave it, for other programs, which may need threads; ``without`` one variable."""
    return {name: value for name, value in os.environ.items() if name not in _added and name != without}
