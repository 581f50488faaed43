"""`Process`: a process of this machine, once and for all; whether it can be seen, and whether it has ended for certain.

A number says which process is meant in one PID namespace only, and a container may be told another boot than its host.
So a process that cannot be seen is not known to have ended. Where a lock tells, it is asked instead.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass

CLOCK_TOLERANCE_NS = 5_000_000  # two looks at a clock that nobody has set differ by less; less than a tick of it
UNSEEN = "a process that cannot be seen from here"
# The inode of the initial PID namespace. Source: Linux, include/linux/proc_ns.h, PROC_PID_INIT_INO.
_INITIAL_NAMESPACE = 0xEFFFFFFC


@dataclass(frozen=True, slots=True)
class Process:
    """A process.

    Attributes:
        number: of the process, in its own PID namespace.
        start: when it began, in clock ticks since boot; 0 where it could not tell.
        boot_id: 16 bytes that no two boots of any machine share. A container may have its own.
    """

    number: int
    start: int
    boot_id: bytes

    def is_seen(self) -> bool:
        """True where it is there to be seen; its number means nothing elsewhere, as in another PID namespace."""
        return self.boot_id == boot_id() and start_of(self.number) == self.start

    def has_ended(self) -> bool:
        """True where it is certain that it does not run on this machine any more.

        A process of another container, or one that ``/proc`` hides, cannot be seen from here, and may live. So nothing
        is certain but where all processes of the machine can be seen.
        """
        if self.is_seen() or not self.start or not _sees_all():
            return False
        try:
            numbers = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        except OSError:
            return False
        return not any(self._may_be(number) for number in numbers)

    def _may_be(self, number: int) -> bool:
        """False where the process that has that number here is known to be another one."""
        start = start_of(number)
        if start is None or _innermost_number(number) not in (self.number, None):
            return False
        # A time namespace has a clock of its own, by which the process may have read when it began.
        return start == self.start or _clock_of(str(number)) != _clock_of("self")

    @property
    def address(self) -> str:
        """Where to find it, for messages: its number where that means something here."""
        return f"process {self.number}" if self.is_seen() else UNSEEN

    def __str__(self) -> str:
        if not self.is_seen():
            return UNSEEN
        try:
            with open(f"/proc/{self.number}/comm", "rb") as file:
                name = file.read().decode(errors="replace").strip()
        except OSError:
            return UNSEEN  # it has just ended
        return f"{name} (process {self.number})"


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


def _sees_all() -> bool:
    """True where ``/proc`` shows all processes of the machine: that of the initial PID namespace, with nothing hidden.

    Under the mount option ``hidepid`` those of other users are hidden, and of them number 1.
    """
    try:
        initial = os.stat("/proc/self/ns/pid").st_ino == _INITIAL_NAMESPACE
        return initial and os.readlink("/proc/self") == str(os.getpid()) and start_of(1) is not None
    except OSError:
        return False


def _innermost_number(number: int) -> int | None:
    """The number that a process has for itself; None where that cannot be told.

    Source: proc(5), /proc/PID/status, NSpid: the numbers in nested PID namespaces, the innermost last.
    """
    try:
        with open(f"/proc/{number}/status", "rb") as file:
            return next(int(line.split()[-1]) for line in file if line.startswith(b"NSpid:"))
    except (OSError, ValueError, StopIteration):
        return None


def _clock_of(process: str) -> int | None:
    """The time namespace of a process as ``/proc`` names it; None where there are none."""
    try:
        return os.stat(f"/proc/{process}/ns/time").st_ino
    except OSError:
        return None
