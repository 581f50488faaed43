"""Reads a whole index, in a process of its own: ``python -m dirtmap.engine.index.walk PATH``.

LMDB trusts its pages, so damage inside may kill whoever reads them: here that costs this process only. What it finds
goes to standard output as JSON: ``entries``, and ``faults``, a line each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from dirtmap.engine.index.database import Database, Reader, fault
from dirtmap.fmt import index as layout
from dirtmap.fmt.errors import Error

_MOST = 20  # faults that are told


def walk(path: str) -> tuple[int, list[str]]:
    """How many entries the database has, and what is wrong with them."""
    if what := fault(path):
        return 0, [what]
    database = Database(path)
    try:
        return database.read(_walk)
    finally:
        database.close()


def _walk(reader: Reader) -> tuple[int, list[str]]:
    entries, faults = 0, []
    numbers = {contents[:8] for _, contents in reader.scan(layout.CONTAINER)}
    for key, contents in reader.scan(b""):
        entries += 1
        try:
            _judge(reader, key, contents, numbers)
        except ValueError as error:
            faults.append(f"{layout.TAGS.get(key[:1], 'unknown')} {key[1:41].hex()}: {error}")
            if len(faults) >= _MOST:
                break
    return entries, faults


def _judge(reader: Reader, key: bytes, contents: bytes, numbers: set[bytes]) -> None:
    """Holds an entry against its form, and against the entries that must be there as well.

    Raises:
        ValueError: says what is wrong.
    """
    tag = key[:1]
    checks: dict[bytes, Callable[[], None]] = {
        layout.BITMAP: lambda: _judge_bitmap(reader, key, contents, numbers),
        layout.FOUND: lambda: _judge_found(reader, key, contents),
    }
    fixed = {
        layout.STATE: layout.STATE_VALUE,
        layout.CONTAINER: layout.CONTAINER_VALUE,
        layout.SEEN: layout.SEEN_VALUE,
    }
    if tag in checks:
        checks[tag]()
    elif tag in fixed:
        if len(contents) != fixed[tag].size:
            raise ValueError(f"{len(contents)} bytes are not {fixed[tag].size}")
    elif tag in (layout.NAME, layout.UUID, layout.ROOT, layout.OTHERS, layout.MEMBERS):
        start = 16 if tag == layout.MEMBERS else 0
        for container, _ in layout.parse_namespaces(contents[start:]):
            if layout.number(container) not in numbers:
                raise ValueError(f"of container {container}, which is not known")
    elif tag != layout.PATH:
        raise ValueError("nobody knows what this is")


def _judge_bitmap(reader: Reader, key: bytes, contents: bytes, numbers: set[bytes]) -> None:
    name, claims = layout.parse_bitmap(contents)
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


def _judge_found(reader: Reader, key: bytes, contents: bytes) -> None:
    holder = layout.part(contents)
    if not key.endswith(holder) or reader.get(layout.BITMAP + holder + key[1 : len(key) - len(holder)]) is None:
        raise ValueError("leads nowhere")


def main() -> int:
    """The command."""
    try:
        entries, faults = walk(sys.argv[1])
    except Error as error:
        entries, faults = 0, [str(error)]
    json.dump({"entries": entries, "faults": faults}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
