"""`NamespaceTable`: the namespaces of a store, in two levels. One is found or changed without reading the others.

table:   2**bucket_bits area pointers          bucket number = CRC32C(name) mod 2**bucket_bits
bucket:  records, one behind the other         8 on average, before the table doubles
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import crc32c

from dirtmap.engine.storefile.session import require_known
from dirtmap.fmt import store
from dirtmap.fmt.errors import FormatError
from dirtmap.fmt.store import Area, Record, namespace_label
from dirtmap.fmt.structures.store import AREA, build_record, parse_areas, parse_records

Read = Callable[[Area, str], bytes]
Place = Callable[[bytes], Area]

_PIECE = 256 * AREA.size  # bytes of pointers that are compared at once


def bucket_of(name: bytes, buckets: int) -> int:
    """The number of the bucket that a namespace is in, where a table has so many."""
    return int(crc32c.crc32c(name)) % buckets


class NamespaceTable:
    """The table as one commit finds it, and as the next one will.

    Args:
        where: path of the store, for messages.
        pointers: the bytes of the table.
        count: number of namespaces.
        sessions: how many of them have a session.
        read: returns the bytes of an area, verified.
    """

    def __init__(self, where: str, pointers: bytes, count: int, sessions: int, read: Read) -> None:
        self._where, self._read = where, read
        self._pointers = pointers
        self._buckets = len(pointers) // AREA.size
        self.count, self.sessions = count, sessions
        self._changed: dict[int, dict[bytes, Record]] = {}
        self._last: tuple[int, dict[bytes, Record]] | None = None  # the bucket read last: it is often read again

    @property
    def bucket_bits(self) -> int:
        """log2 of the number of buckets."""
        return self._buckets.bit_length() - 1

    def get(self, name: bytes) -> Record | None:
        """The namespace of that name, or None. Errors as `bucket`."""
        return self.bucket(self._number(name)).get(name)

    def __iter__(self) -> Iterator[Record]:
        """All namespaces, bucket by bucket. Errors as `bucket`."""
        for number in range(self._buckets):
            yield from self.bucket(number).values()

    def readable(self, broken: list[FormatError]) -> Iterator[Record]:
        """All namespaces of the buckets that can be read; ``broken`` takes in why others cannot."""
        for number in range(self._buckets):
            try:
                yield from self.bucket(number).values()
            except FormatError as error:
                broken.append(error)

    def put(self, record: Record) -> None:
        """Adds or replaces a namespace.

        Raises:
            UnsupportedError: the one there is needs newer software.
            FormatError: the record breaks a rule of the format, or the table is full.
        """
        for field, what in store.record_faults(record):
            raise FormatError(f"{self._where}: {namespace_label(record.name)}.{field}", what)
        bucket = self._change(self._number(record.name))
        before = bucket.get(record.name)
        if before is not None:
            require_known(self._where, before)
        self.count += before is None
        self.sessions += record.tracked - (before is not None and before.tracked)
        if self.count > store.MAX_NAMESPACES:
            raise FormatError(f"{self._where}: namespaces", f"more than {store.MAX_NAMESPACES}")
        bucket[record.name] = record

    def remove(self, name: bytes) -> None:
        """Removes a namespace. Errors as `put` and `bucket`."""
        bucket = self._change(self._number(name))
        require_known(self._where, bucket[name])
        removed = bucket.pop(name)
        self.count -= 1
        self.sessions -= removed.tracked

    def seal(self, place: Place, release: Callable[[Area], None], old: Area) -> Area:
        """Writes the changed buckets and the table anew.

        Args:
            place: finds room for bytes, and plans their writing.
            release: gives up an area.
            old: the present area of the table.

        Returns:
            The new area of the table; the old one if nothing has changed.
        """
        if not self._changed:
            return old
        # Patches the pointers instead of building all: one or two of thousands change.
        pointers = bytearray(self._pointers)
        if self.count > self._buckets * store.RECORDS_PER_BUCKET and self.bucket_bits < store.MAX_BUCKET_BITS:
            records = list(self)
            for area in self.areas():
                release(area)
            while (
                self.count > self._buckets * store.RECORDS_PER_BUCKET // 2 and self.bucket_bits < store.MAX_BUCKET_BITS
            ):
                self._buckets *= 2
            pointers = bytearray(self._buckets * AREA.size)
            self._changed, self._last = {}, None
            for record in records:
                self._changed.setdefault(self._number(record.name), {})[record.name] = record
        for number, bucket in self._changed.items():
            at = slice(number * AREA.size, (number + 1) * AREA.size)
            release(*parse_areas(bytes(pointers[at])))
            area = place(b"".join(map(build_record, bucket.values()))) if bucket else Area()
            pointers[at] = AREA.build(**area._asdict())
        release(old)
        self._pointers = bytes(pointers)
        return place(self._pointers)

    def _number(self, name: bytes) -> int:
        return bucket_of(name, self._buckets)

    @property
    def pointers(self) -> list[bytes]:
        """The bucket pointers as found, each as its raw bytes."""
        size = AREA.size
        return [self._pointers[at : at + size] for at in range(0, len(self._pointers), size)]

    def unlike(self, other: NamespaceTable) -> Iterator[int]:
        """The numbers of the buckets whose pointer differs from that in ``other``, a table of the same length."""
        mine, theirs = self._pointers, other._pointers
        size = AREA.size
        for start in range(0, len(mine), _PIECE):
            if mine[start : start + _PIECE] != theirs[start : start + _PIECE]:
                piece = range(start, min(start + _PIECE, len(mine)), size)
                yield from (at // size for at in piece if mine[at : at + size] != theirs[at : at + size])

    def areas(self) -> list[Area]:
        """The bucket pointers as found, parsed."""
        return parse_areas(self._pointers)

    def bucket(self, number: int) -> dict[bytes, Record]:
        """The namespaces of one bucket, by name.

        Raises:
            FormatError: damaged; the error names the bucket or the record.
        """
        if number in self._changed:
            return self._changed[number]
        if self._last and self._last[0] == number:
            return self._last[1]
        raw = AREA.parse(self._pointers, number * AREA.size)
        where = f"bucket {number}"
        data = self._read(Area(raw.offset, raw.length, raw.checksum), where)
        found: dict[bytes, Record] = {}
        try:
            for record in parse_records(data):
                for field, what in store.record_faults(record):
                    raise FormatError(f"{self._where}: {namespace_label(record.name)}.{field}", what)
                if self._number(record.name) != number:
                    raise FormatError(
                        f"{self._where}: {where}", f"{namespace_label(record.name)} belongs into another bucket"
                    )
                if record.name in found:
                    raise FormatError(f"{self._where}: {where}", f"{namespace_label(record.name)} appears twice")
                found[record.name] = record
                if len(found) > self.count:
                    raise FormatError(f"{self._where}: {where}", f"more namespaces than all there are, {self.count}")
        except ValueError as error:
            raise FormatError(f"{self._where}: {where}", str(error)) from None
        self._last = number, found
        return found

    def _change(self, number: int) -> dict[bytes, Record]:
        if number not in self._changed:
            self._changed[number] = dict(self.bucket(number))
        return self._changed[number]
