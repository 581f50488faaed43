"""What each bitmap of a checked-out qcow2 image holds once its tracker is dead, as a table over facts.

SPEC.md has the rule, in "Tracked qcow2 images". Each bitmap is decided on its own, because a crash, or another program,
can come between any two steps of `dirtmap.engine.namespaces.check_in`:

    the session   the image   "tracked"   what else                      what it holds
    has lost it   -           -           -                              all dirty
    has it        -           on          the session is in doubt        all dirty
    has it        -           on          -                              what the session has
    has it        usable      off         all marks are known            what the tracker has marked
    has it        usable      off         all logged regions are known   those regions
    has it        -           off         -                              all dirty
    has it not    in use      on          -                              it is gone: the tracker has removed it
    has it not    usable      off         it records                     all dirty
    has it not    -           -           -                              what the image has

Usable means that the image has the bitmap, and not in use. Where the session has the bitmap, too, or has lost it, the
two are ORed.

A bitmap that is usable while "tracked" is off is not checked out yet, or is checked in already. Or another program has
made it usable, perhaps while the tracker lived, without knowing what that has marked. So what is known of the marks
counts, although others may have written to the image.

If the session or its directory is lost, a bitmap that is missing there was not necessarily removed. So every bitmap
that can still be named is all dirty.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dirtmap.engine.model.bitmap import Bitmap
from dirtmap.engine.model.naming import decode_name
from dirtmap.engine.namespaces import salvage
from dirtmap.engine.namespaces.condition import Condition
from dirtmap.engine.namespaces.image import bitmap_of_slot
from dirtmap.engine.qcow2.layout import Layout, Slot
from dirtmap.engine.session.verdict import Row
from dirtmap.engine.storefile.directory import header_doubts
from dirtmap.engine.storefile.session import window_of
from dirtmap.engine.system.file import File
from dirtmap.fmt import directory, live
from dirtmap.fmt.directory import Entry

_OPENED = "another program has opened the image for writing since"
_ADDED = "another program has added it since"
_WITH_MARKS = "what the image has, and what its tracker has marked"
_WITH_REGIONS = "what the image has, and every region that its tracker has logged"


class Content(Enum):
    """What a bitmap holds: the last column of the table."""

    ALL_DIRTY = "all dirty"
    SESSION = "what the session has"
    MARKS = "what the tracker has marked"
    REGIONS = "the regions that the tracker has logged"
    GONE = "nothing: it was removed"
    IMAGE = "what the image has"


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides about one bitmap.

    Attributes:
        in_session: the session has it.
        in_image: the image has it.
        in_use: in the image it is in use, so its bits there mean nothing.
        recording: in the image it records.
        tracked: the image's autoclear bit "tracked" is on.
        lost: why what the session has of it is lost, or None.
        doubt: why the bits of the session cannot be relied on, although "tracked" is on, or None.
        known: what is known of the tracker's marks, whoever has written to the image: ``EXACT``, ``LOGGED`` or None.
    """

    in_session: bool
    in_image: bool
    in_use: bool
    recording: bool
    tracked: bool
    lost: str | None
    doubt: str | None
    known: Row | None

    @property
    def usable(self) -> bool:
        """True if the image has bits of it that mean something."""
        return self.in_image and not self.in_use


def decide(facts: Facts) -> tuple[Content, str]:
    """The row of the table that applies, and why, in words; "" where nothing needs to be said."""
    if facts.in_session:
        return _decide_of_session(facts)
    if facts.in_use and facts.tracked:
        return Content.GONE, ""
    if facts.usable and facts.recording and not facts.tracked:
        return Content.ALL_DIRTY, _ADDED
    return Content.IMAGE, ""


def _decide_of_session(facts: Facts) -> tuple[Content, str]:
    if facts.lost is not None:
        return Content.ALL_DIRTY, facts.lost
    if facts.tracked:
        return (Content.SESSION, "") if facts.doubt is None else (Content.ALL_DIRTY, facts.doubt)
    if facts.usable and facts.known is Row.EXACT:
        return Content.MARKS, _WITH_MARKS
    if facts.usable and facts.known is Row.LOGGED:
        return Content.REGIONS, _WITH_REGIONS
    return Content.ALL_DIRTY, _OPENED


def contents(
    file: File, layout: Layout, now: Condition, entries: list[Entry] | None
) -> dict[str, tuple[Bitmap | None, str]]:
    """The content of each bitmap, and how it was found. The content is None for a bitmap that the image keeps as it is.

    Args:
        file: the image.
        layout: of the image.
        now: the condition of the namespace that has the session.
        entries: the directory of the session; None if it is damaged.
    """
    slots = {decode_name(slot.entry.name): slot for slot in layout.slots}
    found: dict[str, tuple[Bitmap | None, str]] = {}
    doubt = _doubt(layout, now)
    for entry, lost in _session_entries(layout, now, entries).items():
        name = decode_name(entry.name)
        found[name] = _of_session(file, layout, now, entry, slots.pop(name, None), lost, doubt)
    for name, slot in slots.items():
        content, why = decide(_facts(layout, slot, in_session=False))
        if content is Content.ALL_DIRTY:
            dirty = Bitmap(layout.header.size, slot.entry.granularity, slot.entry.auto).recovered()
            found[name] = dirty, f"{Row.ALL_DIRTY.value}: {why}"
        elif content is Content.IMAGE:
            found[name] = None, ""
    return found


def _of_session(
    file: File, layout: Layout, now: Condition, entry: Entry, slot: Slot | None, lost: str | None, doubt: str | None
) -> tuple[Bitmap | None, str]:
    """The content of a bitmap that the session has, ORed with what the image has of it; see `contents`."""
    assert now.view
    facts = _facts(layout, slot, in_session=True, lost=lost, doubt=doubt, known=_known(layout, now, entry))
    content, why = decide(facts)
    if content is Content.ALL_DIRTY:
        bitmap = Bitmap(layout.header.size, entry.granularity, entry.auto).recovered()
        how = f"{Row.ALL_DIRTY.value}: {why}"
    else:
        bitmap = now.frozen(entry, doubted=False).copy()  # read while all of them are as of one moment
        how = now.view.how
        if content is Content.MARKS:
            how = f"{Row.EXACT.value}: {why}"
        elif content is Content.REGIONS:
            how = f"{Row.LOGGED.value}: {why}"
            _mark_regions(bitmap, now)
    if slot and facts.usable:
        there = bitmap_of_slot(file, layout, slot)
        bitmap = (bitmap | there.at(bitmap.granularity)).replace(recording=there.recording or bitmap.recording)
        if not facts.tracked and bitmap == there:
            return None, ""
    return bitmap, how


def _facts(
    layout: Layout,
    slot: Slot | None,
    *,
    in_session: bool,
    lost: str | None = None,
    doubt: str | None = None,
    known: Row | None = None,
) -> Facts:
    return Facts(
        in_session=in_session,
        in_image=slot is not None,
        in_use=slot is not None and slot.entry.in_use,
        recording=slot is not None and slot.entry.auto,
        tracked=layout.tracked,
        lost=lost,
        doubt=doubt,
        known=known,
    )


def _session_entries(layout: Layout, now: Condition, entries: list[Entry] | None) -> dict[Entry, str | None]:
    """The entries of the bitmaps that the session has, or may have had, each with why its bits are lost, or None."""
    assert now.view
    if entries is not None and now.view.session is not live.NO_SESSION:
        return dict.fromkeys(entries)
    if entries is None:
        why = salvage.KNOWN
        lost: dict[Entry, str | None] = {**salvage.spare_entries(now.snapshot, now.record, now.snapshot.older())}
    else:
        why = now.view.why
        lost = dict.fromkeys(entries, why)
    known = {entry.name for entry in lost}
    for slot in layout.slots:
        if slot.entry.in_use and layout.tracked and slot.entry.name not in known:
            lost[slot.entry.with_flags(set=directory.FLAG_AUTO)] = why
    return lost


def _doubt(layout: Layout, now: Condition) -> str | None:
    """Why the bits of a session cannot be relied on, although the image's bit "tracked" is on; or None."""
    if now.doubt:
        return now.doubt
    if layout.header.size != now.record.size:
        return f"the disk has {layout.header.size} bytes now, and had {now.record.size}"
    return now.view.doubt if now.view else None


def _known(layout: Layout, now: Condition, entry: Entry) -> Row | None:
    """What is known of all that the tracker has marked for a bitmap, even if others have written to the image."""
    view = now.view
    if view is None or layout.header.size != now.record.size or header_doubts(now.snapshot, now.record) is not None:
        return None
    window = window_of(entry)
    if window is None or not window.records or (view.found is not None and not view.found.poisoned):
        return Row.EXACT
    return None if view.logged is None else Row.LOGGED


def _mark_regions(bitmap: Bitmap, now: Condition) -> None:
    assert now.view
    region = 1 << now.view.session.region_bits
    for number in now.view.logged or ():
        bitmap.mark(number * region, min(region, now.record.size - number * region))
