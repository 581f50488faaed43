"""What software of another age has put into a store: refused where it must not be ignored, kept where it may be."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.file import Store
from dirtmap.fmt import store
from dirtmap.fmt.live import NO_SESSION, build_session, parse_session
from dirtmap.fmt.parsers.store import HEADER

MIB = 1 << 20
CRITICAL = store.CRITICAL | 0x4E455721
OTHER = 0x4E455721
STORE = "default.dmap"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A default store with two nodes, each with a bitmap."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIRTMAP_STORE", raising=False)
    for node in ("new", "old"):
        Path(f"{node}.raw").write_bytes(bytes(MIB))
        dirtmap("node", "add", node, f"{node}.raw")
        dirtmap("add", node, "b")
    return tmp_path


def give(kind: int, data: bytes) -> None:
    """Gives a node an extension of its record."""
    with Store(STORE) as target, target.change() as change:
        record = change.table.get(b"new")
        assert record is not None
        change.table.put(record.with_extensions([], [(kind, data)]))


def a_session(version: int, tail: bytes = b"") -> bytes:
    paths = replace(NO_SESSION, uuid=bytes(range(16)), live=b"/nowhere/live", log_path=b"/nowhere/log")
    data = bytearray(build_session(paths))
    data[:4] = version.to_bytes(4, "big")
    return bytes(data) + tail


UNKNOWN = pytest.mark.parametrize(
    ("kind", "data", "what"),
    [
        (CRITICAL, b"", f"extension {CRITICAL:#010x} is unknown"),
        (store.EXTENSION_SESSION, a_session(2), "the session's version 2 is unknown"),
        (store.EXTENSION_SESSION, a_session(0, b"longer"), "the session's version 0 is unknown"),
    ],
)


@UNKNOWN
@pytest.mark.parametrize("index", [True, False])
def test_namespace_with_what_must_not_be_ignored_is_refused_by_name(
    kind: int, data: bytes, what: str, index: bool
) -> None:
    give(kind, data)
    if not index:
        shutil.rmtree("index")
    before = Path(STORE).read_bytes()
    Path("third.raw").write_bytes(bytes(MIB))
    for command in (
        ("list", "new"),
        ("map", "new", "b"),
        ("add", "new", "c"),
        ("clear", "new", "b"),
        ("recover", "new"),
        ("node", "rename", "--with-bitmaps", "new", "other"),
        ("node", "relocate", "new", "third.raw"),
        ("node", "confirm", "new"),
        ("node", "resize", "new"),
        ("node", "remove", "new"),
        ("store", "compact", STORE),
        ("check", "-r", "all", STORE),
    ):
        done = dirtmap(*command, status=1)
        assert f"node 'new': {what}" in done.out + done.error, command
        assert Path(STORE).read_bytes() == before
    with dm.Host() as host, pytest.raises(dm.UnsupportedError, match=what), host.open("new") as image:
        image.track()


@UNKNOWN
def test_the_others_go_on_and_are_listed(kind: int, data: bytes, what: str) -> None:
    give(kind, data)
    dirtmap("add", "old", "c")
    (listed,) = json_of("list", STORE, status=1)
    assert [(bitmap["node"], bitmap["name"]) for bitmap in listed["bitmaps"]] == [("old", "b"), ("old", "c")]
    (said,) = listed["errors"]
    assert f"node 'new': {what}" in said
    assert what in dirtmap("list", status=1).error
    report = dm.check(STORE)
    assert (report.corruptions, report.check_errors) == (0, 1)
    assert any(finding.where == "node 'new'" and what in finding.what for finding in report.findings)
    assert any(what in fault["what"] for fault in dm.dump(STORE)["faults"])
    with Store(STORE) as target:
        record = target.read(lambda snapshot: snapshot.table().get(b"new"))
        assert record is not None
        assert record.extensions == ((kind, data),)


def test_another_extension_of_a_record_is_kept() -> None:
    give(OTHER, b"kept")
    dirtmap("add", "new", "c")
    dirtmap("node", "rename", "--with-bitmaps", "new", "other")
    dirtmap("store", "compact", STORE)
    with Store(STORE) as target:
        record = target.record(b"other")
        assert record is not None
        assert record.extension(OTHER) == b"kept"


def test_what_a_later_version_has_put_behind_a_session_is_ignored() -> None:
    assert parse_session(a_session(1, b"more")) == parse_session(a_session(1))


def test_a_store_counts_its_sessions() -> None:
    def said() -> tuple[int, int]:
        raw = Path(STORE).read_bytes()
        chosen = headers.choose(STORE, raw[: store.RESERVED])
        return chosen.header.sessions, HEADER.parse(chosen.block).incompatible_features

    assert said() == (0, 0)
    with dm.Host() as host, host.open("new") as image, host.open("old") as another:
        with image.track():
            assert said() == (1, 1)
            with another.track():
                assert said() == (2, 1)
            assert said() == (1, 1)
        assert said() == (0, 0)


def test_wrong_number_of_sessions_is_found_and_mended() -> None:
    raw = bytearray(Path(STORE).read_bytes())
    chosen = headers.choose(STORE, bytes(raw[: store.RESERVED]))
    for number, block in headers.pair(replace(chosen.header, sessions=3), chosen.slot, followed=False):
        raw[number * store.BLOCK :][: store.BLOCK] = block
        raw[number * store.BLOCK : (number + 1) * store.BLOCK] = block
    Path(STORE).write_bytes(raw)
    report = dm.check(STORE)
    assert [finding.where for finding in report.findings if finding.severity == "corruption"] == ["header.sessions"]
    assert dm.check(STORE, repair="all").corruptions == 0
    assert not dm.check(STORE).findings


@pytest.mark.parametrize("bits", [1, 1 << 63])
def test_store_with_an_unknown_read_only_compatible_bit_is_read_and_not_written(bits: int) -> None:
    dirtmap("mark", "new", "b", 0, 1)
    raw = bytearray(Path(STORE).read_bytes())
    chosen = headers.choose(STORE, bytes(raw[: store.RESERVED]))
    new = replace(chosen.header, read_only_compatible=bits)
    for number, block in headers.pair(new, chosen.slot, followed=False):
        raw[number * store.BLOCK : (number + 1) * store.BLOCK] = block
    Path(STORE).write_bytes(raw)
    assert [extent["offset"] for extent in json_of("map", "--dirty", "new", "b")] == [0]
    assert not dm.check(STORE).findings
    for command in (
        ("add", "new", "c"),
        ("node", "remove", "old"),
        ("store", "compact", STORE),
        ("store", "new-identity", STORE),
    ):
        assert f"{bits:#x} is unknown" in error_of(*command)
        assert Path(STORE).read_bytes() == raw


@pytest.mark.parametrize("copies", [(0, 1, 2, 3), (2,)])
def test_a_store_of_the_earlier_layout_is_refused_by_name_and_never_repaired(copies: tuple[int, ...]) -> None:
    raw = bytearray(4 * store.BLOCK + 20_000)
    for number in copies:
        raw[number * store.BLOCK : number * store.BLOCK + 8] = b"DMS\xfb" + (1).to_bytes(4, "big")
    Path("earlier").write_bytes(raw)
    for command in (
        ("list", "earlier"),
        ("check", "earlier"),
        ("check", "-r", "all", "earlier"),
        ("store", "compact", "earlier"),
        ("store", "new-identity", "earlier"),
        ("list", "--store", "earlier"),
    ):
        assert "a store of an earlier layout" in error_of(*command), command
    assert "earlier: a store, and not the image of a disk" in error_of("node", "add", "disk", "earlier")
    assert "a store of an earlier layout" in dm.dump("earlier")["stopped"]
    assert Path("earlier").read_bytes() == raw


def test_the_writer_is_shown() -> None:
    fields = [field for structure in dm.dump(STORE)["structures"] for field in structure.get("fields", [])]
    assert {field["value"] for field in fields if field["name"] == "writer"} == {f"dirtmap {dm.__version__}"}
