"""What each bitmap of a checked-out image holds: the table of SPEC.md, "Tracked qcow2 images", row by row."""

from dataclasses import replace
from itertools import product

import pytest

from dirtmap.engine.namespaces.contents import Content, Facts, decide
from dirtmap.engine.session.verdict import Row

NOTHING = Facts(
    in_session=False,
    in_image=False,
    in_use=False,
    recording=False,
    tracked=False,
    lost=None,
    doubt=None,
    known=None,
)
BOTH = replace(NOTHING, in_session=True, in_image=True)
IMAGE_ONLY = replace(NOTHING, in_image=True)

ROWS = {
    "usable, off, all marks are known": (replace(BOTH, known=Row.EXACT), Content.MARKS),
    "usable, off, the regions are known": (replace(BOTH, known=Row.LOGGED), Content.REGIONS),
    "usable, off, nothing is known": (BOTH, Content.ALL_DIRTY),
    "usable, off, the session is lost": (replace(BOTH, known=Row.EXACT, lost="why"), Content.ALL_DIRTY),
    "usable, on": (replace(BOTH, tracked=True), Content.SESSION),
    "usable, on, in doubt": (replace(BOTH, tracked=True, doubt="why"), Content.ALL_DIRTY),
    "in use, on": (replace(BOTH, in_use=True, tracked=True), Content.SESSION),
    "in use, off": (replace(BOTH, in_use=True, known=Row.EXACT), Content.ALL_DIRTY),
    "not there, on": (replace(BOTH, in_image=False, tracked=True), Content.SESSION),
    "not there, off": (replace(BOTH, in_image=False, known=Row.EXACT), Content.ALL_DIRTY),
    "not there, on, the session is lost": (
        replace(BOTH, in_image=False, tracked=True, lost="why"),
        Content.ALL_DIRTY,
    ),
    "added by others, recording": (replace(IMAGE_ONLY, recording=True), Content.ALL_DIRTY),
    "added by others, not recording": (IMAGE_ONLY, Content.IMAGE),
    "not the session's, usable, on": (replace(IMAGE_ONLY, recording=True, tracked=True), Content.IMAGE),
    "removed by the tracker": (replace(IMAGE_ONLY, in_use=True, tracked=True), Content.GONE),
    "not the session's, in use, off": (replace(IMAGE_ONLY, in_use=True, recording=True), Content.IMAGE),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_table(row: str) -> None:
    facts, content = ROWS[row]
    assert decide(facts)[0] is content


def test_every_reason_for_all_dirty_is_said() -> None:
    flags = [False, True]
    for in_session, in_image, in_use, recording, tracked in product(flags, repeat=5):
        for lost, doubt, known in product([None, "lost"], [None, "in doubt"], [None, Row.EXACT, Row.LOGGED]):
            facts = Facts(in_session, in_image, in_image and in_use, recording, tracked, lost, doubt, known)
            content, why = decide(facts)
            assert bool(why) or content not in (Content.ALL_DIRTY, Content.MARKS, Content.REGIONS)
            if in_session and (lost or (tracked and doubt)):
                assert (content, why) == (Content.ALL_DIRTY, lost or doubt)
