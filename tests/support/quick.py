"""What makes thousands of stores quick to try, and changes no answer."""

from __future__ import annotations

import time
from functools import lru_cache

import pytest

from dirtmap.engine.storefile import file as store
from dirtmap.engine.storefile import header
from dirtmap.engine.system.file import File


class Quick(File):
    """A file whose syncs cost nothing."""

    def sync(self) -> None:
        self._refuse_if_poisoned()


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Headers are parsed once for each content, and nobody waits for a writer that is not there."""
    patch.setattr(header, "parse_block", lru_cache(maxsize=64)(header.parse_block))
    patch.setattr(store, "time", _Hurried)


class _Hurried:
    monotonic = staticmethod(time.monotonic)

    @staticmethod
    def sleep(seconds: float) -> None:
        pass
