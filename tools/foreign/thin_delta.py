"""``thin_delta`` of thin-provisioning-tools: how the mappings of two thin devices differ.

    <superblock uuid="" time="1" transaction="2" version="2" data_block_size="128" nr_data_blocks="16384">
      <diff left="1" right="2">
        <same begin="0" length="16"/>
        <different begin="16" length="1"/>
        <left_only begin="20" length="4"/>
      </diff>
    </superblock>

With ``--verbose``, elements of these names hold ``<range begin= length=/>``.

Source: thin_delta(8), and src/thin/delta_visitor.rs of thin-provisioning-tools (thin_delta.cc before 1.0);
``data_block_size`` is in sectors of 512 bytes, 64 KiB to 1 GiB and a multiple of 64 KiB, as the kernel's
Documentation/admin-guide/device-mapper/thin-provisioning.rst says. ``thin_delta`` 1.0.0 to 1.0.5 also calls blocks the
same that differ (CHANGES, 1.0.6: "Fix range mappings preprocessing"), which cannot be seen in what it prints.
"""

from __future__ import annotations

from dirtmap.fmt.errors import FormatError
from dirtmap.tools.foreign import xmlstream
from dirtmap.tools.foreign.blocks import Blocks, number
from dirtmap.tools.foreign.marks import SECTOR, Marks
from dirtmap.tools.inputs import Input

_DIRTY = {"same": False, "different": True, "left_only": True, "right_only": True}
_LEAST_BLOCK, _MOST_BLOCK = 128, 1 << 21


def read(source: Input, marks: Marks) -> None:
    """Marks all blocks but those that both devices share, or that neither has.

    Raises:
        FormatError: not such a document, or not whole.
        RangeError: a block is behind the end of the disk.
    """
    reader = _Reader(marks)
    xmlstream.parse(source, reader.begin, reader.end)
    if not reader.has_diff:
        raise FormatError(source.where, "no <diff>: not what thin_delta prints")


class _Reader:
    def __init__(self, marks: Marks) -> None:
        self.has_diff = False
        self._marks = marks
        self._path: list[str] = []
        self._blocks: Blocks | None = None

    def begin(self, name: str, attributes: dict[str, str]) -> None:
        marks = self._marks
        match [*self._path, name]:
            case ["superblock"]:
                sectors = number(marks, attributes, "data_block_size")
                if not _LEAST_BLOCK <= sectors <= _MOST_BLOCK or sectors % _LEAST_BLOCK:
                    raise FormatError(marks.where, f"data_block_size: {sectors} sectors are no block of a thin pool")
                self._blocks = Blocks(marks, sectors * SECTOR)
            case ["superblock", "diff"] if not self.has_diff:
                self.has_diff = True
            case ["superblock", "diff", kind] if kind in _DIRTY:
                if attributes:
                    self._take(kind, attributes)
            case ["superblock", "diff", kind, "range"] if kind in _DIRTY:
                self._take(kind, attributes)
            case _:
                raise FormatError(marks.where, f"<{name}> where thin_delta prints none")
        self._path.append(name)

    def end(self, _: str) -> None:
        self._path.pop()

    def _take(self, kind: str, attributes: dict[str, str]) -> None:
        assert self._blocks is not None  # the superblock came first
        self._marks.next()
        begin, length = (number(self._marks, attributes, key) for key in ("begin", "length"))
        self._blocks.take(begin, length, _DIRTY[kind])
