"""fio, as a client of an NBD server at a Unix socket."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any


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


def write(sock: Path, how: str, block: int, jobs: int, size: int, seconds: float) -> dict[str, Any]:
    """What fio says of such writes. Arguments as `command`."""
    words = command(sock, how, block, jobs, size, seconds)
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return json.loads(said[said.index("{") :])["jobs"][0]["write"]  # type: ignore[no-any-return]
