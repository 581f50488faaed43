"""`Process`: a process of this host, once and for all; and whether it still lives."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass

CLOCK_TOLERANCE_NS = 5_000_000  # two looks at a clock that nobody has set differ by less; less than a tick of it


@dataclass(frozen=True, slots=True)
class Process:
    """A process.

    Attributes:
        number: of the process.
        start: when it began, in clock ticks since boot.
        boot_id: 16 bytes that no two boots of any machine share.
    """

    number: int
    start: int
    boot_id: bytes

    def lives(self) -> bool:
        """False where it is known to have ended."""
        return self.boot_id == boot_id() and start_of(self.number) == self.start

    def __str__(self) -> str:
        try:
            with open(f"/proc/{self.number}/comm", "rb") as file:
                name = file.read().decode(errors="replace").strip()
        except OSError:
            name = "a process that cannot be seen from here"
        return f"{name} (process {self.number})" if self.lives() else f"{name} ({self.number} where it runs)"


def this_process() -> Process:
    """The process that asks."""
    return Process(os.getpid(), start_of(os.getpid()) or 0, boot_id())


def boot_id() -> bytes:
    """The UUID of this boot; zeros where the kernel does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return uuid.UUID(file.read().strip()).bytes
    except (OSError, ValueError):
        return bytes(16)


def clock_offset() -> int:
    """When the machine was booted, by its clock as that is set now: ns since 1970.

    It changes only where the clock is set: a clock that is slowed down or sped up, as by NTP, takes the time since boot
    with it. Source: clock_gettime(2), CLOCK_BOOTTIME.
    """
    looks = []
    for _ in range(3):  # whoever is interrupted between two looks tells too little
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        now = time.time_ns()
        after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        looks.append((after - before, now - before))
    return min(looks)[1]


def start_of(number: int) -> int | None:
    """When a process began, in clock ticks since boot; None where there is none. A zombie is none: it does nothing.

    Source: proc(5), /proc/PID/stat, fields 3 and 22; the name before them may hold spaces and parentheses.
    """
    try:
        with open(f"/proc/{number}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
