"""File systems of their own for a test, on files that are attached as disks: as root only."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from support.alone import alone

# Linux, fs/ext4/ext4.h; and whether what is in memory is written first: everything, the journal alone, or nothing.
_EXT4_IOC_SHUTDOWN = 0x8004587D
FLUSHED, JOURNAL_FLUSHED, NOT_FLUSHED = 0, 1, 2

# The least that mkfs makes; the files are sparse.
_SIZES = {"ext4": 16 << 20, "xfs": 320 << 20, "btrfs": 128 << 20}


def require_root() -> None:
    """Skips where nothing can be mounted."""
    if os.geteuid():
        pytest.skip("only root mounts file systems")


def make(kind: str, image: Path, *options: str, size: int = 0) -> Path:
    """A file with an empty file system, as small as can be, or of so many bytes."""
    image.touch()
    os.truncate(image, size or _SIZES[kind])
    subprocess.run([f"mkfs.{kind}", "-q", *options, image], check=True, capture_output=True)
    return image


@contextmanager
def loops() -> Iterator[None]:
    """Waits for the loop devices, of which there are few."""
    require_root()
    with alone("loop"):
        yield


@contextmanager
def attached(image: Path) -> Iterator[str]:
    """Attaches a file as a disk, inside `loops`; yields the path of the device."""
    done = subprocess.run(["losetup", "--find", "--show", image], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file can be attached as a disk here: {done.stderr}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextmanager
def mounted(what: str | Path, where: Path, *options: str) -> Iterator[Path]:
    """Mounts, as mount(8) does, on a folder, which is made; yields that."""
    where.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, what, where], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot be mounted here: {done.stderr}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@contextmanager
def tmpfs(where: Path, size: str) -> Iterator[Path]:
    """Mounts a tmpfs of that size, for this user alone. What is mapped of it may be so for longer."""
    require_root()
    where.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


def forgotten(device: str) -> None:
    """Waits until the ext4 of a device is in no memory. Mounted again before, it would be the same one, shut down.

    A mount namespace that anybody makes has all mounts, and keeps them for as long as it lives.
    """
    for _ in range(6000):
        if not Path("/sys/fs/ext4", Path(device).name).exists():
            return
        time.sleep(0.01)
    pytest.skip("another mount namespace keeps the file system mounted")


def shut_down(folder: Path, how: int = NOT_FLUSHED) -> None:
    """From now on nothing reaches the disk of the ext4 that is mounted there, as if it had been unplugged."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, _EXT4_IOC_SHUTDOWN, struct.pack("I", how))
    except OSError as error:
        pytest.skip(f"no ext4 can be shut down here: {error}")
    finally:
        os.close(fd)


@contextmanager
def volume(image: Path, where: Path, *, behind: int = 0) -> Iterator[Path]:
    """Mounts the file system in a file.

    Args:
        image: the file.
        where: the folder to mount it on.
        behind: how many other disks to attach first, so that it gets the number of another device.
    """
    with ExitStack() as stack:
        for number in range(behind):
            other = image.with_name(f"other-{number}")
            other.write_bytes(bytes(1 << 20))
            stack.enter_context(attached(other))
        yield stack.enter_context(mounted(stack.enter_context(attached(image)), where))
