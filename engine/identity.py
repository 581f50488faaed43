"""What an image looks like from outside. This tells which file it is, and whether it has changed."""

from __future__ import annotations

import os
import stat
import time
import uuid
from contextlib import suppress

from dirtmap.engine.qcow2.datafile import data_path
from dirtmap.engine.qcow2.layout import read_head
from dirtmap.engine.system.file import File, is_same_file, open_file
from dirtmap.engine.system.filesystem import look_at
from dirtmap.fmt import qcow2, store
from dirtmap.fmt.errors import StorageError, errno_of, printable
from dirtmap.fmt.identity import Identity
from dirtmap.fmt.parsers.qcow2 import HEADER_V2
from dirtmap.fmt.store import Record

_SECOND_NS = 1_000_000_000
# Linux before 6.13 takes the time of a write from a clock that steps every 1 to 10 ms. Some file systems keep whole
# seconds only, as ext4 with small inodes, or even seconds, as FAT.
_TICK_NS = 20_000_000
_ROUNDS = 10


def identity_of(path: str) -> Identity:
    """What an image looks like now: which file it is, its size and times; a block device's number, medium and size.

    Raises:
        StorageError: it cannot be looked at, or is neither.
    """
    try:
        status, place = look_at(path)
        if stat.S_ISREG(status.st_mode):
            # Before 1970 a time is negative; it is only ever compared.
            times = status.st_mtime_ns % 2**64, status.st_ctime_ns % 2**64
            return Identity(*place, status.st_size, *times)
        if stat.S_ISBLK(status.st_mode):
            with open_file(path) as file:
                return Identity(*place, size=file.size())
    except (OSError, ValueError) as error:  # the latter: a path that no file can have
        raise StorageError(path, getattr(error, "strerror", None) or str(error), errno_of(error)) from error
    raise StorageError(path, "neither a regular file nor a block device")


def touched(path: str) -> int:
    """When a file was last written to or changed in its times, names, owner or mode; ns since 1970.

    The time of the last write can be put back, as ``touch -r`` and ``cp -p`` do. That of the last change cannot.

    Returns:
        The later of the two times; 0 for a block device, which has none.

    Raises:
        StorageError: it cannot be looked at.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise StorageError(path, getattr(error, "strerror", None) or str(error)) from error
    return max(status.st_mtime_ns, status.st_ctime_ns) if stat.S_ISREG(status.st_mode) else 0


def data_file_of(path: str) -> str | None:
    """The path of the file that has a qcow2 image's guest data; None if the image itself has it.

    Raises:
        StorageError: the image cannot be read, or does not say which file that is.
    """
    with open_file(path) as file:
        return data_path(read_head(file)) if _is_qcow2(file) else None


def identity_of_disk(path: str) -> Identity:
    """Like `identity_of`, but of all that a guest reads. The data of a qcow2 image may be in another file.

    Raises:
        StorageError: either cannot be looked at.
    """
    identity, data = identity_of(path), data_file_of(path)
    if data is None:
        return identity
    try:
        return identity.with_data(identity_of(data))
    except StorageError as error:
        raise StorageError(path, f"its external data file, {error}", error.errno) from error


def identity_now(record: Record) -> Identity:
    """What the image of a node, or of a device's root, looks like now. Errors as `identity_of_disk`."""
    look = identity_of_disk if record.kind == store.KIND_DEVICE else identity_of
    return look(os.fsdecode(record.path))


def root_elsewhere(record: Record) -> str | None:
    """Why a device's root is not at its recorded path any more; None if it is, or if that is not known.

    A qcow2 root is known by its UUID. A raw root has none, so another raw image at the path counts as the root.
    """
    if record.kind != store.KIND_DEVICE:
        return None
    path = os.fsdecode(record.path)
    with suppress(StorageError), open_file(path) as file:
        # The recorded identity of a raw root has the size of its disk. That of a qcow2 image has it only by chance.
        was_raw = record.identity.size == record.size
        if not (read_head(file).uuid == record.root_uuid if _is_qcow2(file) else was_raw):
            return f"its root's image is not at {printable(path)} any more; 'index scan' finds one that was moved"
    return None


def _is_qcow2(file: File) -> bool:
    return file.read(0, len(qcow2.MAGIC)) == qcow2.MAGIC


def lasting_identity(path: str, *, of_disk: bool = False) -> Identity:
    """Like `identity_of`, but any later write to the image will give it another time. This is what gets recorded.

    A time is only as fine as its clock. If the image was written to just before, this waits until the clock has moved
    on: a few milliseconds, or longer if the file system keeps whole seconds.

    A write through a mapping changes the time of the file only when it makes a clean page dirty. So the file is written
    back, until none of its pages has become dirty meanwhile. Source: Linux, ``file_update_time`` in
    ``filemap_page_mkwrite``. A tmpfs does not do this.

    Args:
        path: of the image.
        of_disk: looks at all that a guest reads, as `identity_of_disk`.

    Raises:
        StorageError: as `identity_of`; or the image cannot be written back, or is written to without pause.
    """
    files = [path]
    if of_disk and (data := data_file_of(path)) is not None:
        files.append(data)
    look = identity_of_disk if of_disk else identity_of
    for _ in range(_ROUNDS):
        found = look(path)
        for each in files:
            now = identity_of(each)
            _wait_out(now.mtime_ns, now.ctime_ns)
            with open_file(each) as file:
                file.write_back()
        if look(path) == found:
            return found
    raise StorageError(path, "is being written to without pause, so that nobody would see what is written next")


def lasting_identity_now(record: Record) -> Identity:
    """Like `identity_now`, but to be recorded; see `lasting_identity`."""
    return lasting_identity(os.fsdecode(record.path), of_disk=record.kind == store.KIND_DEVICE)


def _wait_out(*times_ns: int) -> None:
    """Waits until whatever is written next has another time than those."""
    for time_ns in times_ns:
        tick = _TICK_NS if time_ns % _SECOND_NS else 2 * _SECOND_NS
        # A time to come is another machine's: what passes here passes there, too.
        age = max(time.time_ns() - time_ns, 0)
        if time_ns and age < tick:
            time.sleep((tick - age) / _SECOND_NS)


def disk_size(path: str) -> int:
    """The size in bytes of an image's disk: the virtual size of a qcow2 image, else the size of the file or device.

    Raises:
        StorageError: the image cannot be read.
    """
    with open_file(path) as file:
        head = file.read(0, HEADER_V2.size)
        if head[: len(qcow2.MAGIC)] == qcow2.MAGIC and len(head) == HEADER_V2.size:
            return int(HEADER_V2.parse(head).size)
        return file.size()


def is_twin(record: Record, path: str) -> bool:
    """True where ``path`` is another file than the one remembered, and that one, or one put in its place, is there.

    If none is, the image was moved. Where both look like that one, the file system that it is on was copied as a whole.
    """
    place, there = os.fsdecode(record.path), record.identity
    if is_same_file(path, place):
        return False
    here = identity_of(path)
    with suppress(StorageError):
        original = identity_of(place)
        if original.is_file(there):
            return True
        return not here.is_file(there) and not original.is_file(here) and carries(record)
    return False


def carries(record: Record) -> bool:
    """True if the file at a qcow2 image's place has the image's UUID: the image itself, or a copy that was put there.

    Raises:
        StorageError: the file cannot be read.
    """
    from dirtmap.engine.qcow2.reading import read_identity

    found = read_identity(os.fsdecode(record.path))
    return found is not None and uuid.UUID(found[1]).bytes == record.uuid
