"""No command, and no call from Python, has all bits of a large bitmap in memory: 16 TiB at 4 KiB have 512 MiB."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.cli import json_of, listed, mapped
from support.large import SIZE, environment, make_large, run_measured

import dirtmap.engine as dm

MEBIBYTES = 256
OPEN = "import dirtmap.engine as dm; import numpy as np; image = dm.open('disk'); "
CHANGE = f"{OPEN}changing = image.transaction(); bitmaps = changing.__enter__(); "
DONE = "; changing.__exit__(None, None, None)"

COMMANDS = {
    "list": ["list", "disk"],
    "dump": ["dump", "disk"],
    "check": ["check", "STORE"],
    "map, totals": ["map", "--totals", "disk", "dense"],
    "map, picture": ["map", "--picture", "disk", "dense"],
    "plot": ["plot", "disk"],
    "plot, page": ["plot", "disk", "-o", "PAGE"],
    "mark": ["mark", "disk", "dense", "5M", "4K"],
    "mark, from lines": ["mark", "disk", "dense", "--from", "LINES"],
    "merge into the same": ["merge", "disk", "dense", "week"],
    "merge into another": ["merge", "disk", "few", "dense"],
    "merge into a coarser one": ["merge", "disk", "week", "dense"],
    "copy": ["copy", "disk", "dense", "disk", "--as", "copy"],
    "copy to another node": ["copy", "disk", "dense", "other"],
    "move to another node": ["move", "disk", "dense", "other"],
    "rename": ["rename", "disk", "dense", "renamed"],
    "disable": ["disable", "disk", "dense"],
    "clear": ["clear", "disk", "dense"],
    "hold": ["hold", "disk", "dense", "--", "true"],
    "recover": ["recover", "disk"],
    "compact": ["store", "compact", "STORE"],
    "remove": ["remove", "disk", "dense"],
}
CALLS = {
    "count": f"{OPEN}print(image['dense'].count)",
    "extents by parts": f"{OPEN}print(sum(int(n.sum()) for _, n in image['dense'].extents_by_parts()))",
    "coarser": f"{OPEN}print(image['dense'].at(65536).count)",
    "finer": f"{OPEN}print(image['week'].at(2048).count)",
    "set algebra": f"{OPEN}a, b = image['dense'], image['few']; print((a | b).count, (a & b) == b, (a ^ b).count)",
    "add": f"{CHANGE}dm.changes.add(bitmaps, 'new', 4096){DONE}",
    "one mark": f"{CHANGE}bitmaps['dense'].mark(1 << 30, 1){DONE}",
    "marks": f"{CHANGE}o = np.arange(10**6) * 16777216; bitmaps['dense'].mark_many(o, np.full(10**6, 4096)){DONE}",
    "a clear": f"{CHANGE}bitmaps['dense'].clear(1 << 30, 1 << 41){DONE}",
    "a union": f"{CHANGE}bitmaps['few'] |= bitmaps['dense']{DONE}",
    "a difference": f"{CHANGE}bitmaps['dense'] -= bitmaps['few']{DONE}",
    "another granularity": f"{CHANGE}bitmaps['dense'] = bitmaps['dense'].at(8192){DONE}",
}
# Where it is a qcow2 image that has the bitmaps: the same but for this, and more.
OF_A_STORE = {"check", "compact"}
OF_AN_IMAGE = {
    "check": ["check", "disk"],
    "repair": ["check", "--repair", "all", "disk"],
    "enable": ["enable", "disk", "dense"],
    "add": ["add", "disk", "new", "--granularity", "4096"],
    "find": ["find", "dense"],
    "transaction": ["transaction", "ACTIONS"],
    "export": ["export", "disk", "--run", "true"],
    "backup": ["backup", "create", "disk", "REPOSITORY"],
}
ACTIONS = [
    {"type": "block-dirty-bitmap-merge", "data": {"node": "disk", "target": "few", "bitmaps": ["dense", "week"]}},
    {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "new", "granularity": 4096}},
    {"type": "block-dirty-bitmap-clear", "data": {"node": "disk", "name": "dense"}},
]
LINES = "".join(f"{number * 16777216} 4096\n" for number in range(SIZE >> 24))
QUICK = "map, totals", "merge into another", "marks"


@pytest.fixture(scope="module", params=["store", "qcow2"])
def sparse(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_large(tmp_path_factory.mktemp("large"), 1 / 256, qcow2=request.param == "qcow2")


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """One of which all the bits are in the file."""
    yield from removed(make_large(tmp_path, 1))


@pytest.fixture
def full_qcow2(tmp_path: Path) -> Iterator[Path]:
    yield from removed(make_large(tmp_path, 1, qcow2=True))


def removed(folder: Path) -> Iterator[Path]:
    """The folder; its files take no space any more afterwards."""
    yield folder
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


def run(what: str, folder: Path, commands: Mapping[str, list[str]] = COMMANDS) -> str:
    """Runs one of them, which must succeed within its memory; returns what it said last."""
    if what in CALLS:
        said, _, resident = run_measured(program=CALLS[what], folder=folder)
    else:
        (folder / "lines").write_text(LINES)
        (folder / "actions").write_text(json.dumps({"actions": ACTIONS}))
        places = {
            "ACTIONS": str(folder / "actions"),
            "REPOSITORY": str(folder / "repository"),
            "STORE": str(folder / "default.dmap"),
            "LINES": str(folder / "lines"),
            "PAGE": str(folder / "page.html"),
        }
        words = [places.get(word, word) for word in (commands[what] if what in commands else what.split())]
        said, _, resident = run_measured(*words, folder=folder)
    assert "Traceback" not in said
    assert "dirtmap:" not in said
    assert resident < MEBIBYTES, f"{what}: {resident} MiB"
    return said


@pytest.mark.parametrize("what", QUICK)
def test_in_bounded_memory(what: str, sparse: Path) -> None:
    run(what, sparse)
    with dm.Host(str(sparse / "default.dmap"), str(sparse / "index")) as host, host.open("disk") as image:
        dense, few = image["dense"], image["few"]
        assert SIZE // 8 * 7 <= dense.count < SIZE
        if what == "merge into another":
            assert (dense - few).count == 0
            assert few.count - dense.count in (0, 4096)


@pytest.mark.long
@pytest.mark.parametrize("what", [*COMMANDS, *CALLS])
def test_all_in_bounded_memory(what: str, full: Path) -> None:
    run(what, full)


@pytest.mark.long
@pytest.mark.parametrize("what", sorted(COMMANDS.keys() - OF_A_STORE | OF_AN_IMAGE.keys() | CALLS.keys()))
def test_all_of_an_image_in_bounded_memory(what: str, full_qcow2: Path) -> None:
    run(what, full_qcow2, COMMANDS | OF_AN_IMAGE)
    if what == "copy to another node":
        run("copy other dense disk --as back", full_qcow2)
    if what == "move to another node":
        run("move other dense disk", full_qcow2)


@pytest.mark.long
def test_all_extents_in_bounded_memory(sparse: Path) -> None:
    assert run("map --output=json disk dense", sparse).rstrip().endswith("]")
    assert run("map disk dense", sparse)


@pytest.mark.long
def test_backups_of_a_large_disk_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 16 TiB with little data, all over it."""
    for key, value in environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    disk, repository, chooser = tmp_path / "disk.raw", tmp_path / "repo", random.Random(5)
    places = [chooser.randrange(SIZE // 4096) * 4096 for _ in range(3000)]

    def write(chosen: list[int], data: bytes) -> None:
        with open(disk, "r+b") as file:
            for at in chosen:
                file.seek(at)
                file.write(data)

    disk.touch()
    write([SIZE - 4096, *places[:2000]], b"\1" * 4096)
    run(f"node add disk {disk}", tmp_path)
    run(f"backup create disk {repository}", tmp_path)
    bitmap = json_of("backup", "info", repository, "disk")["bitmap"]
    write(places[1000:], b"\2")
    run(f"rebuild disk {bitmap} --against {repository}", tmp_path)
    changed = {at >> 16 for at in places[1000:]}
    assert {offset >> 16 for offset, _ in mapped(Path("disk"), bitmap)} <= changed
    assert listed(Path("disk"))[bitmap]["count"] == len(changed) << 16
    assert "no differences" in run(f"backup verify {repository} disk", tmp_path)
    run(f"backup verify {repository}", tmp_path)
    assert "incremental" in run(f"backup create disk {repository}", tmp_path)
