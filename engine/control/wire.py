"""What is said at a control socket: messages of a JSON object and, behind it, bytes.

A message begins with the lengths of both, big-endian: 4 bytes and 8. A question has ``act``, and an answer ``answer``;
or ``error``, with the error's class, where and what.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from dirtmap.fmt import errors
from dirtmap.fmt.errors import Error, StorageError
from dirtmap.fmt.live import SOCKET

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtmap.fmt.identity import FilePlace

NAME: Final = SOCKET
_LENGTHS: Final = struct.Struct(">IQ")
_CREDENTIALS: Final = struct.Struct("3i")
_MOST_TEXT: Final = 1 << 24
_PART: Final = 1 << 20
MOST_BYTES: Final = 1 << 40  # more than any bitmap has


def spelled(place: FilePlace) -> dict[str, Any]:
    """Which file something is, as an answer says it."""
    return {"filesystem": place.filesystem.hex(), "inode": place.inode, "birth": place.birth}


@contextmanager
def place(folder: str) -> Iterator[str]:
    """The path of the socket in a folder, short enough for an address, which has at most 107 bytes.

    Raises:
        OSError: there is no such folder.
    """
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)  # noqa: TID251  no data: an address
    try:
        yield f"/proc/self/fd/{fd}/{NAME}"
    finally:
        os.close(fd)


def user_of(peer: socket.socket) -> int:
    """The effective user of the process at the other end."""
    _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(user)


def send(peer: socket.socket, document: dict[str, Any], data: bytes = b"") -> None:
    """Sends a message."""
    text = json.dumps(document).encode()
    peer.sendall(_LENGTHS.pack(len(text), len(data)) + text)
    view = memoryview(data)
    for at in range(0, len(view), _PART):  # the socket's time limit is for each
        peer.sendall(view[at : at + _PART])


def comes(peer: socket.socket, seconds: float | None) -> bool:
    """Waits until a message begins to come, or the other end has hung up; False if neither happens in time."""
    look = select.poll()
    look.register(peer, select.POLLIN)
    return bool(look.poll(None if seconds is None else seconds * 1000))


def has_hung_up(peer: socket.socket) -> bool:
    """True where nobody is there any more who could read an answer."""
    look = select.poll()
    look.register(peer, 0)
    return bool(look.poll(0))


def receive(peer: socket.socket, most: int = MOST_BYTES) -> tuple[dict[str, Any], bytes] | None:
    """Takes a message; None where the other end has hung up.

    Args:
        peer: the socket, whose timeout is the longest pause in the middle of a message.
        most: bytes behind the object.

    Raises:
        StorageError: it is not as described.
        TimeoutError: it does not go on.
    """
    head = _take(peer, _LENGTHS.size)
    if head is None:
        return None
    length, more = _LENGTHS.unpack(head)
    if length > _MOST_TEXT or more > most:
        raise StorageError(NAME, "not a message")
    text, data = _take(peer, length), _take(peer, more)
    if text is None or data is None:
        return None
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise StorageError(NAME, "not a message")
    return document, data


def _take(peer: socket.socket, length: int) -> bytes | None:
    """So many bytes. Memory is only taken for what comes."""
    parts = bytearray()
    while len(parts) < length:
        try:
            part = peer.recv(min(length - len(parts), 1 << 20))
        except ConnectionResetError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)


def written(error: Error) -> dict[str, Any]:
    """An answer that says why not."""
    return {"error": [type(error).__name__, error.where, error.what]}


def raised(document: dict[str, Any]) -> None:
    """Raises the error of an answer, if it has one."""
    found = document.get("error")
    if found is None:
        return
    kind, where, what = map(str, found)
    known = getattr(errors, kind, Error)
    raise (known if isinstance(known, type) and issubclass(known, Error) else Error)(where, what)
