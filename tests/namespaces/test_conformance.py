"""Every kind of namespace keeps what `Namespace` promises: the suite of `support.conformance`, once for each."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from support.conformance import NamespaceConformance
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


_STALE = "the handle is of no use once the session of the tracker that died has ended: 'open it again'"
_OPEN_AFTER_CLOSE = "opens the image anew although it was closed"


class TestImage(Kind):
    of = ImageMaker
    broken: ClassVar = {
        "test_a_transaction_after_close": _OPEN_AFTER_CLOSE,
        "test_recovery_after_close": _OPEN_AFTER_CLOSE,
    }


class TestNamedImage(Kind):
    of = NamedImageMaker
    broken: ClassVar = {
        "test_a_transaction_after_close": _OPEN_AFTER_CLOSE,
        "test_recovery_after_close": _OPEN_AFTER_CLOSE,
        "test_a_reader_stays_right_while_somebody_tracks": "a handle opened before tells all bitmaps as inconsistent",
    }


class TestNode(Kind):
    of = NodeMaker
    broken: ClassVar = {
        "test_info_tells_the_uuid": "that of a node in a store is with its bitmaps only",
        "test_info_tells_the_node": "that of a node in a store is with its bitmaps only",
        "test_one_name_in_two_spellings": "commits a directory with one name twice, which nothing can read any more",
        "test_an_inconsistent_bitmap_is_not_copied": "copies one that has no bits in the file",
    }


class TestDevice(Kind):
    of = DeviceMaker
    broken: ClassVar = {
        "test_info_tells_the_uuid": "that of a device is with its bitmaps only",
        "test_one_name_in_two_spellings": TestNode.broken["test_one_name_in_two_spellings"],
        "test_an_inconsistent_bitmap_is_not_copied": TestNode.broken["test_an_inconsistent_bitmap_is_not_copied"],
    }


class TestDeviceOnImage(Kind):
    of = DeviceOnImageMaker
    broken: ClassVar = TestDevice.broken


class TestDeadTracker(Kind):
    of = DeadTrackerMaker
    broken: ClassVar = {
        "test_a_transaction_after_close": _OPEN_AFTER_CLOSE,
        "test_recovery_after_close": _OPEN_AFTER_CLOSE,
        "test_a_hold_after_close": _OPEN_AFTER_CLOSE,
        "test_a_handle_sees_its_own_change": _STALE,
        "test_a_handle_goes_on_after_recovery": _STALE,
        "test_a_reader_sees_the_change_of_another": _STALE,
        "test_a_reader_stays_right_while_somebody_tracks": _STALE,
        "test_the_trackers_handle_goes_on": _STALE,
        "test_one_recovery_recovers_all": "leaves an inconsistent bitmap alone that the session does not know",
    }


class TestLivingTracker(Kind):
    of = LivingTrackerMaker
