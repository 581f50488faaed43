"""Whatever act on the disk a backup, a pruning or a restoring is killed at, or loses its power: the next is right."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from support.backups import counted_acts, lose, qcow2_disk, raw_disk, same, settled_io, write_raw
from support.child import died_of
from support.medium import Medium, lose_power
from support.qemu import qemu_img

import dirtmap.engine as dm
from dirtmap.tools.backup import Backup, Repository, create, prune, rebuild, restore, verify

GRANULE = 65536


def steps(step: int) -> Iterator[int]:
    """Every so-manieth act, beginning with another one each time; the first time always, where runs are to be alike."""
    at = 0 if os.environ.get("CI") else random.randrange(step)
    while True:
        yield at
        at += step


class Disks:
    """Some disks, a repository, and what they had at each backup.

    Args:
        folder: for all of it; it is made.
        kinds: of the disks: ``raw`` or ``qcow2``.
        compress: as of `create`.
    """

    def __init__(self, folder: Path, kinds: list[str], compress: str | None = None) -> None:
        folder.mkdir()
        self.repository, self.compress = folder / "repo", compress
        self.targets: dict[str, str] = {}
        self.disks: dict[str, Path] = {}
        for number, kind in enumerate(kinds):
            name = f"{folder.name}-{number}.{kind}"
            self.disks[name] = disk = folder / name
            if kind == "raw":
                raw_disk(disk, name=name)
            else:
                qcow2_disk(disk)
            self.targets[name] = name if kind == "raw" else str(disk)
        self._beside = self._around()
        self.contents: dict[str, dict[int, bytes]] = {name: {} for name in self.disks}

    def _around(self) -> set[str]:
        """The files of trackers, on the disk beside the store and on the tmpfs."""
        store = Path(os.environ["DIRTMAP_STORE"])
        live = (path for path in Path(os.environ["DIRTMAP_LIVE"]).rglob("*") if not path.is_dir())
        return {path.name for path in (*store.parent.glob(f"{store.name}*"), *live)}

    def write(self, granule: int, value: int) -> None:
        """Writes to one granule of each disk."""
        for name, disk in self.disks.items():
            if disk.suffix == ".raw":
                write_raw(disk, {granule * GRANULE: bytes([value]) * 3000}, name)
            else:
                settled_io(disk, f"write -qP {value} {granule * GRANULE} 3k")

    def back_up(self) -> list[Backup]:
        with dm.Host() as host:
            return create(host, self.targets.values(), self.repository, compress=self.compress)

    def rebuild(self, backup: Backup) -> None:
        with dm.Host() as host:
            rebuild(host, self.targets[backup.disk], backup.bitmap, self.repository)

    def remember(self, made: list[Backup]) -> None:
        """Keeps what the disks have, which QEMU alone has to read from the backups."""
        for backup in made:
            same(self.repository, backup, self.disks[backup.disk])
            self.contents[backup.disk][backup.number] = self.restored(backup.disk, backup.number)

    def restored(self, name: str, number: int) -> bytes:
        out = self.repository.with_name("out")
        with dm.Host() as host:
            restore(host, self.repository, name, out, at=str(number), form="raw", force=True)
        return out.read_bytes()

    def require_kept(self) -> None:
        """Fails unless each backup that is there has what its disk had."""
        for backup in Repository(self.repository).backups():
            if backup.number in self.contents[backup.disk]:
                assert self.restored(backup.disk, backup.number) == self.contents[backup.disk][backup.number]

    def require_tidy(self) -> None:
        """Fails unless all is sound, and nothing is left of any act, in the repository or beside the disks."""
        place = Repository(self.repository)
        backups = place.backups()
        names = {f"{backup.id}{end}" for backup in backups for end in (".qcow2", ".json")}
        assert set(os.listdir(self.repository)) == {"repository.json", "lock", *names}
        assert self._around() == self._beside
        assert verify(self.repository) == []

    def require_tidy_disks(self) -> None:
        """Fails unless the disks have the bitmaps of backups that are there, and no tracker."""
        place = Repository(self.repository)
        for name, target in self.targets.items():
            with dm.open(target) as image:
                assert set(image) <= {place.bitmap_name(backup.id) for backup in place.backups(name)}
                assert image.tracking() is None


def lose_live_files() -> None:
    for path in Path(os.environ["DIRTMAP_LIVE"]).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def stopped(work: Callable[[], object], at: int, folder: Path, power: random.Random | None) -> bool:
    """Kills an act on a repository before it does that to the disk, or has it lose its power there, or after its end.

    Returns:
        Whether it came so far.
    """
    kept = folder.with_name("kept")

    def attempt() -> None:
        with counted_acts(at, Medium(folder, kept) if power else None):
            work()

    number = died_of(attempt)
    assert number in (0, signal.SIGKILL)
    if power:
        lose_power(kept, power)
        lose_live_files()
    return bool(number)


def stopped_backup(disks: Disks, at: int, power: random.Random | None) -> bool:
    """A backup that ends before an act, or loses its power there; and then another one. Whether it came so far."""
    whole = len(Repository(disks.repository).backups()) if disks.repository.exists() else 0
    disks.write(40, 1)
    died = stopped(disks.back_up, at, disks.repository, power)
    if disks.repository.joinpath("repository.json").exists():
        disks.require_kept()
    disks.write(41, 2)
    made = disks.back_up()
    for backup in made:
        if whole:
            assert (backup.kind, backup.reason) == ("incremental", None)
            assert backup.dirty <= 2 * GRANULE
        else:
            assert backup.reason in ("first", None)
    disks.remember(made)
    disks.require_kept()
    disks.require_tidy()
    disks.require_tidy_disks()
    return died


# The disks, how they are compressed, and how many backups there are; and a prime for the quick search.
BACKUPS = {
    "full raw": (["raw"], None, 0, 29),
    "raw": (["raw"], None, 1, 23),
    "qcow2": (["qcow2"], None, 1, 17),
    "several": (["raw", "qcow2"], None, 1, 83),
    "compressed": (["raw"], "zstd", 1, 31),
}


def search_backup(folder: Path, what: str, step: int, power: random.Random | None) -> None:
    kinds, compress, before, _ = BACKUPS[what]
    folder.mkdir()
    for at in steps(step):
        disks = Disks(folder / f"{folder.name}-{at}", kinds, compress)
        if before:
            disks.remember(disks.back_up())
        if not stopped_backup(disks, at, power):
            print(f"{what}: {at} acts")
            return


def search_prune(folder: Path, compress: str | None, keep: int, step: int, power: random.Random | None) -> None:
    disks = Disks(folder, ["raw", "qcow2"], compress)
    for night in range(3):
        disks.write(40 + night, night + 1)
        disks.remember(disks.back_up())
    original, kept = disks.repository, set(range(4 - keep, 4))

    def numbers(name: str) -> set[int]:
        return {backup.number for backup in Repository(disks.repository).backups(name)}

    for at in steps(step):
        disks.repository = shutil.copytree(original, folder / f"repo-{at}")
        died = stopped(lambda: prune(disks.repository, keep), at, disks.repository, power)
        assert all(numbers(name) >= kept for name in disks.disks)
        disks.require_kept()
        prune(disks.repository, keep)
        assert all(numbers(name) == kept for name in disks.disks)
        disks.require_kept()
        disks.require_tidy()
        if not died:
            print(f"prune {keep}: {at} acts")
            return


def search_restore(folder: Path, form: str, step: int, power: random.Random | None) -> None:
    """Over a file that is there, which is replaced as a whole or not at all."""
    disks = Disks(folder, ["raw"])
    for night in range(2):
        disks.write(40 + night, night + 1)
        disks.remember(disks.back_up())
    (name,) = disks.disks
    outs = folder / "outs"
    outs.mkdir()
    out = outs / "out"

    def work() -> None:
        with dm.Host() as host:
            restore(host, disks.repository, name, out, form=form, force=True)

    def content(path: Path) -> bytes:
        (folder / "raw").unlink(missing_ok=True)
        qemu_img("convert", "-f", form, "-O", "raw", path, folder / "raw")
        return (folder / "raw").read_bytes()

    work()
    expected = content(out)
    assert expected.startswith(disks.contents[name][2])
    for at in steps(step):
        with dm.Host() as host:
            restore(host, disks.repository, name, out, at="1", form=form, force=True)
        before = content(out)
        assert before != expected
        died = stopped(work, at, outs, power)
        assert content(out) in (before, expected)
        work()
        assert content(out) == expected
        assert os.listdir(outs) == ["out"]
        if not died:
            print(f"restore to {form}: {at} acts")
            return


def search_rebuild(folder: Path, kind: str, step: int, power: random.Random | None) -> None:
    """Of a bitmap that has missed a write."""
    folder.mkdir()
    for at in steps(step):
        disks = Disks(folder / f"{folder.name}-{at}", [kind])
        (backup,) = disks.back_up()
        disks.remember([backup])
        disks.write(40, 1)
        lose(disks.disks[backup.disk], [(38 * GRANULE, 512, 1)])
        died = stopped(partial(disks.rebuild, backup), at, disks.repository, power)
        if not died or power:
            disks.rebuild(backup)
        disks.write(41, 2)
        (made,) = disks.back_up()
        disks.remember([made])
        if not died or power:
            assert (made.kind, made.dirty) == ("incremental", 3 * GRANULE)
        disks.require_kept()
        disks.require_tidy()
        disks.require_tidy_disks()
        if not died:
            print(f"rebuild {kind}: {at} acts")
            return


def power(is_lost: bool, seed: int = 1) -> random.Random | None:
    return random.Random(seed) if is_lost else None


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("what", BACKUPS)
def test_a_backup_that_is_stopped(tmp_path: Path, what: str, is_lost: bool) -> None:
    search_backup(tmp_path / "stopped", what, BACKUPS[what][-1], power(is_lost))


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_pruning_that_is_stopped(tmp_path: Path, is_lost: bool) -> None:
    search_prune(tmp_path / "stopped", None, 1, 37, power(is_lost))


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_restoring_that_is_stopped(tmp_path: Path, form: str, is_lost: bool) -> None:
    search_restore(tmp_path / "stopped", form, 3, power(is_lost))


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_rebuilding_that_is_stopped(tmp_path: Path, kind: str, is_lost: bool) -> None:
    search_rebuild(tmp_path / "stopped", kind, 53 if kind == "raw" else 13, power(is_lost))


@pytest.mark.long
@pytest.mark.parametrize("what", BACKUPS)
def test_a_backup_that_is_stopped_anywhere(tmp_path: Path, what: str) -> None:
    search_backup(tmp_path / "killed", what, 1, None)
    for seed in range(2):
        search_backup(tmp_path / f"power-{seed}", what, 1, power(True, seed))


@pytest.mark.long
@pytest.mark.parametrize(("keep", "compress"), [(1, None), (2, "zstd")])
def test_a_pruning_that_is_stopped_anywhere(tmp_path: Path, keep: int, compress: str | None) -> None:
    search_prune(tmp_path / "killed", compress, keep, 1, None)
    for seed in range(2):
        search_prune(tmp_path / f"power-{seed}", compress, keep, 1, power(True, seed))


@pytest.mark.long
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_restoring_that_is_stopped_anywhere(tmp_path: Path, form: str) -> None:
    search_restore(tmp_path / "killed", form, 1, None)
    for seed in range(2):
        search_restore(tmp_path / f"power-{seed}", form, 1, power(True, seed))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_rebuilding_that_is_stopped_anywhere(tmp_path: Path, kind: str) -> None:
    search_rebuild(tmp_path / "killed", kind, 1, None)
    search_rebuild(tmp_path / "power", kind, 1, power(True))
