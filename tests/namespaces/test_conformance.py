"""Every kind of namespace keeps what `Namespace` promises: the suite of `support.conformance`, once for each."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from support.conformance import NamespaceConformance
from support.memory import MemoryMaker
from support.namespaces import (
    DeadTrackerMaker,
    DeviceMaker,
    DeviceOnImageMaker,
    ImageMaker,
    LivingTrackerMaker,
    Maker,
    NamedImageMaker,
    NodeMaker,
)


class Kind(NamespaceConformance):
    """The suite for one maker."""

    of: ClassVar[type[Maker]]

    def __init_subclass__(cls) -> None:
        assert all(hasattr(cls, name.partition("[")[0]) for name in cls.broken), "a test that is not there"

    @pytest.fixture
    def maker(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Maker]:
        """In memory: nothing here is about what a disk does."""
        with tempfile.TemporaryDirectory(prefix="dirtmap-tests-", dir="/dev/shm") as folder:
            monkeypatch.setenv("DIRTMAP_STORE", f"{folder}/default.dmap")
            monkeypatch.setenv("DIRTMAP_INDEX", f"{folder}/index")
            with contextlib.closing(self.of(Path(folder))) as maker:
                yield maker


class TestImage(Kind):
    of = ImageMaker


class TestNamedImage(Kind):
    of = NamedImageMaker


class TestNode(Kind):
    of = NodeMaker


class TestDevice(Kind):
    of = DeviceMaker


class TestDeviceOnImage(Kind):
    of = DeviceOnImageMaker


class TestDeadTracker(Kind):
    of = DeadTrackerMaker


class TestLivingTracker(Kind):
    of = LivingTrackerMaker


class TestMemory(Kind):
    """A kind of container that only the tests have: it took one module and one row."""

    of = MemoryMaker
