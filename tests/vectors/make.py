"""Makes the test vectors, each time the same bytes: `make vectors`. README.md beside this says what they are.

What a document says of a sound store comes from the tests' own reader (`support.store_crash`), which shares nothing
with dirtmap, and is compared with what was put in. What damage makes of it, and all that is said of killed trackers and
qcow2 images, is stated here.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import crc32c
from support import store_crash, vectors
from support.craft import Craft
from support.hostless import ALONE, image, name_image, stored
from support.vectors import SECOND, Clock, Said, identity, plainly, written

import dirtmap.engine as dm
from dirtmap.engine.qcow2.commit import Kept, commit, set_tracked
from dirtmap.engine.qcow2.layout import read_layout
from dirtmap.engine.qcow2.reading import write_session
from dirtmap.engine.storefile import chunks, holds
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.chain import with_chain
from dirtmap.engine.storefile.directory import read_entries, replace_directory
from dirtmap.engine.storefile.entries import tree_of, with_items, with_root
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.storefile.header import Header
from dirtmap.engine.storefile.holds import Hold
from dirtmap.engine.system.locks import USUAL
from dirtmap.engine.system.process import Process
from dirtmap.engine.tracking.home import Home
from dirtmap.engine.tracking.options import Options
from dirtmap.engine.tracking.recorder import Setup
from dirtmap.engine.tracking.tracker import Tracker
from dirtmap.fmt import directory, live, store
from dirtmap.fmt.directory import Entry
from dirtmap.fmt.live import SLOT_SIZE, build_log_record, record_seed
from dirtmap.fmt.parsers.live import CONTROL, DESCRIPTOR, SLOT, WRITESET
from dirtmap.fmt.parsers.store import NODE_POINTER, POINTER
from dirtmap.fmt.store import Record

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = store.BLOCK
CHUNK = 32768 * 512  # bytes of a disk that a chunk of 4 KiB is about, at a granularity of 512
LATER = 0x54455354, b"a later version's"  # an extension, or an item, that nobody knows

Extents = list[list[int]]
Stored = tuple[bytearray, Said]  # a store, and what a reader must say of it


class Making:
    """A store while it is made.

    Attributes:
        path: of the store.
        given: by namespace and bitmap, the extents that it was given.
    """

    def __init__(self, folder: Path, cluster_bits: int = 12) -> None:
        self.path = folder / "store.dmap"
        self.given: dict[tuple[str, str], Extents] = {}
        create(str(self.path), cluster_bits=cluster_bits)

    def add(self, *records: Record) -> None:
        """Adds namespaces, in one commit."""
        with self.changing() as change:
            for record in records:
                change.table.put(replace(record, generation=change.generation))

    @contextlib.contextmanager
    def changing(self) -> Iterator[Any]:
        with Store(str(self.path)) as target, target.change() as change:
            yield change

    def give(self, name: str, bitmap: str, granularity: int, extents: Extents, *, recording: bool = True) -> None:
        """Gives a namespace a bitmap, or a bitmap other bits, in one commit."""
        with Store(str(self.path)) as target, stored(target, name).transaction() as bitmaps:
            offsets, lengths = [extent[0] for extent in extents], [extent[1] for extent in extents]
            bitmaps[bitmap] = dm.Bitmap.from_extents(bitmaps.size, offsets, lengths, granularity, recording)
        self.given[name, bitmap] = extents

    def edit(self, name: str, edit: Callable[[Record], Record]) -> None:
        """Changes a record, in one commit."""
        with self.changing() as change:
            change.table.put(replace(edit(change.table.get(name.encode())), generation=change.generation))

    def edit_entries(self, name: str, edit: Callable[[Entry], Entry]) -> None:
        """Changes all entries of a directory, in one commit."""
        with self.changing() as change:
            record = change.table.get(name.encode())
            old = read_entries(change.snapshot, record)
            area = replace_directory(change, record, old, [edit(entry) for entry in old])
            change.table.put(replace(record, generation=change.generation, directory=area))

    def done(self) -> Stored:
        """The store. The tests' own reader finds what was put in."""
        data = bytearray(self.path.read_bytes())
        said = plainly(bytes(data))
        found = {(one["name"], each["name"]): each["dirty"] for one in said["namespaces"] for each in one["bitmaps"]}
        for key, extents in self.given.items():
            assert found[key] in (extents, None), key
        return data, said

    def directory_of(self, name: str) -> int:
        """Where the directory of a namespace is."""
        with Store(str(self.path)) as target:
            record = target.record(name.encode())
            assert record is not None
            return record.directory.offset

    def uuid_of(self, name: str) -> str:
        """The UUID of a namespace."""
        with Store(str(self.path)) as target:
            record = target.record(name.encode())
            assert record is not None
            return vectors.text_of(record.uuid)

    def parts_of(self, name: str, called: str) -> dict[tuple[int, int], int]:
        """Where the nodes and chunks of a bitmap are, by level and number."""

        def find(snapshot: Any) -> dict[tuple[int, int], int]:
            record = snapshot.record(name.encode())
            entry = next(entry for entry in read_entries(snapshot, record) if entry.name == called.encode())
            found = chunks.walk(snapshot, tree_of(record, entry), keep=True)
            return found.at | {(0, n): at for n, at in zip(found.chunks.tolist(), found.places.tolist(), strict=True)}

        with Store(str(self.path)) as target:
            return target.read(find)


def node(name: str, size: int, number: int = 1234) -> Record:
    """A node whose image has that number."""
    path = f"/images/{name}.raw".encode()
    return Record(name.encode(), store.KIND_NODE, uuid.uuid4().bytes, size, path=path, identity=identity(number, size))


def device(name: str, root: Record) -> Record:
    """A device on that node."""
    return replace(root, name=name.encode(), kind=store.KIND_DEVICE, uuid=uuid.uuid4().bytes, root_uuid=root.uuid)


def namespace(said: Said, name: str) -> Said:
    """What is said of a namespace."""
    found: Said = next(found for found in said["namespaces"] if found["name"] == name)
    return found


def bitmap(said: Said, name: str, called: str) -> Said:
    """What is said of a bitmap."""
    found: Said = next(found for found in namespace(said, name)["bitmaps"] if found["name"] == called)
    return found


def all_in_doubt(said: Said) -> None:
    """Every bitmap counts as all dirty."""
    said["in_doubt"] = True
    for one in said["namespaces"]:
        one["doubt"] = bool(one["bitmaps"])
        for found in one["bitmaps"]:
            found["dirty"] = None if found["inconsistent"] else [[0, one["size"]]]


def unreadable(said: Said, name: str) -> None:
    """A namespace is refused, and no other."""
    lost = dict.fromkeys(("doubt", "checkpoints", "holds", "bitmaps"))
    namespace(said, name).update(lost, unreadable=True)


def sealed(data: bytearray, number: int) -> None:
    """Makes the checksum of a block of the header right."""
    end = (number + 1) * BLOCK
    data[end - 4 : end] = crc32c.crc32c(bytes(data[number * BLOCK : end - 4])).to_bytes(4, "big")


def newest(data: bytearray) -> Header:
    """The newest header of a sound store."""
    return headers.choose("", bytes(data[: store.RESERVED])).header


# Sound stores.


def empty(folder: Path) -> Stored:
    """No namespaces: neither a namespace table nor released clusters."""
    return Making(folder).done()


def kinds(folder: Path) -> Stored:
    """A node, a device on it, the place of a qcow2 image, and a container; node and device each have `monday`."""
    making = Making(folder)
    disk = node("disk", 4 * MIB)
    place = replace(node("other", 8 * MIB, 99), kind=store.KIND_PLACE, path=b"/images/other.qcow2")
    place = replace(place, identity=replace(place.identity, size=0, mtime_ns=0, ctime_ns=0))
    where = b"/images/third.qcow2"
    container = Record(store.container_name(where), store.KIND_CONTAINER, bytes(16), 0, path=where)
    making.add(disk, device("drive0", disk), place, container)
    making.give("disk", "monday", 64 * KIB, [[64 * KIB, 192 * KIB]])
    making.give("drive0", "monday", 64 * KIB, [[MIB, 64 * KIB]], recording=False)
    return making.done()


def contents(folder: Path) -> Stored:
    """What a bitmap can be: clean, all dirty, sparse, disabled, of any granularity, inconsistent; a disk that ends in
    the middle of a sector, and one of no bytes.
    """
    making = Making(folder)
    size = 3 * MIB + 100
    making.add(node("odd", size), node("left", MIB, 77), node("nothing-äöü", 0, 78))
    for name, granularity, extents, recording in (
        ("clean", 64 * KIB, [], True),
        ("all", 64 * KIB, [[0, size]], True),
        ("disabled", 4 * KIB, [[4 * KIB, 8 * KIB]], False),
        ("fine", 512, [[0, 512], [1024, 512], [3 * MIB - 512, 612]], True),
        ("last", 64 * KIB, [[3 * MIB, 100]], True),
        ("coarse", 2 * GIB, [[0, size]], True),
        ("überall", 4 * KIB, [[8 * KIB, 4 * KIB]], True),
    ):
        making.give("odd", name, granularity, extents, recording=recording)
    making.give("nothing-äöü", "monday", 64 * KIB, [])
    making.give("left", "in use", 64 * KIB, [[0, 64 * KIB]])
    making.edit_entries("left", lambda entry: entry.with_flags(set=directory.FLAG_IN_USE))
    making.give("left", "usable", 64 * KIB, [[64 * KIB, 64 * KIB]])
    return making.done()


def levels(folder: Path) -> Stored:
    """Trees of bits with roots on level 0, 1 and 2, in which whole chunks and nodes are all 0 or all 1."""
    making = Making(folder)
    making.add(node("small", CHUNK), node("middle", 8 * CHUNK, 77), node("large", 512 * CHUNK, 78))
    making.give("small", "level 0", 512, [[CHUNK - 512, 512]])
    making.give("middle", "level 1", 512, [[0, 512], [3 * CHUNK, CHUNK], [7 * CHUNK + 512, 1024]])
    extents = [[5 * 512, 512], [2 * CHUNK, 3 * CHUNK], [300 * CHUNK, 512], [512 * CHUNK - 512, 512]]
    making.give("large", "level 2", 512, extents)
    making.give("large", "a node is all 1", 512, [[256 * CHUNK, 256 * CHUNK]])
    making.give("large", "coarser", 64 * KIB, [[64 * KIB, 64 * KIB]])
    return making.done()


def level_3(folder: Path) -> Stored:
    """A bitmap of more than 2^31 granules: the root of its bits is on level 3, and most nodes below are not there."""
    making = Making(folder)
    size = 65537 * CHUNK
    making.add(node("disk", size))
    making.give("disk", "monday", 512, [[512, 512], [40_000 * CHUNK, CHUNK], [size - 1024, 1024]])
    data, said = making.done()
    assert max(level for level, _ in making.parts_of("disk", "monday")) == 3
    return data, said


def clusters(folder: Path) -> Stored:
    """Clusters of 16 KiB: a chunk has 131072 bits, a node 1024 pointers, and the headers fill one cluster."""
    making = Making(folder, cluster_bits=14)
    making.add(node("disk", 8 * CHUNK))
    making.give("disk", "monday", 512, [[4 * CHUNK - 512, 1024]])
    return making.done()


def reused(folder: Path) -> Stored:
    """A store after twelve commits to one bitmap: clusters are released, free, and taken again."""
    making = Making(folder)
    making.add(node("disk", MIB))
    for number in range(12):
        making.give("disk", "monday", 64 * KIB, [[number * 64 * KIB, 64 * KIB]])
    return making.done()


def kept(folder: Path) -> Stored:
    """Checkpoints with a break, a hold that nobody has any more, and what readers skip and writers keep: an unknown
    header extension, compatible bit, autoclear bit, record extension and item, none of them critical.
    """
    making = Making(folder)
    making.add(node("disk", MIB))
    making.give("disk", "sunday", 64 * KIB, [[0, 64 * KIB]], recording=False)
    making.give("disk", "monday", 64 * KIB, [[128 * KIB, 64 * KIB]])
    held = Hold(b"sunday", "backup", Process(4711, 1500, vectors.BOOT.bytes), uuid.uuid4().bytes)
    making.edit("disk", lambda record: holds.with_holds(with_chain(record, ["sunday", "", "monday"]), [held]))
    making.edit("disk", lambda record: record.with_extensions([], [LATER]))
    making.edit_entries("disk", lambda entry: with_items(entry, dict([LATER])))
    data, said = making.done()
    namespace(said, "disk").update(
        checkpoints=["sunday", None, "monday"], holds=[{"bitmap": "sunday", "owner": "backup"}]
    )
    for number in range(4):
        at = number * BLOCK
        header = headers.parse_block("", bytes(data[at : at + BLOCK]))
        followed = data[at + 50 : at + 52]
        data[at : at + BLOCK] = headers.build_block(replace(header, compatible=1 << 7, others=(LATER,)), number)
        data[at + 32 : at + 40] = (1 << 9).to_bytes(8, "big")  # autoclear_features
        data[at + 50 : at + 52] = followed
        sealed(data, number)
    return data, said


def _of_many(folder: Path) -> Making:
    making = Making(folder)
    making.add(*(node(f"node {number}", MIB, number) for number in range(64)))
    making.give("node 7", "monday", 64 * KIB, [[0, 64 * KIB]])
    return making


def many(folder: Path) -> Stored:
    """64 namespaces: the root of the namespace table is on level 1, above leaves."""
    data, said = _of_many(folder).done()
    assert newest(data).depth == 1
    return data, said


def deep(folder: Path) -> Stored:
    """180 namespaces with paths of 4096 bytes, so that a leaf has one record, and is long: the root is on level 2."""
    making = Making(folder)
    long = b"/" + b"a" * 4095
    making.add(*(replace(node(f"node {number}", MIB, number), path=long) for number in range(180)))
    making.give("node 7", "monday", 64 * KIB, [[0, 64 * KIB]])
    data, said = making.done()
    assert newest(data).depth == 2
    return data, said


def doubt(folder: Path) -> Stored:
    """A store that had lost its newest header, and was written to since: what that did not write stays in doubt."""
    making = _two(folder)
    data = bytearray(making.path.read_bytes())
    store_crash.damage(data, 1, 3)
    making.path.write_bytes(data)
    making.give("disk", "monday", 64 * KIB, [[0, MIB]])
    making.given.clear()
    data, said = making.done()
    assert [one["doubt"] for one in said["namespaces"]] == [False, True]
    return data, said


SOUND = empty, kinds, contents, levels, level_3, clusters, reused, kept, many, deep, doubt


# Damaged stores, and those of other software.


def _two(folder: Path) -> Making:
    """A store with two namespaces, whose newest header is in slot B."""
    making = Making(folder)
    making.add(node("disk", MIB), node("other", 2 * MIB, 77))
    making.give("disk", "monday", 64 * KIB, [[64 * KIB, 192 * KIB]])
    making.give("other", "monday", 64 * KIB, [[0, 64 * KIB], [MIB, 64 * KIB]])
    making.give("other", "tuesday", 4 * KIB, [[4 * KIB, 4 * KIB]])
    assert making.done()[1]["generation"] % 2 == 0
    return making


def _tree(folder: Path) -> Making:
    """A store with a tree of three levels."""
    making = Making(folder)
    making.add(node("disk", 512 * CHUNK))
    making.give("disk", "tuesday", 512, [[0, 512]])
    making.give("disk", "monday", 512, [[0, 512], [5 * CHUNK + 512, 512], [300 * CHUNK, 512], [511 * CHUNK, 512]])
    return making


def header_copy(folder: Path) -> Stored:
    """One bit of the newest header's first copy is wrong: nothing is lost."""
    data, said = _two(folder).done()
    store_crash.damage(data, 1)
    return data, said


def header_copies(folder: Path) -> Stored:
    """One copy of each slot is damaged: nothing is lost."""
    data, said = _two(folder).done()
    store_crash.damage(data, 0, 3)
    return data, said


def header_astray(folder: Path) -> Stored:
    """The first copy of slot B is overwritten with that of slot A: whole, but in the wrong place, and so damaged."""
    data, said = _two(folder).done()
    data[BLOCK : 2 * BLOCK] = data[:BLOCK]
    return data, said


def newest_slot(folder: Path) -> Stored:
    """Both copies of the newest header are damaged: what is left is the commit before, in doubt."""
    making = Making(folder)
    making.add(node("disk", MIB))
    making.give("disk", "monday", 64 * KIB, [[0, 64 * KIB]])
    _, said = making.done()
    making.give("disk", "tuesday", 64 * KIB, [[64 * KIB, 64 * KIB]])
    data, after = making.done()
    slot = (after["generation"] + 1) % 2
    store_crash.damage(data, slot, slot + 2)
    all_in_doubt(said)
    return data, said


def other_slot(folder: Path) -> Stored:
    """Both copies of the older header are damaged: they may have been newer, so all is in doubt."""
    data, said = _two(folder).done()
    store_crash.damage(data, 0, 2)
    all_in_doubt(said)
    return data, said


def _with_past(folder: Path) -> tuple[Making, list[Stored]]:
    """A store, and what it was after each of its last three commits."""
    making, past = Making(folder), []
    making.add(node("disk", MIB))
    for number in range(3):
        making.give("disk", "monday", 64 * KIB, [[number * 64 * KIB, 64 * KIB]])
        past.append(making.done())
    return making, past


def _put_back(data: bytearray, slot: int, older: bytearray) -> None:
    """Puts both copies of a slot back to what they were."""
    for number in (slot, slot + 2):
        data[number * BLOCK : (number + 1) * BLOCK] = older[number * BLOCK : (number + 1) * BLOCK]


def newest_slot_stale(folder: Path) -> Stored:
    """Both copies of the newest header are as they were before its commit; but the second copy of the header before
    says that it was followed: all is in doubt.
    """
    _, (*_, (before, said), (data, after)) = _with_past(folder)
    _put_back(data, (after["generation"] + 1) % 2, before)
    all_in_doubt(said)
    return data, said


def other_slot_stale(folder: Path) -> Stored:
    """Both copies of the older header are those of an earlier commit than the newest was made from: all is in doubt."""
    _, ((first, _), _, (data, said)) = _with_past(folder)
    _put_back(data, said["generation"] % 2, first)
    all_in_doubt(said)
    return data, said


def no_header(folder: Path) -> Stored:
    """All four copies of the header are damaged: the store is refused."""
    data, _ = _two(folder).done()
    store_crash.damage(data, 0, 1, 2, 3)
    return data, {"readable": False}


def table_leaf(folder: Path) -> Stored:
    """A leaf of the namespace table is damaged: the names in it are hidden, and no others."""
    data, said = _of_many(folder).done()
    root = newest(data).table
    ends = range(root.offset, root.offset + root.length, NODE_POINTER.size)
    lost, following, *_ = [NODE_POINTER.parse(bytes(data[at : at + NODE_POINTER.size])) for at in ends][1:]
    data[lost.offset + 60] ^= 1
    said["hidden"] = lost.count
    said["namespaces"] = [
        one for one in said["namespaces"] if not lost.key <= int(crc32c.crc32c(one["name"].encode())) < following.key
    ]
    return data, said


def table_root(folder: Path) -> Stored:
    """The root of the namespace table is damaged: all names are hidden, and the store is still one."""
    data, said = _two(folder).done()
    data[newest(data).table.offset] ^= 1
    return data, said | {"hidden": 2, "namespaces": [], "writable": False}


def a_directory(folder: Path) -> Stored:
    """The directory of one namespace is damaged: that namespace cannot be read, the other can."""
    making = _two(folder)
    data, said = making.done()
    data[making.directory_of("other") + 3] ^= 0x10
    unreadable(said, "other")
    return data, said


def shared_directory(folder: Path) -> Stored:
    """The records of two namespaces lead to the directory of one of them: the other namespace is refused."""
    making = _two(folder)
    _, said = making.done()
    with making.changing() as change:
        disk = change.table.get(b"disk")
        change.table.put(replace(disk, name=b"twin", uuid=uuid.uuid4().bytes))
    said["generation"] += 1
    said["namespaces"].append(namespace(said, "disk") | {"name": "twin", "uuid": making.uuid_of("twin")})
    unreadable(said, "twin")
    return bytearray(making.path.read_bytes()), said


def a_chunk(folder: Path) -> Stored:
    """A chunk in the middle of a bitmap is damaged: what it covers counts as dirty."""
    making = _tree(folder)
    data, said = making.done()
    data[making.parts_of("disk", "monday")[0, 5] + 100] ^= 1
    dirty = [[0, 512], [5 * CHUNK, CHUNK], [300 * CHUNK, 512], [511 * CHUNK, 512]]
    bitmap(said, "disk", "monday").update(dirty=dirty, damaged=[[5 * CHUNK, CHUNK]])
    return data, said


def a_bits_node(folder: Path) -> Stored:
    """A node on level 1 of a tree of bits is damaged: all that is below it counts as dirty."""
    making = _tree(folder)
    data, said = making.done()
    data[making.parts_of("disk", "monday")[1, 1] + 5] ^= 1
    half = [256 * CHUNK, 256 * CHUNK]
    dirty = [[0, 512], [5 * CHUNK + 512, 512], half]
    bitmap(said, "disk", "monday").update(dirty=dirty, damaged=[half])
    return data, said


def a_bits_root(folder: Path) -> Stored:
    """The root of a tree of bits is damaged: that bitmap counts as dirty all over, the other does not."""
    making = _tree(folder)
    data, said = making.done()
    data[making.parts_of("disk", "monday")[2, 0]] ^= 0x80
    bitmap(said, "disk", "monday").update(dirty=[[0, 512 * CHUNK]], damaged=[[0, 512 * CHUNK]])
    return data, said


def bits_past_the_end(folder: Path) -> Stored:
    """A pointer in a sound node leads behind the end of the file: what it covers counts as dirty."""
    making = Making(folder)
    making.add(node("disk", 2 * CHUNK))
    making.give("disk", "monday", 512, [])
    _, said = making.done()
    with making.changing() as change:
        record = change.table.get(b"disk")
        (entry,) = read_entries(change.snapshot, record)
        pointers = bytes(POINTER.size) + POINTER.build(place=1 << 40, checksum=0x12345678, reserved=0)
        root = change.place(pointers.ljust(4096, b"\0"))
        area = replace_directory(change, record, [], [with_root(entry, root.offset, root.checksum, 2)])
        change.table.put(replace(record, generation=change.generation, directory=area))
    said["generation"] += 1
    bitmap(said, "disk", "monday").update(dirty=[[CHUNK, CHUNK]], damaged=[[CHUNK, CHUNK]])
    return bytearray(making.path.read_bytes()), said


def space_map(folder: Path) -> Stored:
    """A leaf of the space map is damaged: all can be read, and nothing written."""
    data, said = _two(folder).done()
    (leaf,) = struct.unpack_from(">Q", data, newest(data).space.offset)
    data[leaf + 8] ^= 1
    return data, said | {"writable": False}


def space_map_root(folder: Path) -> Stored:
    """The root of the space map is damaged: all can be read, and nothing written."""
    data, said = _two(folder).done()
    data[newest(data).space.offset + 15] ^= 1
    return data, said | {"writable": False}


def critical_extension(folder: Path) -> Stored:
    """A record has an extension that is critical and unknown: that namespace is refused, the other is not."""
    making = _two(folder)
    later = LATER[0] | store.CRITICAL, LATER[1]
    making.edit("other", lambda record: record.with_extensions([], [later]))
    data, said = making.done()
    unreadable(said, "other")
    return data, said


def critical_item(folder: Path) -> Stored:
    """An entry has an item that is critical and unknown: its namespace is refused, the other is not."""
    making = _two(folder)
    making.edit_entries("other", lambda entry: with_items(entry, {LATER[0] | store.CRITICAL_ITEM: LATER[1]}))
    data, said = making.done()
    unreadable(said, "other")
    return data, said


def session_version(folder: Path) -> Stored:
    """A record has a session of a version that is unknown: that namespace is refused, the other is not."""
    making = _two(folder)
    later = (2).to_bytes(4, "big").ljust(200, b"\0")
    making.edit("other", lambda record: record.with_extensions([], [(store.EXTENSION_SESSION, later)]))
    data, said = making.done()
    unreadable(said, "other")
    return data, said


def _with_bit(folder: Path, offset: int) -> Stored:
    """A store with bit 5 of the feature word at that offset."""
    data, said = _two(folder).done()
    for number in range(4):
        data[number * BLOCK + offset + 7] |= 1 << 5
        sealed(data, number)
    return data, said


def read_only_bit(folder: Path) -> Stored:
    """An unknown read-only-compatible bit: all can be read, and nothing written."""
    data, said = _with_bit(folder, 16)
    return data, said | {"writable": False}


def incompatible_bit(folder: Path) -> Stored:
    """An unknown incompatible bit: the store is refused."""
    return _with_bit(folder, 8)[0], {"readable": False}


def earlier(folder: Path) -> Stored:
    """The magic of an earlier layout: the store is refused by that name, and not repaired."""
    data, _ = _two(folder).done()
    for number in range(4):
        data[number * BLOCK + 3] = 0xFB
        sealed(data, number)
    return data, {"readable": False}


DAMAGED = (
    header_copy, header_copies, header_astray, newest_slot, newest_slot_stale, other_slot,
    other_slot_stale, no_header, table_leaf, table_root, a_directory, shared_directory,
    a_chunk, a_bits_node, a_bits_root, bits_past_the_end, space_map, space_map_root, critical_extension, critical_item,
    session_version, read_only_bit, incompatible_bit, earlier,
)  # fmt: skip


# Killed trackers. Their disks have 4 MiB, in regions of 1 MiB, with a bit for each 64 KiB.

DISK, GRANULE = 4 * MIB, 64 * KIB

Files = dict[str, bytearray]
Bits = dict[str, Extents]
Left = tuple[Files, list[Said]]  # what a tracker leaves, and what recovery makes of it, by facts


class Killed:
    """A tracker that is killed: what it leaves is what is there at that moment.

    Attributes:
        tracker: it.
    """

    def __init__(self, making: Making, clock: Clock, *names: str, intent: str = "region", size: int = DISK) -> None:
        self._store, self._clock, self._ended = making.path, clock, 0
        self._shm = making.path.with_name("shm")
        self._shm.mkdir()
        homes = [Home(ALONE, str(making.path), name.encode()) for name in names]
        options = Options(live=self._shm, intent=intent, region_size=MIB, save_interval=0)
        self.tracker = Tracker(Setup(homes, f"/images/{size}", options))  # see `support.vectors.fixed`

    def write(self, offset: int, length: int) -> None:
        """A write, as the tracker sees it, a second after what was before."""
        self._clock.now += SECOND
        self.tracker.end(self.tracker.begin(offset, length))
        self._ended = self._clock.now  # what marks reads another clock

    def beat(self) -> None:
        """What a tracker does in the background: a sign of life in the control file, and one in the log."""
        self._clock.now += SECOND
        self.tracker._kernel.give_sign()
        self.tracker._kernel.beat(self._clock.now)

    def files(self) -> Files:
        """What it leaves, by the names in a vector."""
        (folder,) = self._shm.glob("*/*")
        paths = {"store.dmap": self._store, "intent": Path(self.tracker._log.path)}
        paths |= {f"live/{path.name}": path for path in folder.iterdir() if path.is_file()}
        found = {name: bytearray(path.read_bytes()) for name, path in sorted(paths.items())}
        self.tracker.abandon()
        control = found["live/control"]
        put(control, CONTROL.field("machine").offset, live.MACHINES["x86_64"].to_bytes(4, "little"))
        put(control, live.LOG_PATH, vectors.LOG.ljust(live.PAGE, b"\0"))
        if self._ended:
            put(control, live.SLOTS + SLOT.field("event").offset, self._ended.to_bytes(8, "little"))
        del control[live.SLOTS + SLOT_SIZE :]  # what is behind it was not used, but for how many regions are logged
        return found


def put(file: bytearray, offset: int, data: bytes) -> None:
    """Changes bytes of a file."""
    file[offset : offset + len(data)] = data


def number(value: int) -> bytes:
    """A number as live files have it."""
    return value.to_bytes(8, "little")


STATE, REASON = (CONTROL.field(name).offset for name in ("state", "reason"))
FIRST_BITS = 2 * live.PAGE  # of the first buffer; each has a page, and a page in front
SECOND_BITS = FIRST_BITS + 2 * live.PAGE


# Whether the image is unchanged, and whether the machine has not been booted since.
FACTS = {"same boot": (True, True), "another boot": (True, False), "changed": (False, True)}


def case(facts: str, row: str, **found: Bits) -> Said:
    """Given these facts, each namespace is in that row of the recovery table, and its bitmaps have these extents."""
    unchanged, same_boot = FACTS[facts]
    return {
        "image_unchanged": unchanged,
        "same_boot": same_boot,
        "namespaces": [
            {"name": name, "row": row, "bitmaps": [{"name": n, "dirty": dirty} for n, dirty in bits.items()]}
            for name, bits in sorted(found.items())
        ],
    }


SAVED = [64 * KIB, 192 * KIB]  # of monday, before the tracker began
SUNDAY, LATE = [MIB + GRANULE, GRANULE], [3 * MIB + 2 * GRANULE, GRANULE]  # writes before and after a checkpoint
WHOLE = [[0, DISK]]
EXACT: Bits = {"monday": [SAVED, SUNDAY], "tuesday": [LATE]}
LOGGED: Bits = {"monday": [SAVED, [MIB, MIB], [3 * MIB, MIB]], "tuesday": [[MIB, MIB], [3 * MIB, MIB]]}
ALL: Bits = {"monday": WHOLE, "tuesday": WHOLE}


def _begun(folder: Path, clock: Clock, intent: str = "region") -> Killed:
    making = Making(folder)
    making.add(node("disk", DISK))
    making.give("disk", "monday", GRANULE, [SAVED])
    making.edit("disk", lambda record: with_chain(record, ["monday"]))  # which the next checkpoint ends
    return Killed(making, clock, "disk", intent=intent)


def _example(folder: Path, clock: Clock, intent: str = "region") -> Files:
    killed = _begun(folder, clock, intent)
    killed.write(*SUNDAY)
    killed.tracker.checkpoint("tuesday")
    killed.write(*LATE)
    killed.beat()
    return killed.files()


def example(folder: Path, clock: Clock) -> Left:
    """The example of docs/examples.md: a write, a checkpoint, another write. Live files and log are there."""
    return _example(folder, clock), [
        case("same boot", "exact", disk=EXACT),
        case("another boot", "logged regions", disk=LOGGED),
        case("changed", "all dirty", disk=ALL),
    ]


def live_gone(folder: Path, clock: Clock) -> Left:
    """The live files are gone, as after a power loss: the regions of the log count."""
    files = _example(folder, clock)
    return {name: data for name, data in files.items() if not name.startswith("live/")}, [
        case("same boot", "logged regions", disk=LOGGED),
        case("changed", "all dirty", disk=ALL),
    ]


def log_gone(folder: Path, clock: Clock) -> Left:
    """Only the store is left: all is dirty."""
    return {"store.dmap": _example(folder, clock)["store.dmap"]}, [case("same boot", "all dirty", disk=ALL)]


def log_off(folder: Path, clock: Clock) -> Left:
    """No regions were logged: exact with the live files, all dirty without."""
    return _example(folder, clock, "off"), [
        case("same boot", "exact", disk=EXACT),
        case("another boot", "all dirty", disk=ALL),
    ]


def _saved(folder: Path, clock: Clock) -> Files:
    killed = _begun(folder, clock)
    killed.write(*SUNDAY)
    killed.tracker.checkpoint("tuesday")
    killed.tracker.save()
    killed.write(*LATE)
    return killed.files()


AFTER_SAVE: Bits = {"monday": [SAVED, SUNDAY], "tuesday": [[3 * MIB, MIB]]}


def saved(folder: Path, clock: Clock) -> Left:
    """After a checkpoint and a save: `oldest` and `log` are 1, and the writeset of interval 0 is gone."""
    return _saved(folder, clock), [
        case("same boot", "exact", disk=EXACT),
        case("another boot", "logged regions", disk=AFTER_SAVE),
    ]


def below_oldest(folder: Path, clock: Clock) -> Left:
    """The control file's interval is 0, and below the session's `oldest`, which is 3: there are no live files."""
    making = Making(folder)
    making.add(node("disk", DISK))
    making.give("disk", "monday", GRANULE, [SAVED])
    killed = Killed(making, clock, "disk")
    killed.write(*SUNDAY)
    for name in ("tuesday", "wednesday", "thursday"):
        killed.tracker.checkpoint(name)
    killed.tracker.save()
    for name in ("tuesday", "wednesday", "thursday"):  # so that no window tells how old the control file is
        killed.tracker.remove(name)
    killed.write(*LATE)
    files = killed.files()
    put(files["live/control"], STATE, number(0 << 32 | 2))
    return files, [case("same boot", "logged regions", disk={"monday": [SAVED, SUNDAY, [3 * MIB, MIB]]})]


def log_reused(folder: Path, clock: Clock) -> Left:
    """Log 2 has one record, beside what is left of log 0, which had four: that is sound, and void."""
    killed = _begun(folder, clock)
    for region in range(4):
        killed.write(region * MIB, GRANULE)
    killed.tracker.save()
    killed.write(0, GRANULE)
    killed.tracker.save()
    killed.write(2 * MIB + GRANULE, GRANULE)
    first = [[0, 256 * KIB], [MIB, GRANULE]]
    return killed.files(), [
        case("same boot", "exact", disk={"monday": [*first, [2 * MIB, 2 * GRANULE], [3 * MIB, GRANULE]]}),
        case("another boot", "logged regions", disk={"monday": [*first, [2 * MIB, MIB + GRANULE]]}),
    ]


def grown(folder: Path, clock: Clock) -> Left:
    """The disk grew from 4 MiB to 6.5 MiB while it was tracked: new space is dirty, and so is a write before."""
    killed = _begun(folder, clock)
    killed.write(*SUNDAY)
    size = 6 * MIB + 512 * KIB
    killed.tracker.resize(size)
    killed.write(0, GRANULE)
    killed.tracker.checkpoint("tuesday")
    killed.write(5 * MIB + GRANULE, GRANULE)
    killed.beat()
    new = [DISK, size - DISK]
    monday = [[0, 4 * GRANULE], SUNDAY, new]
    return killed.files(), [
        case("same boot", "exact", disk={"monday": monday, "tuesday": [[5 * MIB + GRANULE, GRANULE]]}),
        case(
            "another boot", "logged regions",
            disk={"monday": [[0, 2 * MIB], new], "tuesday": [[0, 2 * MIB], [5 * MIB, MIB]]},
        ),
        case("changed", "all dirty", disk={"monday": [[0, size]], "tuesday": [[0, size]]}),
    ]  # fmt: skip


def checked_out(folder: Path, clock: Clock) -> Left:
    """A tracked qcow2 image: the store has bitmaps and session. In the image they are `in-use`, and `tracked` is on."""
    path, _ = _image(folder, ("monday", GRANULE, [SAVED], True), name="disk")
    making = Making(folder)
    with image(path) as opened:
        of_image = uuid.UUID(opened.uuid or "").bytes
    place = replace(node("disk", MIB), kind=store.KIND_PLACE, uuid=of_image, path=b"/images/disk.qcow2")
    making.add(replace(place, identity=replace(place.identity, size=0, mtime_ns=0, ctime_ns=0)))
    making.give("disk", "monday", GRANULE, [SAVED])
    killed = Killed(making, clock, "disk", size=MIB)
    with write_session(str(path), str(path), locking=USUAL) as (file, layout):
        set_tracked(file, layout, True)
        layout = read_layout(file)
        commit(file, layout, [Kept(slot.entry.with_flags(set=directory.FLAG_IN_USE)) for slot in layout.slots])
    killed.write(MIB - GRANULE, GRANULE)
    killed.beat()
    exact: Bits = {"monday": [SAVED, [MIB - GRANULE, GRANULE]]}
    return killed.files() | {"image.qcow2": bytearray(path.read_bytes())}, [
        case("same boot", "exact", disk=exact),
        case("another boot", "logged regions", disk={"monday": [[0, MIB]]}),
    ]


def poisoned(folder: Path, clock: Clock) -> Left:
    """The control file says that a sync had failed: the live files do not count, the log does."""
    files = _example(folder, clock)
    put(files["live/control"], STATE, number(1 << 32 | 1))
    put(files["live/control"], REASON, number(5))
    return files, [case("same boot", "logged regions", disk=LOGGED)]


def short_bits(folder: Path, clock: Clock) -> Left:
    """The bits of an interval end behind the end of their file: there are no live files."""
    files = _example(folder, clock)
    del files["live/bits"][SECOND_BITS + 7 :]
    return files, [case("same boot", "logged regions", disk=LOGGED)]


def missing_descriptor(folder: Path, clock: Clock) -> Left:
    """An interval has no descriptor: there are no live files."""
    files = _example(folder, clock)
    put(files["live/control"], live.DESCRIPTORS, number(0))
    return files, [case("same boot", "logged regions", disk=LOGGED)]


def other_interval(folder: Path, clock: Clock) -> Left:
    """A descriptor leads to the bits of another interval, as their header says: there are no live files."""
    files = _example(folder, clock)
    put(files["live/control"], live.DESCRIPTORS + DESCRIPTOR.field("offset").offset, number(SECOND_BITS))
    return files, [case("same boot", "logged regions", disk=LOGGED)]


def window_behind_current(folder: Path, clock: Clock) -> Left:
    """The control file is an older one: a bitmap's window begins behind its interval. There are no live files."""
    killed = _begun(folder, clock)
    killed.write(*SUNDAY)
    killed.tracker.checkpoint("tuesday")
    files = killed.files()
    put(files["live/control"], STATE, number(0))
    region = [MIB, MIB]
    return files, [case("same boot", "logged regions", disk={"monday": [SAVED, region], "tuesday": [region]})]


ONE_WRITE: Bits = {"monday": [SAVED, [MIB, MIB]]}


def _one_write(folder: Path, clock: Clock) -> Files:
    killed = _begun(folder, clock)
    killed.write(*SUNDAY)
    return killed.files()


def mark_behind_current(folder: Path, clock: Clock) -> Left:
    """A buffer of a later interval than the control file's has a bit: there are no live files."""
    files = _one_write(folder, clock)
    put(files["live/bits"], SECOND_BITS - live.PAGE + WRITESET.field("number").offset, number(1))
    files["live/bits"][SECOND_BITS + 6] = 4
    return files, [case("same boot", "logged regions", disk=ONE_WRITE)]


def write_in_flight(folder: Path, clock: Clock) -> Left:
    """A write is in flight: its entry is there, and its bit is set."""
    killed = _begun(folder, clock)
    killed.write(*SUNDAY)
    ticket = killed.tracker.begin(*LATE)
    files = killed.files()
    ticket.end()
    return files, [case("same boot", "exact", disk={"monday": [SAVED, SUNDAY, LATE]})]


def other_session(folder: Path, clock: Clock) -> Left:
    """The control file is of another session: there are no live files."""
    files = _example(folder, clock)
    files["live/control"][CONTROL.field("uuid").offset] ^= 1
    return files, [case("same boot", "logged regions", disk=LOGGED)]


def _three_regions(folder: Path, clock: Clock) -> tuple[Files, Bits]:
    killed = _begun(folder, clock)
    for region in (1, 2, 3):
        killed.write(region * MIB, GRANULE)
    return killed.files(), {"monday": [SAVED, *([region * MIB, GRANULE] for region in (1, 2, 3))]}


def _spoiled_log(folder: Path, clock: Clock, spoil: Callable[[bytearray, bytes], object]) -> Left:
    """Three regions were logged, and the tally is not durable; then somebody has changed the log.

    Args:
        folder: to work in.
        clock: of the tracker.
        spoil: changes the log; gets the session's UUID, too.
    """
    files, exact = _three_regions(folder, clock)
    log = files["intent"]
    log[live.TALLIES[0] : live.TALLIES[0] + 16] = bytes(16)
    spoil(log, bytes(log[8:24]))
    return files, [
        case("same boot", "exact", disk=exact),
        case("another boot", "all dirty", disk={"monday": WHOLE}),
    ]


def _set_record(log: bytearray, place: int, record: bytes) -> None:
    put(log, live.record_offset(place, 0), record)


def log_damaged(folder: Path, clock: Clock) -> Left:
    """The second of three records of the log is damaged: the log counts as lost where it is needed."""

    def spoil(log: bytearray, uuid: bytes) -> None:
        log[live.record_offset(2, 0) + 2] ^= 1

    return _spoiled_log(folder, clock, spoil)


def log_to_come(folder: Path, clock: Clock) -> Left:
    """A record is of log 2, which the session does not know yet: the log counts as lost where it is needed."""
    return _spoiled_log(folder, clock, lambda log, uuid: _set_record(log, 0, build_log_record(record_seed(uuid, 2), 0)))


def log_astray(folder: Path, clock: Clock) -> Left:
    """A record is in the place of another region: the log counts as lost where it is needed."""
    return _spoiled_log(folder, clock, lambda log, uuid: _set_record(log, 0, build_log_record(record_seed(uuid, 0), 2)))


def log_beyond_the_disk(folder: Path, clock: Clock) -> Left:
    """A region is in the log that the disk does not have: the log counts as lost where it is needed."""
    return _spoiled_log(folder, clock, lambda log, uuid: _set_record(log, 4, build_log_record(record_seed(uuid, 0), 4)))


def log_short(folder: Path, clock: Clock) -> Left:
    """The last of three records of the log is gone, as the tally tells: it counts as lost where it is needed."""
    files, exact = _three_regions(folder, clock)
    _set_record(files["intent"], 3, bytes(8))
    return files, [
        case("same boot", "exact", disk=exact),
        case("another boot", "all dirty", disk={"monday": WHOLE}),
    ]


def session_lost(folder: Path, clock: Clock) -> Left:
    """The record's session has no data: all is dirty, whatever files there are."""
    making = Making(folder)
    making.add(node("disk", DISK))
    making.give("disk", "monday", GRANULE, [SAVED])
    making.edit("disk", lambda record: record.with_extensions([], [(store.EXTENSION_SESSION, live.LOST)]))
    files = {"store.dmap": bytearray(making.path.read_bytes())}
    return files, [case("same boot", "all dirty", disk={"monday": WHOLE})]


def with_device(folder: Path, clock: Clock) -> Left:
    """A device is tracked with its root: one session in both records, and each has bitmaps and windows of its own."""
    making = Making(folder)
    disk = node("disk", DISK)
    making.add(disk, device("drive0", disk))
    making.give("disk", "monday", GRANULE, [SAVED])
    making.give("drive0", "monday", GRANULE, [])
    making.edit("drive0", lambda record: with_chain(record, ["monday"]))
    killed = Killed(making, clock, "drive0", "disk")
    killed.write(*SUNDAY)
    killed.tracker.checkpoint("tuesday")  # of the device
    killed.write(*LATE)
    regions = [[MIB, MIB], [3 * MIB, MIB]]
    return killed.files(), [
        case(
            "same boot", "exact",
            disk={"monday": [SAVED, SUNDAY, LATE]}, drive0={"monday": [SUNDAY], "tuesday": [LATE]},
        ),
        case(
            "another boot", "logged regions",
            disk={"monday": [SAVED, *regions]}, drive0={"monday": regions, "tuesday": regions},
        ),
        case("changed", "all dirty", disk={"monday": WHOLE}, drive0=ALL),
    ]  # fmt: skip


KILLED = (
    example, live_gone, log_gone, log_off, saved, below_oldest, log_reused, grown, checked_out, poisoned, short_bits,
    missing_descriptor,
    other_interval, window_behind_current, mark_behind_current, write_in_flight, other_session, log_damaged,
    log_to_come, log_astray, log_beyond_the_disk, log_short, session_lost, with_device,
)  # fmt: skip


# qcow2 images: disks of 1 MiB in clusters of 512 bytes.


def blank(path: Path) -> None:
    """An image without data: header, refcount table, a refcount block, L1 table; a cluster each."""
    l1_size = MIB // 512 // (512 // 8)
    fields = b"QFI\xfb", 3, 0, 0, 9, MIB, 0, l1_size, 3 * 512, 512, 1, 0, 0, 0, 0, 0, 4, 112
    header = struct.pack(">4sIQIIQIIQQIIQQQQII", *fields)
    parts = header, (2 * 512).to_bytes(8, "big"), struct.pack(">4H", 1, 1, 1, 1), b""
    path.write_bytes(b"".join(part.ljust(512, b"\0") for part in parts))


Given = tuple[str, int, Extents, bool]  # name, granularity, extents, recording


def _image(folder: Path, *given: Given, name: str | None = None) -> tuple[Path, Said]:
    path = folder / "image"
    blank(path)
    if name:
        name_image(path, name)
    for called, granularity, extents, recording in given:
        with image(path) as opened, opened.transaction() as bitmaps:
            offsets, lengths = [extent[0] for extent in extents], [extent[1] for extent in extents]
            bitmaps[called] = dm.Bitmap.from_extents(MIB, offsets, lengths, granularity, recording)
    said: Said = {"readable": True, "size": MIB, "cluster_size": 512, "node": None, "uuid": None}
    said["bitmaps"] = [
        {"name": called, "granularity": granularity, "recording": recording, "inconsistent": False, "dirty": extents}
        for called, granularity, extents, recording in given
    ]
    return path, said


def _few(folder: Path) -> tuple[Craft, Said]:
    monday: Given = "monday", 512, [[512, 1024], [MIB - 512, 512]], True
    path, said = _image(folder, monday, ("tuesday", 64 * KIB, [[0, 64 * KIB]], False))
    return Craft(path), said


def no_bitmaps(folder: Path) -> tuple[bytes, Said]:
    """An image without a bitmaps extension."""
    path, said = _image(folder)
    return path.read_bytes(), said


def bitmaps(folder: Path) -> tuple[bytes, Said]:
    """Bitmaps that are clean, sparse, and disabled."""
    path, said = _image(
        folder,
        ("clean", 64 * KIB, [], True),
        ("sparse", 4 * KIB, [[0, 4 * KIB], [MIB - 4 * KIB, 4 * KIB]], True),
        ("disabled", 4 * KIB, [[8 * KIB, 8 * KIB]], False),
    )
    return path.read_bytes(), said


def all_ones(folder: Path) -> tuple[bytes, Said]:
    """A bitmap that is all dirty: a table entry of 1, which dirtmap writes, and QEMU only reads."""
    path, said = _image(folder, ("all", 512, [[0, MIB]], True))
    return path.read_bytes(), said


def named(folder: Path) -> tuple[bytes, Said]:
    """An image with dirtmap's namespace extension: a name and a UUID."""
    path, said = _image(folder, ("monday", 64 * KIB, [[64 * KIB, 64 * KIB]], True), name="disk")
    return path.read_bytes(), said | {"node": "disk", "uuid": "00000001-0000-4000-8000-000000000000"}


def void(folder: Path) -> tuple[bytes, Said]:
    """Autoclear bit 0 is off: the bitmaps are void, and not listed; the image is not faulty."""
    craft, said = _few(folder)
    craft.set(craft.header("autoclear_features"), 0)
    return bytes(craft.data), said | {"bitmaps": []}


def inconsistent(folder: Path) -> tuple[bytes, Said]:
    """One bitmap is `in-use`: its bits mean nothing. The other is as it was."""
    craft, said = _few(folder)
    place = craft.entry(0, "flags")
    craft.set(place, craft.get(place) | directory.FLAG_IN_USE)
    said["bitmaps"][0].update(inconsistent=True, dirty=None)
    return bytes(craft.data), said


def directory_past_the_end(folder: Path) -> tuple[bytes, Said]:
    """The directory is said to be behind the end of the file: the bitmaps cannot be read."""
    craft, _ = _few(folder)
    craft.set(craft.bitmaps("directory_offset"), 1 << 20)
    return bytes(craft.data), {"readable": False}


IMAGES = no_bitmaps, bitmaps, all_ones, named, void, inconsistent, directory_past_the_end


# All of them.

FOLDERS = "stores", "damaged", "killed", "qcow2"


@contextlib.contextmanager
def _workshop() -> Iterator[tuple[Path, Clock]]:
    with tempfile.TemporaryDirectory(prefix="dirtmap-vectors-") as folder, vectors.fixed() as clock:
        yield Path(folder), clock


def _title(function: Callable[..., object]) -> str:
    return function.__name__.removeprefix("a_").replace("_", "-")


def _write(path: Path, function: Callable[..., object], said: Said) -> None:
    """Writes a document, which begins with what the vector is for: the function's docstring."""
    path.write_text(written({"what": " ".join((function.__doc__ or "").split())} | said))


def make_all(target: Path) -> None:
    """Makes all vectors in a folder, and removes what was in its folders for them."""
    for name in FOLDERS:
        shutil.rmtree(target / name, ignore_errors=True)
        (target / name).mkdir(parents=True)
    parts = ("stores", SOUND, "dmap"), ("damaged", DAMAGED, "dmap"), ("qcow2", IMAGES, "qcow2")
    for name, functions, suffix in parts:
        for function in functions:
            with _workshop() as (work, _):
                data, said = function(work)
            path = target / name / f"{_title(function)}.{suffix}"
            path.write_bytes(data)
            _write(path.with_suffix(".json"), function, {"file": path.name} | said)
    for tracker in KILLED:
        with _workshop() as (work, clock):
            files, cases = tracker(work, clock)
        folder = target / "killed" / _title(tracker)
        for each, content in files.items():
            (folder / each).parent.mkdir(parents=True, exist_ok=True)
            (folder / each).write_bytes(content)
        there = {
            "store": "store.dmap",
            "live": "live" if "live/control" in files else None,
            "log": "intent" if "intent" in files else None,
        }
        if "image.qcow2" in files:
            there["image"] = "image.qcow2"
        _write(folder / "said.json", tracker, {"files": there, "cases": cases})


if __name__ == "__main__":
    make_all(Path(sys.argv[1]) if len(sys.argv) > 1 else vectors.VECTORS)
