"""Programs that cannot see each other's processes, as in containers; all of it needs root, and no image of a container.

pid     a PID namespace of its own, and the /proc of that
boot    another boot id, as LXC and systemd-nspawn give their containers
both    as a container has it
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes namespaces and mounts")

PLACES = ("pid", "boot", "both")
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def inside(place: str, *command: str) -> list[str]:
    """The command line that runs a command in one of the places above; in this one, where ``place`` is empty."""
    line = list(command)
    if place in ("boot", "both"):
        fake = 'file=$(mktemp) && echo "$0" >"$file"'
        mount = f'{fake} && mount --bind "$file" {_BOOT_ID} && rm "$file" && exec "$@"'
        line = ["unshare", "--mount", "sh", "-c", mount, "11111111-2222-4333-8444-555555555555", *line]
    if place in ("pid", "both"):
        line = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *line]
    return line


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A program that has printed its first line, and ends at the next one that it reads, or with the block."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline()
            yield process
        finally:
            assert process.stdin
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait(60)


def told(*command: str) -> str:
    """What a program that fails says."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, (done.stdout, done.stderr)
    return done.stderr


def runs(*command: str) -> str:
    """What a program that succeeds prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout
