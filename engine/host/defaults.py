"""Where the default store and the index of this user are."""

from __future__ import annotations

import os

USUAL_STORE = "default.dmap"  # beside the index


def default_store(index: str | None = None) -> str:
    """Where the default store is: ``$DIRTMAP_STORE``, else ``default.dmap`` beside the index."""
    if path := os.environ.get("DIRTMAP_STORE"):
        return path
    return os.path.join(os.path.dirname(default_index(index)), USUAL_STORE)


def default_index(index: str | None = None) -> str:
    """Where the index is: as given, else ``$DIRTMAP_INDEX``, else the place that is usual for the user."""
    if path := index or os.environ.get("DIRTMAP_INDEX"):
        return path
    if os.geteuid() == 0:
        return "/var/lib/dirtmap/index"
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "dirtmap", "index")
