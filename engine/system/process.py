"""`Process`: a process of this machine: whether it can be seen, and whether it has certainly ended.

A process number means something in one PID namespace only, and a container may see another boot id than its host. So a
process that cannot be seen is not known to have ended. Locks tell more, and are asked first.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass

# Two values of `clock_offset` differ by less if nobody has set the clock in between. It is less than a tick of the
# clock.
CLOCK_TOLERANCE_NS = 5_000_000
UNSEEN = "a process that cannot be seen from here"
# The inode of the initial PID namespace. Source: Linux, include/linux/proc_ns.h, PROC_PID_INIT_INO.
_INITIAL_NAMESPACE = 0xEFFFFFFC


@dataclass(frozen=True, slots=True)
class Process:
    """A process.

    Attributes:
        number: of the process, in its own PID namespace.
        start: when it began, in clock ticks since boot; 0 if it could not tell.
        boot_id: 16 bytes, different for every boot of every machine. A container may have its own.
    """

    number: int
    start: int
    boot_id: bytes

    def is_seen(self) -> bool:
        """True if this process can see it. In another PID namespace its number is none, or another process's."""
        return self.boot_id == boot_id() and start_of(self.number) == self.start

    def has_ended(self) -> bool:
        """True if it is certain that it does not run on this machine any more.

        A process of another container, or one that ``/proc`` hides, cannot be seen from here and may be alive. So this
        is certain only if all processes of the machine can be seen.
        """
        if self.is_seen() or not self.start or not _sees_all():
            return False
        try:
            numbers = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        except OSError:
            return False
        return not any(self._may_be(number) for number in numbers)

    def _may_be(self, number: int) -> bool:
        """False if the process that has that number here is known to be another one."""
        start = start_of(number)
        if start is None or _innermost_number(number) not in (self.number, None):
            return False
        # In another time namespace the clock is another one, so the process may have read another start.
        return start == self.start or _clock_of(str(number)) != _clock_of("self")

    @property
    def address(self) -> str:
        """How messages name it: by its number, if that means something here."""
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
    """This process itself."""
    return Process(os.getpid(), start_of(os.getpid()) or 0, boot_id())


def boot_id() -> bytes:
    """The UUID of this boot, 16 bytes; zeros if the kernel does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return uuid.UUID(file.read().strip()).bytes
    except (OSError, ValueError):
        return bytes(16)


def clock_offset() -> int:
    """When the machine was booted, by its clock as it is set now: ns since 1970.

    This changes only if the clock is set. If NTP slows the clock down or speeds it up, it does the same to the time
    since boot. Source: clock_gettime(2), CLOCK_BOOTTIME.
    """
    looks = []
    for _ in range(3):  # the attempt that was least interrupted is the most exact one
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        now = time.time_ns()
        after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        looks.append((after - before, now - before))
    return min(looks)[1]


def start_of(number: int) -> int | None:
    """When a process began, in clock ticks since boot; None if there is no such process.

    A zombie counts as none, since it does nothing any more.
    Source: proc(5), /proc/PID/stat, fields 3 and 22. The name before them may have spaces and parentheses in it.
    """
    try:
        with open(f"/proc/{number}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _sees_all() -> bool:
    """True if ``/proc`` shows all processes of the machine: it is that of the initial PID namespace, and hides nothing.

    The mount option ``hidepid`` hides the processes of other users, so number 1 as well.
    """
    try:
        initial = os.stat("/proc/self/ns/pid").st_ino == _INITIAL_NAMESPACE
        return initial and os.readlink("/proc/self") == str(os.getpid()) and start_of(1) is not None
    except OSError:
        return False


def _innermost_number(number: int) -> int | None:
    """The number of a process in its own PID namespace; None if that is not known.

    Source: proc(5), /proc/PID/status, NSpid: the numbers in nested PID namespaces, the innermost last.
    """
    try:
        with open(f"/proc/{number}/status", "rb") as file:
            return next(int(line.split()[-1]) for line in file if line.startswith(b"NSpid:"))
    except (OSError, ValueError, StopIteration):
        return None


def _clock_of(process: str) -> int | None:
    """The inode of a process's time namespace; None if the kernel has none, or it cannot be seen."""
    try:
        return os.stat(f"/proc/{process}/ns/time").st_ino
    except OSError:
        return None
