"""The document of a backup: what it is of, what it has, and the digests of that. `docs/backup.md` has the schema.

It is JSON, written line by line, and read so, too: a disk may have millions of pieces.

    {"backup": {...},
    "digest": "SHA-256 of the first line, without its end",
    "extents": [
    [0, 1048576, "SHA-256 of these bytes"],
    [1048576, 65536, null]                        null: zeros
    ]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, NamedTuple

from dirtmap.fmt.errors import FormatError
from dirtmap.tools.backup.files import failing

VERSION: Final = 1
# Bytes of a piece with a digest of its own. Requests of this size cost QEMU the least.
PIECE: Final = 1 << 20
FULL, INCREMENTAL = "full", "incremental"
OFFLINE, REFLINK, SOURCE, LIVE = "offline", "reflink", "source", "live"
ZSTD: Final = "zstd"
STEM: Final = r"\d{8}T\d{6}Z-[0-9a-f]{16}"  # of the files of a backup: its id
BITMAP_PREFIX: Final = "dirtmap-backup-"

_MOST_LINE: Final = 1 << 20
_FIRST, _DIGEST, _EXTENTS, _END = b'{"backup": ', b'"digest": ', b'"extents": [', b"]}"
_MOST_SIZE: Final = 1 << 63


class Piece(NamedTuple):
    """Bytes of a disk: from ``offset``, ``length`` of them; the SHA-256 of them, or None where all are zero."""

    offset: int
    length: int
    digest: bytes | None

    @property
    def end(self) -> int:
        """The offset of what is behind it."""
        return self.offset + self.length

    def line(self) -> bytes:
        """As it stands in a document."""
        digest = "null" if self.digest is None else f'"{self.digest.hex()}"'
        return f"[{self.offset}, {self.length}, {digest}]".encode()


@dataclass(frozen=True, slots=True)
class Backup:
    """One backup of one disk; sizes in bytes.

    Attributes:
        id: of the backup; its files are named after it.
        repository: the UUID of the repository.
        disk: the name of the disk in the repository.
        number: of the backup among those of the disk, from 1; it stays when others are pruned.
        uuid: of the disk's node; None of a qcow2 image that is no node.
        path: of the disk.
        format: of the disk: ``raw`` or ``qcow2``.
        size: of the disk, exactly.
        time: when the copy began, in UTC, as ISO 8601 has it.
        kind: ``full`` or ``incremental``.
        parent: the id of the backup that it is the difference to; None if it is full.
        reason: why it was made as a full one, one word; None if it was made as an increment.
        why: the same as a sentence; of an increment, why more counts as written than was, or None.
        granularity: of the bitmap.
        cluster_size: of the image.
        image_size: of the image's file.
        bitmap: the name of the bitmap or checkpoint that began with it.
        dirty: what the bitmap said, in whole granules.
        copied: what was copied, without zeros.
        zeros: what is zero of the extents.
        seconds: that it took.
        pieces: how many there are.
        pieces_digest: SHA-256 of their lines.
        frozen: what was read: ``offline``, the disk, to which nobody wrote; ``reflink``, a clone of it; ``source``, a
            snapshot that was given; or ``live``, the disk while it was written, which is not of one moment.
        compression: of the image's clusters: ``zstd``, or None. Digests are of what the disk has.
    """

    id: str
    repository: str
    disk: str
    number: int
    uuid: str | None
    path: str
    format: str
    size: int
    time: str
    kind: str
    parent: str | None
    reason: str | None
    why: str | None
    granularity: int
    cluster_size: int
    image_size: int
    bitmap: str
    dirty: int
    copied: int
    zeros: int
    seconds: float
    pieces: int
    pieces_digest: str
    frozen: str = OFFLINE
    compression: str | None = None

    def document(self) -> dict[str, Any]:
        """Its keys and values, as the document has them."""
        return {key.replace("_", "-"): value for key, value in asdict(self).items()}


class Digest:
    """The digest of pieces' lines, one after the other."""

    def __init__(self) -> None:
        from hashlib import sha256

        self._sha, self.count = sha256(), 0

    def add(self, line: bytes) -> None:
        """Takes the next line, without its end."""
        self._sha.update(line + b"\n")
        self.count += 1

    def hex(self) -> str:
        """Of all so far."""
        return self._sha.hexdigest()


def parts(backup: Backup, lines: Iterable[bytes]) -> Iterator[bytes]:
    """A document, part by part; ``lines`` are those of its pieces, without their ends."""
    head = _FIRST + json.dumps(backup.document()).encode() + b","
    yield head + b"\n" + _DIGEST + f'"{_sha(head)}"'.encode() + b",\n" + _EXTENTS
    for number, line in enumerate(lines):
        yield (b",\n" if number else b"\n") + line
    yield b"\n" + _END + b"\n"


def read_head(path: str) -> Backup:
    """The backup that a document is about, without its pieces.

    Raises:
        FormatError: it is no such document, or damaged.
        StorageError: it cannot be read.
    """
    with failing(path), open(path, "rb") as file:
        head, digest, extents = (file.readline(_MOST_LINE).rstrip(b"\n") for _ in range(3))
    if not head.startswith(_FIRST) or not digest.startswith(_DIGEST) or extents != _EXTENTS:
        raise FormatError(path, "not the document of a backup")
    if digest != _DIGEST + f'"{_sha(head)}",'.encode():
        raise FormatError(path, "damaged: its first line has another digest")
    try:
        found = {key.replace("-", "_"): value for key, value in json.loads(head[len(_FIRST) : -1]).items()}
        found.setdefault("frozen", OFFLINE)  # as what was made before there was this key
        found.setdefault("compression", None)  # as what was made before there was this key
        backup = Backup(**{field.name: found[field.name] for field in fields(Backup)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(path, f"not a document of version {VERSION} ({error!r})") from error
    if fault := _fault(backup):
        raise FormatError(path, f"{fault} makes no sense")
    return backup


def _fault(backup: Backup) -> str | None:
    """The key of a value that cannot be; None where all can."""
    values: dict[str, object] = asdict(backup)
    for key in ("size", "number", "granularity", "cluster_size", "image_size", "dirty", "copied", "zeros", "pieces"):
        value = values[key]
        if not isinstance(value, int) or not 0 <= value < _MOST_SIZE:
            return key
    for key in ("id", "parent"):
        value = values[key]
        if not (isinstance(value, str) and re.fullmatch(STEM, value)) and (key, value) != ("parent", None):
            return key
    for key in ("repository", "disk", "path", "format", "time", "kind", "bitmap", "pieces_digest", "frozen"):
        if not isinstance(values[key], str):
            return key
    if backup.compression not in (None, ZSTD):
        return "compression"
    if backup.kind not in (FULL, INCREMENTAL) or (backup.kind == FULL) != (backup.parent is None):
        return "kind"
    powers = backup.granularity, backup.cluster_size
    return None if all(value and not value & (value - 1) for value in powers) else "granularity"


def read_pieces(path: str, backup: Backup) -> Iterator[Piece]:
    """The pieces of a document, in order, as they are read. At the end their number and digest have been compared.

    Raises:
        FormatError: what is there is not what was written.
        StorageError: it cannot be read.
    """
    digest, before = Digest(), 0
    with failing(path), open(path, "rb") as file:
        for _ in range(3):
            file.readline(_MOST_LINE)
        while True:
            line = file.readline(_MOST_LINE).rstrip(b"\n")
            if line == _END or not line:
                break
            line = line.removesuffix(b",")
            piece = _piece(path, line)
            if not before <= piece.offset < piece.end <= backup.size:
                raise FormatError(path, f"damaged: a piece at {piece.offset} that cannot be there")
            digest.add(line)
            before = piece.end
            yield piece
    if (digest.count, digest.hex(), line) != (backup.pieces, backup.pieces_digest, _END):
        raise FormatError(path, "damaged: its extents have another digest")


def _piece(path: str, line: bytes) -> Piece:
    try:
        offset, length, digest = json.loads(line)
        if type(offset) is not int or type(length) is not int or length <= 0:
            raise ValueError
        if digest is not None and (len(digest) != 64 or length > PIECE):
            raise ValueError
        return Piece(offset, length, None if digest is None else bytes.fromhex(digest))
    except (ValueError, TypeError) as error:
        raise FormatError(path, "damaged: a line is not that of a piece") from error


def _sha(data: bytes) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()
