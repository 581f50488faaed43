"""What a file looks like from outside: which file it is, and what has become of it.

Source of every rule: SPEC.md, "Identity of an image".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from dirtmap.fmt.digest import digest


class FilePlace(NamedTuple):
    """Which file it is: three numbers that stay as they are while it is renamed, written to, or mounted elsewhere.

    Attributes:
        filesystem: 16 bytes that name the file system it is on: see SPEC.md, "Identity of an image".
        inode: ``st_ino``; of a block device a number for the medium in it.
        birth: when the file was made, in nanoseconds since 1970; 0 where that is not known, and of a block device.
    """

    filesystem: bytes
    inode: int
    birth: int = 0

    @property
    def is_lasting(self) -> bool:
        """True where the file system is called the same after it was mounted again."""
        return any(self.filesystem[:8])


NO_FILE_PLACE = FilePlace(bytes(16), 0)


def unnamed_filesystem(device: int) -> bytes:
    """Returns what stands for a file system without a name that lasts, or for a block device: its number."""
    return device.to_bytes(16, "big")


@dataclass(frozen=True, slots=True)
class Identity:
    """What an image looked like when its bitmaps were last known to be right.

    Attributes:
        filesystem, inode, birth: which file it is, as in `FilePlace`.
        size: bytes.
        mtime_ns: ``st_mtime`` in nanoseconds since 1970, or the digest that `with_data` makes; of a block device 0.
        ctime_ns: ``st_ctime`` in nanoseconds since 1970; of a block device 0.
    """

    filesystem: bytes = bytes(16)
    inode: int = 0
    birth: int = 0
    size: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0

    @property
    def place(self) -> FilePlace:
        """Which file it is."""
        return FilePlace(self.filesystem, self.inode, self.birth)

    def is_file(self, other: Identity) -> bool:
        """Returns True if both are of the same file, even if it was written to in between."""
        return self.place == other.place

    def with_data(self, data: Identity) -> Identity:
        """Returns the identity of an image whose guest data is in an external data file with the identity ``data``.

        A digest of both takes the place of the time, so the result changes whenever either file does.
        """
        numbers = self.mtime_ns, data.inode, data.birth, data.size, data.mtime_ns, data.ctime_ns
        both = digest(data.filesystem + b"".join(number.to_bytes(8, "big") for number in numbers), 8)
        return replace(self, mtime_ns=int.from_bytes(both, "big"))


NO_IDENTITY = Identity()
