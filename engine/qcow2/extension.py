"""`NewExtension`: adds a header extension to a qcow2 image, in steps that survive a crash.

Each step is one epoch, ``|`` the sync after it:

    vacant room of its length    data | type over "vacant"
    the end of the chain         data and a new end marker behind the old one | type and length over the old end marker
      a name behind it           copy of the name | its pointer | data and end marker | type and length

    before   ... | 0 0 | backing file name |
    after    ... | type length | data | 0 0 | copy of the name |
"""

from __future__ import annotations

from collections.abc import Iterator

from dirtmap.engine.qcow2.layout import Layout
from dirtmap.fmt import geometry, qcow2
from dirtmap.fmt.errors import FormatError, UnsupportedError
from dirtmap.fmt.extensions import END_MARKER
from dirtmap.fmt.parsers.extensions import EXTENSION_HEAD
from dirtmap.fmt.parsers.qcow2 import POINTER

Write = tuple[int, bytes | memoryview]


class NewExtension:
    """Room for an extension, found before anything is written.

    Args:
        layout: of the image.
        kind: type of the extension.
        length: of its data, in bytes.

    Raises:
        UnsupportedError: the first cluster has no room.
        FormatError: the backing file's name ends past the end of the file.
    """

    def __init__(self, layout: Layout, kind: int, length: int) -> None:
        assert layout.chain is not None  # a layout without a chain has a fault, and is never changed
        chain = layout.chain
        vacant = (e for e in chain.extensions if e.type == qcow2.EXTENSION_VACANT and len(e.data) == length)
        found = next(vacant, None)
        self._head = EXTENSION_HEAD.build(type=kind, length=length)
        self._offset = found.offset if found else chain.end
        self._tail = b"" if found else bytes(geometry.align_up(length, 8) - length) + END_MARKER
        self._name: Write | None = None
        if found:
            return
        end = chain.end + EXTENSION_HEAD.size + length + len(self._tail)
        name, name_size = layout.header.v2.backing_file_offset, layout.header.v2.backing_file_size
        if chain.terminated and name and name < end:
            # Clear of the old name and of the new chain.
            moved = geometry.align_up(max(end, name + name_size), 8)
            text = layout.first_cluster[name : name + name_size]
            if len(text) < name_size:
                raise FormatError(f"{layout.path}: header.backing_file_size", "the name ends past the end of the file")
            self._name = (moved, text)
            end = moved + name_size
        if end > layout.cluster_size or not chain.terminated:
            what = f"the first cluster has no room for '{qcow2.EXTENSION_NAMES[kind]}'"
            raise UnsupportedError(f"{layout.path}: header extensions", what)

    def unreferenced(self, data: bytes) -> list[Write]:
        """The first epoch. Nothing leads to these writes yet, so they can share an epoch with anything."""
        return [self._name] if self._name else [self._data(data)]

    def references(self) -> list[Write]:
        """The second epoch: what refers to the writes of the first."""
        if self._name:
            return [(qcow2.BACKING_FILE_OFFSET, POINTER.build(offset=self._name[0]))]
        return [(self._offset, self._head)]

    def rest(self, data: bytes) -> Iterator[list[Write]]:
        """Further epochs, if a backing file's name had to be moved first."""
        if self._name:
            yield [self._data(data)]
            yield [(self._offset, self._head)]

    def _data(self, data: bytes) -> Write:
        return self._offset + EXTENSION_HEAD.size, data + self._tail
