"""Reads a whole index, in a process of its own: ``python -m dirtmap.engine.index.walk PATH``.

LMDB trusts its pages, so damage may kill the process that reads them; here it kills only this one. Standard output gets
two lines of JSON: the commits seen of stores, as [UUID, generation, commit id, path]; then the number of entries and
what is wrong with them.
"""

from __future__ import annotations

import contextlib
import json
import sys

from dirtmap.engine.index.database import Database, Reader, fault
from dirtmap.engine.index.index import Index, SeenCommit
from dirtmap.engine.index.writing import image_keys_of, keys_of
from dirtmap.engine.model.naming import decode_name
from dirtmap.fmt import index as layout
from dirtmap.fmt.errors import Error
from dirtmap.fmt.index import Member, parse_bitmap, parse_members, parse_namespaces
from dirtmap.fmt.parsers.index import CONTAINER_VALUE, SEEN_VALUE, STATE_VALUE

Members = dict[tuple[int, bytes], Member]  # by container and name

_MOST = 20  # faults to report


def walk(path: str) -> tuple[int, list[str]]:
    """The number of entries in the database, and what is wrong with them. Errors as `fault`."""
    if what := fault(path):
        return 0, [what]
    database = Database(path)
    try:
        return database.read(_walk)
    finally:
        database.close()


def salvage(path: str) -> list[SeenCommit]:
    """The commits seen of stores, as far as they can be read, whatever else is damaged."""
    database = Database(path)
    try:
        return Index(path, [], database).all_seen(sound_only=True)
    finally:
        database.close()


def _walk(reader: Reader) -> tuple[int, list[str]]:
    entries, faults = 0, []
    numbers = {contents[:8] for _, contents in reader.scan(layout.CONTAINER)}
    members = {
        (container, member.name): member
        for _, contents in reader.scan(layout.MEMBERS)
        for container, member in parse_members(contents)[1]
    }
    for key, contents in reader.scan(b""):
        entries += 1
        try:
            _check_entry(reader, key, contents, numbers, members)
        except ValueError as error:
            faults.append(f"{layout.TAGS.get(key[:1], 'unknown')} {key[1:41].hex()}: {error}")
            if len(faults) >= _MOST:
                break
    return entries, faults


def _check_entry(reader: Reader, key: bytes, contents: bytes, numbers: set[bytes], members: Members) -> None:
    """Validates the form of an entry, and that the entries exist which must go with it.

    Raises:
        ValueError: says what is wrong.
    """
    tag = key[:1]
    sizes = {
        layout.STATE: STATE_VALUE.size,
        layout.CONTAINER: CONTAINER_VALUE.size,
        layout.SEEN: SEEN_VALUE.size,
    }
    if tag in sizes and len(contents) != sizes[tag]:
        raise ValueError(f"{len(contents)} bytes are not {sizes[tag]}")
    if tag == layout.BITMAP:
        _check_bitmap(reader, key, contents, numbers)
    elif tag == layout.FOUND:
        _check_found(reader, key, contents)
    elif tag == layout.CONTAINER:
        if layout.CONTAINER + layout.part(reader.get(layout.PATH + contents[:8]) or b"") != key:
            raise ValueError("its path is not known")
    elif tag == layout.MEMBERS:
        _check_members(reader, contents, numbers)
    elif tag in (layout.NAME, layout.UUID, layout.ROOT, layout.OTHERS):
        for container, member in parse_namespaces(contents):
            if members.get((container, member.name)) != member:
                raise ValueError(f"container {container} does not say so")
    elif tag == layout.IMAGE:
        container = int.from_bytes(key[1:9], "big")
        known = members.get((container, contents))
        if known is None or key not in image_keys_of(container, known):
            raise ValueError(f"container {container} does not say so")
    elif tag not in (*sizes, layout.PATH):
        raise ValueError("nobody knows what this is")


def _check_members(reader: Reader, contents: bytes, numbers: set[bytes]) -> None:
    for container, member in parse_members(contents)[1]:
        if layout.number(container) not in numbers:
            raise ValueError(f"of container {container}, which is not known")
        for key in keys_of(container, member):
            if (container, member) not in parse_namespaces(reader.get(key)):
                name = decode_name(member.name)
                raise ValueError(f"'{name}' cannot be found by its {layout.TAGS[key[:1]]}")
        if any(reader.get(key) != member.name for key in image_keys_of(container, member)):
            raise ValueError(f"'{decode_name(member.name)}' cannot be found by its image")


def _check_bitmap(reader: Reader, key: bytes, contents: bytes, numbers: set[bytes]) -> None:
    name, claims = parse_bitmap(contents)
    if not claims:
        raise ValueError("nobody has it")
    for claim in claims:
        if layout.number(claim.container) not in numbers:
            raise ValueError(f"of container {claim.container}, which is not known")
    holder = key[1 : len(key) - len(layout.part(name))]
    if (
        key != layout.BITMAP + holder + layout.part(name)
        or reader.get(layout.FOUND + layout.part(name) + holder) is None
    ):
        raise ValueError("cannot be found by its name")


def _check_found(reader: Reader, key: bytes, contents: bytes) -> None:
    holder = layout.part(contents)
    if not key.endswith(holder) or reader.get(layout.BITMAP + holder + key[1 : len(key) - len(holder)]) is None:
        raise ValueError("leads nowhere")


def main() -> int:
    """Runs the command."""
    seen: list[SeenCommit] = []
    with contextlib.suppress(Error):
        seen = salvage(sys.argv[1])
    print(
        json.dumps([(uuid.hex(), generation, commit.hex(), path) for uuid, (generation, commit), path in seen]),
        flush=True,
    )
    try:
        found = walk(sys.argv[1])
    except Error as error:
        found = 0, [str(error)]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
