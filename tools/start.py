"""Starts the `dirtmap` command, so that an interrupt during the import of its modules also ends it quietly."""

from __future__ import annotations

import gc
import sys

from dirtmap.tools.exits import INTERRUPTED
from dirtmap.tools.surroundings import spare_threads

# Imports make many objects that stay, and no garbage to look for: the usual 700 takes 6 % of a short command.
_OBJECTS_BETWEEN_COLLECTIONS = 50_000


def main() -> None:
    """Runs the command line and exits; see `dirtmap.tools.cli`."""
    spare_threads()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    try:
        from dirtmap.tools.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
