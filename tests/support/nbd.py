"""A client of the NBD protocol that knows what it has asked for and what was answered.

Source: NBD's doc/proto.md, "Newstyle negotiation" (fixed newstyle, NBD_OPT_GO) and "Transmission phase".
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from pathlib import Path
from typing import Self

WRITE, TRIM, ZERO = 1, 4, 6
_FLAG_FUA = 1
_OPT_GO, _REP_ACK = 7, 1


class Client:
    """A connection to the server at a Unix socket. Requests may be sent before earlier ones are answered.

    Attributes:
        submitted: ranges that it has asked to write, zero or trim; also those of requests that were not sent whole.
        acknowledged: those of them that the server says have been done.
        refused: ranges and errors of the others.
    """

    def __init__(self, path: Path | str) -> None:
        self.submitted: list[tuple[int, int]] = []
        self.acknowledged: list[tuple[int, int]] = []
        self.refused: list[tuple[int, int, int]] = []
        self._waiting: dict[int, tuple[int, int]] = {}
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(60)
            self._socket.connect(str(path))
            self._negotiate()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, command: int, offset: int, length: int, *, fua: bool = False, data: bytes = b"") -> None:
        """Asks for a change; where ``data`` is not given, 0xa5 is written."""
        cookie = len(self.submitted)
        self.submitted.append((offset, length))
        self._waiting[cookie] = offset, length
        head = struct.pack(">IHHQQI", 0x25609513, _FLAG_FUA * fua, command, cookie, offset, length)
        self._socket.sendall(head + ((data or b"\xa5" * length) if command == WRITE else b""))

    def receive(self) -> int:
        """Takes one answer, of any request; returns its error number."""
        magic, error, cookie = struct.unpack(">IIQ", self._take(16))
        assert magic == 0x67446698
        offset, length = self._waiting.pop(cookie)
        if error:
            self.refused.append((offset, length, error))
        else:
            self.acknowledged.append((offset, length))
        return int(error)

    def ask(self, command: int, offset: int, length: int, *, fua: bool = False) -> int:
        """`send` and `receive`."""
        self.send(command, offset, length, fua=fua)
        return self.receive()

    def drain(self) -> None:
        """Takes all answers that are to come."""
        while self._waiting:
            self.receive()

    def _take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise ConnectionResetError("the server has hung up")
            data += part
        return data

    def _negotiate(self) -> None:
        assert self._take(16) == b"NBDMAGICIHAVEOPT"
        self._take(2)
        request = struct.pack(">IH", 0, 0)  # the default export, nothing else asked
        go = b"IHAVEOPT" + struct.pack(">II", _OPT_GO, len(request)) + request
        self._socket.sendall(struct.pack(">I", 3) + go)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._take(20))
            text = self._take(length)
            if kind == _REP_ACK:
                return
            if kind & 1 << 31:
                raise ConnectionRefusedError(text.decode(errors="replace"))


def write_until_it_ends(path: Path, size: int, seed: int, deep: int = 8) -> tuple[Client, threading.Thread]:
    """Writes, zeroes and trims at random, several requests at a time, in a thread, until the server hangs up."""
    client, chance = Client(path), random.Random(seed)

    def work() -> None:
        with client, contextlib.suppress(OSError):
            while True:
                for _ in range(deep):
                    length = chance.choice([1, 512, 4096, 65536, 200_000])
                    offset = chance.randrange(size - length)
                    client.send(chance.choice([WRITE, WRITE, ZERO, TRIM]), offset, length, fua=chance.random() < 0.1)
                client.drain()

    thread = threading.Thread(target=work)
    thread.start()
    return client, thread
