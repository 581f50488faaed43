"""`dirtmap track status`, and how other commands meet a tracked image."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import qemu
from support.cli import COMMAND, dirtmap, error_of, json_of
from support.tracking import GRANULE, make_node

import dirtmap.engine as dm
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt import store

SIZE = 64 << 20


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Tracker]:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0, region_size=1 << 20) as tracker:
        yield tracker


def test_status_of_a_tracked_image(tracker: Tracker) -> None:
    with tracker.write(0, 1):
        pass
    tracker.mark(5 << 20, 2 * GRANULE)
    found = json_of("track", "status", "drive0")
    assert found["tracked"] is True
    assert found["pid"] == os.getpid()
    assert (found["writes"], found["dirty"], found["regions"], found["regions-in-all"]) == (1, 3 * GRANULE, 2, 64)
    assert (found["intent"], found["region-size"], found["poisoned"], found["recovery"]) == (
        "region",
        1 << 20,
        False,
        None,
    )
    text = dirtmap("track", "status", "drive0").out
    assert f"(process {os.getpid()})" in text
    assert "2 of 64 (3.1%), 1 MiB each" in text
    tracker.save()
    assert json_of("track", "status", "drive0")["regions"] == 0
    assert dirtmap("track", "status", "-q", "drive0").out == ""


def test_status_on_a_terminal_goes_on_until_the_tracker_ends(tracker: Tracker) -> None:
    screen, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    command = [COMMAND, "track", "status", "drive0"]
    shown = b""
    with subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        marked = False
        while True:
            try:
                shown += os.read(screen, 4096)
            except OSError:  # the other end is closed
                break
            if not marked and b"0 of 64" in shown:
                tracker.mark(0, 1)
                marked = True
            elif marked and b"1 of 64" in shown:
                tracker.close()
        assert process.wait() == 0
    os.close(screen)
    assert b"not tracked" in shown


def test_status_of_an_image_that_nobody_tracks(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    where = {"filename": os.environ["DIRTMAP_STORE"], "node": "drive0"}
    assert json_of("track", "status", "drive0") == {**where, "tracked": False}
    assert json_of("recover", "drive0") == {**where, "recovered": []}
    dirtmap("device", "add", "d", "--root", "drive0")
    assert json_of("track", "status", "d") == {"filename": where["filename"], "device": "d", "tracked": False}
    image = tmp_path / "q.qcow2"
    qemu.create(image, SIZE)
    assert json_of("recover", image) == {"filename": str(image), "recovered": []}
    dirtmap("node", "add", "q", image)
    for target in ("q", image):
        assert json_of("track", "status", target) == {"filename": str(image), "node": "q", "tracked": False}
        assert json_of("recover", target) == {"filename": str(image), "node": "q", "recovered": []}
    assert dirtmap("track", "status", "drive0").out == "drive0: not tracked\n"


@pytest.mark.parametrize(
    "command",
    [
        ("recover", "drive0"),
        ("node", "rename", "drive0", "x", "--with-bitmaps"),
        ("node", "remove", "drive0"),
        ("node", "resize", "drive0"),
        ("node", "confirm", "drive0"),
    ],
    ids=lambda command: " ".join(map(str, command[:2])),
)
def test_what_changes_a_tracked_image_is_refused_with_the_trackers_name(
    tracker: Tracker, command: tuple[str | int, ...]
) -> None:
    assert f"(process {os.getpid()}); 'dirtmap track stop TARGET' ends it" in error_of(*command)
    assert list(map(str, tracker.bitmap("b0").extents()[0])) == []


def test_a_tracked_image_is_listed_mapped_dumped_and_checked(tracker: Tracker) -> None:
    tracker.mark(GRANULE, 1)
    tracker.take("b0")
    done = dirtmap("list", "drive0")
    assert "recording, busy" in done.out
    assert "tracked by" in done.error
    assert json_of("map", "drive0", "b0", "--dirty") == [
        {"offset": GRANULE, "length": GRANULE, "type": 1, "description": "dirty"}
    ]
    store = os.environ["DIRTMAP_STORE"]
    dirtmap("dump", store)
    assert json_of("check", store)["corruptions"] == 0


def killed(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    pid = os.fork()
    if pid == 0:
        try:
            dm.open("node:drive0").track().mark(GRANULE, 1)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_recover_says_which_row_applied(tmp_path: Path) -> None:
    killed(tmp_path)
    assert "not recovered yet: exact" in dirtmap("list", "drive0").error
    assert "its tracker has died" in dirtmap("track", "status", "drive0").out
    status = json_of("track", "status", "drive0")
    assert status["recovery"].startswith("exact: ")
    assert status["tracker"] == f"a process that has ended ({status['pid']} while it ran)"
    assert "recover' first" in error_of("node", "rename", "drive0", "x", "--with-bitmaps")
    assert dirtmap("recover", "drive0").out.startswith("b0: exact: ")
    assert dirtmap("recover", "drive0").out == ""
    assert [extent["offset"] for extent in json_of("map", "drive0", "b0", "--dirty")] == [GRANULE]


def test_nothing_is_called_exact_whose_directory_is_damaged(tmp_path: Path) -> None:
    killed(tmp_path)
    with Store(os.environ["DIRTMAP_STORE"]) as target:
        record = target.record(b"drive0")
    assert record
    with open(os.environ["DIRTMAP_STORE"], "r+b") as file:
        file.seek(record.directory.offset + store.OWNER_SIZE + 10)
        file.write(b"?")
    told = dirtmap("list", "drive0", status=1).error
    assert "checksum is wrong" in told
    assert "node 'drive0' counts as all dirty: its directory is damaged" in told
    assert json_of("track", "status", "drive0")["recovery"] == "all dirty: its directory is damaged"
    assert "checksum is wrong" in error_of("add", "drive0", "x")
    assert dirtmap("recover", "drive0").out == "b0: all dirty: its directory was damaged\n"


def test_the_first_change_recovers_and_says_so(tmp_path: Path) -> None:
    killed(tmp_path)
    assert "recovered first: exact: " in dirtmap("add", "drive0", "x").error
    assert dirtmap("recover", "drive0").out == ""
    assert [extent["offset"] for extent in json_of("map", "drive0", "b0", "--dirty")] == [GRANULE]


def test_a_transaction_recovers_and_says_so(tmp_path: Path) -> None:
    killed(tmp_path)
    document = '{"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "drive0", "name": "x"}}]}'
    assert "drive0: recovered first: exact: " in dirtmap("transaction", "-", given=document).error
    assert [extent["offset"] for extent in json_of("map", "drive0", "b0", "--dirty")] == [GRANULE]


def test_a_tracked_raw_image_gets_no_sidecar(tracker: Tracker, tmp_path: Path) -> None:
    assert "node 'drive0': tracked by" in error_of("sidecar", tmp_path / "drive0.raw", tmp_path / "new.qcow2")
    assert not (tmp_path / "new.qcow2").exists()
    shutil.rmtree(os.environ["DIRTMAP_INDEX"], ignore_errors=True)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "notes").touch()  # so that nobody may write there: it is no index
    assert "node 'drive0': tracked by" in error_of("sidecar", tmp_path / "drive0.raw", tmp_path / "new.qcow2")
    tracker.close()
    dirtmap("sidecar", tmp_path / "drive0.raw", tmp_path / "new.qcow2")


def test_a_store_lists_checked_out_bitmaps_with_their_node(tmp_path: Path) -> None:
    qemu.create(tmp_path / "disk.qcow2", SIZE)
    dirtmap("node", "add", "drive1", tmp_path / "disk.qcow2")
    dirtmap("add", "drive1", "b1")
    with dm.open("drive1") as image, image.track():
        (document,) = json_of("list", os.environ["DIRTMAP_STORE"])
        assert [(bitmap["node"], bitmap["name"]) for bitmap in document["bitmaps"]] == [("drive1", "b1")]
        assert "drive1" in dirtmap("list", os.environ["DIRTMAP_STORE"]).out
