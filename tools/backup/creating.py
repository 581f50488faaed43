"""Makes backups of disks; see `create`."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from dirtmap.fmt.errors import ArgumentError, Error, UnsupportedError, printable
from dirtmap.tools.backup import files, state
from dirtmap.tools.backup.copying import Run, Source, Writer, copy, dirty_runs, pieces_of, read, with_holes
from dirtmap.tools.backup.direct import DirectImage
from dirtmap.tools.backup.document import (
    FULL,
    INCREMENTAL,
    LIVE,
    OFFLINE,
    REFLINK,
    SOURCE,
    ZSTD,
    Backup,
    Digest,
    Piece,
    parts,
)
from dirtmap.tools.backup.freezing import Written, freeze
from dirtmap.tools.backup.making import new_image
from dirtmap.tools.backup.opened import Images
from dirtmap.tools.backup.raw import RawSource
from dirtmap.tools.backup.repository import DOCUMENT, IMAGE, WAIT_SECONDS, Repository
from dirtmap.tools.qsd import nodes

if TYPE_CHECKING:
    from dirtmap.engine import Bitmap, Disk, Handle, Host

FIRST, RENAMED, RESIZED, BROKEN = "first", "renamed", "resized", "chain-broken"
_CLUSTER = 1 << 16  # bytes, at most; as QEMU makes images


class Watcher(Protocol):
    """Is told how far a copy is: the disk's name, bytes done, and bytes in all."""

    def __call__(self, disk: str, done: int, total: int) -> object:
        """Takes it."""


@dataclass
class _Target:
    """A disk that a backup is to be made of.

    Attributes:
        image: its bitmaps.
        disk: where it is.
        name: of the disk in the repository.
        id: of the backup.
        time: when it was begun.
        last: the disk's last backup; None where there is none.
        former: a backup of another disk, as far as names tell, of which the image has the bitmap; None where there is
            none.
        broken: why nothing can be put on top of that, one word and a sentence; None where it can.
        names: of its bitmaps.
        base: the bitmap from which the next backup goes on.
        how: it is written meanwhile, and is read so: see `freezing`; None where it is kept offline.
        kept: keeps what is read as it is until it is closed, which fails where that was not so.
    """

    image: Handle
    disk: Disk
    name: str
    id: str
    time: datetime
    last: Backup | None
    former: Backup | None
    broken: tuple[str, str] | None
    names: state.Names
    base: str
    how: str | None
    kept: contextlib.ExitStack


@dataclass
class _Plan:
    """A backup that is to be made.

    Attributes:
        disk: what is read.
        backup: as it is known so far.
        changed: what is to be copied; None for all.
        kept: see `_Target`.
    """

    disk: Disk
    backup: Backup
    changed: Bitmap | None
    kept: contextlib.ExitStack


def create(
    host: Host,
    targets: Iterable[str],
    repository: str | os.PathLike[str],
    *,
    sources: Mapping[str, str] | None = None,
    snapshot: str | None = None,
    live: bool = False,
    compress: str | None = None,
    wait: float = WAIT_SECONDS,
    watch: Watcher = lambda disk, done, total: None,
) -> list[Backup]:
    """Makes a backup of each disk, as of one moment for all: an increment to its last one, or a full one.

    A disk that nobody tracks is kept offline until it is copied. One that is tracked is cloned, where neither
    ``sources`` nor ``live`` says otherwise, and goes on being written. Each backup is durable before the next is begun.
    Where one fails, those before it stay, and the next call is right for all of them.

    Args:
        host: knows the disks.
        targets: paths of qcow2 images, or names of nodes.
        repository: the path of its folder; it is made where it is not there.
        sources: of targets that are tracked: the path of a snapshot, that is read instead.
        snapshot: a command of the shell that makes these snapshots; it is run while nothing is written to the disks.
            None where they have been made already, after the last backups.
        live: reads disks that are tracked while they are written. What is copied is not of one moment.
        compress: ``zstd`` has QEMU compress the images; None leaves them as they are.
        wait: seconds to wait for another process that uses the repository.
        watch: is told how far it is.

    Returns:
        The backups, in the order of the targets.

    Raises:
        ArgumentError: two targets are one disk, or have one name; the arguments do not go together; or there is no such
            compression.
        BitmapError: no checkpoint is known to be older than a snapshot.
        LockedError: a disk is in use, or was written to meanwhile.
        UnsupportedError: a disk that is tracked cannot be cloned.
        Error: what the engine, QEMU or the operating system says.
    """
    if compress not in (None, ZSTD):
        raise ArgumentError("compress", f"'{printable(compress)}' is not {ZSTD}")
    chosen, given = list(targets), dict(sources or {})
    _require_fitting(chosen, given, snapshot, live)
    place = Repository.made(repository, wait)
    with place.writing(wait), contextlib.ExitStack() as stack:
        found: list[_Target] = []
        with _unmaking(place, found):
            for target in chosen:
                one = _look_at(host, place, target, stack, given.get(target), after=snapshot is None, live=live)
                if any(other.name == one.name for other in found):
                    raise ArgumentError(target, f"another target is called '{printable(one.name)}', too")
                found.append(one)
            offline = {one.name: _begin_offline(host, one) for one in found if one.how is None}
            written = _begin_written(host, [one for one in found if one.how is not None], snapshot)
        plans = [_planned(place, one, {**offline, **written}[one.name]) for one in found]
        return [_carry_out(host, place, plan, compress, watch) for plan in plans]


@contextlib.contextmanager
def _unmaking(place: Repository, targets: list[_Target]) -> Iterator[None]:
    """Removes a repository again that is new, where the block fails before any of its bitmaps has begun.

    Once one has, the repository stays: by its UUID the next backup knows the bitmap, and removes it.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(Error):  # the block's own error is the one to raise
            if not any(name.startswith(place.bitmap_prefix) for one in targets for name in one.image):
                place.unmake()
        raise


def _require_fitting(targets: list[str], sources: Mapping[str, str], snapshot: str | None, live: bool) -> None:
    if unknown := [target for target in sources if target not in targets]:
        raise ArgumentError("sources", f"'{printable(unknown[0])}' is no target")
    if live and sources:
        raise ArgumentError("live", "goes with no snapshot, which nobody writes")
    if snapshot is not None and not sources:
        raise ArgumentError("snapshot", "--source has to say what the command makes")


def _look_at(
    host: Host,
    place: Repository,
    target: str,
    stack: contextlib.ExitStack,
    source: str | None,
    *,
    after: bool,
    live: bool,
) -> _Target:
    """Opens a target, and decides what its backup will go on from, and how the disk is read.

    Args:
        host: knows it.
        place: the repository.
        target: as it was given.
        stack: closes it.
        source: its snapshot.
        after: that is there already.
        live: it may be read while it is written.
    """
    # Read without a lock where that goes: who has it open is told by what follows, and better.
    image = stack.enter_context(host.open(target, force_share=True))
    state.refuse_unknown(image, is_device=host.locate(target).is_device)
    disk = image.disk()
    name = disk_name(image, disk)
    earlier = place.backups()
    last = next((backup for backup in reversed(earlier) if backup.disk == name), None)
    if last is not None:
        require_same_disk(place, image, disk, last)
    how = None
    if state.is_written(image) and disk.format == "raw":
        how = SOURCE if source is not None else LIVE if live else REFLINK
    elif source is not None:
        raise ArgumentError(target, "is not tracked, so it is kept offline and read itself: it has no --source")
    now = datetime.now(UTC)
    made = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(8)}"
    broken = None if last is None else _broken(place, last, image.size)
    new = base = place.bitmap_name(made)
    if how == SOURCE and after:
        base = state.base_of_snapshot(image, None if last is None else place.bitmap_name(last.id))
    usable = None if last is None or broken else last.bitmap
    names = state.Names(place.bitmap_prefix, place.bitmaps(earlier), new, usable)
    kept = stack.enter_context(contextlib.ExitStack())
    if how is not None and source is not None:
        disk = replace(disk, path=source)
    former = _former(place, name, earlier, image)
    return _Target(image, disk, name, made, now, last, former, broken, names, base, how, kept)


def _begin_offline(host: Host, target: _Target) -> tuple[Disk, state.Since]:
    """Begins the bitmap of a new backup, and keeps the disk offline from then on."""
    image, disk, names = target.image, target.disk, target.names
    if disk.format == "raw":
        target.kept.enter_context(host.offline(disk))
        return disk, state.begin_stored(image, names)
    begun = state.begin_qcow2(image, names)
    target.kept.enter_context(host.offline(disk))
    return disk, state.changed_qcow2(image, names, begun)


def _begin_written(host: Host, targets: list[_Target], snapshot: str | None) -> dict[str, tuple[Disk, state.Since]]:
    """Begins the checkpoints of new backups at one instant, and freezes the disks."""
    for target in targets:
        state.forget_failed(target.image, target.names)
    written = [
        Written(target.image, target.names.new, target.how or LIVE, target.disk, target.kept) for target in targets
    ]
    freeze(host, written, snapshot)
    return {
        target.name: (one.disk, state.since_tracked(target.image, target.names))
        for target, one in zip(targets, written, strict=True)
    }


def _planned(place: Repository, target: _Target, begun: tuple[Disk, state.Since]) -> _Plan:
    """What is to be copied, and what is known of the backup before that."""
    image, last = target.image, target.last
    disk, since = begun
    reason, why = since.reason, since.why
    if (former := target.former) is not None and (last is None or reason == state.MISSING):
        earlier = f"'{printable(former.disk)}' ({printable(former.path)})"
        bitmap = place.bitmap_name(former.id)
        reason, why = RENAMED, f"as its bitmap {bitmap} tells, it is {earlier} under another name, or a copy of that"
    elif last is None:
        reason, why = FIRST, "the repository has no earlier backup of this disk"
    elif target.broken:
        reason, why = target.broken
    granularity = image[target.names.new].granularity
    changed = None if reason else since.bitmap
    if changed is not None:
        granularity = changed.granularity
    is_at = image.disk()
    backup = Backup(
        id=target.id,
        repository=place.uuid,
        disk=target.name,
        number=last.number + 1 if last else 1,
        uuid=image.uuid,
        path=is_at.path,
        format=is_at.format,
        size=image.size,
        time=target.time.isoformat(timespec="milliseconds"),
        kind=FULL if changed is None else INCREMENTAL,
        parent=None if changed is None or last is None else last.id,
        reason=reason,
        why=why,
        granularity=granularity,
        cluster_size=min(granularity, _CLUSTER),
        image_size=0,
        bitmap=target.base,
        dirty=image.size if changed is None else changed.count,
        copied=0,
        zeros=0,
        seconds=0.0,
        pieces=0,
        pieces_digest="",
        frozen=target.how or OFFLINE,
    )
    return _Plan(disk, backup, changed, target.kept)


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


def _former(place: Repository, name: str, earlier: Iterable[Backup], image: Handle) -> Backup | None:
    """The newest backup of a disk of another name whose bitmap, or checkpoint, an image has; None if it has none."""
    names = set(image)
    found = [each for each in earlier if each.disk != name and place.bitmap_name(each.id) in names]
    return max(found, key=lambda each: each.time, default=None)


def _broken(place: Repository, last: Backup, size: int) -> tuple[str, str] | None:
    """Why nothing can be put on top of the last backup: one word, and a sentence; None where it can."""
    if last.size != size:
        return RESIZED, f"the disk has {size} bytes now, and had {last.size}"
    try:
        place.require_sound(last)
    except Error as error:
        return BROKEN, f"the last backup cannot be used: {error}"
    return None


def _carry_out(host: Host, place: Repository, plan: _Plan, compress: str | None, watch: Watcher) -> Backup:
    """Copies what is to be copied, and makes a backup of it."""
    base = os.path.join(place.path, plan.backup.id)
    temporary = base + IMAGE + files.TEMPORARY
    with contextlib.ExitStack() as undo:
        for path in (temporary, base + ".pieces"):
            undo.callback(files.discard, path)
        spool = PieceFile(base + ".pieces")
        plan.backup = replace(plan.backup, compression=compress)
        backup = _copy(host, plan, spool, temporary, watch)
        plan.kept.close()  # fails where the disk did not stay as it was
        backup = replace(backup, image_size=os.path.getsize(temporary))
        files.rename(temporary, base + IMAGE)
        files.write(base + DOCUMENT, parts(backup, spool.lines()))
    return backup


def _copy(host: Host, plan: _Plan, spool: PieceFile, temporary: str, watch: Watcher) -> Backup:
    backup, cluster, size = plan.backup, plan.backup.cluster_size, plan.backup.size
    begun = time.monotonic()
    parent = None if backup.parent is None else backup.parent + IMAGE
    total = min(backup.dirty, size)
    made = new_image(temporary, size, cluster=cluster, backing=parent, compression=backup.compression)
    with spool, reading(host, plan.disk, size) as source, made as image:
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

        copy(read(source, wanted), writer, spool.keep, progress, source.recycle)
    return replace(
        backup,
        copied=writer.copied,
        zeros=done - writer.copied,
        seconds=round(time.monotonic() - begun, 3),
        pieces=spool.digest.count,
        pieces_digest=spool.digest.hex(),
    )


@contextlib.contextmanager
def reading(host: Host, disk: Disk, size: int) -> Iterator[Source]:
    """A disk of ``size`` bytes, to be read until the end of the block; what it is on is kept from being written to."""
    with contextlib.ExitStack() as stack:
        yield _opened(stack, host, disk, size)


@contextlib.contextmanager
def reading_tracked(host: Host, image: Handle, disk: Disk) -> Iterator[Source]:
    """A raw disk that goes on being written, to be read until the end of the block.

    Raises:
        LockedError: what was opened is not what its tracker tracks; or as `Host.instant`.
    """
    with RawSource(disk.path, image.size) as source:
        with host.instant([image]) as instant:
            instant.require_file(image, source.opened)
        yield source


def _opened(stack: contextlib.ExitStack, host: Host, disk: Disk, size: int) -> Source:
    if disk.format == "raw":
        return stack.enter_context(RawSource(disk.path, size))
    try:
        return stack.enter_context(DirectImage(disk.path, host))
    except UnsupportedError:
        opened = stack.enter_context(Images())
        opened.open("disk", nodes.image(disk.path, disk.format))
        return opened.connect("disk")


class PieceFile:
    """A file that takes the lines of pieces until the document can be written, which says first how many there are."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.digest = Digest()

    def __enter__(self) -> PieceFile:
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
