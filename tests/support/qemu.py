"""QEMU's own tools, as the tests call them, and a naive model of what they ought to say.

Every run is bounded in time, and no process outlives the block or call that started it. An image is given by its
path, or as an `Encrypted` path. Offsets, lengths and sizes are bytes; a *map* is a list of (offset, length) of the
dirty runs, maximal, in order, cut off at the end of the disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Target = str | os.PathLike[str]
Map = list[tuple[int, int]]

_SECONDS = 60
_SECRET = ("--object", "secret,id=secret,data=dirtmap")


class ToolError(Exception):
    """A tool ended with another status than expected; the message is what it said."""


@dataclass(frozen=True)
class Encrypted(os.PathLike[str]):
    """An image whose guest data are encrypted (LUKS): QEMU opens it with a secret, dirtmap without."""

    path: Target

    def __fspath__(self) -> str:
        return os.fspath(self.path)


def run(*command: str, status: int = 0) -> str:
    """What the command prints, once it has ended with that status; where that is not 0, its complaints as well."""
    done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    said, complained = done.stdout.decode(), done.stderr.decode()
    if done.returncode != status:
        raise ToolError(f"{command}: status {done.returncode}: {said}{complained}")
    return said + complained if status else said


def qemu_img(command: str, *arguments: Target, status: int = 0) -> str:
    """`qemu-img COMMAND ARGUMENTS`."""
    return run("qemu-img", command, *map(os.fspath, arguments), status=status)


def opened(target: Target) -> list[str]:
    """The arguments by which `qemu-img` and its like open an image."""
    secret = _SECRET if isinstance(target, Encrypted) else ()
    return [*secret, "--image-opts", f"{_driver(target)},file.filename={os.fspath(target)}"]


def _driver(target: Target) -> str:
    encryption = ",encrypt.format=luks,encrypt.key-secret=secret" if isinstance(target, Encrypted) else ""
    return f"driver=qcow2{encryption}"


def create(path: Path, size: int | str, options: str = "", *arguments: Target, encrypted: bool = False) -> Target:
    """A new image; ``options`` as of `qemu-img create -o`, then more of its arguments (none where encrypted)."""
    if encrypted:
        path.write_bytes(_encrypted_image(options))
        qemu_img("resize", "-q", *opened(Encrypted(path)), str(size))
        return Encrypted(path)
    qemu_img("create", "-q", "-f", "qcow2", *(("-o", options) if options else ()), *arguments, path, str(size))
    return path


@functools.cache
def _encrypted_image(options: str) -> bytes:
    """The bytes of an empty one. QEMU takes seconds to make it: it first measures how fast the machine derives keys.

    Where the clock is coarse, it fails to, most of the time.
    """
    luks = "encrypt.format=luks,encrypt.key-secret=secret,encrypt.iter-time=10"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "luks")
        for attempt in itertools.count():
            try:
                qemu_img("create", "-q", *_SECRET, "-f", "qcow2", "-o", f"{options},{luks}".lstrip(","), path, "512")
                return path.read_bytes()
            except ToolError as error:
                if attempt == 200 or "accurate CPU usage" not in str(error):
                    raise
    raise AssertionError


def qemu_io(target: Target, *commands: str, status: int = 0) -> str:
    """`qemu-io` with those commands, one after the other; discards reach the image."""
    return run("qemu-io", "-d", "unmap", *_each("-c", commands), *opened(target), status=status)


def check(target: Target) -> None:
    """Fails unless `qemu-img check` finds nothing wrong, not even a leak."""
    qemu_img("check", *opened(target))


def info(target: Target) -> dict[str, Any]:
    """`qemu-img info`, without looking at backing files."""
    return dict(json.loads(qemu_img("info", "--output=json", "-f", "qcow2", os.fspath(target))))


def bitmaps(target: Target) -> dict[str, tuple[int, set[str]]]:
    """What QEMU lists: granularity and flags by name, in order."""
    listed = info(target)["format-specific"]["data"].get("bitmaps", [])
    return {bitmap["name"]: (bitmap["granularity"], set(bitmap["flags"])) for bitmap in listed}


def dirty(target: Target, name: str) -> Map:
    """What QEMU serves over NBD as the content of a persistent bitmap. `nbdinfo` starts and ends the server."""
    server = ["qemu-nbd", "--read-only", *opened(target), f"--bitmap={name}"]
    context = f"--map=qemu:dirty-bitmap:{name}"
    found = json.loads(run("nbdinfo", context, "--json", "--", "[", *server, "]"))
    return merged((extent["offset"], extent["length"]) for extent in found if extent["type"])


def merged(ranges: Iterable[tuple[int, int]]) -> Map:
    """The same bytes as maximal runs, in order."""
    runs: Map = []
    for offset, length in sorted(ranges):
        if runs and offset <= sum(runs[-1]):
            runs[-1] = (runs[-1][0], max(sum(runs[-1]), offset + length) - runs[-1][0])
        elif length:
            runs.append((offset, length))
    return runs


def modelled(size: int, granularity: int, writes: Iterable[tuple[int, int]]) -> Map:
    """The map of a bitmap that recorded those writes."""
    widened = []
    for offset, length in writes:
        if length:
            first = offset // granularity * granularity
            end = min(size, (offset + length + granularity - 1) // granularity * granularity)
            widened.append((first, end - first))
    return merged(widened)


def digest(size: int, granularity: int, found: Map) -> str:
    """What `StorageDaemon.digest` says of a bitmap with that map."""
    words = 0
    for offset, length in found:
        first, end = offset // granularity, -(-(offset + length) // granularity)
        words |= ((1 << (end - first)) - 1) << first
    return hashlib.sha256(words.to_bytes(max(1, -(-size // granularity // 64)) * 8, "little")).hexdigest()


def extents(bitmap: Any) -> Map:
    """The map of a `dirtmap.engine.Bitmap`."""
    offsets, lengths = bitmap.extents()
    return list(zip(offsets.tolist(), lengths.tolist(), strict=True))


class StorageDaemon:
    """A `qemu-storage-daemon` that has an image open, as node ``disk``, and serves it over NBD; ended with the block.

    Args:
        target: the image.
        options: of `--blockdev`, for the format layer, such as ``read-only=on``.

    Raises:
        ToolError: it did not start.
    """

    def __init__(self, target: Target, *options: str) -> None:
        self._target, self._options = target, options

    def __enter__(self) -> StorageDaemon:
        self._folder = tempfile.TemporaryDirectory(prefix="dirtmap-")  # short: a socket's path has 107 bytes at most
        self._nbd = f"{self._folder.name}/nbd"
        ours, theirs = socket.socketpair()
        options = [_driver(self._target), "node-name=disk", "discard=unmap", "file.driver=file", *self._options]
        self._process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *(_SECRET if isinstance(self._target, Encrypted) else ()),
                *("--blockdev", f"{','.join(options)},file.filename={os.fspath(self._target)}"),
                *("--chardev", f"socket,id=qmp,fd={theirs.fileno()}", "--monitor", "qmp"),
                *("--nbd-server", f"addr.type=unix,addr.path={self._nbd}"),
            ],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
        self.pid = self._process.pid
        theirs.close()
        ours.settimeout(_SECONDS)
        self._qmp = ours.makefile("rw", encoding="utf-8")
        ours.close()  # the stream has it now
        try:
            self._next()
            self.qmp("qmp_capabilities")
            writable = not {"read-only=on", "auto-read-only=on"} & set(self._options)
            self.qmp("block-export-add", type="nbd", id="export", node_name="disk", name="disk", writable=writable)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Runs a QMP command and returns what it returns; ``_`` in the names of arguments stands for ``-``."""
        cooked = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._qmp.write(json.dumps({"execute": command, "arguments": cooked}) + "\n")
        self._qmp.flush()
        while "return" not in (answer := self._next()):
            if "error" in answer:
                raise ToolError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def _next(self) -> dict[str, Any]:
        line = self._qmp.readline()
        if not line:
            raise ToolError(f"qemu-storage-daemon ended: {self._process.communicate(timeout=_SECONDS)[1].decode()}")
        return dict(json.loads(line))

    def io(self, *commands: str) -> None:
        """`qemu-io` through the export, as a guest would write."""
        run("qemu-io", "-d", "unmap", "-f", "raw", *_each("-c", commands), f"nbd+unix:///disk?socket={self._nbd}")

    def add(self, name: str, granularity: int | None = None, *, recording: bool = True) -> None:
        """A new persistent bitmap."""
        given = {} if granularity is None else {"granularity": granularity}
        self.qmp("block-dirty-bitmap-add", node="disk", name=name, persistent=True, disabled=not recording, **given)

    def bitmaps(self) -> dict[str, dict[str, Any]]:
        """What QEMU says of each bitmap, by name: `BlockDirtyInfo`."""
        nodes = self.qmp("query-named-block-nodes", flat=True)
        (disk,) = (node for node in nodes if node["node-name"] == "disk")
        return {bitmap["name"]: bitmap for bitmap in disk.get("dirty-bitmaps", [])}

    def digest(self, name: str) -> str:
        """SHA-256 of a bitmap's bits as QEMU holds them: little-endian 64-bit words, a granule a bit."""
        return str(self.qmp("x-debug-block-dirty-bitmap-sha256", node="disk", name=name)["sha256"])

    def quit(self) -> None:
        """Ends it in good order: bitmaps are saved."""
        self.qmp("quit")
        self._process.communicate(timeout=_SECONDS)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self._process.kill()
        self._process.communicate(timeout=_SECONDS)
        self._qmp.close()
        self._folder.cleanup()


@dataclass
class Header:
    """A version 3 header read by hand, without what dirtmap may change in it.

    Attributes:
        fields: its ``header_length`` bytes, those that may change zeroed.
        extensions: (type, data) in order, but for the bitmaps extension and room that dirtmap left vacant.
        backing: the backing file's name.
    """

    fields: bytes
    extensions: list[tuple[int, bytes]]
    backing: bytes


# Where the backing file's name is; where the refcount table is, and its length; autoclear feature bits.
_MAY_CHANGE = ((8, 8), (48, 12), (88, 8))
_NOT_OTHERS = (0x23852875, 0x646D7046)


def read_header(image: bytes) -> Header:
    """The header of an image, given its bytes."""
    offset, size, cluster_bits = struct.unpack_from(">QII", image, 8)
    (length,) = struct.unpack_from(">I", image, 100)
    fields = bytearray(image[:length])
    for start, width in _MAY_CHANGE:
        fields[start : start + width] = bytes(width)
    chain = _chain(image[: offset or 1 << cluster_bits], length)
    others = [(kind, data) for kind, data in chain if kind not in _NOT_OTHERS]
    return Header(bytes(fields), others, image[offset : offset + size])


def _chain(data: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    while at + 8 <= len(data):
        kind, length = struct.unpack_from(">II", data, at)
        if kind == 0:
            return
        yield kind, data[at + 8 : at + 8 + length]
        at += 8 + _padded(length)


def _padded(length: int) -> int:
    return (length + 7) // 8 * 8


def write_header(path: Path, header: Header, *, gap: int = 0) -> None:
    """Writes the fields, which may have grown, the extensions, and ``gap`` bytes behind them the backing file's name.

    The image has no bitmaps.
    """
    old = path.read_bytes()
    fields = bytearray(header.fields)
    for start, width in _MAY_CHANGE:
        fields[start : start + width] = old[start : start + width]
    struct.pack_into(">I", fields, 100, len(fields))
    chain = b"".join(
        struct.pack(">II", kind, len(data)) + data.ljust(_padded(len(data)), b"\0") for kind, data in header.extensions
    )
    behind = len(fields) + len(chain) + 8 + gap
    if header.backing:
        struct.pack_into(">QI", fields, 8, behind, len(header.backing))
    patch(path, 0, fields + chain + bytes(8 + gap) + header.backing)


def patch(path: Target, offset: int, data: bytes) -> None:
    """Overwrites bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def strays(before: bytes, after: bytes) -> list[int]:
    """The numbers of clusters that changed from one state of an image to the next, and should not have.

    Guest data, snapshots, tables, encryption header: all that is counted, but for the header and the refcounts.
    """
    (cluster_bits,) = struct.unpack_from(">I", before, 20)
    (order,) = struct.unpack_from(">I", before, 96)
    table, clusters = struct.unpack_from(">QI", before, 48)
    size, bits = 1 << cluster_bits, 1 << order
    blocks = struct.unpack_from(f">{clusters * size // 8}Q", before.ljust(table + clusters * size, b"\0"), table)
    own = {0, *range(table // size, table // size + clusters), *(block // size for block in blocks)}
    found = []
    for number in range(len(before) // size):
        start, end = number * size, (number + 1) * size
        if number not in own and before[start:end] != after[start:end]:
            index, position = divmod(number, size * 8 // bits)
            if index < len(blocks) and blocks[index] and _count(before, blocks[index], position, bits):
                found.append(number)
    return found


def _count(image: bytes, block: int, position: int, bits: int) -> int:
    if bits >= 8:
        at = block + position * bits // 8
        return int.from_bytes(image[at : at + bits // 8], "big")
    return image[block + position * bits // 8] >> position * bits % 8 & (1 << bits) - 1


def _each(option: str, values: Sequence[str]) -> list[str]:
    return [part for value in values for part in (option, value)]


@contextlib.contextmanager
def nothing_else_changes(target: Target, *, checked: bool = True) -> Iterator[None]:
    """Fails where the block changes anything but the bitmaps of a version 3 image, or leaves it unclean."""
    path = Path(target)
    before = path.read_bytes()
    yield
    after = path.read_bytes()
    assert strays(before, after) == []
    assert read_header(before) == read_header(after)
    if checked:
        check(target)
