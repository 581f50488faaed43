"""The filter as nbdkit-filter(3) wants one: a client, and the plugin, meet each other as if it were not there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from support import qemu
from support.server import SIZE, granules
from support.tracking import GRANULE, make_node

import dirtmap.engine as dm
from dirtmap.tools.serve.building import built_filter

BELOW: dict[str, list[str]] = {
    "plain": [],
    "no FUA": ["--filter=fua"],
    "FUA by flush": ["--filter=fua", "fuamode=emulate"],
    "FUA": ["--filter=fua", "fuamode=native"],
    "no zero": ["--filter=nozero", "zeromode=none"],
    "zero by write": ["--filter=nozero", "zeromode=emulate"],
    "zero without trim": ["--filter=nozero", "zeromode=notrim"],
    "no fast zero": ["--filter=nozero", "fastzeromode=none"],
    "slow zero": ["--filter=nozero", "fastzeromode=slow"],
    "no extents": ["--filter=noextents"],
    "no cache": ["--filter=nocache", "cachemode=none"],
    "one connection": ["--filter=multi-conn", "multi-conn-mode=disable"],
    "sizes": ["--filter=blocksize-policy", "blocksize-minimum=512", "blocksize-preferred=4k"],
    "read-only": ["--filter=protect", f"protect=0-{SIZE - 1}"],
}
WRITES = ["write 1k 512", "write -f 64k 4k", "write -z 128k 8k", "write -z -u 256k 8k", "write -z -f 512k 8k"]
WRITES += ["write -z -n 1m 64k", "discard 2m 64k", "flush", "read 0 512"]
MARKED = [(1 << 10, 512), (64 << 10, 4 << 10), (128 << 10, 8 << 10), (256 << 10, 8 << 10), (512 << 10, 8 << 10)]


def met(folder: Path, below: list[str], *filters: str, session: str = "") -> tuple[str, str]:
    """What a client is told and gets, and what the plugin is asked for."""
    log = folder / "log"
    asked = " ".join(f"-c '{write}'" for write in WRITES)
    told = f'nbdinfo --json "$uri"; qemu-io -t writeback -f raw {asked} "$uri" 2>&1; nbdinfo --map "$uri" 2>&1'
    command = ["nbdkit", "-U", "-", *filters, "--filter=log", "memory", f"{SIZE}", *below, f"logfile={log}"]
    command += ["--run", told, *([f"dirtmap-session={session}"] if session else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took = r"[0-9.]+ (sec|[A-Z]iB/sec|ops/sec)|[0-9.]+ bytes/sec|\S*/nbdkit\S*/socket|[0-9.]+ ops; .*"
    assert log.exists(), done.stderr
    requests = re.findall(r" (\w+) id=\d+ (.*)", log.read_text())
    log.unlink()
    return re.sub(took, "", done.stdout), "\n".join(" ".join(one) for one in requests if one[0] != "Ready")


@pytest.mark.parametrize("below", BELOW)
def test_a_client_and_the_plugin_meet_as_without_it(tmp_path: Path, below: str) -> None:
    make_node(tmp_path, SIZE)
    plain = met(tmp_path, BELOW[below])
    with dm.open("node:drive0") as image, image.track() as tracker:
        status = image.tracking()
        assert status is not None
        ours = met(tmp_path, BELOW[below], f"--filter={built_filter()}", session=status.live)
        found = granules(qemu.extents(tracker.bitmap("b0")))
    assert ours == plain
    assert "Write" in ours[1] or below == "read-only"
    if below != "read-only":
        assert found >= granules(MARKED)
    assert found <= granules([*MARKED, (1 << 20, GRANULE), (2 << 20, GRANULE)])
