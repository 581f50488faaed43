"""`dirtmap transaction`: a QMP document, all or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.cli import dirtmap, error_of, listed, mapped

import dirtmap.engine as dm
from dirtmap.tools.qmp import Action, Source, parse_transaction

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``disk.qcow2`` in the current folder: bitmap ``a`` with 64 KiB dirty, ``b`` with another."""
    monkeypatch.chdir(tmp_path)
    return make("disk.qcow2", 4 * MIB)


def make(name: str, size: int) -> Path:
    path = Path(name)
    qemu.create(path, size)
    for number, bitmap in enumerate("ab"):
        dirtmap("add", path, bitmap)
        dirtmap("mark", path, bitmap, number * MIB, 1)
    return path


def action(verb: str, node: str = "disk.qcow2", **data: Any) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, **data}}


def document(*actions: Any) -> str:
    return json.dumps({"actions": actions})


def refused(*actions: Any, text: str | None = None) -> str:
    """The error; no file has changed."""
    before = {path: path.read_bytes() for path in Path.cwd().iterdir()}
    error = error_of("transaction", "-", given=text or document(*actions))
    assert {path: path.read_bytes() for path in Path.cwd().iterdir()} == before
    return error


def test_everything_at_once(image: Path) -> None:
    actions = [
        action("add", name="week", granularity=128 * KIB, disabled=True, persistent=True),
        action("merge", target="week", bitmaps=["a", {"node": str(image.absolute()), "name": "b"}]),
        action("clear", name="a"),
        action("disable", name="a"),
        action("remove", name="b"),
        action("add", name="b"),
        action("enable", name="week"),
    ]
    Path("actions.json").write_text(document(*actions))
    dirtmap("transaction", "actions.json")
    assert qemu.bitmaps(image) == {
        "a": (64 * KIB, set()),
        "week": (128 * KIB, {"auto"}),
        "b": (64 * KIB, {"auto"}),
    }
    assert mapped(image, "week") == qemu.dirty(image, "week") == [(0, 128 * KIB), (MIB, 128 * KIB)]
    assert mapped(image, "a") == mapped(image, "b") == []
    qemu.check(image)


def test_as_qemu_does_it(image: Path) -> None:
    actions = [
        action("add", name="sum", disabled=True, granularity=4 * KIB),
        action("merge", target="sum", bitmaps=["a", "b"]),
        action("clear", name="b"),
        action("disable", name="a"),
    ]
    twin = Path("twin.qcow2")
    twin.write_bytes(image.read_bytes())
    dirtmap("transaction", "-", given=document(*actions))
    for item in actions:
        item["data"] |= {"node": "disk"} | ({"persistent": True} if "granularity" in item["data"] else {})
    with qemu.StorageDaemon(twin) as daemon:
        daemon.qmp("transaction", actions=actions)
        daemon.quit()
    assert qemu.bitmaps(image) == qemu.bitmaps(twin)
    assert [qemu.dirty(image, name) for name in listed(image)] == [qemu.dirty(twin, name) for name in listed(image)]


def test_sources_of_a_merge_may_be_elsewhere(image: Path) -> None:
    make("other.qcow2", 4 * MIB)
    dirtmap("mark", "other.qcow2", "a", "2M", "1")
    elsewhere = [{"node": "other.qcow2", "name": name} for name in "ab"]
    dirtmap("transaction", "-", given=document(action("merge", target="a", bitmaps=elsewhere)))
    assert mapped(image, "a") == [(offset * MIB, 64 * KIB) for offset in range(3)]


def test_one_image_under_several_names(image: Path) -> None:
    Path("link").symlink_to(image)
    Path("twin").hardlink_to(image)
    nodes = ["disk.qcow2", "link", "./twin", f"file:{image.absolute()}"]
    dirtmap("transaction", "-", given=document(*(action("add", node, name=node) for node in nodes)))
    assert list(listed(image)) == ["a", "b", *nodes]


def test_nothing_to_do(image: Path) -> None:
    dirtmap("transaction", "-", given='{"actions": []}')
    dirtmap("transaction", "-", given='{"actions": [], "properties": {"completion-mode": "individual"}}')
    before = image.read_bytes()
    dirtmap("transaction", "-", given=document(action("enable", name="a"), action("enable", name="b")))
    assert image.read_bytes() == before


def test_all_or_nothing(image: Path) -> None:
    good = action("remove", name="a")
    assert refused(good, action("remove", name="a")) == (
        "standard input: actions[1]: disk.qcow2: bitmap 'a': there is no such bitmap"
    )
    assert "actions[1]: disk.qcow2: bitmap 'b': the name is taken" in refused(good, action("add", name="b"))
    assert "granularity 3 is not" in refused(good, action("add", name="n", granularity=3))
    assert "granularity -1 is not" in refused(good, action("add", name="n", granularity=-1))
    assert f"granularity {2**70} is not" in refused(good, action("add", name="n", granularity=2**70))
    assert "bitmap 'n': there is no such bitmap" in refused(good, action("merge", target="b", bitmaps=["n"]))
    assert "name contains a NUL byte" in refused(good, action("add", name="a\0b"))
    assert "the name cannot be encoded" in refused(good, action("add", name="\ud800"))


def test_two_images_are_refused(image: Path) -> None:
    make("other.qcow2", 4 * MIB)
    assert refused(action("remove", name="a"), action("remove", "other.qcow2", name="a")) == (
        "standard input: actions[1].data.node: 'other.qcow2' is in another container than 'disk.qcow2'; "
        "a transaction changes one"
    )
    assert "no.qcow2: " in refused(action("remove", name="a"), action("remove", "no.qcow2", name="a"))
    small = make("small.qcow2", MIB * 2)
    source = {"node": str(small), "name": "a"}
    assert "a disk of 2097152 bytes" in refused(action("merge", target="a", bitmaps=[source]))


def test_inconsistent_bitmaps(image: Path) -> None:
    with qemu.StorageDaemon(image):
        pass
    for item in (action("clear", name="a"), action("enable", name="a"), action("merge", target="a", bitmaps=["b"])):
        assert "inconsistent" in refused(item)
    dirtmap("transaction", "-", given=document(action("remove", name="a"), action("add", name="a")))
    assert not listed(image)["a"]["inconsistent"]


GOOD = action("add", name="n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON: "),
        ("{", "not valid JSON: "),
        (b'{"actions": "\xff"}', "not valid JSON: "),
        ("[" * 100_000, "not valid JSON: "),
        ('{"actions": [], "actions": []}', "not valid JSON: a key appears twice in one object"),
        ("[]", "not an object"),
        ("{}", "'actions' is missing"),
        ({"actions": {}}, "actions: not an array"),
        ({"execute": "transaction", "arguments": {"actions": []}}, "'actions' is missing"),
        ({"actions": [], "id": 5}, "id: not known"),
        ({"actions": [], "properties": 5}, "properties: not an object"),
        ({"actions": [], "properties": {"completion-mode": "grouped"}}, "properties.completion-mode: 'grouped' is not"),
        ({"actions": [], "properties": {"mode": "grouped"}}, "properties.mode: not known"),
        ([5], "actions[0]: not an object"),
        ([{"type": "block-dirty-bitmap-add"}], "actions[0]: 'data' is missing"),
        ([GOOD, {"type": "abort", "data": {}}], "actions[1].type: 'abort' is not known; known are block-dirty-bitmap-"),
        ([{"type": 5, "data": {}}], "actions[0].type: not a string"),
        ([{**GOOD, "more": 1}], "actions[0].more: not known"),
        ([{**GOOD, "data": []}], "actions[0].data: not an object"),
        ([action("add")], "actions[0].data: 'name' is missing"),
        ([action("add", name=5)], "actions[0].data.name: not a string"),
        ([action("add", name="n", granularity="64K")], "actions[0].data.granularity: not an integer"),
        ([action("add", name="n", granularity=True)], "actions[0].data.granularity: not an integer"),
        ([action("add", name="n", granularity=65536.0)], "actions[0].data.granularity: not an integer"),
        ([action("add", name="n", disabled=1)], "actions[0].data.disabled: not true or false"),
        ([action("add", name="n", persistent=False)], "actions[0].data.persistent: false: "),
        ([action("add", name="n", autoload=True)], "actions[0].data.autoload: not known"),
        ([action("remove", name="n", persistent=True)], "actions[0].data.persistent: not known"),
        ([action("merge", target="n")], "actions[0].data: 'bitmaps' is missing"),
        ([action("merge", name="n", bitmaps=[])], "actions[0].data: 'target' is missing"),
        ([action("merge", target="n", bitmaps=[5])], "actions[0].data.bitmaps[0]: not an object"),
        ([action("merge", target="n", bitmaps=["m", {"node": "x"}])], "actions[0].data.bitmaps[1]: 'name' is missing"),
        ([action("add", "a\0b", name="n")], "actions[0].data.node: not a path"),
        ([action("add", "\ud800", name="n")], "actions[0].data.node: not a path"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(text: Any, message: str) -> None:
    if isinstance(text, list):
        text = {"actions": text}
    data = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
    with pytest.raises(dm.FormatError) as caught:
        parse_transaction(data, "F")
    assert str(caught.value).startswith(f"F: {message}")


def test_what_is_right() -> None:
    actions = [
        action("add", name="n"),
        action("merge", target="n", bitmaps=["a", {"node": "x", "name": "b"}]),
    ]
    assert parse_transaction(document(*actions).encode(), "F") == [
        Action("F: actions[0]", "add", "disk.qcow2", "n"),
        Action("F: actions[1]", "merge", "disk.qcow2", "n", sources=(Source(None, "a"), Source("x", "b"))),
    ]
