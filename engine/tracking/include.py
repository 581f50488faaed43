"""Where `marking.h` is, for programs in C that mark writes; it imports nothing of the tracker."""

from __future__ import annotations

import os


def get_include() -> str:
    """The folder with ``marking.h``: the protocol by which any thread of any process marks in a tracker's session.

    For a compiler's ``-I``. The header needs C11, POSIX and Linux. SPEC.md, "Marking", describes the protocol, and
    ``live`` of a `Status` is the folder of a session to attach to.
    """
    return os.path.dirname(os.path.abspath(__file__))
