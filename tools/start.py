"""Starts the `dirtmap` command, so that an interrupt during the import of its modules also ends it quietly."""

from __future__ import annotations

import sys

from dirtmap.tools.exits import INTERRUPTED


def main() -> None:
    """Runs the command line and exits; see `dirtmap.tools.cli`."""
    try:
        from dirtmap.tools.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
