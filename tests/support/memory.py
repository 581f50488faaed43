"""A fourth kind of container, in memory: one module and one row, as for any other kind.

Its file has a magic number and nothing else; the bitmaps are in a dictionary of this process, by the file's path.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import ClassVar

import dirtmap.engine as dm
from dirtmap.engine.host.kind import Address, Kind, KindPort
from dirtmap.engine.host.kinds import KINDS
from dirtmap.engine.model.namespace import Namespace
from dirtmap.engine.system.file import File
from support.namespaces import Bitmaps, Made, Maker

MAGIC = b"MEMORY"
CLUSTER = 65536

_sizes: dict[str, int] = {}
_contents: dict[str, dict[str, dm.Bitmap]] = {}
_changing: set[str] = set()


class MemoryNamespace(Namespace):
    """The bitmaps of one disk, in memory."""

    format = "memory"

    def __init__(self, path: str) -> None:
        self.path, self.name, self.uuid, self.cluster_size = path, None, None, CLUSTER
        self.size = _sizes[os.path.abspath(path)]
        self._bitmaps = _contents[os.path.abspath(path)]

    def info(self) -> dm.ImageInfo:
        found = tuple(
            dm.BitmapInfo(name, b.granularity, b.recording, b.inconsistent, False, None if b.inconsistent else b.count)
            for name, b in self._bitmaps.items()
        )
        return dm.ImageInfo(self.path, self.format, self.size, self.cluster_size, found)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[dm.Transaction]:
        if self.path in _changing:
            raise dm.LockedError(self.path, "held by this very process")
        _changing.add(self.path)
        bitmaps = dm.Transaction(self.where, self.size, CLUSTER, {n: b.copy() for n, b in self._bitmaps.items()})
        try:
            yield bitmaps
            bitmaps.validate()
            changed = {name: bitmap.copy().freeze() for name, bitmap in bitmaps.items()}
            self._bitmaps.clear()
            self._bitmaps.update(changed)
        finally:
            bitmaps.close()
            _changing.remove(self.path)

    def recover(self, names: Iterable[str] = ()) -> list[dm.Recovery]:
        for name in names:
            _ = self[name]
        return []

    @contextlib.contextmanager
    def hold(self, name: str, owner: str = "dirtmap") -> Iterator[dm.Bitmap]:
        _ = self[name]
        raise dm.BitmapError(f"{self.path}: bitmap '{name}'", "only bitmaps that other processes see can be held")
        yield

    def close(self) -> None:
        pass

    def _names(self) -> list[bytes]:
        return [name.encode("utf-8", "surrogateescape") for name in self._bitmaps]

    def _load(self, name: bytes) -> dm.Bitmap | None:
        found = self._bitmaps.get(name.decode("utf-8", "surrogateescape"))
        return None if found is None else found.copy().freeze()


class MemoryKind(Kind):
    """The row."""

    name = "memory"

    def probe(self, file: File) -> bool:
        return file.read(0, len(MAGIC)) == MAGIC

    @contextlib.contextmanager
    def open(self, host: KindPort, address: Address, *, force_share: bool) -> Iterator[Namespace]:
        yield MemoryNamespace(address.path)

    @contextlib.contextmanager
    def transaction(self, host: KindPort, addresses: list[Address]) -> Iterator[list[dm.Transaction]]:
        with MemoryNamespace(addresses[0].path).transaction() as bitmaps:
            yield [bitmaps] * len(addresses)


class _MadeInMemory(Made):
    def open(self) -> dm.Namespace:
        return dm.Host(kinds=(*KINDS, MemoryKind())).open(self.target)

    def describe(self) -> dm.ImageInfo:
        with dm.Host(kinds=(*KINDS, MemoryKind())) as host:
            return host.describe(self.target)

    def recover(self) -> list[dm.Recovery]:
        with dm.Host(kinds=(*KINDS, MemoryKind())) as host:
            return host.recover(self.target)

    def stored(self) -> bytes:
        found = _contents[self.target]
        return repr([(name, b.granularity, b.recording, bytes(b.packed())) for name, b in found.items()]).encode()


class MemoryMaker(Maker):
    """A disk in memory."""

    formats = ("memory",)
    lazy = False
    lacks: ClassVar = {
        "hold": "no other process could see the hold",
        "track": "a death would take the bitmaps as well",
        "name": "no store has a record of it",
        "node": "no store has a record of it",
        "doubt": "there is no disk that others could write to",
        "inconsistent": "nobody but this process ever has it",
        "apart": "no bitmap of it is ever inconsistent",
        "file": "the bitmaps are not in its file",
        "process": "the bitmaps are of this process alone",
    }

    def empty(self, size: int, number: int) -> Made:
        path = self.folder / f"memory{number}"
        path.write_bytes(MAGIC)
        _sizes[str(path)], _contents[str(path)] = size, {}
        return _MadeInMemory(self, str(path), path, path, size)

    def make(self, size: int, bitmaps: Bitmaps | None = None, inconsistent: Iterable[str] = ()) -> Made:
        assert not list(inconsistent)
        return super().make(size, bitmaps)
