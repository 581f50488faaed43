"""The store's four header copies: which one counts, and what damage to the others means.

block   0    1    2    3        slot A: blocks 0 and 2     slot B: blocks 1 and 3
        A    B    A'   B'       each says which it is; where it is another, it is damaged

commit N + 1, in slot B, after N in slot A        1   B  = N + 1
                                                  2   B' = N + 1, and A' = N, which says that another has followed

newest slot                other slot                              then
whole, and not followed    has what the newest was made from       the newest counts
whole, and not followed    has not                                 it counts, in doubt: the other may have been newer
whole, and followed        any                                     it counts, in doubt: a later commit is lost
damaged                    damaged                                 refused

A slot is whole where one of its copies is. The newest was made from the commit before it, or, where it counted in doubt
or a commit was missing, from its ``doubt_generation``. So three copies have to be damaged before the newest commit is
lost without doubt: both of its own, and the one that says that it was there.

A writer wipes the generation of both copies of the other slot before it changes a store in doubt, or a torn header over
what is left there could bring back a commit whose areas are gone by then.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dirtmap.fmt import store
from dirtmap.fmt.digest import crc32c
from dirtmap.fmt.errors import FormatError, UnsupportedError
from dirtmap.fmt.extensions import Chain, build_chain, parse_chain
from dirtmap.fmt.identity import NO_FILE_PLACE, FilePlace
from dirtmap.fmt.parsers.store import AREA, CHECKSUM, HEADER, LEAF, NAMESPACES_EXTENSION, PLACE_EXTENSION, RUN
from dirtmap.fmt.store import Area, parse_areas

_CHECKED = store.BLOCK - CHECKSUM.size
_GENERATION = HEADER.field("generation")
_SLOT = HEADER.field("slot").offset  # the number of the copy is the byte behind it
_FOLLOWED = HEADER.field("followed")
_LABEL = 2 + _FOLLOWED.size  # bytes from `_SLOT` on that differ between the copies of one header
_NO_GENERATION = b"\xff" * _GENERATION.size  # more than one bit away from any that there can be


class Seen(NamedTuple):
    """A commit that was seen: its generation, and its id, 16 bytes."""

    generation: int
    commit_id: bytes

    def is_missing_at(self, newest: Seen) -> bool:
        """True where a store that has this newest commit was rolled back. The one rule for that."""
        return newest.generation < self.generation or (
            newest.generation == self.generation and newest.commit_id != self.commit_id
        )


@dataclass(frozen=True, slots=True)
class Header:
    """One commit's header.

    Attributes:
        uuid: of the store, 16 bytes.
        generation: number of the commit; the higher one counts.
        commit_id: random, 16 bytes: tells two commits of one generation apart.
        doubt_generation: namespaces written by this commit or an earlier one count as all dirty.
        cluster_bits: log2 of bytes.
        clusters: length of the file in clusters.
        table: the root of the namespace table.
        depth: how many levels of nodes are below that root.
        namespaces: how many there are.
        space: the space map's root.
        released: the list of runs that this commit released.
        sessions: how many of the namespaces have a session.
        commit_time: when the commit was made, in nanoseconds since 1970; for people only.
        place: where the file was that the commit was written to.
        writer: the program that made the commit, and its version: UTF-8.
        read_only_compatible, compatible, autoclear: feature bits as found. Nobody writes a store with the first.
        others: extensions we do not know, as (type, data), kept as found.
    """

    uuid: bytes
    generation: int
    commit_id: bytes
    doubt_generation: int
    cluster_bits: int
    clusters: int
    table: Area
    depth: int
    namespaces: int
    space: Area
    released: Area
    sessions: int = 0
    commit_time: int = 0
    place: FilePlace = NO_FILE_PLACE
    writer: bytes = store.WRITER
    read_only_compatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    others: tuple[tuple[int, bytes], ...] = ()

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def commit(self) -> Seen:
        """The commit whose header this is."""
        return Seen(self.generation, self.commit_id)


def build_block(header: Header, number: int) -> bytes:
    """The copy that is block ``number`` of the file: `store.BLOCK` bytes with their checksum."""
    fixed = HEADER.build(
        magic=store.MAGIC,
        version=store.VERSION,
        incompatible_features=store.INCOMPATIBLE_SESSION if header.sessions else 0,
        read_only_compatible_features=header.read_only_compatible,
        compatible_features=header.compatible,
        autoclear_features=0,  # none are known, and a writer clears those it does not know
        cluster_bits=header.cluster_bits,
        header_length=HEADER.size,
        slot=number % 2,
        copy=number // 2,
        followed=0,
        sessions=header.sessions,
        uuid=header.uuid,
        generation=header.generation,
        commit_id=header.commit_id,
        doubt_generation=header.doubt_generation,
        clusters=header.clusters,
        commit_time=header.commit_time,
    )
    namespaces = NAMESPACES_EXTENSION.build(
        **header.table._asdict(), depth=header.depth, reserved=0, namespaces=header.namespaces
    )
    chain = build_chain(
        [
            (store.EXTENSION_NAMESPACES, namespaces),
            (store.EXTENSION_SPACE, AREA.build(**header.space._asdict())),
            (store.EXTENSION_RELEASED, AREA.build(**header.released._asdict())),
            (store.EXTENSION_PLACE, PLACE_EXTENSION.build(**header.place._asdict())),
            (store.EXTENSION_WRITER, header.writer),
            *header.others,
        ]
    )
    return _sealed((fixed + chain).ljust(_CHECKED, b"\0"))


def _sealed(checked: bytes) -> bytes:
    return checked + CHECKSUM.build(checksum=crc32c(checked))


def as_copy(block: bytes, number: int, *, followed: bool = False) -> bytes:
    """The same header as the copy that is block ``number`` of the file, which says whether another has followed."""
    position = bytes([number % 2, number // 2]) + int(followed).to_bytes(_FOLLOWED.size, "big")
    return _sealed(block[:_SLOT] + position + block[_SLOT + len(position) : _CHECKED])


def is_whole(block: bytes, number: int) -> bool:
    """True where the copy that is block ``number`` of the file is complete, in place, and its checksum right."""
    if len(block) < store.BLOCK or not block.startswith(store.MAGIC) or not _is_in_place(block, number):
        return False
    return bool(CHECKSUM.parse(block, _CHECKED).checksum == crc32c(block[:_CHECKED]))


def _is_in_place(block: bytes, number: int) -> bool:
    return block[_SLOT] == number % 2 and block[_SLOT + 1] == number // 2


def parse_block(path: str, block: bytes) -> Header:
    """A whole copy's header.

    Raises:
        UnsupportedError: it asks for a newer dirtmap.
        FormatError: a field makes no sense.
    """
    return _parse_unlabelled(path, block[:_SLOT] + bytes(_LABEL) + block[_SLOT + _LABEL : _CHECKED])


# Both copies of a slot say the same, and a commit reads each of them several times.
@functools.lru_cache(maxsize=8)
def _parse_unlabelled(path: str, block: bytes) -> Header:
    raw = HEADER.parse(block)
    if raw.version != store.VERSION:
        raise UnsupportedError(f"{path}: header.version", f"{raw.version} is not {store.VERSION}")
    if unknown := raw.incompatible_features & ~store.INCOMPATIBLE_KNOWN:
        what = f"{unknown:#x} is unknown: the store needs newer software"
        raise UnsupportedError(f"{path}: header.incompatible_features", what)
    if bool(raw.incompatible_features & store.INCOMPATIBLE_SESSION) != bool(raw.sessions):
        what = f"{raw.sessions}, which the incompatible features contradict"
        raise FormatError(f"{path}: header.sessions", what)
    if not store.MIN_CLUSTER_BITS <= raw.cluster_bits <= store.MAX_CLUSTER_BITS:
        limits = f"{store.MIN_CLUSTER_BITS}..{store.MAX_CLUSTER_BITS}"
        raise FormatError(f"{path}: header.cluster_bits", f"{raw.cluster_bits} is outside {limits}")
    if raw.generation > store.MAX_GENERATION:
        raise FormatError(f"{path}: header.generation", f"{raw.generation} is above {store.MAX_GENERATION}")
    if not store.RESERVED <= raw.clusters << raw.cluster_bits <= store.MAX_FILE_BYTES:
        raise FormatError(f"{path}: header.clusters", f"{raw.clusters} is out of range")
    if raw.header_length < HEADER.size or raw.header_length > _CHECKED or raw.header_length % 8:
        raise FormatError(f"{path}: header.header_length", f"{raw.header_length} is out of range")
    chain = parse_chain(block, raw.header_length, _CHECKED)
    if chain.fault or not chain.terminated:
        raise FormatError(f"{path}: header extensions", chain.fault or "there is no end marker")
    areas = _known(path, chain)
    writer = areas[store.EXTENSION_WRITER]
    if len(writer) > store.MAX_WRITER or not _is_text(writer):
        raise FormatError(f"{path}: writer extension", f"more than {store.MAX_WRITER} bytes, or not UTF-8")
    namespaces = NAMESPACES_EXTENSION.parse(areas[store.EXTENSION_NAMESPACES])
    if namespaces.depth > store.MAX_DEPTH:
        raise FormatError(f"{path}: namespaces extension.depth", f"{namespaces.depth} is above {store.MAX_DEPTH}")
    if namespaces.namespaces > store.MAX_NAMESPACES:
        what = f"{namespaces.namespaces} is above {store.MAX_NAMESPACES}"
        raise FormatError(f"{path}: namespaces extension.namespaces", what)
    space = parse_areas(areas[store.EXTENSION_SPACE])[0]
    if space.length > store.MAX_SPACE_MAP_BYTES or space.length % LEAF.size:
        raise FormatError(f"{path}: space map extension.length", f"{space.length} is out of range")
    released = parse_areas(areas[store.EXTENSION_RELEASED])[0]
    if released.length > store.MAX_RELEASED_BYTES or released.length % RUN.size:
        raise FormatError(f"{path}: released clusters extension.length", f"{released.length} is out of range")
    return Header(
        sessions=raw.sessions,
        commit_time=raw.commit_time,
        place=FilePlace(*PLACE_EXTENSION.unpack(areas[store.EXTENSION_PLACE])),
        writer=writer,
        read_only_compatible=raw.read_only_compatible_features,
        uuid=raw.uuid,
        generation=raw.generation,
        commit_id=raw.commit_id,
        doubt_generation=raw.doubt_generation,
        cluster_bits=raw.cluster_bits,
        clusters=raw.clusters,
        table=Area(namespaces.offset, namespaces.length, namespaces.checksum),
        depth=namespaces.depth,
        namespaces=namespaces.namespaces,
        space=space,
        released=released,
        compatible=raw.compatible_features,
        autoclear=raw.autoclear_features,
        others=tuple((e.type, e.data) for e in chain.extensions if e.type not in store.EXTENSION_NAMES),
    )


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _known(path: str, chain: Chain) -> dict[int, bytes]:
    sizes = {
        store.EXTENSION_NAMESPACES: NAMESPACES_EXTENSION.size,
        store.EXTENSION_SPACE: AREA.size,
        store.EXTENSION_RELEASED: AREA.size,
        store.EXTENSION_PLACE: PLACE_EXTENSION.size,
        store.EXTENSION_WRITER: None,  # any, as far as there is room
    }
    found: dict[int, bytes] = {}
    for extension in chain.extensions:
        if extension.type in sizes:
            name = store.EXTENSION_NAMES[extension.type]
            size = sizes[extension.type]
            if extension.type in found or size not in (None, len(extension.data)):
                raise FormatError(f"{path}: {name} extension", "appears twice, or its length is wrong")
            found[extension.type] = extension.data
    for kind in sizes.keys() - found.keys():
        raise FormatError(f"{path}: header extensions", f"'{store.EXTENSION_NAMES[kind]}' is missing")
    return found


@dataclass(frozen=True, slots=True)
class Chosen:
    """The header that counts.

    Attributes:
        header: it; where ``in_doubt``, or a commit is lost, with every namespace put in doubt.
        slot: 0 (A) or 1 (B).
        in_doubt: a later commit is lost, or may be.
        block: the copy that it was read from.
        older: the header that the other slot has; None if neither of its copies is whole.
        repairs: (block, bytes): damaged or outdated copies, and what they should be, before anything new is written.
        lost: generation of a commit that was seen and is missing; 0: none.
        copies: the whole copies, and what they say.
    """

    header: Header
    slot: int
    in_doubt: bool
    block: bytes = b""
    older: Header | None = None
    repairs: tuple[tuple[int, bytes], ...] = ()
    lost: int = 0
    copies: Mapping[bytes, Header] = field(default_factory=dict, compare=False, repr=False)

    def is_as_committed(self, commit: Seen) -> bool:
        """True where the newest commit is that one, and nothing is in doubt: then all that it leads to is as it was."""
        return not self.in_doubt and not self.lost and self.header.commit == commit

    def without(self, seen: Seen) -> Chosen:
        """The same, where that commit is missing."""
        return replace(self, header=_in_doubt(self.header), lost=seen.generation)


def choose(path: str, data: bytes, known: Mapping[bytes, Header] | None = None) -> Chosen:
    """Judges the first `store.RESERVED` bytes of a store.

    Args:
        path: for messages.
        data: the bytes.
        known: copies that need no second look: every read looks twice, and writers know what they wrote.

    Raises:
        FormatError: not a store, or no copy is whole.
        UnsupportedError: it needs a newer dirtmap, or an older one.
    """
    blocks = [data[at : at + store.BLOCK] for at in range(0, store.RESERVED, store.BLOCK)]
    if not any(block.startswith(store.MAGIC) for block in blocks):
        if any(block.startswith(store.EARLIER_MAGIC) for block in blocks):
            raise UnsupportedError(f"{path}: header.magic", "a store of an earlier layout, which had no release")
        raise FormatError(f"{path}: header.magic", "not a dirtmap store")
    copies: dict[bytes, Header] = {}
    whole: dict[int, Header] = {}
    for number, block in enumerate(blocks):
        if known and block in known and _is_in_place(block, number):
            copies[block] = whole[number] = known[block]
        elif is_whole(block, number):
            copies[block] = whole[number] = parse_block(path, block)
    if not whole:
        raise FormatError(f"{path}: header", "all four copies are damaged")
    best = max(whole, key=lambda number: whole[number].generation)
    header, slot = whole[best], best % 2
    others = [number for number in store.COPIES[1 - slot] if number in whole]
    other = max(others, key=lambda number: whole[number].generation, default=None)
    older = None if other is None else whole[other]
    bests = (n for n in store.COPIES[slot] if n in whole and whole[n].generation == header.generation)
    followed = {number for number in bests if _is_followed(blocks[number])}
    in_doubt = (
        bool(followed) or older is None or older.generation not in (header.generation - 1, header.doubt_generation)
    )
    # The copy that a repair is made from stays as it is: a crash that tears both would lose the slot.
    wanted = {n: as_copy(blocks[best], n, followed=n in followed) for n in store.COPIES[slot] if n != best}
    if in_doubt:
        header = _in_doubt(header)
        # Only the generation: another value of a damaged word could be what that word was before.
        wanted |= {n: _wiped(blocks[n]) for n in store.COPIES[1 - slot]}
    elif other is not None:
        twin = other ^ 2
        wanted[twin] = as_copy(blocks[other], twin, followed=twin == store.COPIES[1 - slot][1])
    repairs = tuple((n, block) for n, block in wanted.items() if block != blocks[n])
    return Chosen(header, slot, in_doubt, blocks[best], older, repairs, copies=copies)


def switch(new: Header, before: Chosen) -> list[list[tuple[int, bytes]]]:
    """What a commit writes to the header copies, in two epochs: (block, bytes). A sync has to end each.

    Args:
        new: the commit's header.
        before: what counted until then.
    """
    first, second = store.COPIES[1 - before.slot]
    last = store.COPIES[before.slot][1]
    block = build_block(new, first)
    return [[(first, block)], [(second, as_copy(block, second)), (last, as_copy(before.block, last, followed=True))]]


def pair(header: Header, slot: int, *, followed: bool) -> list[tuple[int, bytes]]:
    """Both copies of a header in a file that nobody has opened yet: (block, bytes)."""
    first, second = store.COPIES[slot]
    block = build_block(header, first)
    return [(first, block), (second, as_copy(block, second, followed=followed))]


def _is_followed(block: bytes) -> bool:
    return any(block[_FOLLOWED.offset : _FOLLOWED.offset + _FOLLOWED.size])


def _in_doubt(header: Header) -> Header:
    return replace(header, doubt_generation=header.generation)


def _wiped(block: bytes) -> bytes:
    end = _GENERATION.offset + _GENERATION.size
    return (block[: _GENERATION.offset].ljust(_GENERATION.offset, b"\0") + _NO_GENERATION + block[end:]).ljust(
        store.BLOCK, b"\0"
    )
