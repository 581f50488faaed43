"""A disk as it was at a backup, read from the images of its chain, each piece of them held against its digest.

    backup 3    |    ####    |          what can be seen of it: all
    backup 2    |  ####    ##|          ##      ##
    backup 1    |############|          ##    ##

An image has exactly what its document lists. So each is read by itself, without those below it, and what it should have
and has not is found.
"""

from __future__ import annotations

import contextlib
import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple, Self

from dirtmap.fmt.errors import FormatError
from dirtmap.tools.backup.copying import Data, hashers, sha256
from dirtmap.tools.backup.direct import MISSING, ZEROS, DirectImage
from dirtmap.tools.backup.document import Backup, Piece
from dirtmap.tools.backup.nbd import ALLOCATION, DEPTH, ZERO, Connection
from dirtmap.tools.backup.opened import Images
from dirtmap.tools.backup.repository import Repository
from dirtmap.tools.qsd import nodes

_AHEAD: Final = 8  # pieces that are asked for before the first is needed; then as many again are being hashed
_KEPT: Final = 32  # pieces that are kept, as another part of them may be seen further on


class Seen(NamedTuple):
    """What can be seen of a piece: bytes ``start`` to ``end`` of the disk, of the backup at that depth in the chain."""

    start: int
    end: int
    depth: int
    piece: Piece


def visible(layers: Iterable[Iterable[Piece]]) -> Iterator[Seen]:
    """What can be seen of each of several layers, the topmost first, in order of offsets."""
    coming: list[tuple[int, int, Piece, Iterator[Piece]]] = []  # by where they begin
    there: list[tuple[int, Piece]] = []  # the topmost first; some may have ended

    def follow(depth: int, pieces: Iterator[Piece]) -> None:
        if (piece := next(pieces, None)) is not None:
            heapq.heappush(coming, (piece.offset, depth, piece, pieces))

    for depth, layer in enumerate(layers):
        follow(depth, iter(layer))
    at, last = 0, None
    while coming or there:
        while there and there[0][1].end <= at:
            heapq.heappop(there)
        if not there and coming:
            at = max(at, coming[0][0])
        while coming and coming[0][0] <= at:
            _, depth, piece, pieces = heapq.heappop(coming)
            heapq.heappush(there, (depth, piece))
            follow(depth, pieces)
        if not there or there[0][1].end <= at:
            continue
        depth, piece = there[0]
        end = min(piece.end, coming[0][0]) if coming else piece.end
        if last is not None and (last.depth, last.piece) == (depth, piece) and last.end == at:
            last = last._replace(end=end)
        else:
            if last is not None:
                yield last
            last = Seen(at, end, depth, piece)
        at = end
    if last is not None:
        yield last


class _Loading:
    """A piece that is on its way from its image."""

    def __init__(self, layer: Connection | DirectImage, piece: Piece) -> None:
        self._layer, self._token = layer, layer.read(piece.offset, piece.length)
        self._result: Future[tuple[bytearray, bytes]] | None = None

    def hash(self, pool: ThreadPoolExecutor) -> None:
        """Has the data taken and hashed, if that is not done yet."""
        if self._result is not None:
            return
        if self._layer.any_thread:
            self._result = pool.submit(lambda: _hashed(self._layer.wait(self._token).data))
        else:
            self._result = pool.submit(_hashed, self._layer.wait(self._token).data)

    def result(self) -> tuple[bytearray, bytes]:
        """The data and their digest."""
        assert self._result is not None
        return self._result.result()


def _hashed(data: bytearray | None) -> tuple[bytearray, bytes]:
    data = data or bytearray()
    return data, sha256(data)


class ChainReader:
    """The disk as it was at a backup. A context manager, in which its images are open.

    Args:
        place: the repository.
        chain: the backup, and those that it is on, the full one last; see `Repository.chain`.
        direct: read without QEMU what is not compressed.
    """

    def __init__(self, place: Repository, chain: list[Backup], *, direct: bool = False) -> None:
        self._place, self._chain, self._direct = place, chain, direct
        self._readers: dict[int, Connection | DirectImage] = {}
        self._images: Images | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for depth, backup in enumerate(self._chain):
                path = self._place.image(backup)
                if self._direct and backup.compression is None:
                    self._readers[depth] = stack.enter_context(DirectImage(path))
                else:
                    if self._images is None:
                        self._images = stack.enter_context(Images())
                    self._images.open(f"layer-{depth}", nodes.image(path, "qcow2", alone=True))
            self._pool = stack.enter_context(hashers())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def layer(self, depth: int) -> Connection | DirectImage:
        """The image of the backup at a depth of the chain, by itself."""
        if depth not in self._readers:
            self._readers[depth] = self._connection(depth)
        return self._readers[depth]

    def _connection(self, depth: int, context: str = ALLOCATION) -> Connection:
        assert self._images is not None
        return self._images.connect(f"layer-{depth}", context)

    def read(self) -> Iterator[Data]:
        """All of the disk, in order.

        Raises:
            FormatError: a document or an image is damaged.
        """
        return self.read_parts(self.seen())

    def seen(self) -> Iterator[Seen]:
        """What can be seen of each image, in order; together it is all of the disk. Errors as `read`."""
        at = 0
        for part in visible(self._place.pieces(backup) for backup in self._chain):
            if part.start != at:
                break
            at = part.end
            yield part
        if at != self._chain[0].size:
            raise FormatError(self._place.document(self._chain[-1]), f"damaged: has nothing at {at}")

    def status(self, depth: int, context: str) -> Iterator[tuple[int, int, int]]:
        """Block status of the image at a depth, by itself, in order: beginning, end, and flags of the context."""
        at, size = 0, self._chain[depth].size
        if isinstance(layer := self.layer(depth), DirectImage):
            for part in layer.parts(0, size):
                flags = int(part.kind != MISSING) if context == DEPTH else ZERO * (part.kind in (MISSING, ZEROS))
                yield part.begin, part.end, flags
            return
        connection = self._connection(depth, context)
        while at < size:
            for length, flags in connection.status(at, size - at):
                if at < size:
                    yield at, min(at + length, size), flags
                at += length

    def read_parts(self, seen: Iterable[Seen]) -> Iterator[Data]:
        """Some parts, in order. Errors as `read`."""
        loading: dict[tuple[int, int], _Loading] = {}
        asked: deque[Seen] = deque()
        hashed: deque[Seen] = deque()

        def key(part: Seen) -> tuple[int, int]:
            return part.depth, part.piece.offset

        def turn(*, least: int) -> Iterator[Data]:
            if len(asked) > least:
                part = asked.popleft()
                if part.piece.digest is not None:
                    loading[key(part)].hash(self._pool)
                hashed.append(part)
            if len(hashed) > least:
                yield self._checked(hashed.popleft(), loading)

        for part in seen:
            if part.piece.digest is not None and key(part) not in loading:
                for old in list(loading)[: max(0, len(loading) - _KEPT)]:
                    del loading[old]  # older than all that wait
                loading[key(part)] = _Loading(self.layer(part.depth), part.piece)
            elif part.piece.digest is not None:
                loading[key(part)] = loading.pop(key(part))  # the youngest again
            asked.append(part)
            yield from turn(least=_AHEAD)
        while asked or hashed:
            yield from turn(least=0)

    def _checked(self, part: Seen, loading: dict[tuple[int, int], _Loading]) -> Data:
        length = part.end - part.start
        if part.piece.digest is None:
            return Data(part.start, length, None)
        data, digest = loading[part.depth, part.piece.offset].result()
        if digest != part.piece.digest:
            path = self._place.image(self._chain[part.depth])
            raise FormatError(path, f"damaged: at {part.piece.offset} of the disk it has not what was written")
        first = part.start - part.piece.offset
        return Data(part.start, length, memoryview(data)[first : first + length])
