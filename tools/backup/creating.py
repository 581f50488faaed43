"""Makes backups of disks that are offline; see `create`."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from dirtmap.fmt.errors import ArgumentError, Error, printable
from dirtmap.tools.backup import files, state
from dirtmap.tools.backup.copying import Run, Source, Writer, copy, dirty_runs, pieces_of, read, with_holes
from dirtmap.tools.backup.document import FULL, INCREMENTAL, ZSTD, Backup, Digest, Piece, parts
from dirtmap.tools.backup.making import new_image
from dirtmap.tools.backup.opened import Images
from dirtmap.tools.backup.raw import RawSource
from dirtmap.tools.backup.repository import DOCUMENT, IMAGE, WAIT_SECONDS, Repository
from dirtmap.tools.qsd import nodes

if TYPE_CHECKING:
    from dirtmap.engine import Bitmap, Disk, Handle, Host

FIRST, RESIZED, BROKEN = "first", "resized", "chain-broken"
_CLUSTER = 1 << 16  # bytes, at most; as QEMU makes images


class Watcher(Protocol):
    """Is told how far a copy is: the disk's name, bytes done, and bytes in all."""

    def __call__(self, disk: str, done: int, total: int) -> object:
        """Takes it."""


@dataclass
class _Plan:
    """A backup that is to be made.

    Attributes:
        image: the disk's bitmaps.
        disk: where it is.
        backup: as it is known so far.
        changed: what is to be copied; None for all.
        offline: keeps the disk as it is until it is closed, which fails where that was not so.
    """

    image: Handle
    disk: Disk
    backup: Backup
    changed: Bitmap | None
    offline: contextlib.ExitStack


def create(
    host: Host,
    targets: Iterable[str],
    repository: str | os.PathLike[str],
    *,
    compress: str | None = None,
    wait: float = WAIT_SECONDS,
    watch: Watcher = lambda disk, done, total: None,
) -> list[Backup]:
    """Makes a backup of each disk, as of one moment for all: an increment to its last one, or a full one.

    All disks are kept offline until they are copied. Each backup is durable before the next is begun. Where one fails,
    those before it stay, and the next call is right for all of them.

    Args:
        host: knows the disks.
        targets: paths of qcow2 images, or names of nodes.
        repository: the path of its folder; it is made where it is not there.
        compress: ``zstd`` has QEMU compress the images; None leaves them as they are.
        wait: seconds to wait for another process that uses the repository.
        watch: is told how far it is.

    Returns:
        The backups, in the order of the targets.

    Raises:
        ArgumentError: two targets are one disk, or have one name; or there is no such compression.
        LockedError: a disk is in use, or was written to meanwhile.
        Error: what the engine, QEMU or the operating system says.
    """
    if compress not in (None, ZSTD):
        raise ArgumentError("compress", f"'{printable(compress)}' is not {ZSTD}")
    place = Repository.made(repository)
    with place.writing(wait), contextlib.ExitStack() as stack:
        plans: list[_Plan] = []
        for target in targets:
            plan = _begin(host, place, target, stack)
            if any(other.backup.disk == plan.backup.disk for other in plans):
                raise ArgumentError(target, f"another target is called '{printable(plan.backup.disk)}', too")
            plans.append(plan)
        return [_carry_out(place, plan, compress, watch) for plan in plans]


def _begin(host: Host, place: Repository, target: str, stack: contextlib.ExitStack) -> _Plan:
    """Begins the bitmap of a new backup, and keeps the disk offline from then on."""
    # Read without a lock where that goes: who has it open is told by what follows, and better.
    image = stack.enter_context(host.open(target, force_share=True))
    state.refuse_unknown(image, is_device=host.locate(target).is_device)
    disk = image.disk()
    name = disk_name(image, disk)
    earlier = place.backups()
    last = next((backup for backup in reversed(earlier) if backup.disk == name), None)
    if last is not None:
        require_same_disk(place, image, disk, last)
    now = datetime.now(UTC)
    made = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(8)}"
    broken = None if last is None else _broken(place, last, image.size)
    names = state.Names(
        place.bitmap_prefix,
        {backup.bitmap for backup in earlier},
        place.bitmap_name(made),
        None if last is None or broken else last.bitmap,
    )
    offline = stack.enter_context(contextlib.ExitStack())
    if disk.format == "raw":
        offline.enter_context(host.offline(disk))
        since = state.begin_stored(image, names)
    else:
        begun = state.begin_qcow2(image, names)
        offline.enter_context(host.offline(disk))
        since = state.changed_qcow2(image, names, begun)
    reason, why = since.reason, since.why
    if last is None:
        reason, why = FIRST, "the repository has no earlier backup of this disk"
    elif broken:
        reason, why = broken
    granularity = image[names.new].granularity
    changed = None if reason else since.bitmap
    if changed is not None:
        granularity = changed.granularity
    backup = Backup(
        id=made,
        repository=place.uuid,
        disk=name,
        number=last.number + 1 if last else 1,
        uuid=image.uuid,
        path=disk.path,
        format=disk.format,
        size=image.size,
        time=now.isoformat(timespec="milliseconds"),
        kind=FULL if changed is None else INCREMENTAL,
        parent=None if changed is None or last is None else last.id,
        reason=reason,
        why=why,
        granularity=granularity,
        cluster_size=min(granularity, _CLUSTER),
        image_size=0,
        bitmap=names.new,
        dirty=image.size if changed is None else changed.count,
        copied=0,
        zeros=0,
        seconds=0.0,
        pieces=0,
        pieces_digest="",
    )
    return _Plan(image, disk, backup, changed, offline)


def disk_name(image: Handle, disk: Disk) -> str:
    """How a repository calls a disk: as its node is called, or else its file."""
    return image.name or os.path.basename(disk.path)


def require_same_disk(place: Repository, image: Handle, disk: Disk, last: Backup) -> None:
    """Refuses another disk of the name of one that the repository has.

    Raises:
        ArgumentError: it is another one, as far as can be told.
    """
    # A disk whose store was lost has another UUID, at the same place.
    if not (disk.path == last.path or last.uuid == image.uuid is not None or last.bitmap in image):
        what = f"has backups of another disk that is called '{printable(last.disk)}', {printable(last.path)}"
        raise ArgumentError(place.path, f"{what}; 'node add' gives this one a name, or use another repository")


def _broken(place: Repository, last: Backup, size: int) -> tuple[str, str] | None:
    """Why nothing can be put on top of the last backup: one word, and a sentence; None where it can."""
    if last.size != size:
        return RESIZED, f"the disk has {size} bytes now, and had {last.size}"
    try:
        place.require_sound(last)
    except Error as error:
        return BROKEN, f"the last backup cannot be used: {error}"
    return None


def _carry_out(place: Repository, plan: _Plan, compress: str | None, watch: Watcher) -> Backup:
    """Copies what is to be copied, and makes a backup of it."""
    base = os.path.join(place.path, plan.backup.id)
    temporary = base + IMAGE + files.TEMPORARY
    with contextlib.ExitStack() as undo:
        for path in (temporary, base + ".pieces"):
            undo.callback(files.discard, path)
        spool = Spool(base + ".pieces")
        plan.backup = replace(plan.backup, compression=compress)
        backup = _copy(plan, spool, temporary, watch)
        plan.offline.close()  # fails where the disk did not stay as it was
        backup = replace(backup, image_size=os.path.getsize(temporary))
        files.rename(temporary, base + IMAGE)
        files.write(base + DOCUMENT, parts(backup, spool.lines()))
    return backup


def _copy(plan: _Plan, spool: Spool, temporary: str, watch: Watcher) -> Backup:
    backup, cluster, size = plan.backup, plan.backup.cluster_size, plan.backup.size
    begun = time.monotonic()
    parent = None if backup.parent is None else backup.parent + IMAGE
    total = min(backup.dirty, size)
    made = new_image(temporary, size, cluster=cluster, backing=parent, compression=backup.compression)
    with spool, reading(plan.disk, size) as source, made as image:
        writer = Writer(image, cluster, zeros=None if parent is None else image)
        runs: Iterable[Run] = [Run(0, size)] if size else []
        if plan.changed is not None:
            runs = dirty_runs(plan.changed)
        wanted = pieces_of(with_holes(source, runs, cluster, size))
        done = 0

        def progress(length: int) -> None:
            nonlocal done
            done += length
            watch(backup.disk, done, total)

        copy(read(source, wanted), writer, spool.keep, progress)
    return replace(
        backup,
        copied=writer.copied,
        zeros=done - writer.copied,
        seconds=round(time.monotonic() - begun, 3),
        pieces=spool.digest.count,
        pieces_digest=spool.digest.hex(),
    )


@contextlib.contextmanager
def reading(disk: Disk, size: int) -> Iterator[Source]:
    """A disk of ``size`` bytes, to be read until the end of the block."""
    if disk.format == "raw":
        with RawSource(disk.path, size) as raw:
            yield raw
        return
    with Images() as opened:
        opened.open("disk", nodes.image(disk.path, disk.format))
        yield opened.connect("disk")


class Spool:
    """A file that takes the lines of pieces until the document can be written, which says first how many there are."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.digest = Digest()

    def __enter__(self) -> Spool:
        with files.failing(self._path):
            self._file = open(self._path, "wb")
        return self

    def keep(self, piece: Piece) -> None:
        """Takes the next piece."""
        line = piece.line()
        self.digest.add(line)
        with files.failing(self._path):
            self._file.write(line + b"\n")

    def __exit__(self, *_: object) -> None:
        with files.failing(self._path):
            self._file.close()

    def lines(self) -> Iterator[bytes]:
        """The lines, without their ends, once it is closed."""
        with files.failing(self._path), open(self._path, "rb") as file:
            for line in file:
                yield line.rstrip(b"\n")
