"""qcow2 images, read without QEMU; asked as an export of QEMU is, see `dirtmap.tools.backup.nbd.Connection`.

    offset of the disk  ->  L1  ->  L2  ->  where in the file    what the image has not is asked of the one below

Each byte that goes through QEMU is copied three times more, and wakes another process. `DirectImage.__enter__` decides
what is read here: all but encrypted images, and those with an external data file, extended L2 entries, clusters that
zstd has compressed, or the mark of QEMU that they are corrupt. QEMU reads these.

Nothing in an image is trusted: what makes no sense is an error. Nothing in memory is as large as its tables are.
Source: QEMU's docs/interop/qcow2.txt, block/qcow2-cluster.c, and, for what lies behind the file's end, the check of
references in block/qcow2-refcount.c.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, Self

from dirtmap.fmt import qcow2
from dirtmap.fmt.errors import FormatError, UnsupportedError, printable
from dirtmap.fmt.geometry import align_up
from dirtmap.tools.backup import files, images
from dirtmap.tools.backup.document import PIECE
from dirtmap.tools.backup.nbd import HOLE, ZERO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtmap.engine import Host

_ZERO_FLAG: Final = 1  # of an L2 entry: its cluster reads as zeros, whatever is below it
_BLOCK: Final = 1 << 16  # bytes of a table that are read at a time
_BLOCKS: Final = 8  # of them that are kept: a disk is read in order
_RUNS: Final = 1024  # that `status` tells at a time
_WHOLE: Final = 1 << 16  # bytes of data that the file system is asked about whether they are a hole
_MOST_IMAGES: Final = 64  # on each other; QEMU reads what is on more
_WINDOW_BITS: Final = -12  # of compressed clusters: deflate without a head, as QEMU has it

MISSING, ZEROS, DATA, PACKED = range(4)  # kinds of a `Part`: not in the image, zeros, in the file, compressed there


class Part(NamedTuple):
    """Bytes ``begin`` to ``end`` of the disk.

    Attributes:
        kind: what is there: of what no image has, it is `MISSING`.
        image: that has it.
        place: where `DATA` begin in its file; the L2 entry of what is `PACKED`.
    """

    begin: int
    end: int
    kind: int
    image: DirectImage | _RawImage
    place: int = 0


class _RawImage:
    """A raw image that others are on. A context manager."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self.file = files.Reading(self._path)
        self.size = align_up(self.file.size, qcow2.SECTOR)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def parts(self, begin: int, end: int) -> Iterator[Part]:
        yield Part(begin, end, DATA, self, begin)

    def read_into(self, view: memoryview, part: Part) -> None:
        self.file.read_as_zeros_behind(view, part.place)


class DirectImage:
    """A qcow2 image and, if that is asked for, what it is on. A context manager.

    Args:
        path: of the image.
        host: keeps the images below from being written to; None reads the image by itself, so that what it does not
            have is zeros.
        above: what the files of the images above it are, by `files.Reading.identity`.

    Attributes:
        size: of the disk, bytes.

    Raises:
        UnsupportedError: it, or one that it is on, is not read here.
        FormatError: it is damaged.
        LockedError: one that it is on is being written to, or was while it was read.
        StorageError: it cannot be read.
    """

    any_thread: ClassVar[bool] = True

    def __init__(self, path: str, host: Host | None = None, above: tuple[tuple[int, int], ...] = ()) -> None:
        self._path, self._host, self._above, self._next = path, host, above, 0
        self._asked: dict[int, tuple[int, list[Part]]] = {}
        self._blocks: dict[tuple[int, int, bool], NDArray[np.uint64]] = {}
        self._buffers = files.Buffers(PIECE)

    def __enter__(self) -> Self:
        head = images.read_head(self._path)
        header = self._header = head.header
        if header.incompatible & ~qcow2.INCOMPATIBLE_DIRTY or header.v2.crypt_method:
            raise UnsupportedError(self._path, "has features for which QEMU has to read it")
        self.size, self._cluster = header.size, header.cluster_size
        self._entries = self._cluster // qcow2.TABLE_ENTRY_SIZE
        self._below: DirectImage | _RawImage | None = None
        with contextlib.ExitStack() as stack:
            self.file = stack.enter_context(contextlib.closing(files.Reading(self._path)))
            if self.file.identity in self._above:
                raise FormatError(self._path, "damaged: it is on an image that is on it")
            if header.v2.l1_size:
                self._require_in_file(header.v2.l1_table_offset, "the L1 table")
                end = header.v2.l1_table_offset + header.v2.l1_size * qcow2.TABLE_ENTRY_SIZE
                if end - self.file.size >= self._cluster:  # the file may end inside the table's last cluster
                    what = f"damaged: the L1 table ends at {end} of the file, which has {self.file.size} bytes"
                    raise FormatError(self._path, what)
                self._look_at_tables()
            if self._host is not None and head.backing is not None:
                self._below = self._open_below(stack, self._host, head.backing, head.backing_format)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def _open_below(
        self, stack: contextlib.ExitStack, host: Host, name: str, form: str | None
    ) -> DirectImage | _RawImage:
        """Opens the image that this one is on."""
        from dirtmap.engine import Disk

        # What has a colon before the first slash is no path to QEMU; and of what has no format it finds one out.
        if form not in ("raw", "qcow2") or re.match("[^/]*:", name) or len(self._above) >= _MOST_IMAGES:
            raise UnsupportedError(self._path, f"QEMU has to read what it is on, {printable(name)}")
        # Its folder is found as the kernel finds it: what is above a symbolic link's target is not above the link.
        joined = os.path.join(os.path.dirname(self._path), name)
        path = os.path.join(os.path.realpath(os.path.dirname(joined)), os.path.basename(joined))
        stack.enter_context(host.offline(Disk(path, form)))
        if form == "raw":
            return stack.enter_context(_RawImage(path))
        return stack.enter_context(DirectImage(path, host, (*self._above, self.file.identity)))

    # As `Connection` has it.

    def status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """What is at the beginning of a range: (length, flags), as of `nbd.ALLOCATION`."""
        found: list[tuple[int, int]] = []
        for part in self.parts(offset, offset + length):
            if len(found) >= _RUNS:
                break
            at = part.begin
            while at < part.end and len(found) < _RUNS:
                is_hole, end = part.kind in (MISSING, ZEROS), part.end
                if part.kind == DATA and part.end - at >= _WHOLE:
                    # QEMU sets clusters aside, as with preallocation, and the file system knows that nothing is there.
                    place = part.place + at - part.begin
                    is_hole, upto = part.image.file.run(place, part.place + part.end - part.begin)
                    end = at + upto - place
                found.append((end - at, HOLE | ZERO if is_hole else 0))
                at = end
        return found

    def read(self, offset: int, length: int) -> int:
        """Asks for bytes of the disk; `wait` returns them."""
        parts = list(self.parts(offset, offset + length))
        for part in parts:
            if part.kind == DATA:
                part.image.file.ask(part.place, part.end - part.begin)
        self._next += 1
        self._asked[self._next] = offset, parts
        return self._next

    def wait(self, token: int) -> files.Answer:
        """The bytes that were asked for. Any thread may do this."""
        offset, parts = self._asked.pop(token)
        data = self._buffers.take(parts[-1].end - offset if parts else 0)
        any_data = False
        for part in parts:
            view = memoryview(data)[part.begin - offset : part.end - offset]
            if part.kind in (DATA, PACKED):
                any_data = True
                part.image.read_into(view, part)
            else:
                view[:] = bytes(len(view))
        return files.Answer(data, not any_data)

    def recycle(self, data: bytearray | memoryview) -> None:
        """Takes back what was read and is not needed any more; later data come in its place."""
        self._buffers.give(data)

    # Where it is.

    def parts(self, begin: int, end: int) -> Iterator[Part]:
        """What is in a range of the disk, in order, without gaps.

        Raises:
            FormatError: a table is damaged.
        """
        below = self._below
        for part in self._own(begin, end):
            if part.kind != MISSING or below is None:
                yield part
                continue
            cut = max(part.begin, min(part.end, below.size))
            if part.begin < cut:
                yield from below.parts(part.begin, cut)
            if cut < part.end:
                yield Part(cut, part.end, MISSING, self)

    def _own(self, begin: int, end: int) -> Iterator[Part]:
        """What this image has in a range, block of an L2 table by block."""
        span, at = self._cluster * self._entries, begin
        count, table_at = self._header.v2.l1_size, self._header.v2.l1_table_offset
        while at < end:
            index, number = divmod(at // self._cluster, self._entries)
            if index >= count:
                yield Part(at, end, MISSING, self)
                return
            tables, first = self._block(table_at, count, index, is_l1=True)
            table = int(tables[index - first])
            if not table:
                used = tables[index - first :].nonzero()[0]
                last = index + int(used[0]) if len(used) else first + len(tables)
                upto = min(end, max(last, index + 1) * span)
                yield Part(at, upto, MISSING, self)
            else:
                self._require_in_file(table, "an L2 table")
                entries, first = self._block(table, self._entries, number)
                upto = min(end, index * span + (first + len(entries)) * self._cluster)
                yield from self._of_entries(entries[number - first :], at, upto)
            at = upto

    def _of_entries(self, entries: NDArray[np.uint64], begin: int, end: int) -> Iterator[Part]:
        """What L2 entries say of bytes of the disk, of which the first entry has the first."""
        import numpy as np

        cluster, base = self._cluster, begin // self._cluster * self._cluster
        entries = entries[: -(-(end - base) // cluster)]
        places = entries & np.uint64(qcow2.OFFSET_MASK)
        kinds = np.where(places != 0, DATA, MISSING)
        kinds[(entries & np.uint64(_ZERO_FLAG)) != 0] = ZEROS
        kinds[(entries & np.uint64(qcow2.L2_COMPRESSED)) != 0] = PACKED
        data, packed = kinds == DATA, kinds == PACKED
        if self._header.version < 3 and (kinds == ZEROS).any():
            raise FormatError(self._path, "damaged: a cluster of zeros, which version 2 of the format does not have")
        wrong = (places % np.uint64(cluster) != 0) & ~packed | (places >= self.file.size) & data
        if wrong.any():
            self._require_in_file(int(places[wrong.argmax()]), "a cluster")
        follows = (kinds[1:] == kinds[:-1]) & ~packed[1:]
        follows &= ~data[1:] | (places[1:] == places[:-1] + np.uint64(cluster))
        starts = [0, *((~follows).nonzero()[0] + 1).tolist()]
        for start, after in zip(starts, [*starts[1:], len(entries)], strict=True):
            at, upto = max(begin, base + start * cluster), min(end, base + after * cluster)
            kind, place = int(kinds[start]), 0
            if kind == DATA:
                place = int(places[start]) + at - (base + start * cluster)
            elif kind == PACKED:
                place = int(entries[start])
            yield Part(at, upto, kind, self, place)

    def _block(self, table: int, count: int, index: int, *, is_l1: bool = False) -> tuple[NDArray[np.uint64], int]:
        """The block of a table of ``count`` entries that has one of them; and which entry is its first.

        Of the L1 table, it has the offsets alone, and none of L2 tables that are holes of the file.
        """
        import numpy as np

        first = index // (_BLOCK // qcow2.TABLE_ENTRY_SIZE) * (_BLOCK // qcow2.TABLE_ENTRY_SIZE)
        key = table + first * qcow2.TABLE_ENTRY_SIZE, min(_BLOCK, (count - first) * qcow2.TABLE_ENTRY_SIZE), is_l1
        block = self._blocks.pop(key, None)
        if block is None:
            data = bytearray(key[1])
            self.file.read_as_zeros_behind(memoryview(data), key[0])
            block = qcow2.table_view(data).astype(np.uint64)
            if is_l1:
                block &= np.uint64(qcow2.OFFSET_MASK)
                block[self._in_holes(block)] = 0
        self._blocks[key] = block  # the youngest
        if len(self._blocks) > _BLOCKS:
            del self._blocks[next(iter(self._blocks))]
        return block, first

    def _look_at_tables(self) -> None:
        """Sees to it that no small file has any number of entries to read.

        It refuses offsets of L2 tables that are equal, and finds holes of the file with tables, which have zeros alone.
        """
        import numpy as np

        data = bytearray(self._header.v2.l1_size * qcow2.TABLE_ENTRY_SIZE)  # `qcow2.MAX_L1_BYTES` at most
        self.file.read_as_zeros_behind(memoryview(data), self._header.v2.l1_table_offset)
        tables = qcow2.table_view(data).astype(np.uint64)
        tables &= np.uint64(qcow2.OFFSET_MASK)
        tables.sort()
        tables = tables[tables.searchsorted(np.uint64(1)) :]
        again = tables[1:] == tables[:-1]
        if again.any():
            place = tables[again.argmax()]
            raise FormatError(self._path, f"damaged: an L2 table is used twice, the one at {place} of the file")
        self._holes = np.array([(0, 0), *self._holes_of(tables)], np.uint64)

    def _holes_of(self, tables: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
        """Holes in which L2 tables are, whose offsets are in order: where these can begin, first and last."""
        import numpy as np

        at = 0
        while at < len(tables) and tables[at] < self.file.size:
            begin = int(tables[at])
            is_hole, end = self.file.run(begin, self.file.size)
            if is_hole and end < self.file.size:
                end = max(begin, end - self._cluster + 1)  # what begins there or later has data
                is_hole = begin < end
            if is_hole:
                yield begin, end - 1
            at = max(at + 1, int(tables.searchsorted(np.uint64(end))))

    def _in_holes(self, tables: NDArray[np.uint64]) -> NDArray[np.bool]:
        """Which L2 tables are in holes."""
        import numpy as np

        last = self._holes[self._holes[:, 0].searchsorted(tables, "right") - 1, 1]
        found: NDArray[np.bool] = (tables <= last) & (tables % np.uint64(self._cluster) == 0)
        return found

    def _require_in_file(self, place: int, what: str) -> None:
        """Refuses what cannot be at a place in the file.

        The file may end inside a cluster, where QEMU has not written its end: that is zeros.
        """
        if place % self._cluster:
            raise FormatError(self._path, f"damaged: {what} at {place} of the file, which is no beginning of a cluster")
        if place and place >= self.file.size:
            raise FormatError(self._path, f"damaged: {what} at {place} of the file, which has {self.file.size} bytes")

    # What it is.

    def read_into(self, view: memoryview, part: Part) -> None:
        """Reads a part that this image has. Any thread may do this."""
        if part.kind == DATA:
            self.file.read_as_zeros_behind(view, part.place)
            return
        first = part.begin % self._cluster
        view[:] = self._unpacked(part.place)[first : first + len(view)]

    def _unpacked(self, entry: int) -> bytes:
        """A cluster that was compressed."""
        bits = 62 - (self._header.v2.cluster_bits - 8)
        place, sectors = entry & ((1 << bits) - 1), (entry >> bits & ((1 << (62 - bits)) - 1)) + 1
        packed = bytearray(sectors * qcow2.COMPRESSED_SECTOR - place % qcow2.COMPRESSED_SECTOR)
        self.file.read_as_zeros_behind(memoryview(packed), place)
        try:
            found = zlib.decompressobj(_WINDOW_BITS).decompress(packed, self._cluster)
        except zlib.error:
            found = b""
        if len(found) != self._cluster:
            raise FormatError(self._path, f"damaged: a compressed cluster at {place} of the file is none")
        return found
