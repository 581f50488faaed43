"""The checkpoints of a namespace: a chain, oldest first, in which each has what was written until the next began.

    changed since "monday"      sunday [======|
                                monday        [========|            the OR of it and of all later ones
                                (break)                 ? ? ? |     what was written here is not known: no answer
                                tuesday                       [====>

A *break* is where a checkpoint is gone, or has not recorded until the next began, by other means than ours. It stays in
the chain until all older checkpoints are removed. A checkpoint that is removed by our means leaves none: the one before
it takes over what it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap

BREAK = ""  # in a chain; no bitmap has that name


def settle(chain: list[str], recording: Mapping[str, bool]) -> list[str]:
    """The chain once what others have done is taken note of.

    Args:
        chain: as of the last time.
        recording: whether they record, of all bitmaps that there are.
    """
    found = [name if name in recording else BREAK for name in chain]
    if found and not recording.get(found[-1], False):
        found.append(BREAK)
    return _tidy(found)


def broken(chain: list[str], name: str) -> list[str]:
    """The chain without a checkpoint that nobody takes over."""
    return _tidy([BREAK if other == name else other for other in chain])


def heir(chain: list[str], name: str) -> str | None:
    """The checkpoint that takes over what one has that is removed; None where nobody needs it."""
    at = chain.index(name)
    return chain[at - 1] if at and chain[at - 1] != BREAK else None


def without(chain: list[str], name: str) -> list[str]:
    """The chain once its `heir` has taken over what a checkpoint has."""
    return _tidy([other for other in chain if other != name])


def take_over(older: Bitmap, newer: Bitmap) -> Bitmap:
    """What the older of two neighbours has once the newer is removed."""
    return (older | newer.at(older.granularity)).replace(recording=newer.recording)


def _tidy(chain: list[str]) -> list[str]:
    tidy: list[str] = []
    for name in chain:
        if name != BREAK or (tidy and tidy[-1] != BREAK):  # nobody asks what was written before the oldest
            tidy.append(name)
    return tidy
