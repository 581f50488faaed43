"""`Repository`: a folder of backups: ``repository.json``, ``lock``, and two files a backup, an image and a document.

A backup is there when its document is. What has none is what is left of an act that was not finished:

    create    ID.qcow2.tmp  ->  ID.qcow2  ->  ID.json                                     each durable before the next
    prune     ID.qcow2.new  ->  ID.json.new  ->  ID.qcow2 replaced  ->  ID.json replaced  ->  older ones removed

Once ``ID.json.new`` is there, it is the document, and the image is ``ID.qcow2.new``, or ``ID.qcow2`` where that is not
there any more. Images above it read the same through either image. Whoever takes the lock to write first brings such an
act to its end, and removes what is of none.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Final, Self

from dirtmap.fmt.errors import ArgumentError, Error, FormatError, StorageError, printable
from dirtmap.fmt.geometry import align_up
from dirtmap.fmt.qcow2 import SECTOR
from dirtmap.tools.backup import files, images
from dirtmap.tools.backup.document import BITMAP_PREFIX, STEM, VERSION, Backup, Piece, read_head, read_pieces

FORMAT: Final = "dirtmap-backup"
IMAGE, DOCUMENT, NEW = ".qcow2", ".json", ".new"
_FILES = re.compile(rf"({STEM})(\.qcow2|\.json|\.pieces)(\.new|\.tmp|\.new\.tmp)?")
_MOST_BYTES = 1 << 16
WAIT_SECONDS: Final = 5.0


class Repository:
    """The backups in a folder. Reading one takes no lock, except in `reading` and `writing`.

    Args:
        path: of the folder.

    Attributes:
        path: the same.
        uuid: of the repository.
        problems: what `backups` could not read when it was asked last.

    Raises:
        StorageError: there is none.
        FormatError: its ``repository.json`` says something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.problems: list[Error] = []
        self._is_new = self._is_new_folder = False
        about = os.path.join(self.path, "repository.json")
        with files.failing(about), open(about, "rb") as file:
            text = file.read(_MOST_BYTES)
        try:
            found = json.loads(text)
            kind, version = found["format"], found["version"]
            self.uuid = str(uuid.UUID(found["uuid"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(about, "not that of a repository of backups") from error
        if kind != FORMAT:
            raise FormatError(about, "not that of a repository of backups")
        if version != VERSION:
            raise FormatError(about, f"version {version} of the format, and this program knows {VERSION}")

    @classmethod
    def made(cls, path: str | os.PathLike[str], wait: float = WAIT_SECONDS) -> Self:
        """The repository there; a new one where there is no such folder, or an empty one.

        Raises:
            LockedError: another process has just made it and uses it, for longer than ``wait`` seconds.
            StorageError: the folder is there and has other files; or it cannot be made.
        """
        place, is_new, is_new_folder = os.fspath(path), False, False
        about = os.path.join(place, "repository.json")
        if not os.path.exists(about):
            is_new_folder = files.make_folder(place)
            with files.failing(place):
                others = set(os.listdir(place)) - {"lock", "repository.json", "repository.json" + files.TEMPORARY}
            if others:
                raise StorageError(place, "is no repository of backups, and not empty")
            lock = os.path.join(place, "lock")
            files.touch(lock)
            with files.locked(lock, shared=False, wait=wait):
                if not os.path.exists(about):  # nor did another process make it just now
                    said = {"format": FORMAT, "version": VERSION, "uuid": str(uuid.uuid4())}
                    files.write(about, [json.dumps(said, indent=4).encode() + b"\n"])
                    is_new = True
        found = cls(path)
        found._is_new, found._is_new_folder = is_new, is_new_folder
        return found

    def unmake(self) -> None:
        """Removes again what `made` has made, where nothing else is in it. Only for who is `writing`."""
        if not self._is_new or self._names():
            return
        for name in ("repository.json", "lock"):
            files.remove(os.path.join(self.path, name))
        if self._is_new_folder:
            files.remove_folder(self.path)

    # Who uses it.

    @contextlib.contextmanager
    def writing(self, wait: float = WAIT_SECONDS) -> Iterator[None]:
        """Keeps all others out until the end of the block; first ends what an earlier act has left.

        Raises:
            LockedError: another process uses it, for longer than ``wait`` seconds.
            StorageError: whoever had made it has removed it meanwhile; see `unmake`.
        """
        with files.locked(os.path.join(self.path, "lock"), shared=False, wait=wait):
            if Repository(self.path).uuid != self.uuid:
                raise StorageError(self.path, "another repository is there now")
            self._tidy()
            yield

    @contextlib.contextmanager
    def reading(self, wait: float = WAIT_SECONDS) -> Iterator[None]:
        """Keeps those out who write, until the end of the block; first ends what an earlier act has left, if it can.

        Raises:
            LockedError: another process writes to it, for longer than ``wait`` seconds.
        """
        if any(name.endswith(NEW) for name in self._names()):
            # On a medium that cannot be written to it is read as it is.
            with contextlib.suppress(StorageError), self.writing(wait):
                pass
        with files.locked(os.path.join(self.path, "lock"), shared=True, wait=wait):
            yield

    def _names(self) -> list[str]:
        with files.failing(self.path):
            return sorted(name for name in os.listdir(self.path) if _FILES.fullmatch(name))

    def _tidy(self) -> None:
        names = set(self._names())
        for name in sorted(names):
            place = os.path.join(self.path, name)
            if name.endswith(DOCUMENT + NEW):
                image = name.removesuffix(DOCUMENT + NEW) + IMAGE
                if image + NEW in names:
                    files.rename(os.path.join(self.path, image + NEW), os.path.join(self.path, image))
                files.rename(place, place.removesuffix(NEW))
            elif (
                name.endswith(files.TEMPORARY)
                or ".pieces" in name
                or (name.endswith(IMAGE + NEW) and name.removesuffix(IMAGE + NEW) + DOCUMENT + NEW not in names)
            ):
                files.remove(place)
        backups = self.backups()
        # Whose document is lost may still be read through by other tools; so may that of one that cannot be read.
        wanted = {backup.parent for backup in backups}
        names = set(self._names())
        for name in sorted(names):
            stem = name.removesuffix(IMAGE)
            if name.endswith(IMAGE) and stem + DOCUMENT not in names and stem not in wanted and not self.problems:
                files.remove(os.path.join(self.path, name))

    # What is there.

    def backups(self, disk: str | None = None) -> list[Backup]:
        """The backups of all disks, or of one, each disk's oldest first. `problems` has those that cannot be read."""
        found: dict[str, Backup] = {}
        self.problems = []
        for name in self._names():
            if not name.endswith((DOCUMENT, DOCUMENT + NEW)):
                continue
            path = os.path.join(self.path, name)
            try:
                backup = read_head(path)
                if not name.startswith(backup.id) or backup.repository != self.uuid:
                    raise FormatError(path, "the document of another backup")
                found[backup.id] = backup  # the new one comes later
            except Error as error:
                self.problems.append(error)
        chosen = [backup for backup in found.values() if disk is None or backup.disk == disk]
        return sorted(chosen, key=lambda backup: (backup.disk, backup.number, backup.id))

    def disk(self, name: str) -> list[Backup]:
        """The backups of a disk, oldest first.

        Raises:
            ArgumentError: there are none.
        """
        if found := self.backups(name):
            return found
        raise ArgumentError(self.path, f"has no backup of '{printable(name)}'; {self._disks()}")

    def _disks(self) -> str:
        names = sorted({backup.disk for backup in self.backups()})
        return f"it has those of {', '.join(printable(name) for name in names)}" if names else "it has none"

    def at(self, name: str, when: str | None) -> Backup:
        """A backup of a disk: the newest; that of a number; or the newest one at a time.

        Args:
            name: of the disk.
            when: a number, as `Backup.number`; or a time, in ISO 8601, local where it names no zone.

        Raises:
            ArgumentError: there is none, or that is neither.
        """
        backups = self.disk(name)
        if when is None:
            return backups[-1]
        if re.fullmatch(r"[0-9]{1,18}", when, re.ASCII):
            chosen = [backup for backup in backups if backup.number == int(when)]
        else:
            try:
                limit = datetime.fromisoformat(when).astimezone(UTC)
            except ValueError as error:
                raise ArgumentError(when, "neither the number of a backup nor a time, as 2026-11-30T22:00") from error
            chosen = [backup for backup in backups if datetime.fromisoformat(backup.time) <= limit]
        if not chosen:
            numbers = f"numbers {backups[0].number} to {backups[-1].number}, the first of {backups[0].time}"
            raise ArgumentError(self.path, f"has no backup of '{printable(name)}' at {when}, but {numbers}")
        return chosen[-1]

    def document(self, backup: Backup) -> str:
        """The path of a backup's document."""
        path = os.path.join(self.path, backup.id + DOCUMENT)
        return path + NEW if os.path.exists(path + NEW) else path

    def image(self, backup: Backup) -> str:
        """The path of a backup's image."""
        path = os.path.join(self.path, backup.id + IMAGE)
        is_new = self.document(backup).endswith(NEW) and os.path.exists(path + NEW)
        return path + NEW if is_new else path

    def pieces(self, backup: Backup) -> Iterator[Piece]:
        """The pieces of a backup; see `read_pieces`."""
        return read_pieces(self.document(backup), backup)

    def chain(self, backup: Backup) -> list[Backup]:
        """A backup and those that it needs, itself first and a full one last.

        Raises:
            FormatError: one is missing, or its file is not as long as it was; none was read otherwise.
        """
        known = {each.id: each for each in self.backups()}
        chain = [backup]
        while (parent := chain[-1].parent) is not None:
            path = os.path.join(self.path, parent + DOCUMENT)
            below = known.get(parent)
            if below is None:
                error = next((error for error in self.problems if error.where.startswith(path)), None)
                raise error or FormatError(path, f"missing, and backup {chain[-1].number} needs it")
            if below in chain or (below.disk, below.size) != (backup.disk, backup.size):
                raise FormatError(path, f"cannot be below backup {chain[-1].number}")
            chain.append(below)
        for each in chain:
            path = self.image(each)
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise FormatError(path, f"missing ({error.strerror}), and backup {backup.number} needs it") from error
            if size != each.image_size:
                raise FormatError(path, f"damaged: has {size} bytes, and had {each.image_size}")
        return chain

    def require_sound(self, backup: Backup) -> list[Backup]:
        """The `chain` of a backup, once the heads of its images say that they are on each other as the documents say.

        Raises:
            FormatError: they are not; or as `chain`.
        """
        chain = self.chain(backup)
        for each in chain:
            path = self.image(each)
            head = images.read_head(path)
            wanted = None if each.parent is None else each.parent + IMAGE
            if head.backing != wanted:
                raise FormatError(path, f"is on {printable(head.backing or 'none')}, and not on {wanted or 'none'}")
            if (size := head.header.size) != align_up(each.size, SECTOR):
                raise FormatError(path, f"damaged: its disk has {size} bytes, and that of the backup {each.size}")
        return chain

    def bitmap_name(self, backup: str) -> str:
        """The name of the bitmap, or checkpoint, that begins with the backup of that id."""
        return f"{self.bitmap_prefix}{backup[-16:]}"

    def bitmaps(self, backups: Iterable[Backup]) -> set[str]:
        """The bitmaps that backups have begun, and those from which the next ones go on."""
        return {name for backup in backups for name in (backup.bitmap, self.bitmap_name(backup.id))}

    @property
    def bitmap_prefix(self) -> str:
        """How the names of all its bitmaps begin."""
        return BITMAP_PREFIX + self.uuid[:8]
