"""The exit codes of the `dirtmap` command, in a module that imports nothing."""

from __future__ import annotations

INTERRUPTED = 130  # what shells report for a process that SIGINT ended
