"""The chain of checkpoints in a namespace's record; what the chain means: see `dirtmap.engine.model.checkpoints`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtmap.fmt import store

if TYPE_CHECKING:
    from collections.abc import Mapping

from typing import TYPE_CHECKING

from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.fmt.errors import FormatError
from dirtmap.fmt.store import EXTENSION_CHECKPOINTS
from dirtmap.fmt.structures.live import build_checkpoints, parse_checkpoints

if TYPE_CHECKING:
    from dirtmap.fmt.store import Record


def read_chain(where: str, record: Record) -> list[str]:
    """The chain in a namespace's record.

    Raises:
        FormatError: it makes no sense.
    """
    try:
        names = parse_checkpoints(record.extension(EXTENSION_CHECKPOINTS) or b"")
        return [decode_name(name) for name in names]
    except ValueError as error:
        raise FormatError(f"{where}: checkpoints", str(error)) from None


def with_chain(record: Record, chain: list[str]) -> Record:
    """The record with this chain and no other."""
    data = build_checkpoints(map(encode_name, chain))
    return record.with_extensions([EXTENSION_CHECKPOINTS], [(EXTENSION_CHECKPOINTS, data)] if chain else [])


def checkpoints_of(where: str, record: Record, recording: Mapping[str, bool]) -> list[str]:
    """The chain of checkpoints of a namespace with these bitmaps; see `dirtmap.engine.model.checkpoints`.

    Args:
        where: names the namespace.
        record: of the namespace.
        recording: the bitmaps that there are, and whether they record.

    Raises:
        FormatError: it makes no sense.
    """
    if record.extension(store.EXTENSION_CHECKPOINTS) is None:
        return []
    from dirtmap.engine.model import checkpoints

    return checkpoints.settle(read_chain(where, record), recording)


def with_checkpoints(record: Record, chain: list[str]) -> Record:
    """The record with this chain of checkpoints and no other."""
    if not chain and record.extension(store.EXTENSION_CHECKPOINTS) is None:
        return record
    return with_chain(record, chain)
