"""Restores a disk as it was at a backup; see `restore`."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from dirtmap.fmt.errors import ArgumentError, Error, StorageError
from dirtmap.tools.backup import files, images
from dirtmap.tools.backup.chain import ChainReader
from dirtmap.tools.backup.copying import Writer
from dirtmap.tools.backup.creating import Watcher
from dirtmap.tools.backup.opened import Images
from dirtmap.tools.backup.raw import RawTarget
from dirtmap.tools.backup.repository import WAIT_SECONDS, Repository
from dirtmap.tools.qsd import nodes

if TYPE_CHECKING:
    from dirtmap.engine import Host, Node
    from dirtmap.tools.backup.document import Backup

RAW, QCOW2 = "raw", "qcow2"
_CLUSTER = 4096  # bytes of zeros that become a hole


def restore(
    host: Host,
    repository: str | os.PathLike[str],
    disk: str,
    out: str | os.PathLike[str],
    *,
    at: str | None = None,
    form: str | None = None,
    force: bool = False,
    wait: float = WAIT_SECONDS,
    watch: Watcher = lambda disk, done, total: None,
) -> Backup:
    """Writes a disk as it was at a backup, and holds all that it reads against its digest.

    A file is written under a temporary name, and has its own once all of it is right and durable. On a block device,
    what is behind the disk stays as it is.

    Args:
        host: knows the nodes, whose bitmaps are all dirty once a block device of theirs was written.
        repository: the path of its folder.
        disk: its name in the repository.
        out: the path of a file or a block device.
        at: the number of a backup, or a time, see `Repository.at`; None for the newest.
        form: of the file, ``raw`` or ``qcow2``; None for qcow2 where ``out`` ends with that, else raw.
        force: replace a file, or write to a block device.
        wait: seconds to wait for a process that writes to the repository.
        watch: is told how far it is.

    Returns:
        The backup.

    Raises:
        ArgumentError: there is no such backup; or the block device is too small.
        StorageError: ``out`` is there already, and ``force`` is not said; or it is in use, or cannot be written.
        FormatError: the backup, or one that it needs, is damaged; a file has not got its name then.
    """
    place, path = Repository(repository), os.fspath(out)
    if os.path.islink(path):
        path = os.path.realpath(path)  # not the link is replaced
    form = form or (QCOW2 if path.endswith(".qcow2") else RAW)
    if form not in (RAW, QCOW2):
        raise ArgumentError(form, "neither raw nor qcow2")
    is_block = _look(path, force=force)
    with place.reading(wait):
        backup = place.at(disk, at)
        chain = place.chain(backup)
        with ChainReader(place, chain, direct=True) as reader:
            _refuse_used(host, path)
            if is_block:
                if form != RAW:
                    raise ArgumentError(path, "a block device is restored as a raw disk")
                _write_device(host, path, backup, reader, watch)
            else:
                _write_file(path, form, backup, reader, watch)
    return backup


def _look(path: str, *, force: bool) -> bool:
    """Whether there is a block device; refuses what must not be written to."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(path, error.strerror or str(error), error.errno) from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise StorageError(path, "neither a regular file nor a block device")
    if not force:
        what = "is a block device, and all on it is lost" if stat.S_ISBLK(mode) else "is there already"
        raise StorageError(path, f"{what}; --force insists")
    return stat.S_ISBLK(mode)


def _write_file(path: str, form: str, backup: Backup, reader: ChainReader, watch: Watcher) -> None:
    temporary = path + ".dirtmap" + files.TEMPORARY
    files.discard(temporary)
    try:
        if form == RAW:
            with RawTarget(temporary, backup.size) as raw:
                _write(Writer(raw, _CLUSTER), backup, reader, watch)
        else:
            images.create(temporary, backup.size)
            with Images() as opened:
                opened.open("out", nodes.image(temporary, form, writable=True))
                _write(Writer(opened.connect("out"), _CLUSTER), backup, reader, watch)
            files.sync(temporary)
        files.rename(temporary, path)
    finally:
        files.discard(temporary)


def _write_device(host: Host, path: str, backup: Backup, reader: ChainReader, watch: Watcher) -> None:
    with files.unused_device(path) as size:
        if size < backup.size:
            raise ArgumentError(path, f"has {size} bytes, and the disk has {backup.size}")
        # Whatever becomes of this, the bitmaps of a node there do not tell what is on it any more.
        _make_dirty(host, path)
        with Images() as opened:
            opened.open("out", nodes.image(path, RAW, writable=True))
            device = opened.connect("out")
            _write(Writer(device, _CLUSTER, zeros=device), backup, reader, watch)
        files.sync(path)


def _nodes_at(host: Host, path: str, *, surely: bool) -> list[str]:
    """The names of the nodes whose disk is at a path, as targets; ``surely``: or an error."""
    # A store that is lost must keep nobody from restoring a disk.
    if not os.path.exists(path) or not os.path.exists(host.home):
        return []
    problems: list[Error] = []
    nodes: list[Node] = []
    try:
        nodes = host.nodes(problems)
    except Error as error:
        problems.append(error)
    for problem in problems if surely else ():  # a store that cannot be read may have a node there
        raise problem
    found = [node for node in nodes if os.path.exists(node.path) and os.path.samefile(node.path, path)]
    return [f"node:{node.name}" for node in found]


def _refuse_used(host: Host, path: str) -> None:
    """Refuses what somebody writes to at the moment.

    Raises:
        LockedError: a program has it open under QEMU's locks, or tracks it.
    """
    import dirtmap.engine as dm

    if os.path.exists(path):
        with host.offline(dm.Disk(os.path.abspath(path), RAW)):
            pass
    # Damage to a store must keep nobody from restoring a file.
    for target in _nodes_at(host, path, surely=False):
        with host.open(target, force_share=True) as image:
            if (status := image.tracking()) is not None and status.alive:
                raise dm.LockedError(path, f"tracked by {status.tracker}; end it first")


def _make_dirty(host: Host, path: str) -> None:
    for target in _nodes_at(host, path, surely=True):
        with host.open(target) as image, image.transaction() as bitmaps:
            for name in bitmaps:
                if not bitmaps[name].inconsistent:
                    bitmaps[name].mark(0, bitmaps.size)


def _write(writer: Writer, backup: Backup, reader: ChainReader, watch: Watcher) -> None:
    done = 0
    for data in reader.read():
        writer.write(data)
        done += data.length
        watch(backup.disk, done, backup.size)
    writer.finish()
