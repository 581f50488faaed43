"""What dirtmap's filter costs an nbdkit of CPU, whatever the machine does meanwhile: `make bench-serve`.

nbdkit against itself differs by far more than a percent from one second to the next. So the filter's own time is
sampled: how many of the moments at which perf looks at an nbdkit with one filter are inside the filter, or in the clock
that it asks. Beside it ten of dirtmap's filters are one over the other, each with a session of its own, and of what
they cost a tenth is told; and nbdkit by itself is measured twice in each turn. CPU is what the kernel has accounted to
the process, kernel time included, by write.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support import fio, qemu
from support.tracking import make_node

import dirtmap.engine as dm
from dirtmap.tools.serve.building import FLAGS, SOURCE

SIZE = 512 << 20
FILTERS = 10
TURNS = int(os.environ.get("TURNS") or 8)
SECONDS = float(os.environ.get("TURN_SECONDS") or 0.4)
SAMPLED_SECONDS = 8.0
MINUTE = 60.0
NOTHING = """
#include <nbdkit-filter.h>
static int pass(nbdkit_next *next, void *h, const void *b, uint32_t count, uint64_t at, uint32_t flags, int *err)
{
    return next->pwrite(next, b, count, at, flags, err);
}
static struct nbdkit_filter filter = {.name = "dirtmap", .pwrite = pass};
NBDKIT_REGISTER_FILTER(filter)
"""


class Server:
    """A process that serves the disk."""

    def __init__(self, stack: ExitStack, sock: Path, command: list[str]) -> None:
        self.sock = sock
        self._process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        stack.callback(self._process.kill)
        while not sock.exists():
            assert self._process.poll() is None
            time.sleep(0.01)

    def share(self, how: str, size: int, jobs: int, folder: Path) -> float:
        """Of the CPU time of all writes, that of its one filter."""
        made = folder / "samples"
        record = ["perf", "record", "-q", "-F", "4999", "-o", str(made), "-p", str(self._process.pid), "--"]
        record += fio.command(self.sock, how, size, jobs, SIZE, SAMPLED_SECONDS)
        subprocess.run(record, check=True, capture_output=True)
        report = ["perf", "report", "-i", str(made), "--stdio", "--no-children", "-F", "sample,dso,sym", "-t", ","]
        told = subprocess.run(report, check=True, capture_output=True, text=True).stdout
        rows = [line.split(",") for line in told.splitlines() if line.strip() and not line.startswith("#")]
        ours = [row for row in rows if "-filter.so" in row[1] or "clock_gettime" in row[2] or "[vdso]" in row[1]]
        return sum(int(row[0]) for row in ours) / sum(int(row[0]) for row in rows)

    def cost(self, how: str, size: int, jobs: int) -> float:
        """CPU time for a write, in seconds."""
        clock = ~self._process.pid << 3 | 2  # linux/posix-timers.h: CPUCLOCK_SCHED of a process
        begun = time.clock_gettime(clock)
        count = fio.write(self.sock, how, size, jobs, SIZE, SECONDS)["total_ios"]
        return (time.clock_gettime(clock) - begun) / int(count)


def nbdkit(stack: ExitStack, disk: Path, name: str, filters: list[str], *parameters: str) -> Server:
    sock = disk.with_name(name)
    loaded = [f"--filter={path}" for path in filters]
    return Server(stack, sock, ["nbdkit", "-f", "-U", str(sock), *loaded, "file", f"file={disk}", *parameters])


def compiled(folder: Path, number: int, source: str) -> str:
    """A filter of its own: nbdkit gives each parameter to the first filter that takes it."""
    path, made = folder / f"filter{number}.c", folder / f"nbdkit-filter{number}-filter.so"
    path.write_text(
        source.replace('"dirtmap-session"', f'"session{number}"').replace('"dirtmap"', f'"dirtmap{number}"')
    )
    subprocess.run(["cc", *FLAGS, f"-I{dm.get_include()}", "-o", made, path], check=True)
    return str(made)


def qemu_nbd(stack: ExitStack, folder: Path, bitmaps: int) -> Server:
    image, sock = folder / f"{bitmaps}.qcow2", folder / f"qemu{bitmaps}"
    qemu.create(image, SIZE, "preallocation=metadata")
    for number in range(bitmaps):
        qemu.qemu_img("bitmap", "--add", image, f"b{number}")
    return Server(stack, sock, ["qemu-nbd", "-f", "qcow2", "--persistent", "--shared=0", "-k", str(sock), str(image)])


class Servers(NamedTuple):
    """What is measured, all on one disk but for QEMU, and the trackers that the filters of one of them mark for."""

    nbdkit: Server
    again: Server
    nothing: Server
    marking: Server
    single: Server
    qemu: dict[int, Server]
    trackers: list[dm.Tracker]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        environment.setenv("DIRTMAP_STORE", str(folder / "default.dmap"))
        environment.setenv("DIRTMAP_INDEX", str(folder / "index"))
        disk = memory / "disk"
        with disk.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, SIZE)
        trackers, sessions = [], []
        for number in range(FILTERS + 1):
            make_node(folder, SIZE, f"drive{number}")
            image = stack.enter_context(dm.open(f"node:drive{number}"))
            trackers.append(stack.enter_context(image.track(live=memory, save_interval=0)))
            status = image.tracking()
            assert status is not None
            sessions.append(f"session{number}={status.live}")
        *ours, single = [compiled(folder, number, SOURCE.read_text()) for number in range(FILTERS + 1)]
        empty = [compiled(folder, FILTERS + 1 + number, NOTHING) for number in range(FILTERS)]
        yield Servers(
            nbdkit(stack, disk, "alone", []),
            nbdkit(stack, disk, "again", []),
            nbdkit(stack, disk, "nothing", empty),
            nbdkit(stack, disk, "marking", ours, *sessions[:FILTERS]),
            nbdkit(stack, disk, "single", [single], sessions[FILTERS]),
            {bitmaps: qemu_nbd(stack, memory, bitmaps) for bitmaps in (0, 1, 10)},
            trackers,
        )


@pytest.mark.parametrize("jobs", [1, 8])
@pytest.mark.parametrize("size", [4 << 10, 64 << 10, 1 << 20], ids=["4k", "64k", "1m"])
@pytest.mark.parametrize("how", ["randwrite", "write"])
def test_cpu(
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    servers: Servers,
    tmp_path: Path,
    how: str,
    size: int,
    jobs: int,
) -> None:
    def saved() -> float:
        for tracker in servers.trackers:
            tracker.save()
        return servers.marking.cost(how, size, jobs)

    def log_all() -> None:
        starts = np.arange(0, SIZE, 1 << 20)  # in each region
        for tracker in servers.trackers:
            tracker.mark_many(starts, np.ones_like(starts))

    def warm() -> float:
        log_all()
        return servers.marking.cost(how, size, jobs)

    def turn() -> None:
        plain = {"nbdkit": servers.nbdkit, "again": servers.again, "nothing": servers.nothing}
        plain |= {f"{bitmaps} bitmaps": server for bitmaps, server in servers.qemu.items()}
        turns.append(
            {"saved": saved(), "warm": warm(), **{name: server.cost(how, size, jobs) for name, server in plain.items()}}
        )

    turns: list[dict[str, float]] = []
    benchmark.pedantic(turn, rounds=TURNS + 1)
    del turns[0]  # it makes pages

    def more(name: str, of: str = "nbdkit", count: int = 1) -> float:
        return statistics.median((turn[name] - turn[of]) / turn[of] / count for turn in turns)

    log_all()
    own = servers.single.share(how, size, jobs, tmp_path)
    # What a save costs is over with the turn, in which most regions are written: the rest of a minute is as without it.
    save = statistics.median((turn["saved"] - turn["warm"]) / turn["nbdkit"] for turn in turns) / FILTERS
    found = {
        "seconds": statistics.median(turn["nbdkit"] for turn in turns),
        "again": more("again"),
        "nothing": more("nothing", count=FILTERS),
        "warm": more("warm", count=FILTERS),
        "own": own,
        "saved": more("saved", count=FILTERS),
        "minute": own + save * SECONDS / MINUTE,
        "qemu": statistics.median(turn["0 bitmaps"] for turn in turns),
        "one": more("1 bitmaps", "0 bitmaps"),
        "ten": more("10 bitmaps", "0 bitmaps"),
    }
    kind = "random" if how == "randwrite" else "sequential"
    what = f"{kind}, {size >> 10} KiB, {jobs} job{'s' if jobs > 1 else ''}"
    benchmark.extra_info.update(what=what, serving=found, turns=TURNS, turn_seconds=SECONDS)
    with capsys.disabled():
        told = ", ".join(f"{key} {value:+.2%}" for key, value in found.items() if key not in ("seconds", "qemu"))
        print(f"\n{what}: {found['seconds'] * 1e6:.3g} µs, qemu-nbd {found['qemu'] * 1e6:.3g} µs; {told}")
