"""A name that is accepted works wherever a node or device is named; any other is refused when it is to be given."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import qemu
from support.cli import dirtmap, error_of, json_of

import dirtmap.engine as dm

MIB = 1 << 20

REFUSED = [
    ("", "the name is empty"),
    ("file:x", "a name cannot begin with 'file:', which says what kind of target follows"),
    ("node:x", "a name cannot begin with 'node:', which says what kind of target follows"),
    ("device:", "a name cannot begin with 'device:', which says what kind of target follows"),
    ("container:x", "names that begin with 'container:' are reserved"),
    ("-x", "a name cannot begin with '-', as options do"),
    ("-", "a name cannot begin with '-', as options do"),
    ("a\nb", "a name cannot have control characters"),
    ("\x1b[31m", "a name cannot have control characters"),
    ("a\0", "a name cannot have control characters"),
    ("\x7f", "a name cannot have control characters"),
    ("n" * 1024, "the name of 1024 bytes is longer than 1023"),
    ("\xe9" * 512, "the name of 1024 bytes is longer than 1023"),
]
ACCEPTED = [
    "a/b",
    "a.b",
    ".",
    "..",
    "/",
    "/etc/passwd",
    " ",
    "a b",
    "~",
    "*",
    "n" * 1023,
    "\xe9" * 511,
    "\udcff",
    "Node:x",
]
ACCEPTED += ["nodes:x", "x:y", "dirtmap", "raw0", "disk.qcow2", "\\xff", "\u202e", "x-", "file", "'", '"']


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A folder to work in, with a host of its own, two raw disks and a qcow2 image."""
    with tempfile.TemporaryDirectory(prefix="dirtmap-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DIRTMAP_INDEX", f"{folder}/state/index")
        patch.delenv("DIRTMAP_STORE", raising=False)
        for name in ("raw0", "raw1"):
            Path(name).write_bytes(bytes(MIB))
        qemu.qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "1M")
        yield Path(folder)


@pytest.mark.parametrize(("name", "why"), REFUSED)
def test_what_would_not_be_found_is_refused(name: str, why: str) -> None:
    shown = name if len(name) < 64 else name[:64] + "..."
    with place(), dm.Host() as host:
        host.add_node("taken", "raw0")
        for kind, act in (
            ("node", lambda: host.add_node(name, "raw1")),
            ("node", lambda: host.add_qcow2(name, "disk.qcow2")),
            ("node", lambda: host.rename_node("taken", name)),
            ("device", lambda: host.add_device(name, "taken")),
        ):
            with pytest.raises(dm.BitmapError) as caught:
                act()
            assert (caught.value.where, caught.value.what) == (f"{kind} '{shown}'", why)
        assert [node.name for node in host.nodes([])] == ["taken"]
        assert host.devices([]) == []
        if "\0" not in name and not name.startswith("-"):
            assert error_of("node", "add", name, "raw1").endswith(why)


def works(name: str) -> None:
    """Gives a node of each kind and a device that name, in turn, and uses it in every way."""
    with place():
        text = os.fsencode(name).decode("utf-8", "surrogateescape")
        for path in ("raw0", "disk.qcow2"):
            dirtmap("node", "add", name, path)
            assert text in [node.name for node in dm.Host().nodes([])]
            target = name if not os.path.lexists(name) else f"node:{name}"
            use(target)
            use(f"node:{name}")
            dirtmap("device", "add", "on it", "--root", name)
            dirtmap("device", "remove", "on it")
            dirtmap("node", "rename", name, "other")
            dirtmap("node", "rename", "other", name)
            dirtmap("node", "remove", name)
        dirtmap("node", "add", "root", "raw1")
        dirtmap("device", "add", name, "--root", "root")
        use(name if not os.path.lexists(name) else f"device:{name}")
        dirtmap("device", "remove", name)


def use(target: str) -> None:
    dirtmap("add", target, "b")
    dirtmap("mark", target, "b", 0, 1)
    assert json_of("map", target, "b")[0]["length"] == 65536
    (shown,) = json_of("list", target)
    assert [bitmap["name"] for bitmap in shown["bitmaps"]] == ["b"]
    dirtmap("remove", target, "b")


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_works(name: str) -> None:
    works(name)


PIECES = st.sampled_from(
    ["file:", "node:", "device:", "container:", "-", ".", "/", "..", "raw0", "disk.qcow2", "\n", " "]
)
NAMES = st.lists(PIECES | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=3), max_size=4)


@given(NAMES.map("".join))
@settings(max_examples=15, deadline=None)
def test_any_name_works_or_is_refused(name: str) -> None:
    with place():
        try:
            with dm.Host() as host:
                host.add_node(name, "raw0")
        except dm.BitmapError:
            if not name.startswith("-"):  # the command takes it for an option
                dirtmap("node", "add", name, "raw0", status=1)
            return
    works(name)


# Names and paths that are not UTF-8, given back as JSON and messages show them.

ODD = os.fsdecode(b"odd-\xff")
SHOWN = "odd-\\xff"


def test_names_and_paths_work_as_json_shows_them() -> None:
    with place() as folder:
        Path(f"{ODD}.raw").write_bytes(bytes(MIB))
        os.rename("disk.qcow2", f"{ODD}.qcow2")
        dirtmap("node", "add", ODD, f"{SHOWN}.raw")
        dirtmap("node", "add", "qcow2", f"{SHOWN}.qcow2")
        dirtmap("device", "add", f"dev-{ODD}", "--root", SHOWN)
        (first, *_) = [node for node in json_of("node", "list") if node["name"] != "qcow2"]
        assert (first["name"], first["filename"]) == (SHOWN, f"{folder}/{SHOWN}.raw")
        (device,) = json_of("device", "list")
        for target in (SHOWN, f"node:{SHOWN}", device["name"], f"device:{device['name']}"):
            use(target)
        for target in (f"{SHOWN}.qcow2", f"file:{SHOWN}.qcow2", f"{folder}/{SHOWN}.qcow2"):
            use(target)
            with dm.open(target) as image:
                assert image.name == "qcow2"
        dirtmap("device", "set-root", device["name"], SHOWN)
        dirtmap("device", "remove", device["name"])
        dirtmap("node", "confirm", SHOWN)
        os.truncate(f"{ODD}.raw", 2 * MIB)
        dirtmap("node", "resize", SHOWN)
        os.rename(f"{ODD}.raw", f"moved-{ODD}.raw")
        dirtmap("node", "relocate", "--confirm", SHOWN, f"moved-{SHOWN}.raw")
        dirtmap("sidecar", f"moved-{SHOWN}.raw", "sidecar.qcow2")
        dirtmap("node", "rename", SHOWN, "even")
        dirtmap("node", "rename", "even", ODD)
        dirtmap("node", "remove", SHOWN)
        assert f"node '{SHOWN}'" in error_of("node", "remove", SHOWN)


def test_stores_and_folders_work_as_json_shows_them() -> None:
    with place():
        os.mkdir(ODD)
        dirtmap("store", "create", f"{ODD}.dmap")
        dirtmap("node", "add", "n", "raw0", "--store", f"{SHOWN}.dmap")
        assert not os.path.lexists(f"{SHOWN}.dmap")
        os.rename("disk.qcow2", f"{ODD}/disk.qcow2")
        assert json_of("index", "scan", SHOWN)["images"] == 1
        dirtmap("store", "compact", f"{SHOWN}.dmap")
        assert [node.name for node in dm.Host(f"{SHOWN}.dmap").nodes([])] == ["n"]


def test_a_transaction_takes_names_as_json_shows_them() -> None:
    with place():
        dirtmap("node", "add", ODD, "raw0")
        os.rename("disk.qcow2", f"{ODD}.qcow2")
        for target in (ODD, f"{ODD}.qcow2"):
            dirtmap("add", target, ODD)
        dirtmap("mark", f"{ODD}.qcow2", SHOWN, 0, 1)
        act = "block-dirty-bitmap-"
        sources = [{"node": f"{SHOWN}.qcow2", "name": SHOWN}]
        actions = [
            {"type": act + "clear", "data": {"node": SHOWN, "name": SHOWN}},
            {"type": act + "merge", "data": {"node": SHOWN, "target": SHOWN, "bitmaps": sources}},
            {"type": act + "add", "data": {"node": SHOWN, "name": "copy"}},
            {"type": act + "merge", "data": {"node": SHOWN, "target": "copy", "bitmaps": [SHOWN]}},
            {"type": act + "disable", "data": {"node": SHOWN, "name": SHOWN}},
        ]
        Path("actions.json").write_text(json.dumps({"actions": actions}))
        dirtmap("transaction", "actions.json")
        assert json_of("map", SHOWN, "copy")[0]["length"] == 65536
        with dm.transaction([SHOWN]) as transactions:
            assert list(transactions[SHOWN]) == [ODD, "copy"]
            del transactions[SHOWN][ODD]


def test_what_has_this_very_text_wins() -> None:
    with place():
        dirtmap("node", "add", ODD, "raw0")
        dirtmap("node", "add", SHOWN, "raw1")  # a new name is taken as it is
        with dm.Host() as host:
            assert host.locate(SHOWN).node == SHOWN
            assert host.locate(ODD).node == ODD
            dirtmap("node", "remove", SHOWN)
            assert host.locate(SHOWN).node == ODD
            Path(f"{ODD}.raw").write_bytes(b"byte")
            Path(f"{SHOWN}.raw").write_bytes(b"text")
            assert host.locate(f"{SHOWN}.raw").path == f"{SHOWN}.raw"
            assert host.locate(f"file:{SHOWN}.new").path == f"{SHOWN}.new"
            for other in ("odd-\\xfe", "odd-\\xc3\\xa9"):  # the last is UTF-8, and not shown so
                with pytest.raises(dm.BitmapNotFoundError, match="neither a file nor a node"):
                    host.locate(other)
            with pytest.raises(dm.BitmapError):
                host.locate("odd-\\xff\ud800")  # no bytes at all
