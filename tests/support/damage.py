"""A sound store of a few clusters, ways to damage it, and what is done with each damaged store.

Each time all that reads a store reads it, and one change is made.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import crc32c
import numpy as np
import pytest

import dirtmap.engine as dm
from dirtmap.engine.host.kind import Address
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.file import Store, create
from dirtmap.fmt import store
from dirtmap.fmt.errors import Error
from dirtmap.fmt.parsers.store import AREA, HEADER, LEAF, NAMESPACES_EXTENSION, NODE_POINTER, RECORD
from dirtmap.fmt.store import Area, Record, build_record
from dirtmap.fmt.structure import Structure
from support.leaves import parse_records

SIZE = 300_001  # of each disk
Bits = dict[tuple[str, str], np.ndarray[Any, Any]]


class Region(NamedTuple):
    """A part of the store that something leads to."""

    name: str
    start: int
    stop: int


@dataclass
class Sound:
    """The undamaged store.

    Attributes:
        path: where it is damaged.
        data: its bytes.
        bits: the words of each bitmap, by node and name.
        regions: where its parts are.
    """

    path: str
    data: bytes
    bits: Bits
    regions: list[Region]

    def region(self, name: str) -> Region:
        return next(region for region in self.regions if region.name == name)

    def write(self, data: bytes | bytearray) -> None:
        with open(self.path, "r+b") as file:
            file.write(data)
            file.truncate(len(data))

    def read(self) -> bytes:
        return Path(self.path).read_bytes()


def make_sound(folder: Path) -> Sound:
    """Its namespace table has a root with a leaf for each of three nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "NODE_BYTES", 200)
        return _made(folder)


def _made(folder: Path) -> Sound:
    path = str(folder / "s.dmap")
    create(path)
    rng = np.random.default_rng(3)
    with Store(path) as target:
        for node in ("a", "b", "empty"):
            (folder / f"{node}.raw").write_bytes(bytes(SIZE))
            add_node(target, node, str(folder / f"{node}.raw"))

    def some(granularity: int, share: float) -> dm.Bitmap:
        granules = np.flatnonzero(rng.random(SIZE // granularity) < share)
        return dm.Bitmap.from_extents(SIZE, granules * granularity, np.full(len(granules), granularity), granularity)

    with dm.open(Address(path, "a")) as image:
        with image.transaction() as bitmaps:
            bitmaps["monday"] = some(4096, 0.3)
            bitmaps["clean"] = dm.Bitmap(SIZE)
            bitmaps["full"] = dm.Bitmap.from_extents(SIZE, [0], [SIZE], 65536, recording=False)
        with image.transaction() as bitmaps:
            bitmaps["monday"] |= some(4096, 0.3)
    with dm.open(Address(path, "b")) as image, image.transaction() as bitmaps:
        bitmaps["\udcff"] = some(1024, 0.2)
    with dm.open(Address(path, "a")) as image, image.transaction() as bitmaps:
        bitmaps["monday"].mark(SIZE - 1, 1)
    found: Bits = {}
    for node in ("a", "b"):
        with dm.open(Address(path, node)) as image:
            found |= {(node, name): image[name].words.copy() for name in image}
    assert len(found) == 4
    assert not dm.check(path).findings
    return Sound(path, Path(path).read_bytes(), found, _regions(path))


def _regions(path: str) -> list[Region]:
    """Every area of the newest commit, and the headers, from a dump."""
    names = {"header": "header copy", "record": "namespace record", "entry": "directory entry"}
    document = dm.dump(path)
    assert not document["faults"]
    found = []
    for structure in document["structures"]:
        name, start = structure["name"], structure["offset"]
        if name.startswith(names["header"]) and "," not in name:
            found.append(Region(name, start, start + store.BLOCK))
        elif not name.startswith(names["header"]):
            found.append(Region(name, start, start + structure["length"]))
    return found


# What is done with each damaged store, and what must hold.


@contextmanager
def bounded(seconds: float = 2.0) -> Iterator[None]:
    """Ends what takes more of the processor's time than that."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def attempt(act: Callable[[], Any]) -> Any:
    """What it returns, or the Error it raises; any other exception is a failure."""
    try:
        return act()
    except Error as error:
        failure = error.with_traceback(None)  # which would keep what was read
        failure.__context__ = None
    assert "\n" not in str(failure), "an error is one line"
    return failure


def no_bit_lost(sound: Sound, node: str, image: dm.Namespace) -> set[tuple[str, str]]:
    """Every bitmap that can be read has all dirty bits that it had; which there still are, readable or not."""
    names = attempt(lambda: list(iter(image)))
    if isinstance(names, Error):
        return set()
    for name in names:
        bitmap = attempt(lambda name=name: image[name])
        if isinstance(bitmap, Error):
            continue
        expected = sound.bits.get((node, name))
        if expected is None:
            continue
        if bitmap.words.size == expected.size:
            assert not (expected & ~bitmap.words).any(), f"{node}:{name} lost a dirty bit"
        else:  # what is left of a damaged directory may show another granularity
            assert not expected.any() or bitmap.count >= SIZE, f"{node}:{name} lost a dirty bit"
    return {(node, name) for name in names} & sound.bits.keys()


def read_everything(sound: Sound) -> set[tuple[str, str]]:
    """Which of the sound store's bitmaps there still are; none of those that can be read has lost a bit."""
    names = set()
    for node in ("a", "b"):
        image = attempt(lambda node=node: dm.open(Address(sound.path, node)))
        if not isinstance(image, Error):
            with image:
                names |= no_bit_lost(sound, node, image)
    return names


def use(sound: Sound) -> dict[str, Any]:
    """Reads the damaged store in every way, then changes it; the answers, or the errors, by what was done."""
    answers: dict[str, Any] = {}
    with bounded(20):
        answers["names"] = read_everything(sound)
        answers["describe"] = info = attempt(lambda: dm.describe(sound.path))
        if not isinstance(info, Error):
            for bitmap in info.bitmaps:
                expected = sound.bits.get((bitmap.node, bitmap.name))
                if expected is not None:
                    dirty = int(np.bitwise_count(expected).sum()) * bitmap.granularity
                    assert bitmap.count is None or bitmap.count >= dirty
        answers["check"] = attempt(lambda: dm.check(sound.path))
        answers["dump"] = dump = attempt(lambda: dm.dump(sound.path))
        if not isinstance(dump, Error):
            assert dump.keys() == {"filename", "format", "file-size", "structures", "faults", "stopped"}
        before = sound.read()
        answers["change"] = changed = attempt(lambda: change(sound.path))
        if isinstance(changed, Error):
            assert sound.read() == before
        else:
            read_everything(sound)
    return answers


def glance(sound: Sound) -> dict[str, Any]:
    """The cheapest part of `use`: reads all bitmaps and checks the store."""
    with bounded(20):
        return {"names": read_everything(sound), "check": attempt(lambda: dm.check(sound.path))}


def change(path: str) -> None:
    with dm.open(Address(path, "a")) as image, image.transaction() as bitmaps:
        bitmaps["new"] = dm.Bitmap.from_extents(SIZE, [5000], [10_000], 512)
        bitmaps["full"].mark(0, 1)


def flipped(sound: Sound, bits: range | list[int]) -> Iterator[int]:
    """For each of these bits of the file: flips it, hands it over, and puts the sound store back."""
    sound.write(sound.data)
    for bit in bits:
        damaged = bytearray(sound.data)
        damaged[bit // 8] ^= 1 << bit % 8
        with open(sound.path, "r+b", buffering=0) as file:
            file.seek(bit // 8)
            file.write(damaged[bit // 8 : bit // 8 + 1])
        yield bit
        sound.write(sound.data)


def found_damage(answers: dict[str, Any]) -> bool:
    """True where the check says that something is wrong; that one header copy is damaged is a note."""
    report = answers["check"]
    return isinstance(report, Error) or report.corruptions > 0 or any("header" in f.where for f in report.findings)


def break_blocks(sound: Sound, *numbers: int) -> bytearray:
    damaged = bytearray(sound.data)
    for number in numbers:
        damaged[number * store.BLOCK + 1000] ^= 1
    return damaged


def mended(sound: Sound) -> dm.CheckReport:
    """Repairs the damaged store; the result must be without fault, and have lost no bit of what it still has."""
    with bounded(20):
        report = dm.check(sound.path, repair="all")
        after = dm.check(sound.path)
        assert (after.corruptions, after.leaks, after.check_errors) == (0, 0, 0), after.findings
        assert (report.corruptions, report.leaks) == (0, 0)
        doubtful = [line for line in report.made_dirty if line.endswith("its name may have been another")]
        lost = sound.bits.keys() - read_everything(sound)
        assert len(lost) <= len(doubtful) or report.dropped, "what is gone is named"
        for bitmap in dm.describe(sound.path).bitmaps:
            assert bitmap.count is not None
            if (expected := sound.bits.get((str(bitmap.node), bitmap.name))) is None:
                assert doubtful
                assert bitmap.count >= SIZE
            else:
                assert bitmap.count >= min(SIZE, int(np.bitwise_count(expected).sum()) * bitmap.granularity)
        attempt(lambda: change(sound.path))  # the node may be one of what was lost
        read_everything(sound)
        assert not dm.check(sound.path).corruptions
    return report


# Numbers that lie under checksums that are right.


class Forged:
    """A copy of the sound store whose structures can be set to anything; `data` puts all checksums right."""

    def __init__(self, sound: Sound) -> None:
        self.raw = bytearray(sound.data)
        chosen = headers.choose(sound.path, sound.data)
        self.header = chosen.header
        self.table = self._at(self.header.table)
        self.root = self._at(self.header.space)
        self.released = self._at(self.header.released)
        leaf = LEAF.parse(self.root)
        self.leaf_offset = int(leaf.offset)
        self.leaf = self._at(Area(self.leaf_offset, self.header.cluster_size, 0))
        self.pointers = [NODE_POINTER.parse(self.table, at) for at in range(0, len(self.table), NODE_POINTER.size)]
        # By the number of each leaf.
        self.leaves: list[list[Record]] = [
            list(parse_records(bytes(self.raw[pointer.offset : pointer.offset + pointer.length])))
            for pointer in self.pointers
        ]
        self.first = next(number for number, leaf in enumerate(self.leaves) if leaf[0].name == b"a")
        cluster = self.header.cluster_size
        self.directories = {  # without their owners
            record.name: bytearray(store.without_owner(bytes(self._at(record.directory)), cluster))
            for leaf in self.leaves
            for record in leaf
        }
        self.fields: dict[str, dict[str, int]] = {}  # of the header and its extensions, to be set at the end
        self.record_fields: dict[str, int] = {}  # of the record of node a
        self.pointer_fields: dict[str, int] = {}  # of the pointer to its leaf
        self.table_forged = False  # the bytes of the table stay as they are
        self.leaf_fields: dict[str, int] = {}  # of the root's first entry

    def _at(self, area: Area) -> bytearray:
        return bytearray(self.raw[area.offset : area.offset + area.length])

    def _put(self, offset: int, data: bytes | bytearray) -> int:
        self.raw[offset : offset + len(data)] = data
        return crc32c.crc32c(data)

    def _record(self, record: Record) -> bytes:
        area = record.directory
        if area.length:
            entries = bytes(self.directories[record.name])
            data = store.with_owner(entries, record.name, self.header.cluster_size)
            area = area._replace(checksum=self._put(area.offset, data))
        raw = bytearray(build_record(replace(record, directory=area)))
        if record.name == b"a":
            set_fields(RECORD, raw, 0, self.record_fields)
        return bytes(raw)

    def data(self) -> bytes:
        """The whole file, checksums right from the leaves to the headers."""
        pointers = bytearray()
        for number, (old, leaf) in enumerate(zip(self.pointers, self.leaves, strict=True)):
            data = b"".join(map(self._record, leaf))
            checksum = self._put(old.offset, data)
            pointer = bytearray(
                NODE_POINTER.build(key=old.key, count=old.count, offset=old.offset, length=len(data), checksum=checksum)
            )
            set_fields(NODE_POINTER, pointer, 0, self.pointer_fields if number == self.first else {})
            pointers += pointer
        if not self.table_forged:
            self.table[:] = pointers
        table = self.header.table._replace(checksum=self._put(self.header.table.offset, self.table))
        leaf = bytearray(self.root[: LEAF.size])
        set_fields(LEAF, leaf, 0, {"checksum": self._put(self.leaf_offset, self.leaf)} | self.leaf_fields)
        self.root[: LEAF.size] = leaf
        space = self.header.space._replace(checksum=self._put(self.header.space.offset, self.root))
        released = self.header.released._replace(checksum=self._put(self.header.released.offset, self.released))
        block = bytearray(headers.build_block(replace(self.header, table=table, space=space, released=released), 0))
        at = HEADER.size + 8
        for name, structure in (
            ("header", HEADER),
            ("namespaces", NAMESPACES_EXTENSION),
            ("space", AREA),
            ("released", AREA),
        ):
            place = 0 if name == "header" else at
            set_fields(structure, block, place, self.fields.get(name, {}))
            at += 0 if name == "header" else structure.size + 8
        generation = HEADER.parse(block).generation
        for number in range(4):  # of the one slot a generation earlier, so that there is no doubt
            set_fields(HEADER, block, 0, {"generation": generation - (number % 2 and generation > 0)})
            copy = headers.as_copy(bytes(block), number, followed=number == 3 and generation > 0)
            self._put(number * store.BLOCK, copy)
        return bytes(self.raw)


def set_fields(structure: Structure, raw: bytearray, start: int, values: dict[str, int]) -> None:
    for name, value in values.items():
        field = structure.field(name)
        at = start + field.offset
        raw[at : at + field.size] = (value % 256**field.size).to_bytes(field.size, "big")
