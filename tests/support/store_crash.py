"""What a crash can leave of a store: `support.crash` for headers torn at 8 bytes, and for one crash after another.

A `Judge` reads every state with a reader of its own, which shares nothing with dirtmap, and has dirtmap choose its
header each time. What dirtmap does from there on, reading all bitmaps, checking, committing again, depends on nothing
but that choice and the bytes it reads; so it is done once for each choice and each content of what was read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import crc32c

from dirtmap.engine.model import changes
from dirtmap.engine.namespaces.nodes import nodes
from dirtmap.engine.namespaces.store_check import check
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.system import file as fileio
from dirtmap.fmt import store as fmt_store
from dirtmap.fmt.errors import Error
from support import crash
from support.crash import Effort, Harm, Recording, Tally, Write
from support.hostless import stored

BLOCK = 4096
RESERVED = 4 * BLOCK
WORD = 8  # what a header is torn at
PAGE = 4096
UUID_AT = 56

Pointer = tuple[int, int, int]  # offset, length, CRC32C


class Broken(Exception):
    """The store is not what SPEC.md says."""


# A second reader, as plain as can be.


class Header(NamedTuple):
    """The fields of a header that this reader needs."""

    generation: int
    followed: bool
    doubt: int
    cluster: int
    clusters: int
    table: Pointer
    depth: int
    namespaces: int
    space: Pointer
    released: Pointer


@dataclass(frozen=True)
class Bitmap:
    """A bitmap; ``bits`` are packed bytes, or 0 or 1 where all of them are; ``uuid`` and ``generation`` tell which.

    These two are not compared: the same change made in another commit comes to the same.
    """

    name: bytes
    granularity_bits: int
    flags: int
    bits: bytes | int
    uuid: bytes = field(compare=False)
    generation: int = field(compare=False)


class Namespace(NamedTuple):
    """A namespace."""

    kind: int
    uuids: bytes
    size: int
    path: bytes
    identity: tuple[bytes | int, ...]
    doubted: bool
    bitmaps: tuple[Bitmap, ...]

    def changed(self) -> bool:
        """The image is not what it was."""
        now = os.stat(self.path)
        _, inode, _, *looks = self.identity
        return (inode, *looks) != (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


Contents = dict[bytes, Namespace]


class Reader:
    """A store in memory.

    Attributes:
        blocks: the header in each of the four copies, or None where it is damaged.
        header: the one that counts.
        slot: 0 or 1.
        in_doubt: the other slot is lost, or a later commit was there.
    """

    def __init__(self, image: bytes | bytearray) -> None:
        self.image = image
        self.blocks = [_header(bytes(image[number * BLOCK : (number + 1) * BLOCK]), number) for number in range(4)]
        whole = [(block.generation, number) for number, block in enumerate(self.blocks) if block]
        if not whole:
            raise Broken("no header copy is whole")
        self.slot = max(whole)[1] % 2
        self.header = self.newest(self.slot)
        newest = [block for block in self.blocks[self.slot :: 2] if block]
        self.in_doubt = not any(self.blocks[1 - self.slot :: 2]) or any(
            block.followed for block in newest if block.generation == self.header.generation
        )

    def newest(self, slot: int) -> Header:
        return max((block for block in self.blocks[slot::2] if block), key=lambda header: header.generation)

    def contents(self) -> Contents:
        """All namespaces; the space map is what it has to be."""
        doubt = self.header.generation if self.in_doubt else self.header.doubt
        found, used = self._walk(self.header, doubt)
        self._require_counted(self.header, used)
        return found

    def older(self) -> Contents | None:
        """All namespaces as the other slot has them, if it is there: what the loss of the newest header leads to."""
        return None if not any(self.blocks[1 - self.slot :: 2]) else self._walk(self.newest(1 - self.slot), 0)[0]

    def _area(self, pointer: Pointer, header: Header, used: list[range]) -> bytes:
        offset, length, checksum = pointer
        data = bytes(self.image[offset : offset + length])
        if length:
            if offset % header.cluster or offset < RESERVED:
                raise Broken(f"an area lies at {offset:#x}")
            if len(data) < length or crc32c.crc32c(data) != checksum:
                raise Broken(f"{length} bytes at {offset:#x} are damaged")
            first = offset // header.cluster
            used.append(range(first, first + -(-length // header.cluster)))
        return data

    def _walk(self, header: Header, doubt: int) -> tuple[Contents, list[range]]:
        used: list[range] = [range(-(-RESERVED // header.cluster))]
        found: Contents = {}
        for low, high, data in self._leaves(header, used):
            at, last = 0, (low, b"")
            while at < len(data):
                (
                    length, kind, _, name_size, uuid, root, generation, size,
                    offset, directory_length, checksum, bitmaps, path_size, *identity,
                ) = struct.unpack_from(">IBBH16s16sQQQIIII16sQQQQQ", data, at)  # fmt: skip
                name = data[at + 136 : at + 136 + name_size]
                path = data[at + 136 + name_size : at + 136 + name_size + path_size]
                key = crc32c.crc32c(name)
                if not last < (key, name) or key >= high:
                    raise Broken(f"{name!r} is in the wrong place")
                last = key, name
                directory = self._area((offset, directory_length, checksum), header, used)
                owner = hashlib.blake2b(name, digest_size=16).digest()
                starts = range(0, len(directory), header.cluster)
                if any(directory[start : start + 16] != owner for start in starts):
                    raise Broken(f"the directory of {name!r} is another's")
                directory = b"".join(directory[start + 16 : start + header.cluster] for start in starts)
                entries = tuple(self._entries(directory, size, header, used))
                if len(entries) != bitmaps or len({entry.name for entry in entries}) != bitmaps:
                    raise Broken(f"the directory of {name!r} has {len(entries)} entries")
                doubted = generation <= doubt
                found[name] = Namespace(kind, uuid + root, size, path, tuple(identity), doubted, entries)
                at += length
        if len(found) != header.namespaces:
            raise Broken(f"{len(found)} namespaces, not {header.namespaces}")
        return found, used

    def _leaves(self, header: Header, used: list[range]) -> Iterator[tuple[int, int, bytes]]:
        """The least key, the end of the keys, and the bytes of each leaf of the namespace table."""
        waiting = [(header.depth, 0, 1 << 32, header.namespaces, header.table)]
        while waiting:
            level, low, high, count, pointer = waiting.pop()
            data = self._area(pointer, header, used)
            if not level:
                yield low, high, data
                continue
            children = list(struct.iter_unpack(">IIQII", data))
            ends = [*(child[0] for child in children[1:]), high]
            if sum(child[1] for child in children) != count or children[0][0] < low:
                raise Broken("a node of the table contradicts the one above it")
            waiting += [
                (level - 1, key, end, below, (place[0], place[1], place[2]))
                for (key, below, *place), end in zip(children, ends, strict=True)
            ]

    def _entries(self, directory: bytes, size: int, header: Header, used: list[range]) -> Iterator[Bitmap]:
        at = 0
        while at < len(directory):
            offset, chunks, flags, _, granularity_bits, name_size, extra = struct.unpack_from(">QIIBBHI", directory, at)
            bits: bytes | int = offset
            items = {}
            start, end = at + 24, at + 24 + extra
            while start < end:
                kind, length = struct.unpack_from(">II", directory, start)
                items[kind] = directory[start + 8 : start + 8 + length]
                start += 8 + -(-length // 8) * 8
            if len(items[0x424D4944]) != 24:
                raise Broken("a bitmap has no identity")
            if offset > 1:
                (checksum,) = struct.unpack_from(">I", items[0x42495453])
                length = packed_size(size, granularity_bits)
                if chunks != -(-length // header.cluster):
                    raise Broken(f"{chunks} chunks, not {-(-length // header.cluster)}")
                level = 0
                while header.cluster * (header.cluster // 16) ** level < length:
                    level += 1
                bits = self._tree(offset, checksum, level, header, used, length)
                if any(bits[length:]):
                    raise Broken("there is something behind the bits")
                last = (1 << (-(-size >> granularity_bits) - 1) % 8 + 1) - 1  # the bits of the last byte that count
                bits = bits[: length - 1] + bytes([bits[length - 1] & last])
            name = directory[at + 24 + extra : at + 24 + extra + name_size]
            yield Bitmap(name, granularity_bits, flags, bits, *struct.unpack(">16sQ", items[0x424D4944]))
            at += -(-(24 + extra + name_size) // 8) * 8

    def _tree(self, place: int, checksum: int, level: int, header: Header, used: list[range], left: int) -> bytes:
        """The packed bytes below a pointer: ``left``, or more in whole chunks."""
        covered = min(header.cluster * (header.cluster // 16) ** level, left)
        if place <= 1:
            return b"\xff" * covered if place else bytes(covered)
        data = self._area((place, header.cluster, checksum), header, used)
        if level == 0:
            return data
        found = bytearray()
        for at, (place, checksum, reserved) in enumerate(struct.iter_unpack(">QII", data)):
            if reserved or (place <= 1 and checksum) or (place and len(found) >= left):
                raise Broken(f"pointer {at} of a node has what it must not have")
            if len(found) < left:
                found += self._tree(place, checksum, level - 1, header, used, left - len(found))
        return bytes(found)

    def _require_counted(self, header: Header, used: list[range]) -> None:
        """Marked is what is used or was released, nothing else; and nothing is used twice."""
        released = [
            range(first, first + count)
            for first, count in struct.iter_unpack(">QQ", self._area(header.released, header, used))
        ]
        per_leaf = fmt_store.leaf_clusters(header.cluster)
        marked = 0
        for index, (offset, free, checksum) in enumerate(
            struct.iter_unpack(">QII", self._area(header.space, header, used))
        ):
            leaf = int.from_bytes(self._area((offset, header.cluster, checksum), header, used), "little")
            if leaf >> per_leaf or leaf.bit_count() + free != per_leaf:
                raise Broken(f"leaf {index} of the space map counts {free} free clusters")
            marked |= leaf << index * per_leaf
        if marked >> header.clusters:
            raise Broken("clusters past the end are marked")
        taken = 0
        for clusters in [*used, *released]:
            mask = (1 << len(clusters)) - 1 << clusters.start
            if taken & mask:
                raise Broken(f"clusters {clusters} are used twice")
            taken |= mask
        if lost := taken & ~marked:
            raise Broken(f"clusters in use are not marked, as number {lost.bit_length() - 1}")
        if leaked := marked & ~taken:
            raise Broken(f"clusters have leaked, as number {leaked.bit_length() - 1}")


def _header(block: bytes, number: int) -> Header | None:
    if (
        block[:4] != b"DMS\xfc"
        or block[48:50] != bytes([number % 2, number // 2])
        or crc32c.crc32c(block[:-4]) != int.from_bytes(block[-4:], "big")
    ):
        return None
    (
        version, incompatible, _, _, _, cluster_bits, length, _, followed, sessions,
        _, generation, _, doubt, clusters, _,
    ) = struct.unpack_from(">IQQQQIIHHI16sQ16sQQQ", block, 4)  # fmt: skip
    if version != 2 or incompatible != (sessions > 0):
        raise Broken("not for this reader")
    chain = {}
    at = length
    while (head := struct.unpack_from(">II", block, at))[0]:
        chain[head[0]] = block[at + 8 : at + 8 + head[1]]
        at += 8 + -(-head[1] // 8) * 8
    *table, depth, _, namespaces = struct.unpack(">QIIIIQ", chain[0x4E535043])
    return Header(
        generation=generation,
        followed=bool(followed),
        doubt=doubt,
        cluster=1 << cluster_bits,
        clusters=clusters,
        table=(table[0], table[1], table[2]),
        depth=depth,
        namespaces=namespaces,
        space=struct.unpack(">QII", chain[0x53504143]),
        released=struct.unpack(">QII", chain[0x52454C53]),
    )


def contents(image: bytes | bytearray) -> Contents:
    """What a store holds."""
    return Reader(image).contents()


def packed(bitmap: Bitmap, size: int, *, doubted: bool) -> bytes:
    """A bitmap's bits as readers have to see them."""
    granules = -(-size >> bitmap.granularity_bits)
    if isinstance(bitmap.bits, bytes) and not doubted:
        return bitmap.bits
    bits = (1 << granules) - 1 if doubted or bitmap.bits else 0
    return bits.to_bytes(packed_size(size, bitmap.granularity_bits), "little")


def packed_size(size: int, granularity_bits: int) -> int:
    granules = -(-size >> granularity_bits)
    return -(-granules // 8)


def damage(image: bytearray, *copies: int, at: int = UUID_AT) -> None:
    """Flips a bit in header copies, by number: if not told where, in the store's UUID, which all headers share."""
    for copy in copies:
        image[copy * BLOCK + at] ^= 1


# What was done.


@contextlib.contextmanager
def in_memory(
    image: bytearray, recording: Recording | None = None, reads: dict[tuple[int, int], bytes] | None = None
) -> Iterator[str]:
    """While active, the engine takes every path for this store; it reads and writes it there.

    Args:
        image: the store.
        recording: gets all that is done.
        reads: gets what was read behind the headers, by first byte and byte behind the last.
    """
    with crash.in_memory(image) as path:
        base = fileio._factory

        class Memory(base):  # type: ignore[valid-type, misc]
            def lock_alone(self, offset: int) -> bool:
                return True

            def read(self, offset: int, length: int) -> bytes:
                data = super().read(offset, length)
                if reads is not None and offset >= RESERVED:
                    reads[offset, offset + length] = data
                return data

            def write(self, offset: int, data: bytes | memoryview) -> None:
                super().write(offset, data)
                if recording:
                    recording.step(Write(offset, bytes(data)))

            def sync(self) -> None:
                if recording:
                    recording.sync()

        with fileio.using(Memory):
            yield path


def record_in_memory(image: bytes | bytearray, operate: Callable[[str], object]) -> Recording:
    """Runs an operation on a copy of a store and records what it does."""
    recording = Recording(bytes(image))
    with in_memory(bytearray(image), recording) as path:
        operate(path)
    return recording


def shredded(recording: Recording) -> Recording:
    """The same with every write to the headers taken apart into words, those left out that change nothing.

    All other writes are taken apart into pages: a commit joins what it writes side by side.
    """
    image = bytearray(recording.original)

    def words(step: crash.Step) -> Iterator[crash.Step]:
        if isinstance(step, Write) and step.offset < RESERVED:
            for at in range(0, len(step.data), WORD):
                word = Write(step.offset + at, step.data[at : at + WORD])
                if image[word.offset : word.offset + len(word.data)] != word.data:
                    yield word
        elif isinstance(step, Write):
            for at in range(0, len(step.data), PAGE):
                yield Write(step.offset + at, step.data[at : at + PAGE])
        else:
            yield step
        crash.land(image, step)

    def each(epoch: crash.Epoch) -> crash.Epoch:
        return [word for step in epoch for word in words(step)]

    return replace(recording, epochs=[each(epoch) for epoch in recording.epochs], unsynced=each(recording.unsynced))


# What it must be.


def next_commit(path: str) -> None:
    """Something to do after a crash: a bitmap added to the last node, or removed from it; or the first node."""
    with Store(path) as target:
        names = [node.name for node in nodes(target)]
        if not names:
            with target.change() as change:  # `add_node` would look at an image, and every file is the store here
                name = b"after the crash"
                record = fmt_store.Record(name, fmt_store.KIND_NODE, bytes(16), 0, path=os.fsencode(__file__))
                change.table.put(record)
            return
        with stored(target, names[-1]).transaction() as bitmaps:
            if "after the crash" in bitmaps:
                changes.remove(bitmaps, "after the crash")
            else:
                changes.add(bitmaps, "after the crash")
                changes.mark(bitmaps, "after the crash", [bitmaps.size // 3], [bitmaps.size // 5])


class Judge:
    """Says whether a state that a crash left is as good as the store was before, or as what was asked for.

    Args:
        recording: of an operation on a sound store.
        chain: what is tried of a crash while the next commit is made; one more commit is all that follows then.

    Attributes:
        chained: the states of that.
    """

    def __init__(self, recording: Recording, chain: Effort | None = None) -> None:
        before = Reader(recording.original)
        self.in_doubt = before.in_doubt
        self.old, self.new = before.contents(), contents(recording.final)
        self.chain, self.chained = chain, Tally()
        self._known: dict[object, list[dict[tuple[int, int], bytes]]] = {}

    def __call__(self, image: bytearray) -> None:
        """Judges a state.

        Raises:
            Harm: it must not be.
        """
        reader = self._read(image)
        chosen = headers.choose("memory", bytes(image[:RESERVED]))
        if (chosen.header.generation, chosen.in_doubt) != (reader.header.generation, reader.in_doubt):
            raise Harm("dirtmap chooses another header")
        self._engine_agrees(image, reader)

    def _read(self, image: bytearray) -> Reader:
        try:
            reader = Reader(image)
            if reader.in_doubt and not self.in_doubt:
                raise Harm("a mere crash has put the store in doubt")
            found = reader.contents()
            if found not in (self.old, self.new):
                raise Harm(f"neither old nor new: {sorted(found)}")
            reader.older()
        except (Broken, struct.error) as broken:
            raise Harm(f"broken: {broken}") from broken
        return reader

    def _engine_agrees(self, image: bytearray, reader: Reader) -> None:
        known = self._known.setdefault(tuple(block and block.generation for block in reader.blocks), [])
        for reads in known:
            if all(image[start:end] == data for (start, end), data in reads.items()):
                return
        reads: dict[tuple[int, int], bytes] = {}
        with in_memory(image, reads=reads) as path:
            try:
                self._bitmaps_agree(path, reader)
                report = check(path)
            except Error as error:
                raise Harm(f"dirtmap refuses it: {error}") from error
        lost = 2 if reader.in_doubt else 0  # both copies of a slot
        if report.corruptions != lost or report.leaks or report.check_errors:
            raise Harm(f"dirtmap finds {report.findings}")
        self._goes_on(image)
        known.append(reads)

    def _bitmaps_agree(self, path: str, reader: Reader) -> None:
        expected = {
            name.decode(): {
                bitmap.name.decode(): packed(bitmap, namespace.size, doubted=namespace.doubted or namespace.changed())
                for bitmap in namespace.bitmaps
                if not bitmap.flags & 1
            }
            for name, namespace in reader.contents().items()
        }
        with Store(path) as target:
            found = {}
            for node in nodes(target):
                image = stored(target, node.name)
                if os.stat(node.path).st_size == node.size:
                    bitmaps = [(name, bitmap) for name, bitmap in image.items() if not bitmap.inconsistent]
                    found[node.name] = {name: bytes(bitmap.packed()) for name, bitmap in bitmaps}
                else:
                    del expected[node.name]
                    assert image.info()
        if found != expected:
            raise Harm("dirtmap reads other bitmaps")

    def _goes_on(self, image: bytearray) -> None:
        """The next commit works, and so do those after it, whatever crash there is."""
        try:
            recording = record_in_memory(image, next_commit)
        except Error as error:
            raise Harm(f"the next commit fails: {error}") from error
        judge = Judge(recording)
        judge.finish(bytearray(recording.final))
        if self.chain:
            try:
                found = crash.explore(shredded(recording), judge, self.chain)
            except Harm as harm:
                raise Harm(f"after the next crash: {harm}") from harm
            self.chained += found

    def finish(self, image: bytearray) -> None:
        """Judges what is durable when the operation has returned: what was asked for, whichever copy gets damaged."""
        for number in (None, *range(4)):
            damaged = bytearray(image)
            if number is not None:
                damaged[number * BLOCK : (number + 1) * BLOCK] = bytes(BLOCK)
            reader = self._read(damaged)
            if reader.contents() != self.new:
                raise Harm(f"what was asked for is not there, or not without header copy {number}")
