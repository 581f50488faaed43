"""QEMU and dirtmap take turns on generated images; a naive model of both says what must be there after each turn."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.qemu import (
    Map,
    StorageDaemon,
    Target,
    bitmaps,
    check,
    create,
    digest,
    dirty,
    extents,
    merged,
    modelled,
    nothing_else_changes,
    opened,
    qemu_img,
    qemu_io,
    read_header,
    write_header,
)

import dirtmap.engine as dm
from dirtmap.engine.model import changes

SECTOR = 512
MAX_BITS = 1 << 20  # of one bitmap: more would take the model too long


@dataclass
class Model:
    """A bitmap as it ought to be: ``dirty`` is None where QEMU was killed while it had the image open."""

    granularity: int
    recording: bool
    dirty: Map | None


@dataclass(frozen=True)
class Plan:
    """What kind of image: ``options`` of `qemu-img create`, and what has to be there beside it."""

    size: int
    options: str
    encrypted: bool = False
    backing: str | None = None  # its format
    folders: int = 0  # in the backing file's name, 100 bytes each
    data_file: str | None = None  # "raw": can be read without the image
    unknown: tuple[tuple[int, bytes], ...] = ()  # header extensions

    @property
    def snapshots(self) -> bool:
        """Internal snapshots are possible."""
        return self.data_file is None and not any(
            f"refcount_bits={bits}" in self.options.split(",") for bits in (1, 2, 4)
        )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    kind = draw(st.sampled_from(["plain", "plain", "backing", "data file", "encrypted"]))
    cluster_bits = draw(st.integers(9, 21))
    if kind == "backing":
        cluster_bits = max(cluster_bits, 12)  # for room for the name
    options = [f"cluster_size={1 << cluster_bits}", f"refcount_bits={1 << draw(st.integers(0, 6))}"]
    options += ["extended_l2=on"] if cluster_bits >= 14 and draw(st.booleans()) else []
    options += ["compression_type=zstd"] if draw(st.booleans()) else []
    if kind == "encrypted":  # takes QEMU seconds, so there is only one of them; see `create`
        options, cluster_bits = [], 16
    # An L1 table of at most a megabyte.
    largest = min(1 << 40, (1 << 17) * (1 << cluster_bits >> 4) << cluster_bits)
    near = draw(st.sampled_from([0, 1 << 16, 1 << 20, 4 << 20, 1 << 30, 1 << 36, 1 << 40]))
    size = max(SECTOR, min(largest, near + SECTOR * draw(st.integers(-100, 1000))))
    unknown = st.tuples(st.integers(1, 0xFFFF), st.binary(max_size=40))
    data_file = draw(st.sampled_from(["raw", "cooked"])) if kind == "data file" else None
    if data_file == "raw":  # QEMU maps all of it, and takes seconds to look through millions of clusters
        size = min(size, (1 << 17) << cluster_bits)
    return Plan(
        size,
        ",".join(options),
        encrypted=kind == "encrypted",
        backing=draw(st.sampled_from(["raw", "qcow2"])) if kind == "backing" else None,
        folders=draw(st.integers(0, 8)) if kind == "backing" else 0,
        data_file=data_file,
        unknown=tuple(draw(st.lists(unknown, max_size=2))) if cluster_bits > 9 else (),
    )


def made(plan: Plan, folder: Path) -> Target:
    """The image."""
    options, arguments = plan.options, []
    if plan.backing:
        base = folder.joinpath(*["d" * 99] * plan.folders, "base")
        base.parent.mkdir(parents=True, exist_ok=True)
        if plan.backing == "raw":
            base.write_bytes(b"base" * 1024)
        else:
            create(base, min(plan.size, 1 << 20))
        arguments = ["-b", str(base), "-F", plan.backing]
    if plan.data_file:
        options += f",data_file={folder / 'data'},data_file_raw={'on' if plan.data_file == 'raw' else 'off'}"
    path = folder / "disk"
    target = create(path, plan.size, options, *arguments, encrypted=plan.encrypted)
    if plan.unknown:
        header = read_header(path.read_bytes())
        header.extensions += plan.unknown
        write_header(path, header, gap=plan.size // SECTOR % 16)
    return target


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300).filter(
    lambda name: len(name.encode()) <= 1023
) | st.sampled_from(["a", "b", "c", "x" * 1023, "ж" * 511])


class Turns(RuleBasedStateMachine):
    """One image, its bitmaps according to the model, and whoever's turn it is."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.models: dict[str, Model] = {}
        self.snapshots: list[str] = []

    @initialize(plan=plans())
    def make(self, plan: Plan) -> None:
        event(f"{plan.options.split(',')[0]}")
        self.plan = plan
        self.size = plan.size
        self.image = made(plan, Path(self.folder.name))

    def teardown(self) -> None:
        try:
            if hasattr(self, "image"):
                self.qemu_agrees()
        finally:
            self.folder.cleanup()

    # What the rules draw.

    def _granularity(self, data: st.DataObject) -> int:
        least = next(bits for bits in range(9, 32) if self.size >> bits <= MAX_BITS)
        return 1 << data.draw(st.integers(least, 31))

    def _range(self, data: st.DataObject, unit: int = 1) -> tuple[int, int]:
        units = self.size // unit
        first = data.draw(st.integers(0, units - 1) | st.sampled_from([0, units - 1]))
        length = data.draw(st.integers(1, min(units - first, (2 << 20) // unit)) | st.just(1))
        return first * unit, length * unit

    def _name(self, data: st.DataObject, *, usable: bool = True) -> str | None:
        names = [name for name, model in self.models.items() if model.dirty is not None or not usable]
        return data.draw(st.sampled_from(names)) if names else None

    def _unused(self, data: st.DataObject) -> str:
        return data.draw(NAMES.filter(lambda name: name not in self.models))

    def _written(self, writes: Map) -> None:
        """What QEMU records of a guest's writes."""
        for model in self.models.values():
            if model.recording and model.dirty is not None:
                model.dirty = merged(model.dirty + modelled(self.size, model.granularity, writes))

    # dirtmap's turn.

    @rule(data=st.data(), count=st.integers(1, 4))
    def transaction(self, data: st.DataObject, count: int) -> None:
        with nothing_else_changes(self.image), dm.open(self.image) as image, image.transaction() as changed:
            for _ in range(count):
                operation = data.draw(st.sampled_from(sorted(self.OPERATIONS)))
                event(operation)
                self.OPERATIONS[operation](self, data, changed)

    def _add(self, data: st.DataObject, changed: dm.Transaction) -> None:
        name, recording, granularity = self._unused(data), data.draw(st.booleans()), self._granularity(data)
        changes.add(changed, name, granularity, recording=recording)
        self.models[name] = Model(granularity, recording, [])

    def _remove(self, data: st.DataObject, changed: dm.Transaction) -> None:
        if name := self._name(data, usable=False):
            changes.remove(changed, name)
            del self.models[name]

    def _clear(self, data: st.DataObject, changed: dm.Transaction) -> None:
        if name := self._name(data):
            changes.clear(changed, name)
            self.models[name].dirty = []

    def _set_recording(self, data: st.DataObject, changed: dm.Transaction) -> None:
        if name := self._name(data):
            self.models[name].recording = data.draw(st.booleans())
            changes.set_recording(changed, name, self.models[name].recording)

    def _mark(self, data: st.DataObject, changed: dm.Transaction) -> None:
        if name := self._name(data):
            ranges = [self._range(data) for _ in range(data.draw(st.integers(1, 3)))]
            changes.mark(changed, name, *zip(*ranges, strict=True))
            model = self.models[name]
            assert model.dirty is not None
            model.dirty = merged(model.dirty + modelled(self.size, model.granularity, ranges))

    def _mark_all(self, data: st.DataObject, changed: dm.Transaction) -> None:
        if name := self._name(data):
            changes.mark(changed, name, [0], [self.size])
            self.models[name].dirty = [(0, self.size)]

    def _merge(self, data: st.DataObject, changed: dm.Transaction) -> None:
        if name := self._name(data):
            sources = data.draw(st.lists(st.sampled_from(sorted(self.models)), max_size=3))
            sources = [source for source in sources if self.models[source].dirty is not None]
            changes.merge(changed, name, [changed[source] for source in sources])
            self._merged(name, sources)

    def _merged(self, name: str, sources: list[str]) -> None:
        model = self.models[name]
        union = list(model.dirty or [])
        for source in sources:
            union += self.models[source].dirty or []
        model.dirty = modelled(self.size, model.granularity, union)

    def _rename(self, data: st.DataObject, changed: dm.Transaction) -> None:
        if name := self._name(data):
            new = self._unused(data)
            changes.rename(changed, name, new)
            self.models[new] = self.models.pop(name)

    def _copy(self, data: st.DataObject, changed: dm.Transaction) -> None:
        if name := self._name(data):
            new, granularity = self._unused(data), self._granularity(data)
            changes.put(changed, new, changed[name].at(granularity))
            model = self.models[name]
            self.models[new] = Model(granularity, model.recording, modelled(self.size, granularity, model.dirty or []))

    def _recover(self, data: st.DataObject, changed: dm.Transaction) -> None:
        if (name := self._name(data, usable=False)) and self.models[name].dirty is None:
            changes.recover(changed, name)
            self.models[name].dirty = [(0, self.size)]

    OPERATIONS: dict[str, Any] = {  # noqa: RUF012
        "add": _add,
        "remove": _remove,
        "clear": _clear,
        "set recording": _set_recording,
        "mark": _mark,
        "mark all": _mark_all,
        "merge": _merge,
        "rename": _rename,
        "copy": _copy,
        "recover": _recover,
    }

    @rule()
    def recover_all(self) -> None:
        with nothing_else_changes(self.image):
            recovered = {item.name for item in dm.recover(self.image)}
        assert recovered == {name for name, model in self.models.items() if model.dirty is None}
        for name in recovered:
            self.models[name].dirty = [(0, self.size)]

    @rule()
    def check_by_dirtmap(self) -> None:
        before = Path(self.image).read_bytes()
        for repair in (None, "leaks", "all"):
            report = dm.check(self.image, repair=repair)
            assert (report.corruptions, report.leaks, report.check_errors, report.dropped) == (0, 0, 0, [])
        assert dm.dump(self.image)["faults"] == []
        assert Path(self.image).read_bytes() == before

    # QEMU's turn.

    @rule(data=st.data(), count=st.integers(1, 3))
    def write(self, data: st.DataObject, count: int) -> None:
        unit = SECTOR if self.plan.encrypted else 1
        ranges = [self._range(data, unit) for _ in range(count)]
        flags = ["-P 165", "-z"] + ["-z -u"] * (unit == 1)
        qemu_io(self.image, *(f"write {data.draw(st.sampled_from(flags))} {start} {size}" for start, size in ranges))
        self._written(ranges)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        start, size = self._range(data, SECTOR)
        qemu_io(self.image, f"discard {start} {size}")
        self._written([(start, size)])

    @precondition(lambda self: not (self.plan.encrypted or self.plan.data_file))
    @rule(data=st.data())
    def write_compressed(self, data: st.DataObject) -> None:
        cluster = int(self.plan.options.split(",")[0].partition("=")[2])
        start = data.draw(st.integers(0, (self.size - 1) // cluster)) * cluster
        size = min(cluster, self.size - start)
        if '"data": true' in qemu_img("map", "--output=json", "-s", str(start), "-l", str(size), *opened(self.image)):
            return  # QEMU compresses into clusters that are not allocated yet
        qemu_io(self.image, f"write -c {start} {size}")
        self._written([(start, size)])

    @rule(data=st.data())
    def add_by_qemu(self, data: st.DataObject) -> None:
        name, recording, granularity = self._unused(data), data.draw(st.booleans()), self._granularity(data)
        with StorageDaemon(self.image) as daemon:
            daemon.add(name, granularity, recording=recording)
            daemon.quit()
        self.models[name] = Model(granularity, recording, [])

    @rule(data=st.data(), action=st.sampled_from(["remove", "clear", "enable", "disable", "merge"]))
    def change_by_qemu(self, data: st.DataObject, action: str) -> None:
        name = self._name(data, usable=action != "remove")
        if name is None:
            return
        with StorageDaemon(self.image) as daemon:
            if action == "merge":
                source = self._name(data) or name
                daemon.qmp("block-dirty-bitmap-merge", node="disk", target=name, bitmaps=[source])
                self._merged(name, [source])
            else:
                daemon.qmp(f"block-dirty-bitmap-{action}", node="disk", name=name)
                if action == "remove":
                    del self.models[name]
                elif action == "clear":
                    self.models[name].dirty = []
                else:
                    self.models[name].recording = action == "enable"
            daemon.quit()

    @rule(data=st.data())
    def kill_qemu(self, data: st.DataObject) -> None:
        start, size = self._range(data, SECTOR)
        qemu_io(self.image, f"write {start} {size}", "flush", "sigraise 9", status=-9)
        for model in self.models.values():
            model.dirty = None
        qemu_img("check", "-q", "-r", "leaks", *opened(self.image))

    @precondition(lambda self: self.plan.snapshots and len(self.snapshots) < 2)
    @rule(name=st.sampled_from(["one", "two", "three"]))
    def take_snapshot(self, name: str) -> None:
        if name not in self.snapshots:
            qemu_img("snapshot", "-c", name, *opened(self.image))
            self.snapshots.append(name)

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def delete_snapshot(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.snapshots))
        qemu_img("snapshot", "-d", name, *opened(self.image))
        self.snapshots.remove(name)

    @precondition(lambda self: self.snapshots and not self.models)
    @rule(data=st.data())
    def apply_snapshot(self, data: st.DataObject) -> None:
        """QEMU refuses to where there are bitmaps."""
        qemu_img("snapshot", "-a", data.draw(st.sampled_from(self.snapshots)), *opened(self.image))

    @precondition(lambda self: not self.snapshots and all(m.dirty is not None for m in self.models.values()))
    @rule(sectors=st.integers(-3000, 3000))
    def resize(self, sectors: int) -> None:
        size = max(SECTOR, self.size + sectors * SECTOR)
        qemu_img("resize", "-q", "--shrink", *opened(self.image), str(size))
        for model in self.models.values():
            clipped = [(start, min(length, size - start)) for start, length in model.dirty or [] if start < size]
            model.dirty = modelled(size, model.granularity, clipped)
        self.size = size

    # After each turn.

    @invariant()
    def dirtmap_agrees(self) -> None:
        if not hasattr(self, "image"):
            return
        usable = {name: model for name, model in self.models.items() if model.dirty is not None}
        with dm.open(self.image) as image:
            assert image.size == self.size
            told = {
                name: Model(b.granularity, b.recording, None if b.inconsistent else extents(b))
                for name, b in image.items()
            }
            assert told == self.models
            order = list(image)
            for info in image.info().bitmaps:
                assert info.count == (image[info.name].count if info.name in usable else None)
            assert [info.name for info in image.info().bitmaps] == order
        check(self.image)

    @rule()
    def qemu_agrees(self) -> None:
        """Also at the end."""
        with dm.open(self.image) as image:
            order = list(image)
        listed = bitmaps(self.image)
        assert list(listed) == order
        usable = {}
        for name, model in self.models.items():
            flags = {flag for flag, set_ in (("auto", model.recording), ("in-use", model.dirty is None)) if set_}
            assert listed.pop(name) == (model.granularity, flags)
            if model.dirty is not None:
                usable[name] = model
        assert not listed
        if usable:
            with StorageDaemon(self.image, "read-only=on") as daemon:
                for name, model in usable.items():
                    assert daemon.digest(name) == digest(self.size, model.granularity, model.dirty or [])
                daemon.quit()
            name, model = usable.popitem()
            assert dirty(self.image, name) == model.dirty


def take_turns(examples: int) -> None:
    every = settings(max_examples=examples, stateful_step_count=8, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Turns, settings=every)


def test_turns() -> None:
    take_turns(20)


@pytest.mark.long
def test_turns_for_long() -> None:
    take_turns(300)
