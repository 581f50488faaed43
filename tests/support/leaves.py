"""Leaves of a store's namespace table, taken apart."""

from __future__ import annotations

from collections.abc import Iterator

from dirtmap.fmt.store import Record, parse_record, split_records


def parse_records(data: bytes) -> Iterator[Record]:
    """The records of a leaf. Errors as those two."""
    return (parse_record(raw) for _, raw in split_records(data))
