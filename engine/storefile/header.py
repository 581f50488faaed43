"""The store's four header copies: which one counts, and what damage to the others means.

block   0    1    2    3        slot A: blocks 0 and 2     slot B: blocks 1 and 3
        A    B    A'   B'

newest slot, at least one copy whole                        it counts
... and the other slot not as a commit leaves it            the other may have been the newest: it counts, in doubt
no copy whole                                               refused

The other slot is as a commit leaves it where

- a copy of it is whole;
- its whole copies are the same: the second copy of a slot is made the same as the first before the other slot changes;
- they have the header that the newest was made from: the one of the generation before, or, where it counted in doubt or
  a commit was missing, of the newest's ``doubt_generation``. So they are not the newest's own, which a write that went
  astray has put there;
- no damaged copy is, but for one bit, of the newest's generation or a later one, and none has its generation wiped.
  Where that bit is in a word that is as its twin has it, a crash was in the middle of writing that copy.

A writer wipes the generation of both copies of a slot before it changes a store in doubt. So doubt outlives a crash of
that writer. What cannot be told: one copy of the newest header damaged beyond one bit, or as it was two commits ago,
and the other as it was two commits ago. That is what the slot is like before a commit, or in the middle of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import crc32c

from dirtmap.fmt import store
from dirtmap.fmt.errors import FormatError, UnsupportedError
from dirtmap.fmt.extensions import Chain
from dirtmap.fmt.store import Area
from dirtmap.fmt.structures.extensions import build_chain, parse_chain
from dirtmap.fmt.structures.store import AREA, CHECKSUM, HEADER, LEAF, NAMESPACES_EXTENSION, RUN, parse_areas

_CHECKED = store.BLOCK - CHECKSUM.size
_GENERATION = HEADER.field("generation")
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
        compatible, autoclear: feature bits as found.
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


def build_block(header: Header) -> bytes:
    """One copy: `store.BLOCK` bytes with their checksum."""
    fixed = HEADER.build(
        magic=store.MAGIC,
        version=store.VERSION,
        incompatible_features=0,
        compatible_features=header.compatible,
        autoclear_features=0,  # none are known, and a writer clears those it does not know
        cluster_bits=header.cluster_bits,
        header_length=HEADER.size,
        uuid=header.uuid,
        generation=header.generation,
        commit_id=header.commit_id,
        doubt_generation=header.doubt_generation,
        clusters=header.clusters,
    )
    namespaces = NAMESPACES_EXTENSION.build(
        **header.table._asdict(), depth=header.depth, reserved=0, namespaces=header.namespaces
    )
    chain = build_chain(
        [
            (store.EXTENSION_NAMESPACES, namespaces),
            (store.EXTENSION_SPACE, AREA.build(**header.space._asdict())),
            (store.EXTENSION_RELEASED, AREA.build(**header.released._asdict())),
            *header.others,
        ]
    )
    block = (fixed + chain).ljust(_CHECKED, b"\0")
    return block + CHECKSUM.build(checksum=crc32c.crc32c(block))


def is_whole(block: bytes) -> bool:
    """True where the copy is complete and its checksum right."""
    if len(block) < store.BLOCK or not block.startswith(store.MAGIC):
        return False
    return bool(CHECKSUM.parse(block, _CHECKED).checksum == crc32c.crc32c(block[:_CHECKED]))


def parse_block(path: str, block: bytes) -> Header:
    """A whole copy's header.

    Raises:
        UnsupportedError: it asks for a newer dirtmap.
        FormatError: a field makes no sense.
    """
    raw = HEADER.parse(block)
    if raw.version != store.VERSION:
        raise UnsupportedError(f"{path}: header.version", f"{raw.version} is not {store.VERSION}")
    if raw.incompatible_features:
        what = f"{raw.incompatible_features:#x} has bits that are unknown: the store needs newer software"
        raise UnsupportedError(f"{path}: header.incompatible_features", what)
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


def _known(path: str, chain: Chain) -> dict[int, bytes]:
    sizes = {
        store.EXTENSION_NAMESPACES: NAMESPACES_EXTENSION.size,
        store.EXTENSION_SPACE: AREA.size,
        store.EXTENSION_RELEASED: AREA.size,
    }
    found: dict[int, bytes] = {}
    for extension in chain.extensions:
        if extension.type in sizes:
            name = store.EXTENSION_NAMES[extension.type]
            if extension.type in found or len(extension.data) != sizes[extension.type]:
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
        in_doubt: the other slot may have had the newest: it is not as a commit leaves it.
        repairs: (block, bytes): damaged or outdated copies, and what they should be, before anything new is written.
        lost: generation of a commit that was seen and is missing; 0: none.
        copies: the whole copies, and what they say.
    """

    header: Header
    slot: int
    in_doubt: bool
    repairs: tuple[tuple[int, bytes], ...]
    lost: int = 0
    copies: Mapping[bytes, Header] = field(default_factory=dict, compare=False, repr=False)

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
        UnsupportedError: it needs a newer dirtmap.
    """
    blocks = [data[at : at + store.BLOCK] for at in range(0, store.RESERVED, store.BLOCK)]
    if not any(block.startswith(store.MAGIC) for block in blocks):
        raise FormatError(f"{path}: header.magic", "not a dirtmap store")
    copies: dict[bytes, Header] = {}
    for block in blocks:
        if block not in copies:
            if known and block in known:
                copies[block] = known[block]
            elif is_whole(block):
                copies[block] = parse_block(path, block)
    headers = {number: copies[block] for number, block in enumerate(blocks) if block in copies}
    if not headers:
        raise FormatError(f"{path}: header", "all four copies are damaged")
    newest = max(header.generation for header in headers.values())
    bests = [number for number, header in headers.items() if header.generation == newest]
    slot = int(2 * sum(number % 2 for number in bests) > len(bests))  # a slot has two copies of it, but for a crash
    best = next(number for number in bests if number % 2 == slot)
    header = headers[best]
    repairs = [(number, blocks[best]) for number in store.COPIES[slot] if blocks[number] != blocks[best]]
    other = [number for number in store.COPIES[1 - slot] if number in headers]
    in_doubt = (
        {headers[number].generation for number in other} not in ({newest - 1}, {header.doubt_generation})
        or len({blocks[number] for number in other}) > 1
        or any(_claims(blocks[n], blocks[n ^ 2]) >= newest for n in store.COPIES[1 - slot] if n not in headers)
    )
    if in_doubt:
        header = _in_doubt(header)
        # Their generation is wiped, or a torn write over what is left of them could bring back a header whose areas are
        # gone by then. Nothing else: another value of a damaged word could be what that word was before.
        repairs += [(n, wiped) for n in store.COPIES[1 - slot] if (wiped := _wiped(blocks[n])) != blocks[n]]
    else:
        repairs += [(n, blocks[other[0]]) for n in store.COPIES[1 - slot] if n not in other]
    return Chosen(header, slot, in_doubt, tuple(repairs), copies=copies)


def _claims(block: bytes, twin: bytes) -> int:
    """Of which generation a damaged copy was, as far as it tells; one that is wiped tells of doubt: any.

    A copy that lacks one word, and has there what its twin has, was being written over that when a crash came.
    """
    repaired = _with_a_bit_flipped_back(block)
    if repaired is not None:
        word = next(at for at in range(0, store.BLOCK, 8) if repaired[at : at + 8] != block[at : at + 8])
        if block[word : word + 8] == twin[word : word + 8]:
            return 0
        return int(HEADER.parse(repaired).generation)
    ones = b"\xff" * _GENERATION.offset  # which a disk can read as where it has lost what was there
    wiped = block == _wiped(block) and not block.startswith(ones)
    return store.MAX_GENERATION + 1 if wiped else 0


def _with_a_bit_flipped_back(block: bytes) -> bytes | None:
    """The whole copy that a damaged one was before one of its bits flipped; None where there is none."""
    if len(block) < store.BLOCK:
        return None
    syndrome = CHECKSUM.parse(block, _CHECKED).checksum ^ crc32c.crc32c(block[:_CHECKED])
    at = _syndromes().get(syndrome)
    if at is None:
        return None
    repaired = bytearray(block)
    repaired[at // 8] ^= 1 << at % 8
    return bytes(repaired) if is_whole(bytes(repaired)) else None


@cache
def _syndromes() -> dict[int, int]:
    """Which bit of a block has flipped, by what that changes in the checksum; CRC32C tells all of them apart."""
    added = [crc32c.crc32c(bytes([byte]), 0xFFFFFFFF) ^ 0xFFFFFFFF for byte in range(256)]
    found = {1 << bit: (store.BLOCK - 1 - bit // 8) * 8 + bit % 8 for bit in range(32)}  # of the checksum itself
    for bit in range(8):
        change = added[1 << bit]
        for byte in reversed(range(_CHECKED)):
            found[change] = byte * 8 + bit
            change = change >> 8 ^ added[change & 0xFF]
    return found


def _in_doubt(header: Header) -> Header:
    return replace(header, doubt_generation=header.generation)


def _wiped(block: bytes) -> bytes:
    end = _GENERATION.offset + _GENERATION.size
    return (block[: _GENERATION.offset].ljust(_GENERATION.offset, b"\0") + _NO_GENERATION + block[end:]).ljust(
        store.BLOCK, b"\0"
    )


def blocks_of(slot: int) -> Sequence[int]:
    """The byte offsets of a slot's two copies."""
    return [number * store.BLOCK for number in store.COPIES[slot]]
