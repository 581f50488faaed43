"""A host and a naive model of its addresses go through the same random changes, and must never differ.

The model: images, which may have a name, devices, which have a root, and what each of their bitmaps calls dirty, as a
set of granules. Of the index it knows nothing: it may be lost, damaged or an older one before any command.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support import qemu
from support.child import died_of
from support.cli import dirtmap, error_of, json_of
from support.quick import Quick

import dirtmap.engine as dm
from dirtmap.engine.host.host import Host
from dirtmap.engine.index import database, walk
from dirtmap.engine.index.database import connect
from dirtmap.engine.model import changes
from dirtmap.engine.system import file as fileio

SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where to be quick

GRANULE = 65536
GRANULES = 64
ALL = set(range(GRANULES))
NAMES = ["a", "b", "ä", "c.d", "\udcff"]
BITMAPS = ["x", "y", "z\udc80"]


class Deadly(Quick):
    """One whose writes end the process when there were enough of them."""

    left = 0

    def write(self, offset: int, data: bytes | memoryview) -> None:
        Deadly.left -= 1
        if Deadly.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(offset, data)


@dataclass
class Holder:
    """Bitmaps, each as the granules it calls dirty; in ``doubt`` all are."""

    bitmaps: dict[str, set[int]] = field(default_factory=dict)
    doubt: bool = False

    def seen(self, name: str) -> set[int]:
        return set(ALL) if self.doubt else set(self.bitmaps[name])

    def settle(self) -> None:
        """What was in doubt is dirty from now on: someone has changed the namespace."""
        if self.doubt:
            for dirty in self.bitmaps.values():
                dirty |= ALL
        self.doubt = False


@dataclass(eq=False)
class Image(Holder):
    """An image; ``known`` where the host has been told of it."""

    path: Path = Path()
    raw: bool = False
    name: str | None = None
    known: bool = False


@dataclass(eq=False)
class Device(Holder):
    root: Image = field(default_factory=Image)


@pytest.fixture(scope="module")
def qcow2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("machine") / "image.qcow2"
    qemu.create(path, GRANULES * GRANULE)
    return path


names = st.sampled_from(NAMES)
bitmap_names = st.sampled_from(BITMAPS)
numbers = st.integers(0, 5)


class Machine(RuleBasedStateMachine):
    """The host and its model.

    Attributes:
        qcow2: an empty image to copy.
        thorough: every address is read after every step; else they take turns, and each is read at the end and after
            what concerns them all.
    """

    qcow2: Path
    thorough: bool

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=SHM)))
        self.stack.enter_context(fileio.using(Quick))
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        self.store, self.index = str(self.folder / "default.dmap"), str(self.folder / "state" / "index")
        patch.setenv("DIRTMAP_STORE", self.store)
        patch.setenv("DIRTMAP_INDEX", self.index)
        (self.folder / "images" / "sub").mkdir(parents=True)
        dirtmap("store", "create", self.store)
        self.images = [Image(path=self.folder / "images" / f"{n}.qcow2") for n in range(3)]
        self.images += [Image(path=self.folder / "images" / f"{n}.raw", raw=True) for n in range(2)]
        for image in self.images:
            if image.raw:
                image.path.touch()
                os.truncate(image.path, GRANULES * GRANULE)
            else:
                shutil.copy(self.qcow2, image.path)
        self.devices: dict[str, Device] = {}
        self.moves = self.steps = 0
        self.read_all = True

    def teardown(self) -> None:
        try:
            self._require(self.addresses())
            for path in [self.store, *(image.path for image in self.images if not image.raw)]:
                report = dm.check(str(path))
                assert (report.corruptions, report.check_errors) == (0, 0)
        finally:
            self._forget_index()
            self.stack.close()

    # The model's view.

    def node(self, name: str) -> Image | None:
        return next((image for image in self.images if image.name == name), None)

    def holder(self, name: str) -> Holder | None:
        return self.node(name) or self.devices.get(name)

    def addresses(self) -> list[tuple[str, Holder]]:
        """The targets that there are."""
        found: list[tuple[str, Holder]] = [(f"node:{i.name}", i) for i in self.images if i.name is not None]
        found += [(f"device:{name}", device) for name, device in self.devices.items()]
        return found + [(str(image.path), image) for image in self.images if not image.raw]

    def address(self, choice: int) -> tuple[str, Holder]:
        """One of them."""
        found = self.addresses()
        return found[choice % len(found)]

    def same_store(self, one: Holder, other: Holder) -> bool:
        return all(isinstance(holder, Device) or (isinstance(holder, Image) and holder.raw) for holder in (one, other))

    # Nodes and devices.

    @initialize(choices=st.lists(numbers, min_size=2, max_size=3, unique=True))
    def begin(self, choices: list[int]) -> None:
        """With something to work on."""
        for name, choice in zip(NAMES, choices, strict=False):
            self.add_node(name, choice)
        self.add_device(NAMES[3], next(image.name for image in self.images if image.name))
        self.add(3, "x", {1, 5})
        self.add(len(choices), "y", {2})

    @rule(name=names, choice=numbers)
    def add_node(self, name: str, choice: int) -> None:
        image = self.images[choice % len(self.images)]
        if image.raw and image.name is not None:
            return  # a file may have several nodes, of which the model knows nothing
        if self.holder(name) is image:
            dirtmap("node", "add", name, image.path)  # it is so already
        elif self.holder(name):
            assert "the name is taken" in error_of("node", "add", name, image.path)
        elif image.name is not None:
            assert "rename that" in error_of("node", "add", name, image.path)
        else:
            dirtmap("node", "add", name, image.path)
            image.name, image.known = name, True

    @rule(name=names)
    def remove_node(self, name: str) -> None:
        image = self.node(name)
        if image is None:
            assert "there is no such node" in error_of("node", "remove", name)
        elif any(device.root is image for device in self.devices.values()):
            assert "root of device" in error_of("node", "remove", name)
        elif image.bitmaps:
            assert "remove or move them first" in error_of("node", "remove", name)
        else:
            dirtmap("node", "remove", name)
            image.name, image.known = None, False

    @rule(name=names, new=names, with_bitmaps=st.booleans())
    def rename_node(self, name: str, new: str, with_bitmaps: bool) -> None:
        image = self.node(name)
        command = ["node", "rename", name, new, *(["--with-bitmaps"] if with_bitmaps else [])]
        if image is None:
            assert "there is no such node" in error_of(*command)
        elif self.holder(new):
            assert "the name is taken" in error_of(*command)
        elif image.bitmaps and not with_bitmaps:
            assert "--with-bitmaps" in error_of(*command)
        else:
            dirtmap(*command)
            image.name = new

    @rule(name=names, root=names)
    def add_device(self, name: str, root: str) -> None:
        image = self.node(root)
        if self.holder(name) or image is None:
            assert error_of("device", "add", name, "--root", root)
        else:
            dirtmap("device", "add", name, "--root", root)
            self.devices[name] = Device(root=image)

    @rule(name=names)
    def remove_device(self, name: str) -> None:
        device = self.devices.get(name)
        if device is None or device.bitmaps:
            assert error_of("device", "remove", name)
        else:
            dirtmap("device", "remove", name)
            del self.devices[name]

    @rule(choice=numbers, other=numbers, unchanged=st.booleans())
    def set_root(self, choice: int, other: int, unchanged: bool) -> None:
        roots = [image.name for image in self.images if image.name is not None]
        if not self.devices or not roots:
            return
        name = sorted(self.devices)[choice % len(self.devices)]
        self._set_root(name, roots[other % len(roots)], unchanged)

    @rule(name=names, root=names, unchanged=st.booleans())
    def _set_root(self, name: str, root: str, unchanged: bool) -> None:
        device, image = self.devices.get(name), self.node(root)
        command = ["device", "set-root", name, root, *(["--content-unchanged"] if unchanged else [])]
        if device is None or image is None:
            assert error_of(*command)
            return
        dirtmap(*command)
        if unchanged and device.root is image:
            device.doubt = False  # that it is its root still is what the caller vouches for
        device.root = image
        if not unchanged:
            device.doubt = True
        device.settle()

    # Bitmaps.

    @rule(choice=numbers, name=bitmap_names, granules=st.sets(st.integers(0, GRANULES - 1), max_size=4))
    def add(self, choice: int, name: str, granules: set[int]) -> None:
        target, holder = self.address(choice)
        if name in holder.bitmaps:
            assert "the name is taken" in error_of("add", target, name)
            return
        dirtmap("add", target, name, "-g", GRANULE)
        holder.settle()
        holder.bitmaps[name] = set()
        for granule in granules:
            self._mark(target, holder, name, granule)

    @rule(choice=numbers, name=bitmap_names, granule=st.integers(0, GRANULES - 1))
    def mark(self, choice: int, name: str, granule: int) -> None:
        target, holder = self.address(choice)
        if name in holder.bitmaps:
            self._mark(target, holder, name, granule)
        else:
            assert "no such bitmap" in error_of("mark", target, name, 0, 1)

    def _mark(self, target: str, holder: Holder, name: str, granule: int) -> None:
        dirtmap("mark", target, name, granule * GRANULE, 1)
        holder.settle()
        holder.bitmaps[name].add(granule)

    @rule(choice=numbers, name=bitmap_names, verb=st.sampled_from(["remove", "clear"]))
    def remove_or_clear(self, choice: int, name: str, verb: str) -> None:
        target, holder = self.address(choice)
        if name not in holder.bitmaps:
            assert "no such bitmap" in error_of(verb, target, name)
            return
        dirtmap(verb, target, name)
        holder.settle()
        if verb == "remove":
            del holder.bitmaps[name]
        else:
            holder.bitmaps[name] = set()

    @rule(choice=numbers, other=numbers, name=bitmap_names, new=bitmap_names, verb=st.sampled_from(["copy", "move"]))
    def copy_or_move(self, choice: int, other: int, name: str, new: str, verb: str) -> None:
        (target, source), (goal, destination) = self.address(choice), self.address(other)
        command = [verb, target, name, goal, "--as", new]
        if name not in source.bitmaps:
            assert "no such bitmap" in error_of(*command)
            return
        if new in destination.bitmaps:
            assert "the name is taken" in error_of(*command)
            return
        dirtmap(*command)
        dirty = source.seen(name)
        destination.settle()
        destination.bitmaps[new] = dirty
        if verb == "move":
            source.settle()
            del source.bitmaps[name]

    @rule(choice=numbers, other=numbers, name=bitmap_names, sources=bitmap_names)
    def merge(self, choice: int, other: int, name: str, sources: str) -> None:
        (target, holder), (where, source) = self.address(choice), self.address(other)
        command = ["merge", target, name, sources, "-b", where]
        if name not in holder.bitmaps or sources not in source.bitmaps:
            assert "no such bitmap" in error_of(*command)
            return
        dirtmap(*command)
        dirty = source.seen(sources)
        holder.settle()
        holder.bitmaps[name] |= dirty

    @rule(choice=numbers, name=bitmap_names, left=st.integers(1, 12))
    def killed_while_adding(self, choice: int, name: str, left: int) -> None:
        target, holder = self.address(choice)
        if name in holder.bitmaps:
            return

        def work() -> None:
            Deadly.left = left
            with fileio.using(Deadly), dm.open(target) as image, image.transaction() as bitmaps:
                changes.add(bitmaps, name, GRANULE)

        end = died_of(work)
        assert end in (0, signal.SIGKILL)
        found = self.read(target)
        if name in found:
            holder.settle()
            holder.bitmaps[name] = set()
        else:
            assert end
        # What is known of its devices may not have got to say that nothing but bitmaps has changed.
        doubts = {device["name"]: device["doubt"] for device in json_of("device", "list")} if end else {}
        for each, device in self.devices.items():
            if device.root is holder and device.bitmaps and doubts.get(_escaped(each)):
                device.doubt = True

    # Files.

    @rule(choice=numbers)
    def written_by_others(self, choice: int) -> None:
        image = self.images[choice % len(self.images)]
        self.moves += 1
        os.utime(image.path, ns=(self.moves, self.moves))
        for holder in [image] if image.raw and image.name is not None else []:
            holder.doubt = bool(holder.bitmaps)
        for device in self.devices.values():
            if device.root is image:
                device.doubt = device.doubt or bool(device.bitmaps)

    @rule(choice=numbers, folder=st.sampled_from(["", "sub"]))
    def rename_file(self, choice: int, folder: str) -> None:
        image = self.images[choice % 3]
        self.moves += 1
        new = self.folder / "images" / folder / f"moved {self.moves}.qcow2"
        os.rename(image.path, new)
        old, image.path = image.path, new
        for device in self.devices.values():
            if device.root is image:
                device.doubt = device.doubt or bool(device.bitmaps)
        if image.name is not None:
            assert "'index scan' finds one that was moved" in error_of("list", f"node:{image.name}")
        done = self.scan()
        named = image.name is not None
        assert done["moved"] == ([{"filename": str(new), "node": _escaped(image.name)}] if named else [])
        assert done["gone"] == ([{"filename": str(old), "node": None}] if image.known and not named else [])
        self._scanned()

    def _scanned(self) -> None:
        for image in self.images:
            image.known = image.known or not image.raw

    def scan(self) -> Any:
        done = json_of("index", "scan", self.folder / "images")
        qcow2 = [image for image in self.images if not image.raw]
        assert (done["images"], done["bitmaps"]) == (3, sum(len(image.bitmaps) for image in qcow2))
        assert done["twins"] == done["clashes"] == done["damaged"] == done["held"] == []
        self.read_all = True
        return done

    @rule()
    def scan_again(self) -> None:
        done = self.scan()
        assert done["moved"] == done["gone"] == []
        self._scanned()

    @rule(choice=numbers)
    def copied_file(self, choice: int) -> None:
        """A copy of an image with a name is a twin, and told."""
        image = self.images[choice % 3]
        if image.name is None:
            return
        copy = self.folder / "images" / "copy.qcow2"
        shutil.copy(image.path, copy)
        assert "with its identity" in error_of("list", copy)
        done = json_of("index", "scan", self.folder / "images")
        assert done["twins"] == [{"filename": str(copy), "original": str(image.path)}]
        copy.unlink()
        self._scanned()

    # The index.

    def _forget_index(self) -> None:
        """As a new process, which has nothing mapped."""
        if known := database._connected.pop(self.index, None):
            known.close()

    @rule()
    def new_process(self) -> None:
        self._forget_index()

    @rule()
    def lose_index(self) -> None:
        self._forget_index()
        shutil.rmtree(self.index, ignore_errors=True)

    @rule(share=st.floats(0, 0.99))
    def cut_index(self, share: float) -> None:
        self._forget_index()
        data = Path(self.index, "data.mdb")
        if data.exists():
            os.truncate(data, int(data.stat().st_size * share))

    @rule(keep=st.booleans())
    def swap_index(self, keep: bool) -> None:
        """Puts the index aside for later, and an older one in its place."""
        self._forget_index()
        old = self.folder / "old"
        if keep and os.path.exists(self.index):
            shutil.rmtree(old, ignore_errors=True)
            shutil.copytree(self.index, old)
        elif old.exists():
            shutil.rmtree(self.index, ignore_errors=True)
            shutil.copytree(old, self.index)
        self.read_all = True

    # What must be so.

    def read(self, target: str) -> dict[str, set[int]]:
        with dm.open(target) as image:
            found = {}
            for name in image:
                offsets, lengths = image[name].extents()
                found[name] = {
                    number
                    for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True)
                    for number in range(offset // GRANULE, (offset + length) // GRANULE)
                }
            return found

    def _require(self, addresses: list[tuple[str, Holder]]) -> None:
        for target, holder in addresses:
            assert self.read(target) == {name: holder.seen(name) for name in holder.bitmaps}, target

    @invariant()
    def every_address_means_its_bitmap(self) -> None:
        self.steps += 1
        self._require(self.addresses() if self.thorough or self.read_all else [self.address(self.steps)])
        self.read_all = False

    @invariant()
    def every_bitmap_is_found(self) -> None:
        here = Host(self.store, self.index)
        for name in BITMAPS:
            expected = {("device", each) for each, device in self.devices.items() if name in device.bitmaps}
            for image in self.images:
                if name in image.bitmaps and image.known:
                    expected.add(("image", str(image.path)) if image.name is None else ("node", image.name))
            assert {(hit.kind, hit.holder) for hit in here.find(name)} == expected

    @invariant()
    def every_name_means_one_thing(self) -> None:
        here = Host(self.store, self.index)
        for name in NAMES:
            found, image = here._parts.names.resolve(name), self.node(name)
            assert (found is not None) == (self.holder(name) is not None)
            if found:
                assert found.is_device == (name in self.devices)
                assert found.path == str(image.path if image else self.devices[name].root.path)

    @invariant()
    def the_index_is_sound(self) -> None:
        assert connect(self.index).read(walk._walk)[1] == []


def _escaped(name: str | None) -> str | None:
    return None if name is None else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def run(qcow2: Path, thorough: bool, **options: Any) -> None:
    class WithImage(Machine):
        pass

    WithImage.qcow2, WithImage.thorough = qcow2, thorough
    run_state_machine_as_test(WithImage, settings=settings(deadline=None, **options))


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    yield
    assert not [path for path in database._connected if "/dev/shm" in path]


def test_addresses_are_as_the_model_has_them(qcow2: Path) -> None:
    run(qcow2, False, max_examples=18, stateful_step_count=30)


@pytest.mark.long
def test_addresses_are_as_the_model_has_them_for_long(qcow2: Path) -> None:
    run(qcow2, True, max_examples=150, stateful_step_count=70)
