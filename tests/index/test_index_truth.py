"""The index is never the truth: a long sequence of commands says and does the same, whatever becomes of the index.

Random UUIDs come from a counter here, so that two runs of the same commands make the same containers.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support import qemu
from support.cli import dirtmap, error_of, json_of

from dirtmap.engine.index import database
from dirtmap.engine.storefile.file import Store
from dirtmap.fmt import index as layout
from dirtmap.fmt.index import build_bitmap, parse_bitmap
from dirtmap.tools.cli import _HOMES, main

MIB = 1 << 20
SIZE = 4 * MIB
ALL = [(0, SIZE)]

Step = tuple[str, ...] | Callable[[], object]

MERGE = {
    "actions": [
        {"type": "block-dirty-bitmap-add", "data": {"node": "two", "name": "t"}},
        {
            "type": "block-dirty-bitmap-merge",
            "data": {
                "node": "two",
                "target": "t",
                "bitmaps": [{"node": "q0", "name": "a"}, {"node": "one", "name": "a"}],
            },
        },
        {"type": "block-dirty-bitmap-disable", "data": {"node": "d0", "name": "a"}},
    ]
}


def _touch() -> None:
    os.utime("one.raw", ns=(1, 1))


SCRIPT: list[Step] = [
    ("list",),
    ("find", "a"),
    ("store", "create", "other.dmap"),
    ("node", "add", "one", "one.raw"),
    ("node", "add", "far", "far.raw", "--store", "other.dmap"),
    ("node", "list", "--output=json"),
    ("node", "add", "two", "two.raw"),
    ("node", "add", "q0", "q0.qcow2"),
    ("node", "add", "one", "two.raw"),
    ("node", "add", "q0", "q1.qcow2"),
    ("device", "add", "d0", "--root", "q0"),
    ("device", "add", "one", "--root", "q0"),
    ("backup", "create", "d0", "backups"),
    ("rebuild", "d0", "a", "--against", "backups"),
    ("export", "nothing", "--run", "true"),
    ("serve", "q0", "--run", "true"),
    ("checkpoint", "list", "one"),
    ("device", "add", "d1", "--root", "far", "--store", "other.dmap"),
    ("device", "list", "--output=json"),
    *(("add", target, name) for target in ("one", "two", "far", "q0", "d0", "d1") for name in ("a", "b")),
    ("add", "one", "a"),
    ("add", "nothing", "a"),
    *(("mark", target, "a", f"{n}M", "1") for n, target in enumerate(("one", "far", "q0", "d0"))),
    *(("map", "--dirty", target, "a") for target in ("one", "two", "far", "q0", "d0", "d1")),
    ("find", "a", "--output=json"),
    ("list", "--output=json"),
    ("list", "one", "far", "q0", "d0", "d1", "q1.qcow2"),
    ("merge", "one", "b", "a"),
    ("merge", "one", "b", "a", "-b", "far"),
    ("map", "--output=json", "one", "b"),
    ("plot", "--output=json", "one"),
    ("plot", "d0", "a"),
    ("copy", "q0", "a", "two", "--as", "copied"),
    ("move", "far", "b", "one", "--as", "moved"),
    ("move", "one", "moved", "q0"),
    ("move", "q0", "moved", "one", "--as", "a"),
    ("rename", "q0", "moved", "renamed"),
    ("disable", "one", "b"),
    ("enable", "one", "b"),
    ("clear", "one", "b"),
    ("transaction", "merge.json"),
    ("transaction", "merge.json"),
    ("transaction", "good.json"),
    ("remove", "q0", "renamed"),
    ("remove", "q0", "renamed"),
    ("index", "scan", "."),
    ("index", "scan", "--output=json", "."),
    ("find", "a"),
    ("node", "rename", "two", "zwei"),
    ("node", "rename", "--with-bitmaps", "two", "zwei"),
    ("map", "--dirty", "zwei", "copied"),
    ("map", "--dirty", "two", "copied"),
    ("node", "rename", "--with-bitmaps", "q0", "q"),
    ("list", "d0"),
    ("track", "status", "d0"),
    ("track", "status", "--output=json", "q"),
    ("track", "status", "zwei"),
    ("track", "status", "two"),
    ("device", "list"),
    ("node", "remove", "q"),
    ("node", "remove", "far"),
    lambda: (Path("folder").mkdir(), os.rename("q0.qcow2", "folder/moved.qcow2")),
    ("list", "q"),
    ("list",),
    ("find", "a"),
    ("index", "scan", "."),
    ("list", "q"),
    ("map", "--dirty", "d0", "a"),
    ("device", "set-root", "d0", "one"),
    ("device", "set-root", "d0", "q", "--content-unchanged"),
    ("map", "--dirty", "d0", "a"),
    ("node", "add", "q1", "q1.qcow2"),
    lambda: shutil.copy("q1.qcow2", "copy.qcow2"),
    ("list", "copy.qcow2"),
    ("index", "scan", "."),
    ("node", "add", "--new-identity", "q2", "copy.qcow2"),
    ("index", "scan", "."),
    _touch,
    ("list", "one"),
    ("map", "--dirty", "one", "a"),
    ("node", "list"),
    ("node", "confirm", "one"),
    ("map", "--dirty", "one", "a"),
    lambda: os.truncate("one.raw", 2 * SIZE),
    ("map", "--dirty", "one", "a"),
    ("node", "resize", "one"),
    ("map", "--dirty", "one", "a"),
    lambda: os.rename("one.raw", "moved.raw"),
    ("list", "one"),
    ("node", "relocate", "--confirm", "one", "moved.raw"),
    ("node", "relocate", "one", "none.raw"),
    ("map", "--dirty", "one", "a"),
    ("node", "list"),
    ("hold", "one", "a", "--", "true"),
    ("hold", "q", "a", "--", "true"),
    ("hold", "q", "none", "--", "true"),
    ("recover", "one"),
    ("check", "default.dmap"),
    ("check", "q"),
    ("dump", "copy.qcow2"),
    ("sidecar", "far.raw", "side.qcow2"),
    ("index", "scan", "side.qcow2"),
    ("store", "compact", "other.dmap"),
    ("list", "far", "d1"),
    ("remove", "d1", "a"),
    ("remove", "d1", "b"),
    ("device", "remove", "d1"),
    ("remove", "far", "a"),
    ("node", "remove", "far"),
    ("list", "other.dmap"),
    ("index", "rebuild"),
    ("index", "verify", "-q"),
    ("node", "list"),
    ("find", "a"),
    ("list", "--output=json"),
]
# What they print is of the index itself.
OF_THE_INDEX = [("index", "verify", "--output=json"), ("index", "stats", "-q")]
VARYING = ("mtime", "ctime", "birth", "inode", "checksum", "commit_time")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where files are made once, to be copied for each run."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("one", "two", "far"):
        (source / f"{name}.raw").touch()
        os.truncate(source / f"{name}.raw", SIZE)
    for name in ("q0", "q1"):
        qemu.create(source / f"{name}.qcow2", SIZE)
    (source / "merge.json").write_text(json.dumps(MERGE))
    (source / "good.json").write_text(json.dumps({"actions": MERGE["actions"][:2]}))
    monkeypatch.setenv("DIRTMAP_STORE", "default.dmap")
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "state" / "index"))
    here = os.getcwd()
    yield tmp_path
    os.chdir(here)


def forget(base: Path) -> Path:
    """What a new process would know of the index: nothing. Where it is."""
    path = base / "state" / "index"
    if known := database._connected.pop(os.path.realpath(path), None):
        known.close()
    return path


def kept(base: Path, step: int) -> None:
    pass


def deleted(base: Path, step: int) -> None:
    shutil.rmtree(forget(base).parent, ignore_errors=True)


def damaged(base: Path, step: int) -> None:
    """Cut short, without a sound page, with wrong values, or an empty folder."""
    path = forget(base)
    data = path / "data.mdb"
    if not data.exists():
        return
    chance = random.Random(step)
    if step % 4 == 0:
        os.truncate(data, chance.randrange(data.stat().st_size))
    elif step % 4 == 1:
        data.write_bytes(bytes(data.stat().st_size))
    elif step % 4 == 2:
        shutil.rmtree(path)
        path.mkdir()
    else:
        spoil_values(path, chance)


def spoil_values(path: Path, chance: random.Random, share: float = 0.3, spared: bytes = b"") -> None:
    """Makes the checksums of some values wrong, but of none of those kinds."""
    opened = database.Database(str(path))

    def work(writer: database.Writer) -> None:
        for key, value in list(writer.scan(b"")):
            if key[0] not in spared and chance.random() < share:
                writer._txn.put(key, bytes(4) + value)

    opened.change(work)
    opened.close()


def old_copy(base: Path, step: int) -> None:
    """Puts the index of some earlier moment back, and keeps that of this one."""
    path = forget(base)
    copies = base / "copies"
    copies.mkdir(exist_ok=True)
    if path.exists():
        shutil.copytree(path, copies / str(step))
    if known := sorted(copies.iterdir()):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(random.Random(step).choice(known), path)


def run(base: Path, between: Callable[[Path, int], None], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every command said, and what was in the containers at the end and at some moments before."""
    os.chdir(base)
    folder = base / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(forget(base).parent, ignore_errors=True)
    shutil.copytree(base / "source", folder)
    os.chdir(folder)
    numbers = iter(range(1, 1 << 20))
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=next(numbers) << 64 | 4 << 12))
    told: list[Any] = []
    for step, command in enumerate(SCRIPT):
        between(base, step)
        if callable(command):
            command()
            continue
        result = CliRunner().invoke(main, command)
        assert "a bug in" not in result.stderr, (command, result.stderr)
        if command[:2] != ("index", "verify"):  # which speaks of nothing but the index
            told.append((command, result.exit_code, result.stdout, result.stderr))
        if step % 10 == 0:
            told.append(contents())
    told.append(contents())
    for command in OF_THE_INDEX:
        dirtmap(*command)
    assert json_of("index", "verify")["faults"] == []
    return told


def contents() -> dict[str, Any]:
    """All containers, field by field, without what no two runs have in common."""
    return {
        str(path): _stable(json_of("dump", path))
        for path in sorted(Path().rglob("*"))
        if path.suffix in (".dmap", ".qcow2")
    }


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        varying = str(value.get("name")).endswith(VARYING)
        return {key: _stable(item) for key, item in value.items() if not (varying and key in ("value", "meaning"))}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Where the two differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), f"{path}.{one.get('name', '')}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}[{index}]")
    elif one != other:
        yield f"{path}: {one} {other}"


def test_the_script_has_every_command() -> None:
    used = {command[0] for command in SCRIPT if not callable(command)}
    assert used == set(_HOMES) - {"completion"}
    groups = {command[:2] for command in [*SCRIPT, *OF_THE_INDEX] if not callable(command) and len(command) > 1}
    for group in ("node", "device", "index", "store"):
        module = __import__(f"dirtmap.tools.{group}", fromlist=["x"])
        assert {name for first, name in groups if first == group} >= set(
            getattr(module, f"{group}_command").commands
        ) - {"new-identity"}


def test_whatever_becomes_of_the_index_every_answer_is_the_same(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(base, kept, monkeypatch)
    assert sum(1 for item in expected if isinstance(item, tuple) and item[1] == 0) > 80
    assert sum(1 for item in expected if isinstance(item, tuple) and item[1] == 1) > 10
    for between in (deleted, damaged, old_copy):
        found = run(base, between, monkeypatch)
        for one, other in zip(expected, found, strict=True):
            assert one == other, (between.__name__, list(differences(one, other))[:9])


# Losing more than the index.


def test_a_scan_brings_names_back_that_no_store_knows(base: Path) -> None:
    os.chdir(base / "source")
    os.mkdir("deep")
    for number in range(5):
        path = Path("deep" if number % 2 else ".", f"image{number}.qcow2")
        qemu.create(path, SIZE)
        dirtmap("node", "add", f"n{number}", path)
        dirtmap("add", f"n{number}", "b")
        dirtmap("mark", f"n{number}", "b", f"{number}00K", 1)
    dirtmap("node", "rename", "--with-bitmaps", "n4", "vier")
    names = ["n0", "n1", "n2", "n3", "vier"]
    before = {node["name"]: node for node in json_of("node", "list")}
    maps = {name: json_of("map", name, "b") for name in names}
    for lost in (["default.dmap"], ["default.dmap", "../state"], ["../state"]):
        forget(base)
        for path in lost:
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        if "default.dmap" in lost:
            assert "no such file, and no store at default.dmap" in error_of("list", "n0")
            done = json_of("index", "scan", ".")
            assert done["new"] == 7  # with the two that have no name
        assert {node["name"]: node for node in json_of("node", "list")} == before
        assert {name: json_of("map", name, "b") for name in names} == maps
        assert json_of("index", "verify")["faults"] == []


@pytest.fixture
def rolled_back(base: Path) -> Callable[[], None]:
    """Puts an older copy of both stores back, in which `b` is clean but was dirty at the last commit."""
    os.chdir(base / "source")
    dirtmap("store", "create", "other.dmap")
    dirtmap("node", "add", "far", "far.raw", "--store", "other.dmap")
    for name in ("one", "two"):
        dirtmap("node", "add", name, f"{name}.raw")
    dirtmap("node", "add", "q0", "q0.qcow2")
    dirtmap("device", "add", "d0", "--root", "q0")
    for target in ("one", "two", "far", "d0", "q0"):
        dirtmap("add", target, "b")
        dirtmap("add", target, "c")
    os.mkdir("old")
    for name in ("default.dmap", "other.dmap"):
        shutil.copy(name, "old")
    for target in ("one", "two", "far", "d0"):
        dirtmap("mark", target, "b", MIB, 1)

    def act() -> None:
        forget(base)
        for name in ("default.dmap", "other.dmap"):
            shutil.copy(f"old/{name}", f"{name}.new")
            os.replace(f"{name}.new", name)

    return act


FIRST: list[tuple[str, ...]] = [
    *(("list",), ("list", "one"), ("list", "default.dmap", "other.dmap"), ("map", "one", "b"), ("find", "b")),
    *(("node", "list"), ("device", "list"), ("add", "one", "x"), ("remove", "one", "c"), ("disable", "one", "b")),
    *(("rename", "one", "c", "x"), ("mark", "one", "c", "0", "1"), ("merge", "one", "c", "b"), ("clear", "one", "c")),
    *(("copy", "one", "b", "q0", "--as", "x"), ("move", "one", "c", "q0", "--as", "x"), ("recover", "two")),
    *(("hold", "one", "b", "--", "true"), ("transaction", "document.json"), ("index", "scan", ".")),
    *(("index", "verify"), ("index", "rebuild"), ("node", "add", "new", "two.raw"), ("node", "rename", "one", "x")),
    *(("device", "set-root", "d0", "q0", "--content-unchanged"), ("node", "remove", "one"), ("list", "q0")),
    *(("device", "add", "d9", "--root", "one"), ("node", "confirm", "one"), ("mark", "q0", "b", "0", "1")),
    *(("store", "compact", "default.dmap"), ("store", "new-identity", "default.dmap"), ("check", "default.dmap")),
    ("check", "-r", "all", "default.dmap"),
]


@pytest.mark.parametrize("command", FIRST, ids=" ".join)
def test_a_store_that_was_put_back_is_all_dirty_before_any_answer(
    rolled_back: Callable[[], None], command: tuple[str, ...]
) -> None:
    Path("document.json").write_text(
        '{"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "one", "name": "x"}}]}'
    )
    rolled_back()
    result = CliRunner().invoke(main, command)
    assert "a bug in" not in result.stderr
    for target in ("one", "two", "far", "d0"):
        assert mapped(target, "b") == ALL, target
    notes = [each["doubt"] for kind in ("node", "device") for each in json_of(kind, "list") if each["name"] != "q0"]
    if command[0] in ("list", "find", "map", "index"):
        assert len([note for note in notes if note == "the store lost a commit"]) == 4
    if command == ("map", "one", "b"):
        assert '"data": true' not in result.stdout
        assert "dirty" in result.stdout
    # And it stays so, until it is cleared.
    dirtmap("add", "two", "later")
    dirtmap("mark", "far", "c", 0, 1)
    for target in ("one", "two", "far", "d0"):
        assert mapped(target, "b") == ALL, target
    dirtmap("clear", "two", "b")
    assert mapped("two", "b") == []
    assert mapped("two", "c") == ALL


def mapped(target: str, name: str) -> list[tuple[int, int]]:
    return [(e["offset"], e["length"]) for e in json_of("map", "--dirty", target, name)]


def test_a_list_says_that_a_store_was_put_back(rolled_back: Callable[[], None]) -> None:
    rolled_back()
    done = dirtmap("list", "one", "far", "d0")
    assert done.error.count("counts as all dirty: the store lost a commit") == 3
    rolled_back()
    done = dirtmap("list", "default.dmap", "other.dmap")
    assert done.error.count("counts as all dirty: the store lost a commit") == 4


@pytest.mark.parametrize("command", [("index", "rebuild"), ("index", "verify"), ("list", "one"), ("find", "b")])
@pytest.mark.parametrize("spared", [layout.SEEN + layout.PATH + layout.STATE, layout.SEEN + layout.STATE, layout.SEEN])
def test_a_damaged_index_still_knows_the_commits_that_it_has_seen(
    rolled_back: Callable[[], None], base: Path, command: tuple[str, ...], spared: bytes
) -> None:
    rolled_back()
    spoil_values(forget(base), random.Random(1), share=1.0, spared=spared)
    dirtmap(*command)
    for target in ("one", "two", "far", "d0"):
        assert mapped(target, "b") == ALL, target
    assert json_of("index", "verify")["faults"] == []


def test_a_rebuild_keeps_what_reads_well_of_the_commits_seen(rolled_back: Callable[[], None], base: Path) -> None:
    index = forget(base)
    with Store("other.dmap") as other:
        lost = layout.SEEN + other.read(lambda snapshot: snapshot.header.uuid)
    rolled_back()
    opened = database.Database(str(index))
    opened.change(lambda writer: writer._txn.put(lost, b"?"))
    opened.change(lambda writer: writer._txn.put(layout.STATE, b"?"))
    opened.close()
    assert json_of("index", "verify")["rebuilt"]
    assert mapped("one", "b") == ALL
    assert "put back from one; 'store new-identity'" in error_of("map", "far", "b")


def test_verify_says_in_words_what_is_wrong(rolled_back: Callable[[], None], base: Path) -> None:
    def spoil(tag: bytes) -> None:
        opened = database.Database(str(forget(base)))
        opened.change(lambda writer: [writer.delete(key) for key, _ in list(writer.scan(tag))])
        opened.close()

    def false_claim(writer: database.Writer) -> None:
        key = layout.bitmap_key(layout.named(b"one"), b"b")
        name, (claim,) = parse_bitmap(writer.get(key) or b"")
        writer.put(key, build_bitmap(name, [claim._replace(granularity_bits=12)]))

    dirtmap("find", "b")
    opened = database.Database(str(forget(base)))
    opened.change(false_claim)
    opened.close()
    told = dirtmap("index", "verify").error
    assert "says what is not so: bitmap 'b' of 'one' in " in told
    assert "default.dmap: granularity 4096, recording, namespace " in told
    assert "says nothing of bitmap 'b' of 'one' in " in told
    for tag in (layout.NAME, layout.FOUND, layout.MEMBERS):
        spoil(tag)
        told += dirtmap("index", "verify").error
    assert " b'" not in told
    assert "\\x" not in told
    assert "' cannot be found by its name" in told


def test_without_an_index_a_store_that_was_put_back_is_to_be_confirmed(
    rolled_back: Callable[[], None], base: Path
) -> None:
    rolled_back()
    shutil.rmtree(base / "state")
    assert "put back from one; 'store new-identity'" in error_of("map", "one", "b")


def test_a_store_is_not_suspected_for_having_been_moved_or_compacted(
    rolled_back: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree("old")
    dirtmap("store", "compact", "default.dmap")
    os.rename("default.dmap", "elsewhere.dmap")
    monkeypatch.setenv("DIRTMAP_STORE", "elsewhere.dmap")
    os.rename("other.dmap", "another.dmap")
    dirtmap("index", "scan", ".")
    for target in ("one", "two", "far", "d0"):
        assert mapped(target, "b") == [(MIB, 65536)], target


def test_a_copy_of_a_store_is_a_twin_and_hides_nothing(rolled_back: Callable[[], None], base: Path) -> None:
    for lost in (False, True):
        if lost:
            shutil.rmtree(forget(base).parent)
        for _ in range(2):
            done = json_of("index", "scan", ".")
            assert {(Path(t["filename"]).parent.name, Path(t["original"]).name) for t in done["twins"]} == {
                ("old", "default.dmap"),
                ("old", "other.dmap"),
            }
            for target in ("one", "two", "far", "d0"):
                assert mapped(target, "b") == [(MIB, 65536)], target
    assert "'store new-identity' gives it" in dirtmap("index", "scan", ".").error
    # Which of two is meant where the original is gone, nobody knows.
    os.rename("other.dmap", "another.dmap")
    done = json_of("index", "scan", ".")
    assert len(done["twins"]) == 3
    assert "neither a file nor a node" in error_of("list", "far")
    os.remove("old/other.dmap")
    dirtmap("index", "scan", ".")
    assert mapped("far", "b") == [(MIB, 65536)]
