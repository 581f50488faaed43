"""Writes what a container says into the index, and removes what it no longer says."""

from __future__ import annotations

import os
from collections.abc import Iterator

from dirtmap.engine.index.database import Writer
from dirtmap.engine.index.reading import Bitmaps, Container, Fingerprint, Get, Reading
from dirtmap.fmt import index as layout
from dirtmap.fmt import store
from dirtmap.fmt.index import (
    BITMAP,
    CONTAINER,
    FOUND,
    KNOWN_IMAGE,
    KNOWN_STORE,
    MEMBERS,
    NAME,
    OTHERS,
    PATH,
    ROOT,
    STATE,
    UUID,
    Claim,
    Member,
    build_bitmap,
    build_members,
    build_namespaces,
    image_key,
    members_key,
    number,
    parse_bitmap,
    parse_members,
    parse_namespaces,
    part,
    path_mark,
)
from dirtmap.fmt.parsers.index import CONTAINER_VALUE, STATE_VALUE


def container_at(get: Get, path: str) -> Container | None:
    """The index's record of the container at a path, or None."""
    contents = get(CONTAINER + part(os.fsencode(path)))
    if contents is None:
        return None
    found, kind, condition, racy, _, *looks, generation, commit_id, uuid = CONTAINER_VALUE.unpack(contents)
    return Container(path, found, kind, condition, bool(racy), Fingerprint(*looks), generation, commit_id, uuid)


def new_number(writer: Writer, path: str) -> int:
    """Gives the path of a container a number that no other path has had."""
    state = STATE_VALUE.parse(writer.get(STATE) or bytes(STATE_VALUE.size))
    taken = int(state.containers) + 1
    writer.put(STATE, STATE_VALUE.build(version=layout.VERSION, reserved=0, containers=taken))
    writer.put(PATH + number(taken), os.fsencode(path))
    return taken


def apply(writer: Writer, reading: Reading) -> Container | None:
    """Writes a reading into the database. None, without writing, if another process has updated the container since."""
    known = container_at(writer.get, reading.container.path)
    if known != reading.base:
        return None
    taken = known.number if known else new_number(writer, reading.container.path)
    container = reading.container._replace(number=taken)
    left = {members_key(taken, key) for key in reading.gone}
    if reading.kept is not None:
        stay = {members_key(taken, key) for key in (*reading.kept, *reading.leaves)}
        left |= {key for key, _ in writer.scan(MEMBERS + number(taken)) if key not in stay}
    # A namespace can have moved from one leaf to another: what has gone from all of them is gone.
    changed = [members_key(taken, key) for key in reading.leaves]
    old = {member.name: member for key in (*left, *changed) for _, member in parse_members(writer.get(key))[1]}
    new = {member.name for _, found in reading.leaves.values() for member, _ in found}
    for name, member in old.items():
        if name not in new:
            _drop(writer, container, member)
    for key in left:
        writer.delete(key)
    for key, (pointer, found) in zip(changed, reading.leaves.values(), strict=True):
        for member, bitmaps in found:
            _set(writer, container, old.get(member.name), member, bitmaps)
        writer.put(key, build_members(pointer, [(taken, member) for member, _ in found]))
    seen = container.fingerprint
    value = CONTAINER_VALUE.build(
        number=taken,
        kind=container.kind,
        condition=container.condition,
        racy=int(container.racy),
        reserved=bytes(5),
        device=seen.device,
        inode=seen.inode,
        mtime=seen.mtime % 2**64,
        ctime=seen.ctime % 2**64,
        size=seen.size,
        generation=container.generation,
        commit_id=container.commit_id,
        uuid=container.uuid,
    )
    writer.put(CONTAINER + part(os.fsencode(container.path)), value)
    return container


def forget(writer: Writer, path: str) -> None:
    """Removes a container from the index. The last commit seen of a store stays."""
    container = container_at(writer.get, path)
    if container is None:
        return
    _drop_all(writer, container)
    writer.delete(CONTAINER + part(os.fsencode(path)))


def holder_of(container: Container, member: Member) -> bytes:
    """The key part under which a namespace's bitmaps are: its name, or the path of its image."""
    return layout.named(member.name) if member.name else layout.unnamed(os.fsencode(container.path))


def _set(writer: Writer, container: Container, old: Member | None, new: Member, bitmaps: Bitmaps | None) -> None:
    if old != new:
        keys = list(keys_of(container.number, new))
        for key in keys_of(container.number, old) if old else ():
            if key not in keys:
                _claim(writer, key, container.number, new.name, None)
        for key in keys:
            _claim(writer, key, container.number, new.name, new)
        images = image_keys_of(container.number, new)
        for key in image_keys_of(container.number, old) - images if old else ():
            writer.delete(key)
        for key in images:
            writer.put(key, new.name)
    if bitmaps is not None:
        _set_bitmaps(writer, container, new, bitmaps)


def _drop_all(writer: Writer, container: Container) -> None:
    for key, value in list(writer.scan(MEMBERS + number(container.number))):
        for _, member in parse_members(value)[1]:
            _drop(writer, container, member)
        writer.delete(key)


def _drop(writer: Writer, container: Container, member: Member) -> None:
    _set_bitmaps(writer, container, member, [])
    for key in keys_of(container.number, member):
        _claim(writer, key, container.number, member.name, None)
    for key in image_keys_of(container.number, member):
        writer.delete(key)


def image_keys_of(container: int, member: Member) -> set[bytes]:
    """The keys under which a node of a store is found by its image."""
    if member.kind not in (store.KIND_NODE, store.KIND_PLACE) or not any(member.image):
        return set()
    return {image_key(container, mark, member.name) for mark in (member.image, path_mark(member.path))}


def keys_of(container: int, member: Member) -> Iterator[bytes]:
    """The keys under which a namespace is found."""
    if member.name:
        yield NAME + part(member.name)
    if any(member.uuid):
        yield UUID + member.uuid
    if member.kind in (store.KIND_PLACE, store.KIND_CONTAINER) and any(member.image):
        is_store = member.kind == store.KIND_CONTAINER and any(member.uuid)
        yield OTHERS + number(container) + (KNOWN_STORE if is_store else KNOWN_IMAGE) + part(member.name)
    if any(member.root_uuid):
        yield ROOT + member.root_uuid + part(member.name)


def _claim(writer: Writer, key: bytes, container: int, name: bytes, member: Member | None) -> None:
    """Sets what a container says about its namespace of that name; None removes it."""
    claims = [claim for claim in parse_namespaces(writer.get(key)) if (claim[0], claim[1].name) != (container, name)]
    if member:
        claims.append((container, member))
    if claims:
        writer.put(key, build_namespaces(claims))
    else:
        writer.delete(key)


def _set_bitmaps(writer: Writer, container: Container, member: Member, bitmaps: Bitmaps) -> None:
    holder = holder_of(container, member)
    wanted = {name: Claim(container.number, flags, bits, 0, member.uuid) for name, flags, bits in bitmaps}
    for key, value in list(writer.scan(BITMAP + part(holder))):
        name, claims = parse_bitmap(value)
        kept = [claim for claim in claims if claim.container != container.number]
        claim = wanted.pop(name, None)
        if claim is not None:
            kept.append(claim)
        if kept == claims:
            continue
        if kept:
            writer.put(key, build_bitmap(name, kept))
        else:
            writer.delete(key)
            writer.delete(FOUND + part(name) + part(holder))
    for name, claim in wanted.items():
        writer.put(layout.bitmap_key(holder, name), build_bitmap(name, [claim]))
        writer.put(FOUND + part(name) + part(holder), holder)
