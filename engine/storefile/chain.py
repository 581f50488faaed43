"""The chain of checkpoints in a namespace's record. `dirtmap.engine.model.checkpoints` says what it means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.fmt import store
from dirtmap.fmt.errors import FormatError
from dirtmap.fmt.live import build_checkpoints, parse_checkpoints
from dirtmap.fmt.store import EXTENSION_CHECKPOINTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dirtmap.fmt.store import Record


def read_chain(where: str, record: Record) -> list[str]:
    """The chain in a namespace's record, as stored.

    Raises:
        FormatError: the chain cannot be parsed.
    """
    try:
        names = parse_checkpoints(record.extension(EXTENSION_CHECKPOINTS) or b"")
        return [decode_name(name) for name in names]
    except ValueError as error:
        raise FormatError(f"{where}: checkpoints", str(error)) from None


def with_chain(record: Record, chain: list[str]) -> Record:
    """The record with this chain in place of its own."""
    data = build_checkpoints(map(encode_name, chain))
    return record.with_extensions([EXTENSION_CHECKPOINTS], [(EXTENSION_CHECKPOINTS, data)] if chain else [])


def checkpoints_of(where: str, record: Record, recording: Mapping[str, bool] | None) -> list[str]:
    """The chain of checkpoints of a namespace, reconciled with the bitmaps that it has now.

    Args:
        where: names the namespace in errors.
        record: of the namespace.
        recording: of every bitmap that exists, whether it records; None where that cannot be told, which leaves the
            chain as it was last written.

    Raises:
        FormatError: the chain cannot be parsed.
    """
    if record.extension(store.EXTENSION_CHECKPOINTS) is None:
        return []
    from dirtmap.engine.model import checkpoints

    chain = read_chain(where, record)
    return chain if recording is None else checkpoints.reconcile(chain, recording)


def with_checkpoints(record: Record, chain: list[str]) -> Record:
    """The record with this chain in place of its own; the same record if neither has a chain."""
    if not chain and record.extension(store.EXTENSION_CHECKPOINTS) is None:
        return record
    return with_chain(record, chain)
