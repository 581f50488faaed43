"""A client of the Network Block Device protocol, as much of it as QEMU's server is asked here.

Requests are sent ahead of their answers: `read`, `write` and `zero` return a token, and `wait` waits for its answer.
Source: the NBD project's doc/proto.md.
"""

from __future__ import annotations

import io
import socket
import struct
from dataclasses import dataclass, field
from typing import ClassVar, Final, cast

from dirtmap.fmt.errors import StorageError

ALLOCATION: Final = "base:allocation"  # bit 0: a hole; bit 1: reads as zeros
DEPTH: Final = "qemu:allocation-depth"  # 0: in no image; 1: in the topmost; 2: in one below
HOLE, ZERO = 1, 2

_MAGIC, _OPTION_MAGIC, _REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_GO, _STRUCTURED, _SET_META = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META, _REP_ERROR = 1, 3, 4, 1 << 31
_INFO_EXPORT = 0
_REQUEST_MAGIC, _SIMPLE_MAGIC, _CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
_READ, _WRITE, _DISCONNECT, _FLUSH, _WRITE_ZEROES, _BLOCK_STATUS = 0, 1, 2, 3, 6, 7
_DONE = 1
_CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS, _CHUNK_ERROR = 1, 2, 5, 1 << 15
_MOST_TEXT: Final = 1 << 16  # bytes of an option's answer or of an error's text: QEMU sends a few hundred
_MOST_STATUS: Final = 1 << 24

MOST_ZEROES: Final = 1 << 30  # bytes of one request that has no data


@dataclass(slots=True)
class _Pending:
    """A request that waits for its answer.

    Attributes:
        kind: of the request.
        offset: where on the disk it begins, bytes.
        data: what is read; zeros where nothing came but holes.
        empty: nothing came but holes so far.
        status: what a block status says: (length, flags), one after the other.
        error: what went wrong, or None.
    """

    kind: int
    offset: int
    data: bytearray | None = None
    empty: bool = True
    status: list[tuple[int, int]] = field(default_factory=list)
    error: str | None = None


class Connection:
    """One export of a server. Not for several threads at once.

    Args:
        address: of the server: the path of its socket, or a host and a port.
        name: of the export.
        where: how errors name it.
        context: of block status: `ALLOCATION` or `DEPTH`.

    Attributes:
        size: of the export, bytes.

    Raises:
        StorageError: the server has ended, or has no such export.
    """

    any_thread: ClassVar[bool] = False

    def __init__(self, address: str | tuple[str, int], name: str, where: str, context: str = ALLOCATION) -> None:
        self._name, self._where, self._pending, self._answered = (
            name,
            where,
            dict[int, _Pending](),
            dict[int, _Pending](),
        )
        self._next = 0
        self._socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        try:
            self._socket.connect(address)
            self._stream = cast(io.BufferedReader, self._socket.makefile("rb", buffering=1 << 16))
            self._shake_hands(context)
        except OSError as error:
            self.close()
            raise self._failed(error.strerror or str(error)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection, whatever was asked and not answered."""
        if hasattr(self, "_stream"):
            self._stream.close()
        self._socket.close()

    def _failed(self, what: str) -> StorageError:
        return StorageError(self._where, what)

    # The beginning.

    def _shake_hands(self, context: str) -> None:
        magic, option, _flags = struct.unpack(">QQH", self._take(18))
        if (magic, option) != (_MAGIC, _OPTION_MAGIC):
            raise self._failed("no NBD server")
        self._send(struct.pack(">I", _FIXED_NEWSTYLE | _NO_ZEROES))
        self._ask(_STRUCTURED, b"")
        name, query = self._name.encode(), context.encode()
        asked = struct.pack(f">I{len(name)}sII{len(query)}s", len(name), name, 1, len(query), query)
        if not any(kind == _REP_META for kind, _ in self._ask(_SET_META, asked)):
            raise self._failed(f"the server does not tell {context}")
        for kind, data in self._ask(_GO, struct.pack(f">I{len(name)}sH", len(name), name, 0)):
            if kind == _REP_INFO and len(data) >= 12 and struct.unpack_from(">H", data)[0] == _INFO_EXPORT:
                (self.size,) = struct.unpack_from(">Q", data, 2)

    def _ask(self, option: int, data: bytes) -> list[tuple[int, bytes]]:
        self._send(struct.pack(">QII", _OPTION_MAGIC, option, len(data)) + data)
        answers: list[tuple[int, bytes]] = []
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._take(20))
            if magic != _REPLY_MAGIC or length > _MOST_TEXT:
                raise self._failed("the server breaks the protocol")
            text = self._take(length)
            if kind & _REP_ERROR:
                raise self._failed(f"the server refuses: {text.decode(errors='replace')}")
            if kind == _REP_ACK:
                return answers
            answers.append((kind, text))

    # Requests.

    def read(self, offset: int, length: int) -> int:
        """Asks for bytes of the disk; `wait` returns them."""
        return self._request(_READ, offset, length, pending=_Pending(_READ, offset, bytearray(length)))

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Asks to write bytes."""
        return self._request(_WRITE, offset, len(data), data)

    def zero(self, offset: int, length: int) -> int:
        """Asks to make bytes zero, `MOST_ZEROES` at most."""
        return self._request(_WRITE_ZEROES, offset, length)

    def recycle(self, data: bytearray | memoryview) -> None:
        """Needs nothing back: holes that QEMU tells are in new memory, which has zeros."""

    def flush(self) -> None:
        """Makes what was written durable, and waits for that."""
        self.wait(self._request(_FLUSH, 0, 0))

    def status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """What is at the beginning of a range: (length, flags of the context) of runs one after the other, in bytes."""
        return self.wait(self._request(_BLOCK_STATUS, offset, min(length, MOST_ZEROES))).status

    def _request(
        self,
        kind: int,
        offset: int,
        length: int,
        data: bytes | bytearray | memoryview = b"",
        *,
        pending: _Pending | None = None,
    ) -> int:
        token = self._next = self._next + 1
        self._pending[token] = pending or _Pending(kind, offset)
        self._send(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, kind, token, offset, length))
        if data:
            self._send(data)
        return token

    def wait(self, token: int) -> _Pending:
        """The answer to a request.

        Raises:
            StorageError: the server could not do it, or has ended.
        """
        while token not in self._answered:
            self._receive()
        answer = self._answered.pop(token)
        if answer.error is not None:
            raise self._failed(answer.error)
        return answer

    def _receive(self) -> None:
        """Takes the next answer, or a piece of one."""
        (magic,) = struct.unpack(">I", self._take(4))
        if magic == _SIMPLE_MAGIC:
            error, token = struct.unpack(">IQ", self._take(12))
            answer = self._of(token)
            if error:
                answer.error = _text(error)
            if answer.kind == _READ:
                raise self._failed("the server breaks the protocol")  # it has agreed to answer in chunks
            self._end(token)
            return
        if magic != _CHUNK_MAGIC:
            raise self._failed("the server breaks the protocol")
        flags, kind, token, length = struct.unpack(">HHQI", self._take(16))
        answer = self._of(token)
        if kind == _CHUNK_DATA and answer.data is not None:
            start, end = self._inside(answer, self._take(8), length - 8)
            answer.empty = False
            self._take_into(memoryview(answer.data)[start:end])
        elif kind == _CHUNK_HOLE and answer.data is not None and length == 12:
            at, holes = self._take(8), self._take(4)
            self._inside(answer, at, struct.unpack(">I", holes)[0])
        elif kind == _CHUNK_STATUS and 4 < length < _MOST_STATUS:
            numbers = self._take(length)
            answer.status = [_pair(numbers, at) for at in range(4, length - 7, 8)]
        elif kind & _CHUNK_ERROR and 4 <= length < _MOST_TEXT:
            said = self._take(length)
            answer.error = _text(struct.unpack_from(">I", said)[0], said[6:])
        elif length:
            raise self._failed("the server breaks the protocol")
        if flags & _DONE:
            self._end(token)

    def _of(self, token: int) -> _Pending:
        if token not in self._pending:
            raise self._failed("the server breaks the protocol")
        return self._pending[token]

    def _end(self, token: int) -> None:
        self._answered[token] = self._pending.pop(token)

    def _inside(self, answer: _Pending, at: bytes, length: int) -> tuple[int, int]:
        start = struct.unpack(">Q", at)[0] - answer.offset
        if not 0 <= start <= start + length <= len(answer.data or b""):
            raise self._failed("the server breaks the protocol")
        return start, start + length

    # Bytes.

    def _send(self, data: bytes | bytearray | memoryview) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise self._failed(f"QEMU has ended: {error.strerror}") from error

    def _take(self, length: int) -> bytes:
        data = bytearray(length)
        self._take_into(memoryview(data))
        return bytes(data)

    def _take_into(self, view: memoryview) -> None:
        while len(view):
            try:
                got = self._stream.readinto(view)
            except OSError as error:
                raise self._failed(f"QEMU has ended: {error.strerror}") from error
            if not got:
                raise self._failed("QEMU has ended")
            view = view[got:]


def _text(error: int, said: bytes = b"") -> str:
    import os

    return f"{os.strerror(error)} (QEMU: {said.decode(errors='replace')})" if said else os.strerror(error)


def _pair(numbers: bytes, at: int) -> tuple[int, int]:
    first, second = struct.unpack_from(">II", numbers, at)
    return first, second
