"""The chain of checkpoints in a namespace's record. `dirtmap.engine.model.checkpoints` says what it means."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.fmt import store
from dirtmap.fmt.errors import FormatError
from dirtmap.fmt.live import build_checkpoint_times, build_checkpoints, parse_checkpoint_times, parse_checkpoints
from dirtmap.fmt.store import EXTENSION_CHECKPOINT_TIMES, EXTENSION_CHECKPOINTS

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


def read_times(record: Record) -> dict[str, int]:
    """When checkpoints of the chain in a namespace's record began, in ns since 1970; of those of which it is known."""
    names, times = record.extension(EXTENSION_CHECKPOINTS), record.extension(EXTENSION_CHECKPOINT_TIMES)
    if names is None or times is None:
        return {}
    with contextlib.suppress(ValueError):  # who reads the chain says so
        chain = map(decode_name, parse_checkpoints(names))
        return {name: time for name, time in zip(chain, parse_checkpoint_times(names, times), strict=False) if time}
    return {}


def with_chain(record: Record, chain: list[str], new: Mapping[str, int] | None = None) -> Record:
    """The record with this chain in place of its own; the same record if neither has a chain.

    Args:
        record: of the namespace.
        chain: the new one. When its checkpoints began stays known.
        new: when those began that are new in it, in ns since 1970.
    """
    if not chain and record.extension(EXTENSION_CHECKPOINTS) is None:
        return record
    data, times = build_checkpoints(map(encode_name, chain)), {**read_times(record), **(new or {})}
    began = [times.get(name, 0) for name in chain]
    extensions = [(EXTENSION_CHECKPOINTS, data)] if chain else []
    if any(began):
        extensions.append((EXTENSION_CHECKPOINT_TIMES, build_checkpoint_times(data, began)))
    return record.with_extensions([EXTENSION_CHECKPOINTS, EXTENSION_CHECKPOINT_TIMES], extensions)


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
