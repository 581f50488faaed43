"""What `dirtmap export` serves, as NBD clients see it, and `dirtmap export` as a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.cli import COMMAND, json_of
from support.qemu import Map, merged, qemu_img, run

_SECONDS = 60


def by_nbdinfo(uri: str, name: str) -> Map:
    """The dirty extents of a bitmap, as libnbd has them."""
    found = json.loads(run("nbdinfo", f"--map=qemu:dirty-bitmap:{name}", "--json", uri))
    return merged((extent["offset"], extent["length"]) for extent in found if extent["type"])


def by_qemu_img(uri: str, name: str) -> Map:
    """The same as QEMU has them, which tells dirty as neither data nor zero."""
    options = {"driver": "nbd", "server": server_of(uri), "export": export_of(uri)}
    image = "json:" + json.dumps({**options, "x-dirty-bitmap": f"qemu:dirty-bitmap:{name}"})
    found = json.loads(qemu_img("map", "--output=json", image))
    return merged((extent["start"], extent["length"]) for extent in found if not extent["data"])


def server_of(uri: str) -> dict[str, str]:
    """The socket of a URI, as QEMU has it."""
    return {"type": "unix", "path": uri.partition("socket=")[2]}


def export_of(uri: str) -> str:
    """The export's name, where nothing in it is escaped."""
    return uri.removeprefix("nbd+unix:///").partition("?")[0]


def contexts(uri: str) -> list[str]:
    """The names of all bitmaps of an export."""
    (export,) = json.loads(run("nbdinfo", "--json", uri))["exports"]
    begin = "qemu:dirty-bitmap:"
    return [name.removeprefix(begin) for name in export["contexts"] if name.startswith(begin)]


def mapped(target: str | Path, name: str) -> Map:
    """The dirty extents of a bitmap, as `dirtmap map` prints them."""
    return merged((e["offset"], e["length"]) for e in json_of("map", target, name) if e["type"])


def clipped(found: Map, size: int) -> Map:
    """A map up to the end of the disk: QEMU serves whole sectors."""
    return [(offset, min(length, size - offset)) for offset, length in found if offset < size]


class Server(subprocess.Popen[str]):
    """`dirtmap export` that is ready; ``ready`` is what it said then, and ``daemons`` the processes that serve."""

    ready: list[dict[str, Any]]
    daemons: list[int]


@contextlib.contextmanager
def exporting(*arguments: str | Path) -> Iterator[Server]:
    """`dirtmap export ARGUMENTS`, until the end of the block at the latest."""
    command = [COMMAND, "export", *map(str, arguments), "--output=json"]
    with Server(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            text = ""
            while not text.endswith("]\n"):
                line = process.stdout.readline()
                assert line, process.communicate(timeout=_SECONDS)
                text += line
            process.ready = json.loads(text)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            process.daemons = [int(pid) for pid in children.split()]
            yield process
        finally:
            process.kill()


def ended(process: Server) -> tuple[int, str]:
    """The exit status of one that ends, and what it complained about."""
    _, complaint = process.communicate(timeout=_SECONDS)
    return process.returncode, complaint


def is_running(pid: int) -> bool:
    """True while a process is there that has not ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
