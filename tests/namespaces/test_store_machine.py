"""A store and a naive model of it go through the same random changes, and must never differ.

The model of a store is a dict of nodes, that of a node a dict of bitmaps, that of a bitmap a set of granule numbers.
After every step all of it is read and compared, and the file is checked: nothing may be corrupt, nothing may leak.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support import hostless, qemu, store_crash
from support.hostless import stored
from support.quick import Quick

import dirtmap.engine as dm
from dirtmap.engine.model import changes
from dirtmap.engine.model.namespace import Namespace
from dirtmap.engine.model.transaction import Transaction
from dirtmap.engine.namespaces import nodes
from dirtmap.engine.namespaces.changing import transaction
from dirtmap.engine.namespaces.compact import compact
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.system import file as fileio
from dirtmap.fmt import store as fmt_store

SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where to be quick

# Of the qcow2 image, too, so that bitmaps can go to and fro.
SIZE = (1 << 20) + 1536
SIZES = [SIZE, SIZE, 1, 4096 * 64, 100_000_007, 0]
NODES = ["a", "b", "c", "ä", "\udcff\udc80", "n" * 1023, *(f"node {number}" for number in range(12))]
BITMAPS = ["x", "y", "z", "\udcfe", "m" * 1023]
GRANULARITIES = [512, 4096, 65536, 1 << 31]


class Abort(Exception):
    """Ends a transaction without a commit."""


@dataclass
class Bits:
    """A bitmap."""

    size: int
    granularity: int
    recording: bool = True
    dirty: set[int] = field(default_factory=set)

    @property
    def all(self) -> set[int]:
        return set(range(-(-self.size // self.granularity)))

    def mark(self, offset: int, length: int) -> None:
        if length:
            self.dirty |= set(range(offset // self.granularity, (offset + length - 1) // self.granularity + 1))

    def clear(self, offset: int, length: int) -> None:
        end = offset + length
        self.dirty -= {
            number
            for number in self.all
            if offset <= number * self.granularity and min((number + 1) * self.granularity, self.size) <= end
        }

    def at(self, granularity: int) -> set[int]:
        """The granules of another size that have a dirty byte."""
        other = Bits(self.size, granularity)
        for number in self.dirty:
            start = number * self.granularity
            other.mark(start, min(self.granularity, self.size - start))
        return other.dirty

    def resize(self, size: int) -> None:
        old, self.size = self.size, size
        self.dirty &= self.all
        if size > old:
            self.mark(old, size - old)


@dataclass
class Node:
    """A node; while it is ``changed``, all of its bits count as dirty."""

    size: int
    path: Path
    bitmaps: dict[str, Bits] = field(default_factory=dict)
    changed: bool = False

    def settle(self) -> None:
        """What is in doubt becomes dirty."""
        if self.changed and self.bitmaps:
            for bits in self.bitmaps.values():
                bits.dirty = bits.all
        self.changed = False


def required(bitmaps: Namespace | Transaction, model: dict[str, Bits]) -> None:
    """Holds a namespace against its model."""
    assert list(bitmaps) == list(model)
    for name, bits in model.items():
        bitmap = bitmaps[name]
        assert (bitmap.size, bitmap.granularity) == (bits.size, bits.granularity)
        assert (bitmap.recording, bitmap.inconsistent) == (bits.recording, False)
        expected = bytearray(-(-len(bits.all) // 8))
        for number in bits.dirty:
            expected[number // 8] |= 1 << number % 8
        assert bytes(bitmap.packed()) == expected


@pytest.fixture(scope="module")
def qcow2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("machine") / "image.qcow2"
    qemu.create(path, SIZE)
    return path


class Machine(RuleBasedStateMachine):
    qcow2: Path

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=SHM)))
        self.stack.enter_context(fileio.using(Quick))
        self.path = str(self.folder / "store")
        self.nodes: dict[str, Node] = {}
        self.image: dict[str, Bits] = {}  # what the qcow2 image holds
        self.held: list[tuple[dm.Bitmap, Bits]] = []
        self.images = 0

    @initialize(
        leaf=st.sampled_from([0, 24, 48]), cluster_bits=st.sampled_from([12, 12, 16]), count=st.sampled_from([1, 2, 7])
    )
    def begin(self, leaf: int, cluster_bits: int, count: int) -> None:
        if leaf:
            self.stack.enter_context(pytest.MonkeyPatch.context()).setattr(fmt_store, "leaf_clusters", lambda _: leaf)
        create(self.path, cluster_bits=cluster_bits)
        self.store = Store(self.path)
        self.target = str(shutil.copy(self.qcow2, self.folder / "image.qcow2"))
        for name in NODES[:count]:
            self.add_node(name, SIZE)
            with stored(self.store, name).transaction() as bitmaps:
                changes.add(bitmaps, "x", 512)
                changes.mark(bitmaps, "x", [70_000], [count * 5000])
            self.nodes[name].bitmaps["x"] = Bits(SIZE, 512)
            self.nodes[name].bitmaps["x"].mark(70_000, count * 5000)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        self.stack.close()

    # Nodes.

    @rule(name=st.sampled_from(NODES), size=st.sampled_from(SIZES), touched=st.booleans())
    def add_node(self, name: str, size: int, touched: bool = False) -> None:
        self.images += 1
        path = self.folder / f"disk {self.images}"
        path.touch()
        os.truncate(path, size)
        if name in self.nodes:
            with pytest.raises(dm.BitmapError, match="taken"):
                add_node(self.store, name, str(path))
        else:
            add_node(self.store, name, str(path))
            self.nodes[name] = Node(size, path, changed=touched)
            if touched:
                os.utime(path, (1, 1))

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def remove_node(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.nodes)))
        if self.nodes[name].bitmaps:
            with pytest.raises(dm.BitmapError, match="bitmap"):
                hostless.remove(self.store, name)
        else:
            hostless.remove(self.store, name)
            del self.nodes[name]

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), new=st.sampled_from(NODES), with_bitmaps=st.booleans())
    def rename_node(self, data: st.DataObject, new: str, with_bitmaps: bool) -> None:
        name = data.draw(st.sampled_from(list(self.nodes)))
        if new in self.nodes or (self.nodes[name].bitmaps and not with_bitmaps):
            with pytest.raises(dm.BitmapError):
                hostless.rename(self.store, name, new, with_bitmaps=with_bitmaps)
        else:
            hostless.rename(self.store, name, new, with_bitmaps=with_bitmaps)
            self.nodes[new] = self.nodes.pop(name)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), size=st.sampled_from(SIZES))
    def resize_node(self, data: st.DataObject, size: int) -> None:
        name = data.draw(st.sampled_from(list(self.nodes)))
        node = self.nodes[name]
        if size == node.size:
            with pytest.raises(dm.BitmapError, match="no new size"):
                nodes.resize_node(self.store, name)
            return
        os.truncate(node.path, size)
        if node.bitmaps:
            with stored(self.store, name) as image, pytest.raises(dm.BitmapError, match="resize"):
                _ = next(iter(image.values()))
            self.store = Store(self.path)
            with pytest.raises(dm.BitmapError, match="resize"):
                nodes.confirm_node(self.store, name)
        nodes.resize_node(self.store, name)
        node.size, node.changed = size, False
        for bits in node.bitmaps.values():
            bits.resize(size)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), confirm=st.sampled_from([None, None, "confirm", "recover"]))
    def touch_image(self, data: st.DataObject, confirm: str | None) -> None:
        name = data.draw(st.sampled_from(list(self.nodes)))
        node = self.nodes[name]
        self.images += 1
        os.utime(node.path, (self.images, self.images))
        node.changed = True
        if confirm == "confirm":
            nodes.confirm_node(self.store, name)
            node.changed = False
        elif confirm == "recover":
            recovered = stored(self.store, name).recover()
            assert [found.name for found in recovered] == list(node.bitmaps)
            node.settle()

    # Bitmaps.

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), abort=st.sampled_from([False] * 6 + [True]))
    def change(self, data: st.DataObject, abort: bool) -> None:
        """A transaction of one node or of several, with any number of steps, perhaps with an end that undoes all."""
        names = data.draw(st.lists(st.sampled_from(list(self.nodes)), min_size=1, max_size=4, unique=True))
        models = copy.deepcopy(self.nodes)
        with contextlib.suppress(Abort):
            with self.transactions(names) as namespaces:
                for name in names:  # all of them first: a step may copy from one whose turn comes later
                    models[name].settle()
                for name in names:
                    before = copy.deepcopy(models[name].bitmaps)
                    for _ in range(data.draw(st.integers(1, 3))):
                        self.step(data, namespaces, models, name)
                    required(namespaces[name], models[name].bitmaps)
                    if not before and not models[name].bitmaps:
                        models[name].changed = self.nodes[name].changed
                if abort:
                    raise Abort
            self.nodes = models

    # Rules are drawn with equal chances, and this one is what it is all about.
    change_again = change_more = change_even_more = change

    @contextlib.contextmanager
    def transactions(self, names: list[str]) -> Iterator[dict[str, Transaction]]:
        if len(names) == 1:
            with stored(self.store, names[0]).transaction() as bitmaps:
                yield {names[0]: bitmaps}
        else:
            with transaction(self.store) as namespaces:
                assert sorted(namespaces) == sorted(self.nodes)
                yield {name: namespaces[name] for name in names}

    def step(self, data: st.DataObject, namespaces: dict[str, Transaction], models: dict[str, Node], name: str) -> None:
        """One change of a namespace and of its model."""
        bitmaps, model = namespaces[name], models[name].bitmaps
        size = models[name].size
        new = data.draw(st.sampled_from(BITMAPS))
        here = data.draw(st.sampled_from(list(model))) if model else None
        act = data.draw(st.sampled_from(ACTS))
        if here is None or act in ("add", "copy"):
            if new in model:
                with pytest.raises(dm.BitmapError, match="taken"):
                    changes.add(bitmaps, new)
                return
            others = [(other, it) for other in namespaces if models[other].size == size for it in models[other].bitmaps]
            held = [pair for pair in self.held if pair[1].size == size]
            if act == "copy" and others:
                other, it = data.draw(st.sampled_from(others))
                changes.put(bitmaps, new, namespaces[other][it])
                model[new] = copy.deepcopy(models[other].bitmaps[it])
            elif act == "copy" and held:
                value, bits = data.draw(st.sampled_from(held))
                changes.put(bitmaps, new, value)
                model[new] = copy.deepcopy(bits)
            else:
                granularity, recording = data.draw(st.sampled_from(GRANULARITIES)), data.draw(st.booleans())
                changes.add(bitmaps, new, granularity, recording=recording)
                model[new] = Bits(size, granularity, recording)
            return
        bits = model[here]
        offset = data.draw(st.integers(0, size))
        length = data.draw(st.one_of(st.integers(0, min(size - offset, 5000)), st.just(size - offset)))
        if act == "remove":
            changes.remove(bitmaps, here)
            del model[here]
        elif act == "rename":
            if new in model:
                with pytest.raises(dm.BitmapError, match="taken"):
                    changes.rename(bitmaps, here, new)
            else:
                changes.rename(bitmaps, here, new)
                renamed = {new if key == here else key: value for key, value in model.items()}
                model.clear()
                model.update(renamed)
        elif act == "mark":
            changes.mark(bitmaps, here, [offset], [length])
            bits.mark(offset, length)
        elif act == "clear range":
            bitmaps[here].clear(offset, length)
            bits.clear(offset, length)
        elif act == "clear":
            changes.clear(bitmaps, here)
            bits.dirty = set()
        elif act == "record":
            bits.recording = data.draw(st.booleans())
            changes.set_recording(bitmaps, here, bits.recording)
        elif act == "swap":
            there = data.draw(st.sampled_from(list(model)))
            bitmaps[here], bitmaps[there] = bitmaps[there], bitmaps[here]
            model[here], model[there] = copy.deepcopy(model[there]), copy.deepcopy(model[here])
        elif act == "merge":
            there = data.draw(st.sampled_from(list(model)))
            changes.merge(bitmaps, here, [bitmaps[there]])
            bits.dirty |= model[there].at(bits.granularity)
        else:
            with pytest.raises(dm.RangeError):
                changes.mark(bitmaps, here, [0, size], [size, 1])

    @precondition(lambda self: any(node.bitmaps for node in self.nodes.values()))
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """Keeps a value, to be put somewhere later, when what it was read from is long gone."""
        name = data.draw(st.sampled_from([name for name, node in self.nodes.items() if node.bitmaps]))
        model = copy.deepcopy(self.nodes[name])
        model.settle()
        here = data.draw(st.sampled_from(list(model.bitmaps)))
        self.held = [*self.held[-5:], (stored(self.store, name)[here], model.bitmaps[here])]

    @precondition(lambda self: any(node.size == SIZE for node in self.nodes.values()))
    @rule(data=st.data(), name=st.sampled_from(BITMAPS), to_image=st.booleans())
    def copy_across(self, data: st.DataObject, name: str, to_image: bool) -> None:
        """A bitmap from the store to a qcow2 image, or back."""
        node = data.draw(st.sampled_from([name for name, node in self.nodes.items() if node.size == SIZE]))
        settled = copy.deepcopy(self.nodes[node])
        settled.settle()
        models = (settled.bitmaps, self.image) if to_image else (self.image, settled.bitmaps)
        with dm.open(self.target) as image:
            opened = stored(self.store, node)
            source, target = (opened, image) if to_image else (image, opened)
            if name in models[0] and name not in models[1]:
                value = source[name]
                with target.transaction() as bitmaps:
                    changes.put(bitmaps, name, value)
                models[1][name] = copy.deepcopy(models[0][name])
                if not to_image:
                    self.nodes[node] = settled
            required(image, self.image)

    # The file.

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store(self.path)

    @rule()
    def compact(self) -> None:
        """Under readers that have the old file open."""
        compact(self.path)
        assert not list(self.folder.glob("*.tmp"))

    @invariant()
    def is_what_the_model_is(self) -> None:
        if not hasattr(self, "store"):
            return
        found = {node.name: node for node in nodes.nodes(self.store)}
        assert found.keys() == self.nodes.keys()
        for name, node in self.nodes.items():
            model = copy.deepcopy(node)
            model.settle()
            assert (found[name].size, found[name].path) == (node.size, str(node.path))
            assert bool(found[name].doubt) == bool(node.changed and node.bitmaps)
            required(stored(self.store, name), model.bitmaps)

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "store"):
            report = dm.check(self.path)
            assert (report.corruptions, report.leaks, report.check_errors) == (0, 0, 0)
            doubted = [name for name, node in self.nodes.items() if node.changed and node.bitmaps]
            assert len(report.findings) == len(doubted)
            assert store_crash.contents(Path(self.path).read_bytes()).keys() == {
                name.encode(errors="surrogateescape") for name in self.nodes
            }


# Said twice: drawn twice as often.
ACTS = [
    *("add", "add", "copy", "copy", "remove", "rename", "mark", "mark", "mark"),
    *("clear range", "clear", "record", "swap", "merge", "wrong"),
]


def run(qcow2: Path, **options: Any) -> None:
    class WithImage(Machine):
        pass

    WithImage.qcow2 = qcow2
    run_state_machine_as_test(WithImage, settings=settings(deadline=None, **options))


def test_store_is_its_model(qcow2: Path) -> None:
    run(qcow2, max_examples=14, stateful_step_count=35)


@pytest.mark.long
def test_store_is_its_model_for_long(qcow2: Path) -> None:
    run(qcow2, max_examples=400, stateful_step_count=80)
