"""Power loss: what a crash can leave on disk at any moment, with tmpfs gone, and what recovery makes of it.

Every write and sync of a tracker is recorded, to the store and to the log, and beside them each mark and cut as it
returns. A crash may come between any two events: each file then has what was synced, and of its later writes any
sectors. Recovered must be at least what had returned, and at most what was marked before the last save, and the regions
of marks since.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import hostless, qemu
from support.cli import dirtmap
from support.power import REGION, SIZE, Recording, expected, lose, use
from support.tracking import GRANULE, files_in, forget_index, make_node, model_of

import dirtmap.engine as dm
from dirtmap.engine.namespaces.nodes import resize_node
from dirtmap.engine.session import livefile
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.engine.tracking.kernel import Kernel
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt import live
from dirtmap.fmt import store as fmt_store
from dirtmap.fmt.errors import StorageError, SyncError
from dirtmap.fmt.live import build_session, parse_session


def lose_power(folder: Path, intent: str, seed: int, acts: int, crashes: int) -> int:
    """Runs a tracker, then tries crashes of it; returns how many."""
    make_node(folder, SIZE)
    with dm.open("node:drive0") as image, image.transaction() as bitmaps:
        bitmaps["b1"] = dm.Bitmap(SIZE)
    recording, rng = Recording(), random.Random(seed)
    opened = dm.open("node:drive0")
    with fileio.using(recording.files()):
        tracker = opened.track(save_interval=0, region_size=REGION, intent=intent)
        recording.events.append("begun")
        use(recording, tracker, rng, acts)
    live_path = os.fsdecode(tracker._session.live)
    lose(tracker)
    shutil.rmtree(live_path)
    opened.close()
    everything = np.ones(SIZE // GRANULE, np.uint8)
    begun = recording.events.index("begun")
    for at, disks in recording.states(rng, crashes):
        forget_index(folder)
        for path, disk in disks.items():
            Path(path).write_bytes(disk)
        least, most, since = expected(recording.events[:at])
        with dm.open("node:drive0") as image:
            shown = model_of(image["b0"])
            names = [name for name in image if name.startswith("c")]
            how = {item.name: item.how for item in image.recover()}
            found = {name: model_of(image[name]) for name in image}
        after = found["b0"]
        assert np.array_equal(shown, after), at
        assert not (least & ~after).any(), f"event {at}: lost {np.flatnonzero(least & ~after)}"
        if at > begun and intent == "region":
            assert how["b0"].startswith("logged regions: "), how
            assert not (after & ~most).any(), f"event {at}: not bounded: {np.flatnonzero(after & ~most)}"
        if at > begun and intent == "off":
            assert how["b0"].startswith("all dirty: "), how
            assert np.array_equal(after, everything)
        for name, model in since.items():  # durable once the cut has returned
            union = np.bitwise_or.reduce([found[later] for later in names[names.index(name) :]])
            assert not (model & ~union).any(), f"event {at}: {name} lost {np.flatnonzero(model & ~union)}"
    return crashes


@pytest.mark.parametrize("intent", ["region", "off"])
def test_power_loss_at_any_moment_loses_no_mark(tmp_path: Path, intent: str) -> None:
    print(lose_power(tmp_path, intent, 1, 120, 150), "crashes")


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_power_loss_at_any_of_many_moments_loses_no_mark(tmp_path: Path, seed: int) -> None:
    print(lose_power(tmp_path, "region", 100 + seed, 200, 1000), "crashes")


def test_power_loss_while_a_qcow2_image_is_tracked(tmp_path: Path) -> None:
    """At any moment from before the check-out to after the check-in: no bit is lost, and the image stays sound."""
    path, store = tmp_path / "disk.qcow2", tmp_path / "default.dmap"
    qemu.create(path, SIZE)
    with dm.open(path) as image, image.transaction() as bitmaps:
        for name in ("b0", "b1"):
            bitmaps[name] = dm.Bitmap(SIZE)
            bitmaps[name].mark(0, 1)
    create(str(store))
    with Store(str(store)) as target:
        hostless.add_image(target, "drive0", str(path))
    recording, rng = Recording(), random.Random(7)
    with fileio.using(recording.files()), dm.open(path) as image:
        with image.track(save_interval=0, region_size=REGION) as tracker:
            recording.events.append("begun")
            use(recording, tracker, rng, 60)
            recording.events.append("closing")
        recording.events.append("closed")
    begun, closing, closed = map(recording.events.index, ("begun", "closing", "closed"))
    for count, (at, disks) in enumerate(recording.states(rng, 300)):
        forget_index(tmp_path)
        for file, disk in disks.items():
            Path(file).write_bytes(disk)
        least, most, since = expected(recording.events[:at])
        least[0] = most[0] = 1
        how = {item.name: item.how.partition(":")[0] for item in dm.recover(path)}
        with dm.open(path) as image:
            found = {name: model_of(image[name]) for name in image}
            assert image.tracking() is None
        assert not (least & ~found["b0"]).any(), f"event {at}: lost {np.flatnonzero(least & ~found['b0'])}"
        if at <= begun or at > closed:
            assert np.array_equal(found["b0"], least), f"event {at}: {how}"
        elif at <= closing:
            assert how["b0"] == "logged regions", f"event {at}: {how}"
        assert not (found["b0"] & ~most).any(), f"event {at}: not bounded"
        names = [name for name in found if name.startswith("c")]
        for name, model in since.items():
            union = np.bitwise_or.reduce([found[later] for later in names[names.index(name) :]])
            assert not (model & ~union).any(), f"event {at}: {name} lost {np.flatnonzero(model & ~union)}"
        assert dm.check(path).corruptions == 0
        if count % 30 == 0:
            qemu.qemu_img("check", "-q", "-r", "leaks", path)
            qemu.check(path)
            assert qemu.dirty(path, "b0") == qemu.merged(
                (int(at) * GRANULE, GRANULE) for at in np.flatnonzero(found["b0"])
            )


# Others writing in between


def died(tmp_path: Path, *, bare: bool) -> Path:
    """A node whose tracker was killed; its live file is there."""
    path = make_node(tmp_path, SIZE)
    pid = os.fork()
    if pid == 0:
        try:
            tracker = dm.open("node:drive0").track()
            with path.open("r+b") as file:
                with tracker.write(0, 1):
                    file.write(b"x")
                    file.flush()
                if bare:
                    tracker.mark(GRANULE, 1)
        finally:
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    return path


@pytest.mark.parametrize("bare", [False, True])
def test_a_raw_image_written_after_the_trackers_death_is_all_dirty(tmp_path: Path, bare: bool) -> None:
    path = died(tmp_path, bare=bare)
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("exact")
    status = os.stat(path)
    later = status.st_mtime_ns + (1_000_000_000 if bare else 50_000_000)
    with path.open("r+b") as file:
        file.write(b"y")
    os.utime(path, ns=(later, later))  # so much later did it write
    with dm.open("node:drive0") as image:
        assert model_of(image["b0"]).all()
        assert [item.how for item in image.recover()] == ["all dirty: the image has changed while nobody tracked it"]
        assert model_of(image["b0"]).all()


@pytest.mark.parametrize("change", ["replaced", "set back", "gone"])
def test_a_raw_image_that_is_another_one_is_all_dirty(tmp_path: Path, change: str) -> None:
    path = died(tmp_path, bare=False)
    if change == "replaced":
        shutil.copy2(path, tmp_path / "copy")
        os.replace(tmp_path / "copy", path)
    elif change == "set back":
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
    with dm.open("node:drive0") as image:
        assert image.tracking().how.startswith("all dirty")
        assert model_of(image["b0"]).all()


@pytest.mark.parametrize("recover", [False, True])
def test_a_raw_image_that_has_grown_is_refused_until_its_size_is_adopted(tmp_path: Path, recover: bool) -> None:
    path = died(tmp_path, bare=False)
    os.truncate(path, 2 * SIZE)
    with dm.open("node:drive0") as image, pytest.raises(dm.BitmapError, match="node resize"):
        _ = image["b0"]
    if recover:
        with dm.open("node:drive0") as image:
            image.recover()
    else:
        with Store(str(tmp_path / "default.dmap")) as target:
            resize_node(target, "drive0")
    with dm.open("node:drive0") as image:
        assert image.tracking() is None
        assert image["b0"].size == 2 * SIZE
        assert model_of(image["b0"]).all()
    assert not list(tmp_path.glob("*.intent"))


def test_after_a_power_loss_a_later_write_by_others_is_noticed(tmp_path: Path) -> None:
    path = died(tmp_path, bare=False)
    with dm.open("node:drive0") as image:
        shutil.rmtree(image.tracking().live)
        assert image.tracking().how.startswith("logged regions")
        now = os.stat(path).st_mtime_ns
        os.utime(path, ns=(now, now + 20_000_000_000))
        assert image.tracking().how.startswith("all dirty")


# A store that is not to be believed


def with_session(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    """Changes the session that a dead tracker has left."""
    with Store(str(tmp_path / "default.dmap")) as target, target.change() as changed:
        record = changed.table.get(b"drive0")
        assert record
        session = record.extension(fmt_store.EXTENSION_SESSION)
        assert session
        changed.table.put(replace(record, extensions=((fmt_store.EXTENSION_SESSION, change(session)),)))


def test_paths_of_a_hostile_session_are_not_touched(tmp_path: Path) -> None:
    died(tmp_path, bare=False)
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("control", "bits", "letter"):
        (precious / name).write_bytes(bytes(live.PAGE))

    def lie(session: bytes) -> bytes:
        found = parse_session(session)
        return build_session(replace(found, live=os.fsencode(precious), log_path=os.fsencode(precious / "letter")))

    with_session(tmp_path, lie)
    with dm.open("node:drive0") as image:
        assert [item.how.partition(":")[0] for item in image.recover()] == ["all dirty"]
        assert image.tracking() is None
    assert sorted(os.listdir(precious)) == ["bits", "control", "letter"]


@pytest.mark.parametrize(
    "change", [lambda s: b"", lambda s: s[:-1], lambda s: s[:-1] + b"\0", lambda s: s[:8] + b"\xff" * (len(s) - 8)]
)
def test_a_session_that_makes_no_sense_is_all_dirty(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    died(tmp_path, bare=False)
    with_session(tmp_path, change)
    with dm.open("node:drive0") as image:
        assert model_of(image["b0"]).all()
        assert [item.how.partition(":")[0] for item in image.recover()] == ["all dirty"]
        with image.track() as tracker:
            assert model_of(tracker.bitmap("b0")).all()


@pytest.mark.parametrize("name", ["control", "bits", "log"])
def test_damaged_live_files_are_never_believed(tmp_path: Path, name: str) -> None:
    died(tmp_path, bare=False)
    with dm.open("node:drive0") as image:
        tracking = image.tracking()
        path = Path(tracking.log if name == "log" else f"{tracking.live}/{name}")
        whole = path.read_bytes()
        for damage in (
            b"",
            whole[:-1],
            whole[:100],
            bytes(len(whole)),
            b"\xff" * len(whole),
            whole[:8] + bytes(16) + whole[24:],
        ):
            path.write_bytes(damage)
            how = image.tracking().how
            # What is behind the end of a live file was not used yet.
            assert how.startswith("exact" if name == "log" or damage == whole[:-1] else "logged regions")
            assert model_of(image["b0"])[0]
        path.unlink()
        assert model_of(image["b0"])[0]
        image.recover()
        assert model_of(image["b0"])[0]


# A full disk, a full tmpfs, a sync that fails


class Faulty(File):
    """Fails on request."""

    action = ""
    where = ""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        if self.action == "write" and self.path.endswith(self.where):
            raise StorageError(self.path, f"write: {os.strerror(errno.ENOSPC)}")
        super().write(offset, data)

    def sync(self) -> None:
        if self.action == "sync" and self.path.endswith(self.where):
            self._refuse_if_poisoned()
            self._poisoned = "injected"
            raise SyncError(self.path, f"sync: {os.strerror(errno.EIO)}")
        super().sync()


@pytest.fixture
def faulty() -> Iterator[type[Faulty]]:
    class Own(Faulty):
        pass

    with fileio.using(Own):
        yield Own


ACTS: dict[str, Callable[[Tracker], object]] = {
    "save": lambda tracker: tracker.save(),
    "checkpoint": lambda tracker: tracker.checkpoint("x"),
    "clear": lambda tracker: tracker.clear("b0"),
    "remove": lambda tracker: tracker.remove("b1"),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_full_disk_is_an_error_and_nothing_is_lost(tmp_path: Path, faulty: type[Faulty], act: str) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.transaction() as bitmaps:
        bitmaps["b1"] = dm.Bitmap(SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
        tracker.mark(0, 1)
        faulty.action, faulty.where = "write", ".dmap"
        for _ in range(3):
            with pytest.raises(dm.StorageError, match="No space"):
                ACTS[act](tracker)
            tracker.mark(GRANULE, 1)
        faulty.action = ""
        assert np.flatnonzero(model_of(tracker.bitmap("b0"))).tolist() == [0, 1]
        tracker.save()
    with dm.open("node:drive0") as image:
        assert np.flatnonzero(model_of(image["b0"])).tolist() == [0, 1]


def test_a_region_that_cannot_be_logged_is_not_marked(tmp_path: Path, faulty: type[Faulty]) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.track(save_interval=0, region_size=REGION) as tracker:
        faulty.action, faulty.where = "write", ".intent"
        for attempt in (tracker.mark, tracker.begin, lambda *at: tracker.mark_many([at[0]] * 500, [at[1]] * 500)):
            with pytest.raises(dm.StorageError, match="No space"):
                attempt(0, 1)
        faulty.action = ""
        assert not model_of(tracker.bitmap("b0")).any()
        tracker.mark(0, 1)
        tracker.checkpoint("x")  # nothing is in flight


@pytest.mark.parametrize("act", ["mark", "begin", "mark_many", *ACTS])
def test_a_failed_sync_poisons_the_tracker(tmp_path: Path, faulty: type[Faulty], act: str) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image, image.transaction() as bitmaps:
        bitmaps["b1"] = dm.Bitmap(SIZE)
    with dm.open("node:drive0") as image:
        tracker = image.track(save_interval=0, region_size=REGION)
        bound = tracker.mark
        bound(0, 1)
        bound(GRANULE, 1)
        faulty.action, faulty.where = "sync", ".intent" if act.startswith(("mark", "begin")) else ".dmap"
        marks = {
            "mark": lambda at: bound(at, 1),
            "begin": lambda at: tracker.begin(at, 1),
            "mark_many": lambda at: tracker.mark_many([at] * 500, [1] * 500),
        }
        with pytest.raises(SyncError):
            marks[act](5 * REGION) if act in marks else ACTS[act](tracker)
        faulty.action = ""
        for attempt in (*marks.values(), *(lambda _, one=one: one(tracker) for one in ACTS.values())):
            with pytest.raises(SyncError, match="not used any more after a failed sync"):
                attempt(0)
        with pytest.raises(SyncError):
            tracker.close()
        # Recovery takes it for a power loss: what was logged is dirty, in this very process, too.
        assert image.tracking().how.startswith("logged regions: a sync of the tracker had failed")
        found = model_of(image["b0"])
        assert found[:2].all()
        assert found.sum() <= 2 * REGION // GRANULE
        with image.track() as again:
            assert model_of(again.bitmap("b0"))[:2].all()


@pytest.mark.parametrize("action", ["sync", "write"])
def test_an_end_that_failed_says_so_and_is_recovered(tmp_path: Path, faulty: type[Faulty], action: str) -> None:
    make_node(tmp_path, SIZE)
    with dm.open("node:drive0") as image:
        tracker = image.track(save_interval=0, region_size=REGION)
        tracker.mark(0, 1)
        faulty.action, faulty.where = action, ".dmap"
        kind = SyncError if action == "sync" else dm.StorageError
        with pytest.raises(kind):
            tracker.close()
        faulty.action = ""
        with pytest.raises(kind):
            tracker.close()
        how = image.tracking().how
        assert how.startswith("logged regions: a sync of the tracker had failed" if action == "sync" else "exact")
        assert model_of(image["b0"])[0]


def test_a_tracker_whose_session_is_lost_takes_no_more_marks(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    store = tmp_path / "default.dmap"
    before = store.read_bytes()
    with dm.open("node:drive0") as image:
        tracker = image.track(save_interval=0)
        tracker.mark(0, 1)
        store.write_bytes(before)
        with pytest.raises(dm.LockedError, match="lost this tracker's session"):
            tracker.save()
        for act in (lambda: tracker.mark(GRANULE, 1), lambda: tracker.begin(0, 1), tracker.save, tracker.close):
            with pytest.raises(dm.LockedError, match="lost this tracker's session"):
                act()


def test_a_store_that_is_put_back_over_a_trackers_saves_is_noticed(tmp_path: Path) -> None:
    path = make_node(tmp_path, SIZE)
    store = tmp_path / "default.dmap"
    dirtmap("index", "scan", tmp_path)
    for last in ("save", "close"):
        before = store.read_bytes()
        with dm.open("node:drive0") as image, image.track(save_interval=0) as tracker:
            if last == "save":
                before = store.read_bytes()
            tracker.mark(0, 1)
            tracker.save()
            if last == "save":
                while tracker._remembered != tracker._saves:
                    time.sleep(0.01)
                store.write_bytes(before)
                with dm.open("node:drive0") as other:
                    assert other.doubt() == "the store lost a commit"
                continue
        store.write_bytes(before)
        with dm.open("node:drive0") as image:
            assert image.doubt() == "the store lost a commit"
            assert model_of(image["b0"]).all()
    assert path.exists()


def test_a_full_tmpfs_is_an_error_when_tracking_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_node(tmp_path, SIZE)

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with dm.open("node:drive0") as image:
        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", full)
            with pytest.raises(dm.StorageError, match="No space"):
                image.track()
        assert image.tracking() is None
        assert files_in(tmp_path) == ["default.dmap", "drive0.raw"]
        with image.track(save_interval=0) as tracker:
            tracker.checkpoint("spare used")
            with monkeypatch.context() as patched:
                patched.setattr(Kernel, "reserve", lambda kernel, *_: kernel._fail(errno.ENOSPC, 0, 0))
                with pytest.raises(dm.StorageError, match="No space"):
                    cut_often(tracker)  # there may be two spares, but not three
                tracker.mark(0, 1)
            tracker.checkpoint("later")
            assert model_of(tracker.bitmap("b0"))[0]


def cut_often(tracker: Tracker) -> None:
    for name in ("one", "two", "three"):
        tracker.checkpoint(name)


def test_a_live_folder_that_others_can_look_into_is_refused(tmp_path: Path) -> None:
    make_node(tmp_path, SIZE)
    folder = Path(livefile.user_folder(str(tmp_path)))
    folder.mkdir(mode=0o755)
    with dm.open("node:drive0") as image, pytest.raises(dm.StorageError, match="this user alone"):
        image.track(live=str(tmp_path))
