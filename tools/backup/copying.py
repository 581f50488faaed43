r"""Copies pieces of a disk from one image to another, with their digests, in bounded memory.

bits -> extents -> what is to be read -> requests sent ahead -> data -> requests sent behind
\-> digests, in threads of their own
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple, Protocol

from dirtmap.tools.backup.document import PIECE, Piece
from dirtmap.tools.backup.nbd import MOST_ZEROES, ZERO

if TYPE_CHECKING:
    from dirtmap.engine import Bitmap

Progress = Callable[[int, int], None]

_AHEAD: Final = 8  # requests that are sent before an answer is waited for
_BATCHES: Final = 2  # of so many pieces that are hashed while others are copied: threads are woken rarely
_STRIDE: Final = 512  # words of 8 bytes: one of each page is looked at first
_WHOLE: Final = 4 * PIECE  # a run of this length is asked for its holes before it is read


class Answer(Protocol):
    """What was read; ``empty`` where it is zeros for certain."""

    @property
    def data(self) -> bytearray | None:
        """The bytes."""

    @property
    def empty(self) -> bool:
        """Whether they are zeros, as they need not be looked at to know."""


class Source(Protocol):
    """A disk that is read: an export of QEMU, or a file.

    Attributes:
        any_thread: ``wait`` may be called by another thread than ``read`` was.
    """

    any_thread: ClassVar[bool]

    def status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """What is at the beginning of a range: (length, flags), as of `nbd.ALLOCATION`."""

    def read(self, offset: int, length: int) -> int:
        """Asks for bytes, and returns a token."""

    def wait(self, token: int) -> Answer:
        """Waits for what was asked for."""

    def recycle(self, data: bytearray | memoryview) -> None:
        """Takes back what was read and is not needed any more; later data may come in its place."""


class Target(Protocol):
    """An image that is written: an export of QEMU, or a raw file."""

    def write(self, offset: int, data: memoryview) -> int:
        """Asks to write bytes, and returns a token."""

    def wait(self, token: int) -> object:
        """Waits for what was asked for."""

    def flush(self) -> None:
        """Passes on what was written."""


class Zeroing(Target, Protocol):
    """One that may have something else than zeros."""

    def zero(self, offset: int, length: int) -> int:
        """Asks to make bytes zero, and returns a token."""


class Data(NamedTuple):
    """Bytes of a disk: from ``offset``, ``length`` of them; None where all are zero."""

    offset: int
    length: int
    data: bytearray | memoryview | None


class Run(NamedTuple):
    """Bytes of a disk, from ``offset``, ``length`` of them; ``hole`` where they are known to be zero."""

    offset: int
    length: int
    hole: bool = False


def dirty_runs(bitmap: Bitmap) -> Iterator[Run]:
    """The dirty runs of a bitmap, in order, cut at the disk's end; a part of the bits at a time."""
    for offsets, lengths in bitmap.ranges():
        yield from map(Run, offsets, lengths)


def with_holes(source: Source, runs: Iterable[Run], cluster: int, size: int, *, least: int = _WHOLE) -> Iterator[Run]:
    """The runs, with what the image says is zero in long ones as runs of their own, at multiples of ``cluster``.

    Args:
        source: the image.
        runs: of it.
        cluster: bytes.
        size: of the image, bytes.
        least: bytes of a run that is a long one.
    """
    for run in runs:
        if run.length < least:
            yield run
            continue
        at, end, begun = run.offset, run.offset + run.length, run.offset
        while at < end:
            for length, flags in source.status(at, end - at):
                length = min(length, end - at)
                first = -(-at // cluster) * cluster
                last = at + length if at + length == size else (at + length) // cluster * cluster
                if flags & ZERO and first < last:
                    if begun < first:
                        yield Run(begun, first - begun)
                    yield Run(first, last - first, hole=True)
                    begun = last
                at += length
        if begun < end:
            yield Run(begun, end - begun)


def pieces_of(runs: Iterable[Run]) -> Iterator[Run]:
    """The runs, cut at multiples of `PIECE` where they are no holes."""
    for run in runs:
        at, end = run.offset, run.offset + run.length
        while at < end:
            cut = end if run.hole else min(end, (at // PIECE + 1) * PIECE)
            yield Run(at, cut - at, run.hole)
            at = cut


def read(source: Source, runs: Iterable[Run]) -> Iterator[Data]:
    """The data of runs of `PIECE` bytes at most; requests are sent ahead."""
    waiting: deque[tuple[Run, int]] = deque()
    for run in runs:
        waiting.append((run, 0 if run.hole else source.read(run.offset, run.length)))
        if len(waiting) > _AHEAD:
            yield _answered(source, *waiting.popleft())
    while waiting:
        yield _answered(source, *waiting.popleft())


def _answered(source: Source, run: Run, token: int) -> Data:
    if run.hole:
        return Data(run.offset, run.length, None)
    answer = source.wait(token)
    return Data(run.offset, run.length, None if answer.empty else answer.data)


def sha256(data: bytes | bytearray | memoryview) -> bytes:
    """The digest of a piece."""
    from hashlib import sha256 as make

    return make(data).digest()


def hashers() -> ThreadPoolExecutor:
    """A thread for each processor."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))


class Writer:
    """Writes pieces of a disk to an image; requests are sent without waiting for each.

    Args:
        target: the image.
        cluster: bytes, a power of two: the least that is written as zeros.
        zeros: the image again, where zeros have to be written; None where it has nothing else so far.

    Attributes:
        copied: bytes that were not zero.
    """

    def __init__(self, target: Target, cluster: int, *, zeros: Zeroing | None = None) -> None:
        self._target, self._cluster, self._zeros = target, cluster, zeros
        self._waiting: deque[int] = deque()
        self.copied = 0

    def write(self, piece: Data) -> bool:
        """Writes a piece; returns whether all of it is zero."""
        if piece.data is None:
            self._zero(piece.offset, piece.length)
            return True
        any_data = False
        for start, end, zero in self._parts(piece.data):
            if zero:
                self._zero(piece.offset + start, end - start)
            else:
                any_data = True
                self.copied += end - start
                self._sent(self._target.write(piece.offset + start, memoryview(piece.data)[start:end]))
        return not any_data

    def _parts(self, data: bytearray | memoryview) -> Iterator[tuple[int, int, bool]]:
        """Runs of clusters that are zero, or are not."""
        import numpy as np

        length, cluster = len(data), self._cluster
        bits = np.frombuffer(data, np.uint8)
        whole = length // cluster * cluster
        clusters = bits[:whole].reshape(-1, cluster).view(np.uint64)
        used = np.asarray(clusters[:, ::_STRIDE].any(axis=1))  # most of what has data shows it here
        for number in np.flatnonzero(~used).tolist():
            used[number] = clusters[number].any()
        flags = [not flag for flag in used.tolist()]
        if whole < length:
            flags.append(not bits[whole:].any())
        start = 0
        for number in range(1, len(flags) + 1):
            if number == len(flags) or flags[number] != flags[start // cluster]:
                yield start, min(number * cluster, length), flags[start // cluster]
                start = number * cluster

    def _zero(self, offset: int, length: int) -> None:
        if self._zeros is None:
            return
        end = offset + length
        while offset < end:
            part = min(end - offset, MOST_ZEROES)
            self._sent(self._zeros.zero(offset, part))
            offset += part

    def _sent(self, token: int) -> None:
        self._waiting.append(token)
        if len(self._waiting) > _AHEAD:
            self._target.wait(self._waiting.popleft())

    def finish(self) -> None:
        """Waits until all is written; not until it is durable."""
        while self._waiting:
            self._target.wait(self._waiting.popleft())
        self._target.flush()


def copy(
    source: Iterable[Data],
    writer: Writer,
    keep: Callable[[Piece], object],
    progress: Callable[[int], object],
    recycle: Callable[[bytearray | memoryview], object] = lambda data: None,
) -> None:
    """Writes all that comes from a source, and keeps the digest of each piece.

    Args:
        source: pieces, in order.
        writer: takes them.
        keep: is given each piece, in order; zeros one after the other as one.
        progress: is told how many bytes are done.
        recycle: is given data that nobody needs any more.
    """
    with hashers() as pool:
        coming: list[Data] = []  # what is not being hashed yet
        hashing: deque[tuple[list[Data], Future[list[bytes | None]]]] = deque()
        zeros: list[int] = []  # where zeros begin that were not kept yet, and where they end

        def flush() -> None:
            if zeros:
                keep(Piece(zeros[0], zeros[1] - zeros[0], None))
                zeros.clear()

        def hash_coming() -> None:
            nonlocal coming
            hashing.append((coming, pool.submit(_digests, coming)))
            coming = []

        def settle() -> None:
            pieces, digests = hashing.popleft()
            for piece, digest in zip(pieces, digests.result(), strict=True):
                if piece.data is not None:
                    recycle(piece.data)
                if digest is None:
                    if zeros and zeros[1] != piece.offset:
                        flush()
                    zeros[:] = [zeros[0] if zeros else piece.offset, piece.offset + piece.length]
                else:
                    flush()
                    keep(Piece(piece.offset, piece.length, digest))

        for piece in source:
            is_zero = writer.write(piece)
            coming.append(piece._replace(data=None) if is_zero else piece)
            if len(coming) >= _AHEAD:
                hash_coming()
            if len(hashing) > _BATCHES:
                settle()
            progress(piece.length)
        hash_coming()
        writer.finish()
        while hashing:
            settle()
        flush()


def _digests(pieces: list[Data]) -> list[bytes | None]:
    """Of each piece; None of zeros."""
    return [None if piece.data is None else sha256(piece.data) for piece in pieces]
