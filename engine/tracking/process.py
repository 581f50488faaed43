"""Which process is meant by a session, and whether it still lives."""

from __future__ import annotations

import os
import uuid

from dirtmap.fmt import live


def boot_id() -> bytes:
    """16 bytes that no two boots of any machine share; zeros where the kernel does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return uuid.UUID(file.read().strip()).bytes
    except (OSError, ValueError):
        return bytes(16)


def start_of(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None where there is none. A zombie is none: it writes nothing.

    Source: proc(5), /proc/PID/stat, fields 3 and 22; the name before them may hold spaces and parentheses.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def is_alive(session: live.Session) -> bool:
    """True while the session's process lives."""
    return session.boot_id == boot_id() and start_of(session.pid) == session.process_start


def describe(session: live.Session) -> str:
    """How messages name the tracker."""
    try:
        with open(f"/proc/{session.pid}/comm", "rb") as file:
            name = file.read().decode(errors="replace").strip()
    except OSError:
        name = "a process that cannot be seen from here"
    return f"{name} (process {session.pid})" if is_alive(session) else f"{name} ({session.pid} where it runs)"


def own() -> tuple[int, int]:
    """The number of this process, and when it began."""
    return os.getpid(), start_of(os.getpid()) or 0
