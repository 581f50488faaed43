"""The checkpoints of a namespace: a chain, oldest first. Each holds what was written until the next one began.

    changed since "monday"      sunday [======|
                                monday        [========|            the OR of it and of all later ones
                                (break)                 ? ? ? |     what was written here is not known: no answer
                                tuesday                       [====>

A *break* stands where a checkpoint was removed by another program, or where one stopped recording before the next
began. It stays in the chain until all older checkpoints are removed. Removing a checkpoint through this engine leaves
no break: the checkpoint before it takes over its content.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from dirtmap.engine.model.naming import label

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap
    from dirtmap.engine.model.infos import ImageInfo

BREAK = ""  # in a chain; no bitmap has that name


def reconcile(chain: list[str], recording: Mapping[str, bool]) -> list[str]:
    """The chain after reconciling it with changes that other programs made since it was written.

    Args:
        chain: as it was last written.
        recording: of every bitmap that exists, whether it records.
    """
    found = [name if name in recording else BREAK for name in chain]
    if found and not recording.get(found[-1], False):
        found.append(BREAK)
    return _tidy(found)


def broken(chain: list[str], name: str) -> list[str]:
    """The chain without a checkpoint whose content no other takes over: a break stands in its place."""
    return _tidy([BREAK if other == name else other for other in chain])


def written_since(chain: list[str], content: Callable[[str], Bitmap | None]) -> dict[str, int]:
    """How many bytes were written since each checkpoint, in whole granules; of those of which it is known.

    Args:
        chain: of the image.
        content: the bitmap of a checkpoint; None where it is not there, or inconsistent.
    """
    found: dict[str, int] = {}
    union: Bitmap | None = None
    for name in reversed(chain):
        bitmap = None if name == BREAK else content(name)
        if bitmap is None:
            break
        union = bitmap if union is None else union | bitmap
        found[name] = union.count
    return found


def shown(
    info: ImageInfo,
    chain: list[str],
    began: Mapping[str, int],
    since: Mapping[str, int],
    whose: str = "",
) -> ImageInfo:
    """An image's description with its checkpoints, and with a note of what is not known any more.

    Args:
        info: of the image, without checkpoints.
        chain: of the image.
        began: when they began, in ns since 1970, as far as it is known.
        since: as `written_since`.
        whose: how the note begins: names the namespace, and ends with a space, where the path does not tell it.
    """
    if not chain:
        return info
    names = tuple(name for name in chain if name != BREAK)
    notes = info.notes
    lacking = [name for name in chain[: len(chain) - 1 - chain[::-1].index(BREAK)] if name] if BREAK in chain else []
    if lacking:
        last = label(lacking[-1]) + " or an older checkpoint" * (len(lacking) > 1)
        notes += (f"{whose}not all that was written since {last} is known: a checkpoint was removed or disabled",)
    bitmaps = tuple(
        replace(
            bitmap,
            checkpoint=True,
            began=began[bitmap.name] / 1e9 if bitmap.name in began else None,
            since=since.get(bitmap.name),
        )
        if bitmap.name in names
        else bitmap
        for bitmap in info.bitmaps
    )
    return replace(info, bitmaps=bitmaps, notes=notes, checkpoints=names, incomplete=tuple(lacking))


def predecessor(chain: list[str], name: str) -> str | None:
    """The checkpoint that takes over the content of one that is removed; None if its content is no longer needed."""
    at = chain.index(name)
    return chain[at - 1] if at and chain[at - 1] != BREAK else None


def without(chain: list[str], name: str) -> list[str]:
    """The chain without a checkpoint, once its `predecessor` has taken over its content."""
    return _tidy([other for other in chain if other != name])


def take_over(older: Bitmap, newer: Bitmap) -> Bitmap:
    """The content of the older of two neighbours once the newer is removed: both, at the older one's granularity."""
    return (older | newer.at(older.granularity)).replace(recording=newer.recording)


def _tidy(chain: list[str]) -> list[str]:
    tidy: list[str] = []
    for name in chain:
        if name != BREAK or (tidy and tidy[-1] != BREAK):  # before the oldest checkpoint no break is needed
            tidy.append(name)
    return tidy
