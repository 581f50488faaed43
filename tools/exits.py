"""The exit codes of the `dirtmap` command that need nothing else."""

from __future__ import annotations

INTERRUPTED = 130  # what shells report for a process that SIGINT ended
