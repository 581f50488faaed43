"""Namespaces of each kind for the conformance suite: what makes one, and what may happen to it from outside.

A test never asks which kind it has. Where a kind cannot do something, and rightly so, its maker says so in ``lacks``.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import os
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, TypeVar

import dirtmap.engine as dm
from dirtmap.engine.storefile.directory import place_directory, read_entries
from dirtmap.engine.storefile.file import Store
from dirtmap.fmt.directory import FLAG_IN_USE
from support import qemu
from support.child import in_child
from support.craft import Craft

T = TypeVar("T")

Bitmaps = Mapping[str, dm.Bitmap]

# What a kind may lack. A test that needs one of them is left out there; that it is refused is tested instead.
CAPABILITIES = {
    "change": "transactions are possible",
    "recover": "it can be recovered",
    "hold": "bitmaps can be held",
    "track": "writes can be tracked",
    "rest": "a new one needs no recovery, and nobody tracks it",
    "name": "it has a name and a UUID",
    "node": "its name is that of an image",
    "doubt": "something from outside puts it in doubt",
    "inconsistent": "a bitmap can be inconsistent",
    "apart": "an inconsistent bitmap says nothing about the others",
    "meanwhile": "it can be read while it is being changed",
    "file": "it is in a file, which has a path",
    "process": "other processes can open it",
}


class Made:
    """One namespace that a maker has made.

    Attributes:
        maker: that has made it.
        target: as `dirtmap.engine.open` takes it.
        container: the file that has its bitmaps.
        disk: the file that has what a guest reads.
        size: of the disk, bytes.
    """

    def __init__(self, maker: Maker, target: str, container: Path, disk: Path, size: int) -> None:
        self.maker, self.target, self.container, self.disk, self.size = maker, target, container, disk, size

    def open(self) -> dm.Namespace:
        """The namespace, opened anew."""
        return dm.open(self.target)

    def describe(self) -> dm.ImageInfo:
        """As `dirtmap.engine.describe`."""
        return dm.describe(self.target)

    def recover(self) -> list[dm.Recovery]:
        """As `dirtmap.engine.recover`."""
        return dm.recover(self.target)

    def stored(self) -> bytes:
        """All that is kept, to be compared."""
        return self.container.read_bytes()

    @property
    def file(self) -> Path:
        """The file that a handle goes by: the image that has bitmaps, whoever has them right now, or else the store."""
        return self.container

    @contextlib.contextmanager
    def changing(self) -> Iterator[dm.Transaction]:
        """A transaction of a handle of its own."""
        with self.open() as namespace, namespace.transaction() as bitmaps:
            yield bitmaps

    def elsewhere(self, work: Callable[[dm.Namespace], T]) -> T:
        """What ``work`` returns in another process, which opens the namespace anew; to be pickled."""

        def opened() -> T:
            with self.open() as namespace:
                return work(namespace)

        return in_child(opened)

    def killed(self, work: Callable[[dm.Namespace], object]) -> None:
        """Has another process open the namespace anew and do ``work``, and kills it then, with all it has open."""

        def then_die() -> None:
            kept = work(namespace := self.open())
            os.kill(os.getpid(), signal.SIGKILL)
            del kept, namespace

        pid = os.fork()
        if pid == 0:
            try:
                then_die()
            except BaseException as error:
                print(repr(error), flush=True)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    # What else happens in the world.

    def interlude(self) -> None:
        """Something happens nearby that must not change anything that the namespace promises."""
        self.maker.interlude(self)

    def put_in_doubt(self) -> None:
        """Something happens after which nothing is known of the bits; needs ``doubt``."""
        self.maker.put_in_doubt(self)


class Maker(abc.ABC):
    """Makes namespaces of one kind, any number of them in one folder.

    Attributes:
        lacks: those of `CAPABILITIES` that the kind has not, and why.
        formats: what its containers may be called.
        lazy: a transaction reads bits when they are asked for, and not once it has ended.
    """

    lacks: ClassVar[Mapping[str, str]] = {}
    formats: ClassVar[tuple[str, ...]] = ("qcow2", "dirtmap")
    lazy: ClassVar[bool] = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0

    def make(self, size: int, bitmaps: Bitmaps | None = None, inconsistent: Iterable[str] = ()) -> Made:
        """A namespace with these bitmaps, in their order, and behind them inconsistent ones of 64 KiB granules."""
        self._count += 1
        made = self.empty(size, self._count)
        if bitmaps:
            with made.changing() as changed:
                changed.update(bitmaps)
        self.finish(made)
        for name in inconsistent:
            self.add_inconsistent(made, name)
        return made

    def close(self) -> None:  # noqa: B027
        """Ends what it has running."""

    @abc.abstractmethod
    def empty(self, size: int, number: int) -> Made:
        """A new namespace without bitmaps, which may still be changed."""

    def finish(self, made: Made) -> None:  # noqa: B027
        """Brings it into the state that makes its kind."""

    def fitting(self, size: int) -> int:
        """The next size in bytes that a disk of the kind can have."""
        return size

    def add_inconsistent(self, made: Made, name: str) -> None:
        """Adds a bitmap that a writer has left in use when it died."""
        raise NotImplementedError

    def interlude(self, made: Made) -> None:  # noqa: B027
        """See `Made.interlude`."""

    def put_in_doubt(self, made: Made) -> None:
        """See `Made.put_in_doubt`."""
        raise NotImplementedError


@functools.cache
def _qcow2(size: int) -> bytes:
    """The bytes of an empty image as QEMU makes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.qcow2")
        qemu.create(path, size)
        return path.read_bytes()


def _add_in_use(path: Path, name: str) -> None:
    """Another program adds a bitmap to a qcow2 image, which then looks as if that had died."""
    qemu.qemu_img("bitmap", "--add", path, name)
    craft = Craft(path)
    place = craft.entry(len(craft.entries()) - 1, "flags")
    craft.set(place, craft.get(place) | FLAG_IN_USE)
    with path.open("r+b") as file:  # the same inode
        file.write(craft.data)


_ALONE = "as with QEMU, who writes an image has it alone"
_OWN_WORD = "QEMU says itself what its bitmaps are worth"


class ImageMaker(Maker):
    """A qcow2 image that nobody has given a name."""

    lacks: ClassVar[Mapping[str, str]] = {
        "hold": "no store knows an image without a name",
        "track": "no store knows an image without a name",
        "name": "nobody has given it one",
        "node": "nobody has given it a name",
        "doubt": _OWN_WORD,
        "meanwhile": _ALONE,
    }

    def empty(self, size: int, number: int) -> Made:
        path = self.folder / f"image{number}.qcow2"
        path.write_bytes(_qcow2(size))
        return Made(self, str(path), path, path, size)

    def fitting(self, size: int) -> int:
        """QEMU counts in sectors."""
        return -(-size // 512) * 512

    def add_inconsistent(self, made: Made, name: str) -> None:
        _add_in_use(made.container, name)


class NamedImageMaker(ImageMaker):
    """A qcow2 image that is a node."""

    lacks: ClassVar[Mapping[str, str]] = {"doubt": _OWN_WORD, "meanwhile": _ALONE}

    def empty(self, size: int, number: int) -> Made:
        made = super().empty(size, number)
        name = f"named{number}"
        dm.this_host().add_qcow2(name, made.target)
        return Made(self, f"node:{name}", made.container, made.disk, size)


class NodeMaker(Maker):
    """A node in a store, for a raw image."""

    def empty(self, size: int, number: int) -> Made:
        disk = self.folder / f"disk{number}.raw"
        disk.touch()
        os.truncate(disk, size)
        os.utime(disk, (1, 1.5))  # so that nobody has to wait until its time tells of a write
        host = dm.this_host()
        host.add_node(f"node{number}", str(disk))
        return Made(self, f"node:node{number}", Path(host.home), disk, size)

    def add_inconsistent(self, made: Made, name: str) -> None:
        with made.changing() as bitmaps:
            bitmaps[name] = dm.Bitmap(made.size, 65536)
        raw = made.target.partition(":")[2].encode()
        with Store(str(made.container)) as target, target.change() as change:
            record = change.table.get(raw)
            assert record
            *others, last = read_entries(change.snapshot, record)
            entries = [*others, last.with_flags(set=FLAG_IN_USE)]
            change.release(record.directory)
            change.table.put(replace(record, directory=place_directory(change, raw, entries)))

    def interlude(self, made: Made) -> None:
        """Another namespace of the store changes."""
        self._count += 1
        other = NodeMaker.empty(self, 4096, self._count)
        with other.changing() as bitmaps:
            bitmaps["a"] = dm.Bitmap.from_extents(4096, [0], [4096])

    def put_in_doubt(self, made: Made) -> None:
        """Somebody writes to the image."""
        with made.disk.open("r+b") as file:
            file.write(b"\1")


class DeviceMaker(NodeMaker):
    """A device in a store."""

    lacks: ClassVar[Mapping[str, str]] = {"node": "a device has a name of its own, which is no image's"}

    def empty(self, size: int, number: int) -> Made:
        made = super().empty(size, number)
        name = f"device{number}"
        dm.this_host().add_device(name, made.target.partition(":")[2])
        return Made(self, f"device:{name}", made.container, made.disk, size)


class DeviceOnImageMaker(NamedImageMaker):
    """A device in a store, whose root is a qcow2 image."""

    lacks: ClassVar[Mapping[str, str]] = DeviceMaker.lacks

    def empty(self, size: int, number: int) -> Made:
        made = super().empty(size, number)
        name, host = f"device{number}", dm.this_host()
        host.add_device(name, made.target.partition(":")[2])
        return Made(self, f"device:{name}", Path(host.home), made.disk, size)

    add_inconsistent = DeviceMaker.add_inconsistent

    def interlude(self, made: Made) -> None:
        """The bitmaps of its root change, and so the image, but nothing that a guest reads."""
        with dm.open(f"file:{made.disk}") as root, root.transaction() as bitmaps:
            bitmaps[f"x{len(bitmaps)}"] = dm.Bitmap.from_extents(made.size, [0], [made.size])

    def put_in_doubt(self, made: Made) -> None:
        """A guest of another device writes."""
        qemu.qemu_io(made.disk, "write 0 512")


class DeadTrackerMaker(NamedImageMaker):
    """A qcow2 image whose bitmaps are checked out, by a tracker that has died."""

    lacks: ClassVar[Mapping[str, str]] = {
        "rest": "its tracker has died, and waits to be recovered",
        "meanwhile": _ALONE,
        "apart": "who left the bitmap in use may have written to the image behind the tracker's back",
    }

    def finish(self, made: Made) -> None:
        made.killed(lambda namespace: namespace.track(save_interval=0))

    def interlude(self, made: Made) -> None:
        """A tracker comes, and dies."""
        self.finish(made)

    def put_in_doubt(self, made: Made) -> None:
        """QEMU opens the image for writing, and takes away the sign that it was tracked."""
        qemu.qemu_io(made.disk, "write 0 512")


class LivingTrackerMaker(NamedImageMaker):
    """A qcow2 image whose bitmaps are checked out, by a tracker that lives in another process."""

    lacks: ClassVar[Mapping[str, str]] = {
        "recover": "while its tracker lives there is nothing to recover",
        "track": "its tracker is the only one",
        "rest": "it is tracked",
        "doubt": "its tracker marks what is written",
        "inconsistent": "no tracker takes an inconsistent bitmap",
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._trackers: list[tuple[int, int]] = []

    def finish(self, made: Made) -> None:
        ready, begun = os.pipe()
        told, end = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.close(end)
                with made.open() as namespace, namespace.track(save_interval=0):
                    os.write(begun, b"!")
                    os.read(told, 1)
                code = 0
            finally:
                os._exit(code)
        for one in (begun, told):
            os.close(one)
        self._trackers.append((pid, end))
        assert os.read(ready, 1), "the tracker did not start"
        os.close(ready)

    def close(self) -> None:
        # The last first: it has inherited the ends of the others' pipes.
        for pid, end in reversed(self._trackers):
            os.close(end)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        self._trackers.clear()
