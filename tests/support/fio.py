"""fio, as a client of an NBD server at a Unix socket."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LONG_SECONDS = 600.0


def command(sock: Path, how: str, block: int, jobs: int, size: int, seconds: float) -> list[str]:
    """Writes, four requests at a time for each job, for so long.

    Args:
        sock: of the server.
        how: ``write`` or ``randwrite``.
        block: bytes of a write.
        jobs: how many connections.
        size: of the disk, bytes.
        seconds: for which it writes.
    """
    words = ["fio", "--name=a", "--thread", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={sock}", f"--rw={how}"]
    words += ["--iodepth=4", f"--bs={block}", f"--size={size}", f"--numjobs={jobs}", "--time_based"]
    return [*words, f"--runtime={round(seconds * 1000)}ms", "--group_reporting", "--output-format=json"]


@contextlib.contextmanager
def steady(sock: Path, rate: int, size: int) -> Iterator[list[float]]:
    """Writes 4 KiB at random until the end of the block, ``rate`` times a second.

    Yields:
        What has the longest wait of a write after the block, in seconds.
    """
    waits: list[float] = []
    words = [*command(sock, "randwrite", 4096, 1, size, _LONG_SECONDS), f"--rate_iops={rate}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield waits
        finally:
            process.send_signal(signal.SIGINT)  # it tells what it has done until then
            assert process.stdout is not None
            told = _told(process.stdout.read())
            assert told["total_ios"]
            waits.append(told["clat_ns"]["max"] * 1e-9)


def write(sock: Path, how: str, block: int, jobs: int, size: int, seconds: float) -> dict[str, Any]:
    """What fio says of such writes. Arguments as `command`."""
    words = command(sock, how, block, jobs, size, seconds)
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return _told(said)


def _told(said: str) -> dict[str, Any]:
    return json.loads(said[said.index("{") :])["jobs"][0]["write"]  # type: ignore[no-any-return]
