"""Compares a disk with what it was at a backup. Verifying and rebuilding both do that.

    what the documents have       zeros       a digest                      a digest, but a part was written over later
    what is read of the disk      its data    all                           that part
    what is read of the images    nothing     what has another digest       all

So most of what has not changed is read once, from the disk, and hashed by all processors. What neither has is not read.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import tee
from typing import TYPE_CHECKING, Final, TypeVar

from dirtmap.tools.backup.chain import ChainReader, Seen
from dirtmap.tools.backup.copying import Data, Run, Source, hashers, pieces_of, read, sha256, with_holes
from dirtmap.tools.backup.document import PIECE

if TYPE_CHECKING:
    from dirtmap.engine import Bitmap

T = TypeVar("T")

_AHEAD: Final = 8  # pieces that are read before the first is hashed; twice as many are being hashed
_STEP: Final = 1 << 16  # bytes that are looked at for holes


class Sample:
    """A share of the pieces of 1 MiB that have any data: every so-manieth, beginning with one that is drawn by lot.

    Every piece is as likely as any other to be looked at, each time anew.

    Args:
        share: of the pieces, more than 0 and 1 at most.

    Attributes:
        data: bytes of all pieces so far.
        chosen: bytes of those that were looked at.
    """

    def __init__(self, share: float = 1.0) -> None:
        self._share, self._sum = share, random.SystemRandom().random()
        self._end, self._is_chosen = 0, False
        self.data = self.chosen = 0

    def takes(self, begin: int, end: int) -> bool:
        """Whether to look at bytes, all of one piece; they come in order, for each disk or image anew."""
        if begin < self._end or begin // PIECE != (self._end - 1) // PIECE:
            self._sum += self._share
            self._is_chosen = self._sum >= 1
            self._sum -= self._is_chosen
        self._end = end
        self.data += end - begin
        self.chosen += (end - begin) * self._is_chosen
        return self._is_chosen


def compare(
    reader: ChainReader, source: Source, differing: Bitmap, sample: Sample, progress: Callable[[int], object]
) -> None:
    """Marks where a disk is different from what it was.

    Args:
        reader: of what it was.
        source: the disk.
        differing: in whose granules that is marked; its size is that of the disk.
        sample: what is looked at.
        progress: is told how far it is, in bytes of the disk.

    Raises:
        FormatError: the backup is damaged, as far as it was read.
        StorageError: the disk, or an image, cannot be read.
    """
    with hashers() as pool:
        wanted = _wanted(reader.seen(), source, differing.size, sample, progress)
        one, other = tee(unequal(wanted, source, pool))
        runs = (Run(part.start, part.end - part.start) for part in other)
        for was, now in zip(reader.read_parts(one), read(source, runs), strict=True):
            _mark(was, now, differing)
    progress(differing.size)


def _wanted(
    seen: Iterable[Seen], source: Source, size: int, sample: Sample, progress: Callable[[int], object]
) -> Iterator[Seen]:
    """What is to be looked at: what the images have, and what the disk has; in pieces, as far as they are chosen."""
    for part in seen:
        if part.piece.digest is not None:
            if sample.takes(part.start, part.end):
                yield part
        else:
            runs = with_holes(source, [Run(part.start, part.end - part.start)], _STEP, size, least=1)
            for run in pieces_of(run for run in runs if not run.hole):
                if sample.takes(run.offset, run.offset + run.length):
                    yield part._replace(start=run.offset, end=run.offset + run.length)
        progress(part.end)


def unequal(parts: Iterable[Seen], source: Source, pool: ThreadPoolExecutor) -> Iterator[Seen]:
    """The parts without those of which a disk, or an image, has the same digest as the document."""
    for part, digest in _late(_digests(parts, source, pool), 2 * _AHEAD):
        if digest is None or digest.result() != part.piece.digest:
            yield part


def _digests(
    parts: Iterable[Seen], source: Source, pool: ThreadPoolExecutor
) -> Iterator[tuple[Seen, Future[bytes] | None]]:
    """Each part, and the digest of what the disk has there, if the document has one of just that part."""

    def read_and_hash(token: int) -> bytes:
        return sha256(source.wait(token).data or b"")

    asked = ((part, source.read(part.start, part.end - part.start) if _is_whole(part) else None) for part in parts)
    for part, token in _late(asked, _AHEAD):
        if token is None:
            yield part, None
        elif source.any_thread:  # hashed by the thread that reads it, which has it in its cache
            yield part, pool.submit(read_and_hash, token)
        else:
            yield part, pool.submit(sha256, source.wait(token).data or b"")


def _is_whole(part: Seen) -> bool:
    return part.piece.digest is not None and (part.start, part.end) == (part.piece.offset, part.piece.end)


def _late(items: Iterable[T], number: int) -> Iterator[T]:
    """The items, each once ``number`` more were taken, so that what was begun for them goes on meanwhile."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > number:
            yield waiting.popleft()
    yield from waiting


def _mark(one: Data, other: Data, differing: Bitmap) -> None:
    """Marks the granules in which two readings of the same bytes differ."""
    import numpy as np

    parts = [np.frombuffer(data.data, np.uint8) for data in (one, other) if data.data is not None]
    if not parts:
        return
    unlike = parts[0] != (parts[1] if len(parts) > 1 else 0)
    granularity = differing.granularity
    first = one.offset // granularity * granularity
    offsets = np.arange(first, one.offset + one.length, granularity)
    offsets = offsets[np.logical_or.reduceat(unlike, np.maximum(offsets - one.offset, 0))]
    differing.mark_many(offsets, np.minimum(granularity, differing.size - offsets))
