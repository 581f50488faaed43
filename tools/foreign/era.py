"""``era_invalidate --written-since ERA``: blocks of a dm-era device that were written since.

    <blocks>
      <block block="3"/>
      <range begin="8" end="12"/>
    </blocks>

Source: era_invalidate(8), and src/era/invalidate.rs of thin-provisioning-tools: ``end`` is the first block behind the
range. The size of a block is not in the document; it is the one that the device was made with (``era <metadata dev>
<origin dev> <block size>`` in the kernel's Documentation/admin-guide/device-mapper/era.rst, in sectors there).
"""

from __future__ import annotations

from dirtmap.fmt.errors import FormatError, counted
from dirtmap.tools.foreign import xmlstream
from dirtmap.tools.foreign.blocks import Blocks, number
from dirtmap.tools.foreign.marks import SECTOR, Marks
from dirtmap.tools.inputs import Input


def read(source: Input, marks: Marks, block_size: int) -> None:
    """Marks all blocks.

    Args:
        source: the document.
        marks: takes them.
        block_size: bytes.

    Raises:
        FormatError: not such a document, not whole, or a block size that no dm-era device has.
        RangeError: a block is behind the end of the disk.
    """
    if not block_size or block_size % SECTOR:
        what = f"{counted(block_size, 'byte')}, not a number of sectors of {SECTOR}"
        raise FormatError(f"{source.where}: --block-size", what)
    blocks = Blocks(marks, block_size)
    path: list[str] = []

    def begin(name: str, attributes: dict[str, str]) -> None:
        match [*path, name]:
            case ["blocks"]:
                pass
            case ["blocks", "block"]:
                marks.next()
                blocks.take(number(marks, attributes, "block"), 1, True)
            case ["blocks", "range"]:
                marks.next()
                first, behind = (number(marks, attributes, key) for key in ("begin", "end"))
                if behind <= first:
                    raise marks.error(f"ends at {behind}, and begins at {first}")
                blocks.take(first, behind - first, True)
            case _:
                raise FormatError(source.where, f"<{name}> where era_invalidate prints none")
        path.append(name)

    def end(_: str) -> None:
        path.pop()

    xmlstream.parse(source, begin, end)
