"""Where the `dirtmap` command begins: an interrupt that comes while its modules are imported ends it quietly, too."""

from __future__ import annotations

import sys

from dirtmap.tools.exits import INTERRUPTED


def main() -> None:
    """Runs the command line and exits, as `dirtmap.tools.cli` has it."""
    try:
        from dirtmap.tools.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
