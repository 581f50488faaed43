"""What may become of a backup's files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dirtmap.tools.backup import Backup, Repository
from support.backups import image_of


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def flip_data(repository: Path, backup: Backup) -> None:
    flip(image_of(repository, backup), backup.cluster_size + 30)  # data come right after the header's cluster


def flip_table(repository: Path, backup: Backup) -> None:
    """An entry of an L2 table, which says where a cluster is."""
    image = image_of(repository, backup)
    data = image.read_bytes()
    at = int.from_bytes(data[40:48], "big")
    table = int.from_bytes(data[at : at + 8], "big") & 0x00FFFFFFFFFFFE00
    entries = [data[table + 8 * number : table + 8 * number + 8] for number in range(8192)]
    used = next(number for number, entry in enumerate(entries) if any(entry[1:7]))
    image.write_bytes(data[: table + 8 * used] + bytes(8) + data[table + 8 * used + 8 :])


def flip_digest(repository: Path, backup: Backup) -> None:
    place = Path(Repository(repository).document(backup))
    text = place.read_text()
    at = text.rindex('"]') - 5
    place.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])


def cut_document(repository: Path, backup: Backup) -> None:
    place = Path(Repository(repository).document(backup))
    place.write_text("".join(place.read_text().splitlines(keepends=True)[:-2]) + "]}\n")


def cut_image(repository: Path, backup: Backup) -> None:
    os.truncate(image_of(repository, backup), backup.image_size - 1)


def remove_image(repository: Path, backup: Backup) -> None:
    image_of(repository, backup).unlink()


def remove_document(repository: Path, backup: Backup) -> None:
    os.unlink(Repository(repository).document(backup))


def swap(repository: Path, backup: Backup) -> None:
    """The image of another backup, of the same length."""
    image = image_of(repository, backup)
    other = image_of(repository, Repository(repository).backups()[backup.number % 4])
    image.write_bytes(other.read_bytes()[: backup.image_size].ljust(backup.image_size, b"\0"))


DAMAGE: list[Callable[[Path, Backup], None]] = [
    flip_data,
    flip_table,
    flip_digest,
    cut_document,
    cut_image,
    remove_image,
    remove_document,
    swap,
]
