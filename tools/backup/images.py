"""qemu-img: images are made, and checked."""

from __future__ import annotations

import os
import subprocess
from typing import NamedTuple

from dirtmap.fmt.errors import FormatError, StorageError
from dirtmap.fmt.extensions import parse_chain
from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.qcow2 import EXTENSION_BACKING_FORMAT, SECTOR, Header, header_faults, parse_header
from dirtmap.tools.backup.files import failing

_MOST_HEAD = 4096  # bytes: more is rarely needed


def plain(path: str) -> str:
    """A path as qemu-img takes none for a protocol, whatever colons are in it."""
    return os.path.abspath(path)


def create(
    path: str,
    size: int,
    *,
    cluster_size: int | None = None,
    backing: str | None = None,
    compression: str | None = None,
) -> None:
    """Makes a new qcow2 image.

    Args:
        path: of the image.
        size: of its disk, bytes; it is rounded up to 512.
        cluster_size: bytes; None for QEMU's own choice.
        backing: the name of the image that it is on, in its own folder.
        compression: of what is compressed in it; None for QEMU's own choice.

    Raises:
        StorageError: it cannot be made.
    """
    options = [f"cluster_size={cluster_size}"] if cluster_size else []
    options += [f"compression_type={compression}"] if compression else []
    below = ["-u", "-b", backing, "-F", "qcow2"] if backing else []
    chosen = ["-o", ",".join(options)] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *chosen, *below, plain(path), str(align_up(size, SECTOR)))


def shrink(path: str, size: int) -> None:
    """Gives a qcow2 image a smaller disk.

    Args:
        path: of the image.
        size: of its disk, bytes; it is rounded up to 512.

    Raises:
        StorageError: QEMU refuses.
    """
    qemu_img("resize", "-q", "--shrink", "-f", "qcow2", plain(path), str(align_up(size, SECTOR)))


class Head(NamedTuple):
    """What a qcow2 image says at its beginning.

    Attributes:
        header: its fields.
        backing: the name of the image that it is on; None where it is on none.
        backing_format: of that image, if it says so.
    """

    header: Header
    backing: str | None
    backing_format: str | None


def read_head(path: str) -> Head:
    """The header of a qcow2 image, and what it is on.

    Raises:
        FormatError: it is no sound one.
        StorageError: it cannot be read.
    """
    with failing(path), open(path, "rb") as file:
        head = file.read(_MOST_HEAD)
        header = parse_header(head.ljust(_MOST_HEAD, b"\0"))
        for field, fault in header_faults(header):
            raise FormatError(path, f"damaged: {field}: {fault}")
        begin = header.v2.backing_file_offset
        end = begin + header.v2.backing_file_size
        head = (head + file.read(max(0, end - len(head)))).ljust(end, b"\0")
    name = head[begin:end].partition(b"\0")[0]
    if not begin or not name:
        return Head(header, None, None)
    found = {each.type: each.data for each in parse_chain(head, header.length, header.chain_limit).extensions}
    form = found.get(EXTENSION_BACKING_FORMAT)
    return Head(header, os.fsdecode(name), None if form is None else form.decode(errors="replace"))


def check(path: str) -> None:
    """Has QEMU check the structures of a qcow2 image.

    Raises:
        FormatError: they are damaged.
    """
    try:
        qemu_img("check", "-q", "-f", "qcow2", plain(path))
    except StorageError as error:
        raise FormatError(path, f"damaged: {error.what}") from error


def qemu_img(*arguments: str) -> str:
    """What qemu-img prints.

    Raises:
        StorageError: it has failed; with its words.
    """
    try:
        done = subprocess.run(["qemu-img", *arguments], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise StorageError("qemu-img", f"{error.strerror}; it is part of QEMU", error.errno) from error
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise StorageError(f"qemu-img {arguments[0]}", said[-1].removeprefix("qemu-img: ") if said else "has failed")
    return done.stdout.decode(errors="replace")
