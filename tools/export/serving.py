"""`export`: holds bitmaps, writes them into carriers and has a daemon serve them beside their disks."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import dirtmap.engine as dm
from dirtmap.fmt import geometry
from dirtmap.fmt.errors import ArgumentError, BitmapError, BitmapNotFoundError, LockedError, printable
from dirtmap.fmt.spelling import escaped, shown_as
from dirtmap.tools.export.carrier import make_carrier, put_into_carrier, require_sizes
from dirtmap.tools.frozen import frozen_copy, prepared_clone
from dirtmap.tools.qsd import nodes
from dirtmap.tools.qsd.daemon import Daemon, require_programs

if TYPE_CHECKING:
    from dirtmap.engine import Bitmap, Clone, Disk, Handle, Host, ImageInfo
    from dirtmap.tools.listening.listener import Listener

_OTHERWISE = "--source serves a frozen copy, --live insists"
_TOGETHER = 64 << 20  # bytes of bits that are in memory at a time, and go into a carrier with one commit; or one bitmap


@dataclass(frozen=True, slots=True)
class Export:
    r"""What is served of one target.

    Attributes:
        target: as it was given.
        name: of the export: the node's or device's, else that of the image's file.
        uri: for NBD clients.
        size: of the disk, in bytes. QEMU serves whole sectors.
        bitmaps: their names, each a metadata context with ``qemu:dirty-bitmap:`` in front. A byte of a name that is not
            UTF-8 is spelled ``\xff``. What changed since a checkpoint is called ``since-`` and its name.
        left_out: the bitmaps that are not served, and why.
        notes: what a user should know although it is served, one line each.
    """

    target: str
    name: str
    uri: str
    size: int
    bitmaps: tuple[str, ...]
    left_out: dict[str, str]
    notes: tuple[str, ...]


class Serving:
    """Exports, while they are served.

    Attributes:
        exports: one for each target, in their order.
        listener: where they are.
    """

    def __init__(self, exports: tuple[Export, ...], listener: Listener, daemon: Daemon) -> None:
        self.exports, self.listener, self._daemon = exports, listener, daemon

    @property
    def uris(self) -> tuple[str, ...]:
        """For NBD clients, one for each target."""
        return tuple(export.uri for export in self.exports)

    def wait(self) -> None:
        """Waits for a signal, whose handler raises something, or for the death of the server.

        Raises:
            Error: the server has died; the error has what it said.
        """
        self._daemon.wait()

    def require_running(self) -> None:
        """Refuses to call it served where the server has died meanwhile. Errors as `wait`."""
        self._daemon.require_running()


@contextlib.contextmanager
def export(
    host: Host,
    targets: Sequence[str],
    listener: Listener,
    *,
    bitmaps: Sequence[str] = (),
    since: str | None = None,
    sources: Sequence[str] = (),
    live: bool = False,
    reflink: bool = False,
    owner: str = "dirtmap export",
) -> Iterator[Serving]:
    """Serves disks with their bitmaps, read-only, over NBD, until the end of the block.

    The bitmaps are what they are when the block begins, and are held until it ends: see `Namespace.hold_all`. A held
    bitmap does not change, so they are of one instant, that of the last hold. The disks are kept offline: see
    `Host.offline`. An error that tells of a write to them comes at the end of the block. The server ends with the
    thread that begins the block.

    Args:
        host: opens the targets.
        targets: images, nodes and devices; an export for each.
        listener: where to serve them.
        bitmaps: names of those to serve, of each target; none for all that can be used.
        since: a checkpoint of each target: what was written since is served as one more bitmap.
        sources: frozen copies of the disks, such as snapshots of a volume, one for each target and in their order; they
            are served in place of the disks, which may be written meanwhile. None: the disks themselves.
        live: serves disks although they are being written. What a client reads is not of one instant then.
        reflink: of raw disks that are tracked, serves clones, which the file system makes: see `dm.Clone`. The clones
            and the bitmaps are of one instant, for all of these disks. Others are kept offline.
        owner: who holds the bitmaps, for messages to others.

    Raises:
        ArgumentError: the arguments do not go together.
        LockedError: a disk is being written, and none of ``sources``, ``live`` and ``reflink`` is given; or, at the
            end, it was.
        UnsupportedError: a tracked disk cannot be cloned.
        BitmapError: a named bitmap, or the checkpoint, does not exist or cannot be used.
        StorageError: a program is missing, there is no room for the carriers, or QEMU refuses; the error has its words.
    """
    _require_fitting(targets, sources, live, reflink)
    require_programs()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dirtmap-")))
        served = []
        for number, target in enumerate(targets):
            source = sources[number] if sources else None
            served.append(_opened(host, stack, target, source, live=live, reflink=reflink))
        _require_names(served)
        for each in served:
            each.choose(bitmaps, since)
            if each.clone is None:
                each.hold(stack, owner)
        clones = _cloned(host, stack, served, owner)
        stack.enter_context(listener.reserved())
        daemon = stack.enter_context(Daemon(clones))
        for number, each in enumerate(served):
            carrier = folder / f"{number}.qcow2"
            each.write_carrier(host, str(carrier))
            each.open(daemon, number, carrier)
        daemon.listen(listener)
        for number, each in enumerate(served):
            names = [(f"bitmaps-{number}", name) for name in each.contexts]
            daemon.add_export(each.name, f"disk-{number}", names)
        for carrier in folder.glob("*.qcow2"):
            carrier.unlink()  # the daemon has them open; so nothing is left of them however this process ends
        yield Serving(tuple(each.told(listener) for each in served), listener, daemon)


def _cloned(host: Host, stack: contextlib.ExitStack, served: list[_Served], owner: str) -> list[int]:
    """Clones the disks that are to be, and holds their bitmaps, at one instant; returns the descriptors."""
    clones = [(each, each.clone) for each in served if each.clone is not None]
    if clones:
        with host.instant([each.handle for each, _ in clones]) as instant:
            for each, clone in clones:
                each.hold(stack, owner)
                instant.clone(each.handle, clone)
    return [clone.fd for _, clone in clones]


def _require_fitting(targets: Sequence[str], sources: Sequence[str], live: bool, reflink: bool) -> None:
    if not targets:
        raise ArgumentError("targets", "there is nothing to serve")
    if reflink and (sources or live):
        raise ArgumentError("reflink", "makes frozen copies by itself: neither --source nor --live goes with it")
    if sources and live:
        raise ArgumentError("live", "goes with no frozen source, which nobody writes")
    if sources and len(sources) != len(targets):
        what = f"{len(sources)} given, and {len(targets)} targets: each needs its own, in the same order"
        raise ArgumentError("sources", what)


def _opened(
    host: Host, stack: contextlib.ExitStack, target: str, source: str | None, *, live: bool, reflink: bool
) -> _Served:
    """Opens a target, and keeps what is served of it as it is."""
    # Whoever has it open for writing is met below, where the error can say what else can be done.
    handle = stack.enter_context(host.open(target, force_share=True))
    notes, status = [], handle.tracking()
    tracked = status is not None and status.alive
    if status is not None and tracked and not (live or reflink or source is not None):
        remedy = f"--reflink serves a clone of it, {_OTHERWISE}"
        raise LockedError(handle.where, f"its disk is being written: tracked by {status.tracker}; {remedy}")
    if status is not None and not tracked:
        handle.recover_session()  # now: nobody writes to the image while it is kept offline
        notes.append(f"recovered first: {status.how}")
    disk = handle.disk()
    if reflink and tracked:
        clone = prepared_clone(stack, handle, _OTHERWISE)
        return _Served(target, handle, dm.Disk(clone.path, disk.format), tracked=True, notes=notes, clone=clone)
    if source is not None:
        disk = frozen_copy(source, disk)
    if not live:
        stack.enter_context(_offline(host, disk))
    own = source is None and not live
    return _Served(target, handle, disk, tracked=tracked, kept=own, live=live, notes=notes)


@contextlib.contextmanager
def _offline(host: Host, disk: Disk) -> Iterator[None]:
    """Like `Host.offline`, and says what else can be done."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(host.offline(disk))
        except LockedError as error:
            raise LockedError(error.where, f"{error.what}; {_OTHERWISE}") from None
        yield


def _require_names(served: list[_Served]) -> None:
    found: dict[str, _Served] = {}
    for each in served:
        other = found.setdefault(each.name, each)
        if other is each:
            continue
        if other.handle.uuid == each.handle.uuid and os.path.samefile(other.handle.path, each.handle.path):
            raise ArgumentError(each.target, "is named twice")
        what = f"its export would be called '{printable(each.name)}', as that of {other.target}"
        raise ArgumentError(each.target, what)


@dataclass(slots=True)
class _Served:
    """A target on its way to be served.

    Attributes:
        target: as it was given.
        handle: of its bitmaps.
        disk: what is served.
        tracked: somebody tracks it, who alone can hold its bitmaps.
        kept: what is served is the disk itself, and is kept offline.
        live: somebody may write to what is served.
        notes: see `Export`.
        clone: what is served, if that is a clone.
        since: the checkpoint since which changes are to be served, or None.
        chosen: the bitmaps to be served by their own names.
        chain: the checkpoints that say what was written since one.
        left_out: see `Export`.
        contexts: the names in the carrier.
        bitmaps: as they are served.
    """

    target: str
    handle: Handle
    disk: Disk
    tracked: bool
    notes: list[str]
    kept: bool = False
    live: bool = False
    clone: Clone | None = None
    since: str | None = None
    chosen: list[str] = field(default_factory=list)
    chain: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    contexts: list[str] = field(default_factory=list)
    bitmaps: Mapping[str, Bitmap] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the export."""
        return escaped(self.handle.name or os.path.basename(self.handle.path))

    def choose(self, named: Sequence[str], since: str | None) -> None:
        """Decides which bitmaps are served."""
        info = self.handle.info()
        there = [bitmap.name for bitmap in info.bitmaps]
        if named:
            self.chosen = [shown_as(name, there) for name in dict.fromkeys(named)]
        else:
            for bitmap in info.bitmaps:
                if bitmap.inconsistent or bitmap.damaged:
                    why = "inconsistent" if bitmap.inconsistent else "damaged"
                    self.left_out[bitmap.name] = f"{why}; recover or remove it"
                else:
                    self.chosen.append(bitmap.name)
        if since is not None:
            self.since = shown_as(since, info.checkpoints)
            self.chain = _chain(self.handle.where, info, self.since)
        if doubt := self.handle.doubt():
            self.notes.append(f"its bitmaps count as all dirty: {doubt}")

    def hold(self, stack: contextlib.ExitStack, owner: str) -> None:
        """Holds the bitmaps, where that is needed and possible."""
        self._hold(stack, owner)
        if self.since is not None and _chain(self.handle.where, self.handle.info(), self.since) != self.chain:
            raise LockedError(self.handle.where, "its checkpoints have changed meanwhile; try again")

    def _hold(self, stack: contextlib.ExitStack, owner: str) -> None:
        names = list(dict.fromkeys([*self.chosen, *self.chain]))
        self.bitmaps = self.handle
        try:
            self.bitmaps = stack.enter_context(self.handle.hold_all(names, owner))
        except (BitmapError, LockedError):
            if self.clone is not None:
                raise  # they would not be of the instant of the clone
            for name in names:
                dm.changes.usable(self.handle.where, self.handle, name)  # says what is wrong with it, if that was it
            in_image = self.handle.format == "qcow2"
            if not self.tracked and not in_image:
                raise
            # Nobody can change what is in an image that is kept offline, whether or not a store has a record of it.
            if not (self.kept and in_image):
                self.notes.append("its bitmaps are not held: each is as it was when the export began, or later")

    def write_carrier(self, host: Host, path: str) -> None:
        """Writes the bitmaps into a carrier, if there are any, as many at a time as fit into the memory meant for it.

        Raises:
            BitmapError: two would have the same name there.
        """
        parts = [(escaped(name), [name]) for name in self.chosen]
        if self.since is not None:
            parts.append((f"since-{escaped(self.since)}", self.chain))
        for context, _ in parts:
            if context in self.contexts:
                raise BitmapError(f"{self.handle.where}: '{context}'", "two bitmaps would be served by this name")
            self.contexts.append(context)
        if not parts:
            return
        make_carrier(path, self.handle.size)
        together: dict[str, Bitmap] = {}
        taken = 0
        for context, names in parts:
            bitmap = self._changed(names)
            together[context] = bitmap
            taken += geometry.packed_bytes(bitmap.size, bitmap.granularity)
            if taken >= _TOGETHER:
                self._put(host, path, together)
                together, taken = {}, 0
        self._put(host, path, together)

    def _changed(self, names: list[str]) -> Bitmap:
        """All of several bitmaps in one."""
        first, *others = names
        changed = self._read(first)
        for name in others:
            changed |= self._read(name)
        return changed

    def _read(self, name: str) -> Bitmap:
        bitmap = dm.changes.usable(self.handle.where, self.bitmaps, name)
        if bitmap.damage:
            self.notes.append(f"'{name}': its {bitmap.damage}; recover makes that last")
        return bitmap

    def _put(self, host: Host, path: str, bitmaps: dict[str, Bitmap]) -> None:
        try:
            put_into_carrier(host, path, bitmaps)
        except BitmapError as error:  # what QEMU has no room for, in the user's words
            raise BitmapError(self.handle.where, f"cannot be served: {error}") from error

    def open(self, daemon: Daemon, number: int, carrier: Path) -> None:
        """Has the daemon open the disk and the carrier, and compares their sizes."""
        disk = nodes.image(self.disk.path, self.disk.format, force_share=self.live)
        size = daemon.open(self.disk.path, f"disk-{number}", disk)
        if self.contexts:
            there = daemon.open(str(carrier), f"bitmaps-{number}", nodes.image(str(carrier), "qcow2"))
            require_sizes(self.disk.path, self.handle.size, size, there)

    def told(self, listener: Listener) -> Export:
        """What became of it."""
        return Export(
            target=self.target,
            name=self.name,
            uri=listener.uri(self.name),
            size=self.handle.size,
            bitmaps=tuple(self.contexts),
            left_out=self.left_out,
            notes=tuple(dict.fromkeys(self.notes)),
        )


def _chain(where: str, info: ImageInfo, since: str) -> list[str]:
    """The checkpoints that together say what was written since one of them."""
    if since not in info.checkpoints:
        raise BitmapNotFoundError(f"{where}: '{printable(since)}'", "there is no such checkpoint")
    if since in info.incomplete:
        what = "not all that was written since is known: a checkpoint was removed or disabled"
        raise BitmapError(f"{where}: '{printable(since)}'", what)
    return list(info.checkpoints[info.checkpoints.index(since) :])
