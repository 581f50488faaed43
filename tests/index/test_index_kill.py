"""Real commands, killed at random moments: containers and index are sound afterwards, and what was reported is so."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import qemu
from support.cli import COMMAND, dirtmap, json_of

from dirtmap.engine.index import database

MIB = 1 << 20
SIZE = 16 * MIB
GRANULE = 65536
ALL = set(range(SIZE // GRANULE))
IMAGES = 10  # to scan
MARKS, DEVICE = "marks", "device"


@dataclass
class Model:
    """What is known to be so: what commands have reported, and what may have been done by one that was killed.

    Attributes:
        nodes: raw nodes that are there.
        dirty: of bitmap `b`, by target: what is dirty at least.
        maybe: of bitmap `b`, by target: what may be dirty besides.
        bitmaps: other bitmaps that are there.
        number: of the next command.
    """

    nodes: set[str] = field(default_factory=set)
    dirty: dict[str, set[int]] = field(default_factory=lambda: {name: set() for name in (MARKS, "q0", DEVICE)})
    maybe: dict[str, set[int]] = field(default_factory=lambda: {name: set() for name in (MARKS, "q0", DEVICE)})
    bitmaps: set[tuple[str, str]] = field(default_factory=set)
    number: int = 0


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nodes, raw and qcow2, a device, and folders of images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIRTMAP_STORE", "default.dmap")
    for name in [MARKS, *(f"raw{number}" for number in range(400))]:
        Path(f"{name}.raw").touch()
        os.truncate(f"{name}.raw", SIZE)
    os.mkdir("images")
    for name in ("q0", "q1"):
        qemu.create(Path("images", f"{name}.qcow2"), SIZE)
        dirtmap("node", "add", name, f"images/{name}.qcow2")
    for number in range(IMAGES):
        shutil.copy("images/q0.qcow2", f"images/more{number}.qcow2")
        dirtmap("node", "add", "--new-identity", f"more{number}", f"images/more{number}.qcow2")
    dirtmap("node", "add", MARKS, f"{MARKS}.raw")
    dirtmap("device", "add", DEVICE, "--root", "q0")
    for target in (MARKS, "q0", DEVICE):
        dirtmap("add", target, "b")
    _forget()
    yield
    _forget()


def _forget() -> None:
    """A process of its own would have nothing mapped."""
    for known in list(database._connected):
        database._connected.pop(known).close()


Act = Callable[[Model, random.Random], tuple[list[str], Callable[[bool], None]]]


def _mark(model: Model, chance: random.Random) -> tuple[list[str], Callable[[bool], None]]:
    target, granule = chance.choice([MARKS, "q0", DEVICE]), chance.randrange(len(ALL))

    def after(reported: bool) -> None:
        (model.dirty if reported else model.maybe)[target].add(granule)
        if target == "q0" and not reported:
            model.maybe[DEVICE] |= ALL  # its root may have changed and nobody have said that nothing but bitmaps did

    return ["mark", target, "b", str(granule * GRANULE), "1"], after


def _add(model: Model, chance: random.Random) -> tuple[list[str], Callable[[bool], None]]:
    target, name = chance.choice([MARKS, "q0", "q1", DEVICE]), f"n{model.number}"

    def after(reported: bool) -> None:
        if reported:
            model.bitmaps.add((target, name))
        elif target == "q0":
            model.maybe[DEVICE] |= ALL

    return ["add", target, name], after


def _node_add(model: Model, chance: random.Random) -> tuple[list[str], Callable[[bool], None]]:
    name = f"raw{model.number}"

    def after(reported: bool) -> None:
        if reported:
            model.nodes.add(name)

    return ["node", "add", name, f"{name}.raw"], after


def _device_add(model: Model, chance: random.Random) -> tuple[list[str], Callable[[bool], None]]:
    return ["device", "add", f"d{model.number}", "--root", chance.choice(["q0", "q1", MARKS])], lambda reported: None


def _set_root(model: Model, chance: random.Random) -> tuple[list[str], Callable[[bool], None]]:
    unchanged = chance.random() < 0.5

    def after(reported: bool) -> None:
        if not unchanged:
            (model.dirty if reported else model.maybe)[DEVICE] |= ALL

    option = ["--content-unchanged"] if unchanged else []
    return ["device", "set-root", DEVICE, chance.choice(["q0", "q1"]), *option], after


def _scan(model: Model, chance: random.Random) -> tuple[list[str], Callable[[bool], None]]:
    one = chance.randrange(IMAGES)
    found = list(Path("images").rglob(f"more{one}.qcow2"))
    folder = Path("images", f"sub{model.number}")
    folder.mkdir()
    os.rename(found[0], folder / found[0].name)
    if chance.random() < 0.5:
        shutil.rmtree("index", ignore_errors=True)
    return ["index", "scan", "images"], lambda reported: None


def _rebuild(model: Model, chance: random.Random) -> tuple[list[str], Callable[[bool], None]]:
    return ["index", chance.choice(["rebuild", "verify"])], lambda reported: None


ACTS: list[Act] = [_mark, _mark, _mark, _add, _node_add, _device_add, _set_root, _scan, _rebuild]


def run(arguments: list[str], seconds: float) -> int:
    """The status of a command that is killed after so long, if it still runs then."""
    with subprocess.Popen(
        [COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        # With what it has started: `verify` reads the index in a process of its own.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), error
    return process.returncode


def judge(model: Model) -> None:
    """Everything is sound, and what was reported is so."""
    _forget()
    verified = json_of("index", "verify") if Path("index").exists() else {"faults": []}
    assert verified["faults"] == []
    for path in ("default.dmap", "images/q0.qcow2", "images/q1.qcow2"):
        report = json_of("check", path, status=3 if _leaks(path) else 0)
        assert report["corruptions"] == report["check-errors"] == 0
    names = {node["name"] for node in json_of("node", "list")}
    assert model.nodes <= names
    for target, dirty in model.dirty.items():
        found = {
            number
            for extent in json_of("map", "--dirty", target, "b")
            for number in range(extent["offset"] // GRANULE, (extent["offset"] + extent["length"]) // GRANULE)
        }
        assert dirty <= found <= dirty | model.maybe[target], target
        model.dirty[target] = found
        model.maybe[target] = set()
    for target in {target for target, _ in model.bitmaps}:
        (image,) = json_of("list", target)
        assert {name for where, name in model.bitmaps if where == target} <= {b["name"] for b in image["bitmaps"]}


def _leaks(path: str) -> bool:
    """A killed commit may leave clusters that nothing uses; they harm nobody."""
    from dirtmap.engine import check

    return check(path).leaks > 0


def killed(count: int, seed: int) -> None:
    chance, model = random.Random(seed), Model()
    ends = {0: 0, -signal.SIGKILL: 0}
    began = time.monotonic()
    subprocess.run([COMMAND, "mark", MARKS, "b", "0", "1"], check=True, timeout=60)
    model.dirty[MARKS].add(0)
    usual = time.monotonic() - began
    for number in range(count):
        model.number = number
        arguments, after = chance.choice(ACTS)(model, chance)
        # However fast the machine is just now: about half of them come through.
        status = run(arguments, chance.uniform(usual * 0.6, usual * 1.3))
        usual *= 1.15 if status else 0.87
        ends[status] += 1
        after(status == 0)
        if number % 5 == 0 or number == count - 1:
            judge(model)
    assert min(ends.values()) > count // 12, ends
    # All that is reported by a command that comes through is there for the next.
    for line in ("index scan images", f"mark {MARKS} b 0 1", f"device set-root {DEVICE} q1"):
        subprocess.run([COMMAND, *line.split()], check=True, capture_output=True, timeout=60)
    assert len(json_of("find", "b")) == 3
    assert not list(Path().glob("index.new-*")) or dirtmap("index", "rebuild")
    assert not list(Path().glob("index.new-*"))


def test_commands_killed_at_random() -> None:
    killed(30, 1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 6))
def test_commands_killed_at_random_for_long(seed: int) -> None:
    killed(250, seed)
