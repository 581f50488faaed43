r"""`NamespaceTable`: the namespaces of a store, in a copy-on-write B-tree. What is found or changed is a path of it.

root, level 2:             | key count pointer | key count pointer |               key = CRC32C(name)
                             /                               \
nodes, level 1:   | .. | .. | .. |                      | .. | .. |              pointers, ascending by key: the
                   /     |     \                         /     \                   smallest below, how many records are
leaves, level 0: records ...  records ...           records ...  records ...     below, place and checksum of the child

Records are ascending by key and name, and those of one key are in one leaf. A change is collected until `seal`, which
writes the leaves that it falls into, and the nodes above them: it splits what has become longer than a node, and joins
what has become short with a neighbour.
Source: SPEC.md, "Namespaces".
"""

from __future__ import annotations

import functools
import heapq
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import groupby, starmap
from operator import itemgetter, lt
from typing import Any, NamedTuple, NoReturn

from dirtmap.engine.storefile.session import require_known
from dirtmap.fmt import store
from dirtmap.fmt.errors import FormatError
from dirtmap.fmt.parsers.store import NODE_POINTER
from dirtmap.fmt.store import Area, Record, build_record, name_key, namespace_label, parse_record, split_records

Read = Callable[[Area, str], bytes]
Place = Callable[[bytes], Area]
Release = Callable[[Area], None]
Item = tuple[Any, ...]  # of a leaf: key, name, bytes of the record; of another node: the fields of a node pointer
Part = Item | list[Item]  # of a node: the pointer to what stays as it is, or what is to be placed below it
Change = tuple[int, bytes, bytes | None]  # key, name, bytes of the record, or None if it goes

_KEYS = 1 << 32
_WORDS = NODE_POINTER.size // 4  # numbers of four bytes in a pointer


class Node(NamedTuple):
    """Where a node is, and what is below it.

    Attributes:
        level: of nodes below it; a leaf has 0.
        end: all keys below it are smaller.
        key: the smallest key below it; of the root 0, whatever is below it.
        records: how many are below it.
        offset, length, checksum: of its area.
    """

    level: int
    end: int
    key: int
    records: int
    offset: int
    length: int
    checksum: int

    @property
    def area(self) -> Area:
        """Where its bytes are."""
        return Area(self.offset, self.length, self.checksum)

    @property
    def what(self) -> str:
        """How messages call it. Names whose keys are between the two may be in it, and no others."""
        whole = (self.key, self.end) == (0, _KEYS)
        return "namespace table" if whole else f"namespace table, keys {self.key:08x}..{self.end - 1:08x}"


class DamagedNodeError(FormatError):
    """A node cannot be read, or contradicts the one above it.

    Attributes:
        node: which one.
        hides_nothing: only the number of records below it is wrong.
    """

    def __init__(self, where: str, what: str, node: Node, *, hides_nothing: bool = False) -> None:
        super().__init__(where, what)
        self.node, self.hides_nothing = node, hides_nothing


class Kept(NamedTuple):
    """A node that was read: its bytes, and the numbers in them if they are pointers; else its records by name."""

    node: Node
    data: bytes
    words: array[int]
    records: dict[bytes, bytes]


# By level, the node that was read last: often read again. A node with the same place and checksum has the same bytes,
# in whichever commit's table it is.
Known = dict[int, Kept]

Fail = Callable[[FormatError], object]
FailNode = Callable[[DamagedNodeError], object]


def raise_it(error: FormatError) -> NoReturn:
    """For who cannot go on past damage."""
    raise error


# A command looks at the same record several times.
@functools.lru_cache(maxsize=8)
def _parsed(raw: bytes) -> tuple[Record, tuple[str, str] | None]:
    """A record, and the first rule of the format that it breaks: field and fault. Errors as `parse_record`."""
    record = parse_record(raw)
    return record, next(iter(store.record_faults(record)), None)


class NamespaceTable:
    """The table as one commit finds it, and as the next one will.

    Args:
        where: path of the store, for messages.
        root: the area of the root; nothing if there are no namespaces.
        depth: level of the root.
        count: number of namespaces.
        sessions: how many of them have a session.
        read: returns the bytes of an area, verified.
        node_bytes: length above which a node is split.
        known: the nodes that were read last of the same store, which are not read again; the table puts its own there.
    """

    def __init__(
        self,
        where: str,
        root: Area,
        depth: int,
        count: int,
        sessions: int,
        read: Read,
        *,
        node_bytes: int,
        known: Known | None = None,
    ) -> None:
        self._where, self._read, self._most = where, read, node_bytes
        self.sessions = sessions
        self.root = Node(depth, _KEYS, 0, count, *root)
        self._changed: dict[bytes, bytes | None] = {}  # by name, the bytes of the record, or None if it goes
        self._last: Known = {} if known is None else known

    # Reading.

    @property
    def count(self) -> int:
        """The number of namespaces. Errors as `get`."""
        changed = ((raw is not None) - (self._found(name) is not None) for name, raw in self._changed.items())
        return self.root.records + sum(changed)

    def get(self, name: bytes) -> Record | None:
        """The namespace of that name, or None.

        Raises:
            FormatError: a node that leads to it, or its record, is damaged; the error names it.
        """
        raw = self._changed[name] if name in self._changed else self._found(name)
        return None if raw is None else self._record(name, raw)

    def __iter__(self) -> Iterator[Record]:
        """All namespaces, ascending by key and name. Errors as `get`."""
        return self.readable(raise_it)

    def readable(self, fail: Fail, see: Callable[[Node], object] = lambda node: None) -> Iterator[Record]:
        """All namespaces that can be read, ascending by key and name.

        Args:
            fail: told of each damaged part.
            see: told of each node that one leads to, before it is read.
        """
        leaves = self._leaves(fail, see)
        found: Iterable[Item] = (item for items in leaves for item in items if item[1] not in self._changed)
        if self._changed:
            found = heapq.merge(found, (change for change in self._changes() if change[2] is not None))
        for _, name, raw in found:
            try:
                record = self._record(name, raw)
            except FormatError as error:
                fail(error)
            else:
                yield record

    def _leaves(self, fail: FailNode, see: Callable[[Node], object]) -> Iterator[list[Item]]:
        """What is in each leaf that can be read, as the last commit left it. See `readable`."""
        waiting = [self.root]
        while waiting:
            node = waiting.pop()
            see(node)
            try:
                items = self._items(node)
            except DamagedNodeError as error:
                fail(error)
                continue
            if fault := self._count_fault(node, _count(node.level, items)):
                fail(fault)
            if node.level:
                waiting += reversed(_below(node, items))
            else:
                yield items

    def records(self, leaf: Node) -> list[Record]:
        """The namespaces of one leaf.

        Raises:
            DamagedNodeError: the leaf or a record in it is damaged.
        """
        try:
            return [self._record(name, raw) for _, name, raw in self._load(leaf)]
        except FormatError as error:
            raise DamagedNodeError(error.where, error.what, leaf) from None

    def unlike(self, other: NamespaceTable | None, fail: FailNode) -> tuple[list[Node], list[Node]]:
        """The leaves of this table that ``other``, one of the same store, has not; and the other way round.

        What both lead to is not read. ``fail`` is told of damaged nodes of this table.

        Raises:
            DamagedNodeError: a node of ``other`` is damaged.
        """
        tables = [self, other] if other else [self]
        levels: list[dict[tuple[int, ...], Node]] = [
            {table.root[2:]: table.root} if table.root.length else {} for table in tables
        ]
        for level in range(max(table.root.level for table in tables), -1, -1):
            # A node has the same level in both: all leaves are equally far from the root.
            shared = set.intersection(*map(set, levels)) if len(levels) > 1 else set()
            for number, table in enumerate(tables):
                if level and table.root.level >= level:
                    nodes = [node for place, node in levels[number].items() if place not in shared]
                    levels[number] = table._expanded(nodes, raise_it if number else fail)
                elif not level:
                    levels[number] = {place: node for place, node in levels[number].items() if place not in shared}
        mine, *others = (list(level.values()) for level in levels)
        return mine, others[0] if others else []

    def _expanded(self, nodes: Iterable[Node], fail: FailNode) -> dict[tuple[int, ...], Node]:
        found: dict[tuple[int, ...], Node] = {}
        for node in nodes:
            try:
                found.update((child[2:], child) for child in _below(node, self._load(node)))
            except DamagedNodeError as error:
                fail(error)
        return found

    def _found(self, name: bytes) -> bytes | None:
        """The bytes of a record as the last commit left it. Takes apart only what leads to it."""
        key, node = name_key(name), self.root
        while node.level:
            _, data, words, _ = self._kept(node)
            at = bisect_right(words[::_WORDS], key) - 1
            if at < 0:
                return None
            following = (at + 1) * _WORDS
            end = words[following] if following < len(words) else node.end
            node = Node(node.level - 1, end, *NODE_POINTER.unpack(data, at * NODE_POINTER.size))
        return self._kept(node).records.get(name)

    def _kept(self, node: Node) -> Kept:
        """A node, which is read if it is not the last one of its level. Errors as `records`."""
        kept = self._last.get(node.level)
        if kept is None or kept.node != node:
            kept = self._read_node(node)
            if node.level and (fault := self._count_fault(node, sum(kept.words[1::_WORDS]))):
                raise fault
            self._last[node.level] = kept
        return kept

    def _read_node(self, node: Node) -> Kept:
        data = self._bytes(node)
        if node.level:
            return Kept(node, data, self._words(node, data), {})
        return Kept(node, data, array("I"), self._records(node, data))

    def _records(self, node: Node, data: bytes) -> dict[bytes, bytes]:
        try:
            found = list(split_records(data))
        except ValueError as error:
            raise self._damaged(node, str(error)) from None
        records = dict(found)
        if len(records) < len(found):
            raise self._damaged(node, "its names do not ascend")
        return records

    def _load(self, node: Node, kept: Kept | None = None) -> list[Item]:
        """What is in a node; ``kept``: the same, where it was read already. Errors as `records`."""
        items = self._items(node, kept)
        if fault := self._count_fault(node, _count(node.level, items)):
            raise fault
        return items

    def _items(self, node: Node, kept: Kept | None = None) -> list[Item]:
        """Like `_load`, but the number of records may be wrong."""
        kept = kept or self._read_node(node)
        if node.level:
            return list(NODE_POINTER.unpack_all(kept.data))
        items: list[Item] = [(name_key(name), name, raw) for name, raw in kept.records.items()]
        if not all(map(lt, items, items[1:])):
            raise self._damaged(node, "its names do not ascend")
        if items and items[-1][0] >= node.end:
            raise self._damaged(node, f"has the key {items[-1][0]:08x}, which does not lead to it")
        return items

    def _bytes(self, node: Node) -> bytes:
        """The bytes of a node, which begins with the key that leads to it. Nothing of a root without namespaces."""
        is_root = node.level == self.root.level
        if is_root and node[2:] == (0, node.records, *store.NOWHERE) and not node.level:
            return b""
        if not 0 < node.length <= store.MAX_NODE_BYTES:
            what = f"{node.length} is outside 1..{store.MAX_NODE_BYTES}"
            raise DamagedNodeError(f"{self._where}: {node.what}.length", what, node)
        try:
            data = self._read(node.area, node.what)
            first = int.from_bytes(data[:4], "big") if node.level else name_key(next(split_records(data))[0])
        except FormatError as error:
            raise DamagedNodeError(error.where, error.what, node) from None
        except ValueError as error:
            raise self._damaged(node, str(error)) from None
        # No node can be reached twice: keys ascend, and each node begins with the key that leads to it. Looked at
        # first, so that not much time goes into a node to which a thousand pointers lead.
        if first != node.key and not is_root:
            raise self._damaged(node, f"begins with the key {first:08x}, which does not lead to it")
        return data

    def _words(self, node: Node, data: bytes) -> array[int]:
        """The pointers of a node, six numbers of four bytes each, of which the first is the key, the second the count.

        Faster than to take each pointer apart.
        """
        if len(data) % NODE_POINTER.size:
            raise self._damaged(node, f"{len(data)} bytes are not an array of pointers")
        words = array("I", data)
        if sys.byteorder == "little":
            words.byteswap()
        keys = words[::_WORDS]
        if not all(map(lt, keys, keys[1:])):
            raise self._damaged(node, "its keys do not ascend")
        if keys[-1] >= node.end:
            raise self._damaged(node, f"has the key {keys[-1]:08x}, which does not lead to it")
        return words

    def _damaged(self, node: Node, what: str) -> DamagedNodeError:
        return DamagedNodeError(f"{self._where}: {node.what}", what, node)

    def _count_fault(self, node: Node, count: int) -> DamagedNodeError | None:
        if count == node.records:
            return None
        where = "namespaces extension.namespaces" if node.level == self.root.level else f"{node.what}.count"
        what = f"{node.records}, but there are {count}"
        return DamagedNodeError(f"{self._where}: {where}", what, node, hides_nothing=True)

    def _record(self, name: bytes, raw: bytes) -> Record:
        where = f"{self._where}: {namespace_label(name)}"
        try:
            record, fault = _parsed(raw)
        except ValueError as error:
            raise FormatError(where, str(error)) from None
        if fault:
            raise FormatError(f"{where}.{fault[0]}", fault[1])
        return record

    # Changing.

    def put(self, record: Record, before: Record | None = None) -> None:
        """Adds or replaces a namespace.

        Args:
            record: the new one.
            before: the one that is there, if the caller knows it.

        Raises:
            UnsupportedError: the one there is needs newer software.
            FormatError: the record breaks a rule of the format; or as `get`.
        """
        for field, what in store.record_faults(record):
            raise FormatError(f"{self._where}: {namespace_label(record.name)}.{field}", what)
        self._change(record.name, build_record(record), before or self.get(record.name), tracked=record.tracked)

    def remove(self, name: bytes) -> None:
        """Removes a namespace, if there is one of that name. Errors as `put`."""
        self._change(name, None, self.get(name), tracked=False)

    def _change(self, name: bytes, raw: bytes | None, before: Record | None, *, tracked: bool) -> None:
        if before is not None:
            require_known(self._where, before)
        self.sessions += tracked - (before is not None and before.tracked)
        self._changed[name] = raw

    def seal(self, place: Place, release: Release) -> None:
        """Writes the changed nodes anew, of which `root` is one then.

        Args:
            place: finds room for bytes, and plans their writing.
            release: gives up an area.

        Raises:
            FormatError: there are too many namespaces, or too many of one key; or a node that changes is damaged.
        """
        if not self._changed:
            return
        level = self.root.level
        items = self._rebuilt(self.root, self._changes(), place, release)
        if (count := _count(level, items)) > store.MAX_NAMESPACES:
            raise FormatError(f"{self._where}: namespaces", f"{count} are more than {store.MAX_NAMESPACES}")
        if not level:
            items = self._placed(0, items, place)
        else:
            level -= 1
        while len(items) > 1:
            level += 1
            items = self._placed(level, items, place)
        self.root = Node(level, _KEYS, 0, *items[0][1:]) if items else Node(0, _KEYS, 0, 0, *Area())
        self._changed, self._last = {}, {}

    def _changes(self) -> list[Change]:
        return sorted((name_key(name), name, raw) for name, raw in self._changed.items())

    def _rebuilt(self, node: Node, changes: list[Change], place: Place, release: Release) -> list[Item]:
        """What will be in a node, which is given up. All that is below it has its place."""
        items = self._load(node, self._kept(node))
        release(node.area)
        if not node.level:
            gone = {name for _, name, _ in changes}
            kept = [item for item in items if item[1] not in gone]
            return sorted([*kept, *(change for change in changes if change[2] is not None)])
        start, below = 0, node.level - 1
        touched: dict[int, list[Item]] = {}
        while start < len(changes):
            at = max(0, bisect_right(items, (changes[start][0], _KEYS)) - 1)
            child = _child(node, items, at)
            end = bisect_left(changes, (child.end,), start)
            touched[at] = self._rebuilt(child, changes[start:end], place, release)
            start = end
        if not any(self._is_short(below, part) for part in touched.values()):  # the usual case, made fast
            pointers = [(at, self._placed(below, part, place)) for at, part in touched.items()]
            for at, pointer in reversed(pointers):
                items[at : at + 1] = pointer
            return items
        parts: list[Part] = [touched.get(at, item) for at, item in enumerate(items)]
        joined: list[Part] = []
        for part in parts:
            neighbour = joined[-1] if joined else ()
            if part and neighbour and (self._is_short(below, part) or self._is_short(below, neighbour)):
                with suppress(DamagedNodeError):  # what cannot be read stays beside what is short
                    part = [each for one in (neighbour, part) for each in self._opened(node, items, one, release)]
                    joined.pop()
            if part:
                joined.append(part)
        found: list[Item] = []
        for part in joined:
            found += [part] if isinstance(part, tuple) else self._placed(below, part, place)
        return found

    def _opened(self, node: Node, items: list[Item], part: Part, release: Release) -> list[Item]:
        """What is in a part of a node; the part is given up where it has a place."""
        if isinstance(part, list):
            return part
        child = _child(node, items, bisect_left(items, part))
        found = self._load(child)
        release(child.area)
        return found

    def _is_short(self, level: int, part: Part) -> bool:
        """True of a changed node that is so short that it is joined with a neighbour."""
        return isinstance(part, list) and _size(level, part) < self._most // 4

    def _placed(self, level: int, items: list[Item], place: Place) -> list[Item]:
        """Places nodes that have all these items, as few and as equal as possible. Returns the pointers to them."""
        total = _size(level, items)
        share = total / max(1, -(-total // self._most))
        pointers: list[Item] = []
        waiting: list[Item] = []
        size = 0

        def end() -> None:
            data = b"".join(starmap(NODE_POINTER.pack, waiting) if level else map(itemgetter(2), waiting))
            if len(data) > store.MAX_NODE_BYTES:
                what = f"{len(waiting)} names share the key {waiting[0][0]:08x}, too many for one leaf"
                raise FormatError(f"{self._where}: namespaces", what)
            pointers.append((waiting[0][0], _count(level, waiting), *place(data)))

        # Where one node is enough, all are one group.
        groups = groupby(items, itemgetter(0)) if total > self._most else [(0, items)] if items else []
        for _, alike in groups:
            group = list(alike)
            length = _size(level, group)
            if waiting and (size >= share or size + length > self._most):
                end()
                waiting, size = [], 0
            waiting += group
            size += length
        if waiting:
            end()
        return pointers


def _below(node: Node, items: list[Item]) -> list[Node]:
    return [_child(node, items, at) for at in range(len(items))]


def _child(node: Node, items: list[Item], at: int) -> Node:
    end = items[at + 1][0] if at + 1 < len(items) else node.end
    return Node(node.level - 1, end, *items[at])


def _count(level: int, items: list[Item]) -> int:
    return sum(map(itemgetter(1), items)) if level else len(items)


def _size(level: int, items: list[Item]) -> int:
    return NODE_POINTER.size * len(items) if level else sum(map(len, map(itemgetter(2), items)))
