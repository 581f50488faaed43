"""Names across a host: every command by name, what would break an address refused, addresses that outlive changes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.cli import COMMAND, dirtmap, error_of, json_of
from support.hosts import ALL, KIB, MIB, SIZE, everything, fill_device, make_host, mapped, names, refused, untouched

import dirtmap.engine as dm
from dirtmap.engine.host.registry import RESERVED

NODES = ["one", "two", "other", "q0", "q1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_host(tmp_path, monkeypatch)
    return tmp_path


# Every command that takes a TARGET.


def test_every_command_by_name() -> None:
    for number, target in enumerate(["one", "other", "q0", "d0", "node:two", "node:q1"]):
        dirtmap("add", target, "a", "-g", "64K", "--disabled")
        dirtmap("enable", target, "a")
        dirtmap("mark", target, "a", number * MIB, 1)
        assert mapped(target, "a") == [(number * MIB, 64 * KIB)]
        dirtmap("copy", target, "a", target, "--as", "b")
        dirtmap("clear", target, "a")
        dirtmap("mark", target, "a", "7M", "1")
        dirtmap("merge", target, "b", "a")
        assert mapped(target, "b") == [(number * MIB, 64 * KIB), (7 * MIB, 64 * KIB)]
        dirtmap("disable", target, "b")
        dirtmap("rename", target, "b", "c")
        dirtmap("move", target, "c", target, "--as", "d")
        dirtmap("remove", target, "a")
        ((bitmap,),) = (image["bitmaps"] for image in json_of("list", target))
        kind = "device" if target == "d0" else "node"
        assert bitmap["name"] == "d"
        assert not bitmap["recording"]
        assert bitmap[kind] == target.removeprefix("node:")
        assert "node" not in bitmap or "device" not in bitmap
        assert dirtmap("recover", target).out == ""
        assert json_of("recover", target)["recovered"] == []
        assert json_of("check", target)["corruptions"] == 0
        assert json_of("dump", target)
        document = {"actions": [{"type": "block-dirty-bitmap-clear", "data": {"node": target, "name": "d"}}]}
        dirtmap("transaction", "-", given=json.dumps(document))
        assert mapped(target, "d") == []
        assert dirtmap("hold", target, "d", "--", "true").out == ""
    assert sorted(hit["node"] or hit["device"] for hit in json_of("find", "d")) == [
        *("d0", "one", "other", "q0", "q1", "two")
    ]
    assert names("plain.qcow2") == []


def test_the_chosen_store_and_index_count_for_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIRTMAP_STORE", "none.dmap")
    monkeypatch.setenv("DIRTMAP_INDEX", str(Path("unused/index").absolute()))
    here = ("--store", "default.dmap", "--index", "chosen")
    for target in ("one", "q0", "d0", "other"):
        dirtmap("add", target, "b", *here)
        dirtmap("mark", target, "b", "1M", "1", *here)
        dirtmap("copy", target, "b", target, "--as", "c", *here)
        dirtmap("merge", target, "c", "b", "-b", target, *here)
        dirtmap("move", target, "c", target, "--as", "e", *here)
        recovered = json_of("recover", target, *here)
        assert recovered.pop("filename") == json_of("list", target, *here)[0]["filename"]
        assert recovered == {"device" if target == "d0" else "node": target, "recovered": []}
        assert [e["length"] for e in json_of("map", "--dirty", target, "b", *here)] == [64 * KIB]
        assert json_of("check", target, *here)["corruptions"] == 0
        document = {"actions": [{"type": "block-dirty-bitmap-clear", "data": {"node": target, "name": "b"}}]}
        dirtmap("transaction", "-", *here, given=json.dumps(document))
        dirtmap("hold", *here, target, "b", "--", "true")
    assert len(json_of("find", "b", *here)) == 4
    assert not Path("unused").exists()
    assert not Path("none.dmap").exists()


def test_files_and_names_that_could_be_either() -> None:
    dirtmap("add", "one", "b")
    shutil.copy("plain.qcow2", "one")
    for command in (["list", "one"], ["map", "one", "b"], ["remove", "one", "b"], ["copy", "q0", "x", "one"]):
        if command[0] == "copy":
            dirtmap("add", "q0", "x")
        assert refused(*command) == "one: both a file and a node of default.dmap: say file:one or node:one"
    assert (names("file:one"), names("node:one"), names("./one")) == ([], ["b"], [])
    # With a dot, what exists as a file is one.
    shutil.copy("two.raw", "third.raw")
    dirtmap("node", "add", "plain.qcow2", "third.raw")
    dirtmap("add", "node:plain.qcow2", "b")
    assert (names("plain.qcow2"), names("file:plain.qcow2"), names("node:plain.qcow2")) == ([], [], ["b"])
    shutil.copy("plain.qcow2", "d0")
    assert "say file:d0 or device:d0" in refused("list", "d0")
    assert names("device:d0") == []
    assert "no node of default.dmap" in refused("list", "node:d0")
    assert "no device of default.dmap" in refused("list", "device:one")
    assert "neither a file nor a node or device" in refused("list", "nothing")


def test_a_device_is_no_alias_of_its_root() -> None:
    dirtmap("add", "d0", "b")
    dirtmap("add", "q0", "b", "-g", "128K")
    dirtmap("mark", "d0", "b", 0, 1)
    assert (mapped("d0", "b"), mapped("q0", "b")) == ([(0, 64 * KIB)], [])
    dirtmap("remove", "q0", "b")
    assert names("d0") == ["b"]
    assert names("q0.qcow2") == []


# What would break an address.


def _busy(target: str, bitmap: str) -> contextlib.AbstractContextManager[Any]:
    return dm.open(target).hold(bitmap, "a backup")


def test_a_name_is_given_once() -> None:
    for name in (*NODES, "d0"):
        for image in ("plain.qcow2", "two.raw"):
            assert "the name is taken" in refused("node", "add", name, image)
        assert "the name is taken" in refused("device", "add", name, "--root", "two")
        if name != "two":
            assert "the name is taken" in refused("node", "rename", "two", name)
    assert "there is no such node; it is a device" in refused("device", "add", "d2", "--root", "d0")
    assert "there is no such node" in refused("device", "add", "d2", "--root", "none")
    assert "are reserved" in refused("node", "add", f"{RESERVED}x", "two.raw")
    assert "rename that, or say --new-identity" in refused("node", "add", "third", "q0.qcow2")


@pytest.mark.parametrize("node", NODES)
def test_a_node_with_bitmaps_stays(node: str) -> None:
    dirtmap("add", node, "b")
    dirtmap("mark", node, "b", MIB, 1)
    assert "--with-bitmaps renames them, too" in refused("node", "rename", node, "new")
    if node != "q0":
        assert "remove or move them first" in refused("node", "remove", node)
    dirtmap("node", "rename", node, "new", "--with-bitmaps")
    assert mapped("new", "b") == [(MIB, 64 * KIB)]
    assert "neither a file nor a node or device" in refused("list", node)


def test_what_a_device_needs_stays() -> None:
    assert "root of device 'd0'; give that another with 'device set-root'" in refused("node", "remove", "q0")
    dirtmap("add", "d0", "b")
    assert "remove or move them first" in refused("device", "remove", "d0")
    assert "there is no such device; it is a node" in refused("device", "remove", "one")
    assert "there is no such node; it is a device" in refused("node", "remove", "d0")
    assert "there is no such node; it is a device" in refused("node", "rename", "d0", "x")
    assert "there is no such device; it is a node" in refused("device", "set-root", "one", "two")
    dirtmap("node", "rename", "q0", "renamed")
    assert json_of("device", "list")[0]["root"] == "renamed"
    assert names("d0") == ["b"]


@pytest.mark.parametrize("source", ["one", "other", "q0", "d0", "plain.qcow2"])
@pytest.mark.parametrize("target", ["two", "q1", "d0", "other"])
def test_moves_that_are_refused(source: str, target: str) -> None:
    if source == target:
        return
    dirtmap("add", source, "b")
    dirtmap("mark", source, "b", MIB, 1)
    dirtmap("add", target, "taken")
    for verb in ("move", "copy"):
        assert "the name is taken" in refused(verb, source, "b", target, "--as", "taken")
        assert "no such bitmap" in refused(verb, source, "none", target)
        Path(f"small-{verb}.raw").write_bytes(bytes(512))
        dirtmap("node", "add", f"small-{verb}", f"small-{verb}.raw")
        assert "made for a disk of" in refused(verb, source, "b", f"small-{verb}")
    assert mapped(source, "b") == [(MIB, 64 * KIB)]
    dirtmap("move", source, "b", target)
    assert mapped(target, "b") == [(MIB, 64 * KIB)]
    assert names(source) == []


def test_inconsistent_bitmaps_are_refused() -> None:
    with qemu.StorageDaemon("q0.qcow2") as daemon:
        daemon.add("b")
        daemon.quit()
    with qemu.StorageDaemon("q0.qcow2") as daemon:
        daemon.io("write 0 64k")
        daemon.kill()
    for verb in ("move", "copy"):
        assert "inconsistent" in refused(verb, "q0", "b", "one")
    assert "inconsistent" in refused("hold", "q0", "b", "--", "true")
    (hit,) = json_of("find", "b")
    assert hit["inconsistent"]


@pytest.mark.parametrize("target", ["one", "other", "q0", "d0"])
def test_a_held_bitmap_stays_as_it_is(target: str) -> None:
    dirtmap("add", target, "b")
    dirtmap("add", target, "c")
    dirtmap("mark", target, "b", MIB, 1)
    with _busy(target, "b"):
        acts: list[list[str | int]] = [
            *(["remove", target, "b"], ["clear", target, "b"], ["rename", target, "b", "x"]),
            *(["move", target, "b", "two"], ["merge", target, "b", "c"], ["mark", target, "b", 0, 1]),
            *(["disable", target, "b"], ["move", target, "b", target, "--as", "x"]),
        ]
        for act in acts:
            assert "busy: held by 'a backup' (process" in refused(*act), act
        if target == "d0":
            for option in ([], ["--content-unchanged"]):
                assert "busy: held by" in refused("device", "set-root", "d0", "q1", *option)
        else:
            assert "busy: held by" in refused("node", "rename", target, "new", "--with-bitmaps")
        assert [b["busy"] for b in json_of("list", target)[0]["bitmaps"]] == [True, False]
        with dm.open(target) as image:
            assert [bitmap.busy for bitmap in image.values()] == [True, False]
        dirtmap("copy", target, "b", "two")
        dirtmap("mark", target, "c", 0, 1)
        dirtmap("merge", target, "c", "b")
    assert [b["busy"] for b in json_of("list", target)[0]["bitmaps"]] == [False, False]
    assert mapped(target, "b") == [(MIB, 64 * KIB)]
    dirtmap("remove", target, "b")


@pytest.mark.parametrize("target", ["one", "q0", "d0"])
def test_a_hold_of_another_process_and_of_a_dead_one(target: str) -> None:
    dirtmap("add", target, "b")
    command = [COMMAND, "hold", "--owner", "nightly", target, "b", "--", "sh", "-c", "echo held; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"held\n"
        assert f"busy: held by 'nightly' (process {holder.pid})" in refused("remove", target, "b")
        holder.kill()
        holder.wait()
        os.killpg(holder.pid, signal.SIGKILL)  # the command that it ran
    dirtmap("remove", target, "b")
    assert names(target) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_hold_that_is_told_to_end_tells_its_command_and_holds_until_that_has_ended(number: signal.Signals) -> None:
    dirtmap("add", "one", "b")
    script = (
        "import signal, sys; signal.sigwait([*map(int, sys.argv[1:])]); print('told', flush=True); sys.stdin.read()"
    )
    ready = f"import signal; signal.pthread_sigmask(0, [{int(number)}]); print('held', flush=True); {script}"
    command = [COMMAND, "hold", "one", "b", "--", sys.executable, "-c", ready, str(int(number))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as holder:
        try:
            assert holder.stdout
            assert holder.stdin
            assert holder.stdout.readline() == b"held\n"
            holder.send_signal(number)
            assert holder.stdout.readline() == b"told\n"
            assert "busy: held by" in refused("remove", "one", "b")
            holder.stdin.close()
            assert holder.wait(30) == 0
        finally:
            if holder.poll() is None:
                os.killpg(holder.pid, signal.SIGKILL)
    dirtmap("remove", "one", "b")


def test_a_command_that_ends_by_what_its_hold_was_told_says_so() -> None:
    dirtmap("add", "one", "b")
    command = [COMMAND, "hold", "one", "b", "--", "sh", "-c", "echo held; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as holder:
        try:
            assert holder.stdout
            assert holder.stdout.readline() == b"held\n"
            holder.terminate()
            assert holder.wait(30) == 128 + signal.SIGTERM
            with pytest.raises(ProcessLookupError):  # the sleep is gone, too
                os.killpg(holder.pid, 0)
        finally:
            if holder.poll() is None:
                os.killpg(holder.pid, signal.SIGKILL)
    dirtmap("remove", "one", "b")


def test_the_hold_command_ends_as_its_command_does() -> None:
    dirtmap("add", "one", "b")
    assert dirtmap("hold", "one", "b", "--", "sh", "-c", "exit 7", status=7)
    assert "no such command" in error_of("hold", "one", "b", "--", "./none")
    assert "no such bitmap" in refused("hold", "one", "none", "--", "true")
    dirtmap("add", "plain.qcow2", "b")
    assert "'node add' gives it one" in refused("hold", "plain.qcow2", "b", "--", "true")


def test_two_images_with_one_uuid() -> None:
    dirtmap("add", "q0", "b")
    shutil.copy("q0.qcow2", "copy.qcow2")
    for act in (
        *(["list"], ["map", "b"], ["remove", "b"], ["clear", "b"], ["recover"], ["add", "c"], ["mark", "b", 0, 1]),
        *(["hold", "b", "--", "true"], ["rename", "b", "x"]),
    ):
        message = refused(act[0], "copy.qcow2", *act[1:])
        assert "a copy of" in message
        assert "'node add --new-identity'" in message
    assert "a copy of" in refused("copy", "copy.qcow2", "b", "one")
    assert "a copy of" in refused("move", "q0", "b", "copy.qcow2", "--as", "x")
    assert "the name is taken" in refused("node", "add", "q0", "copy.qcow2")
    assert "is node 'q0' already" in refused("node", "add", "q9", "copy.qcow2")
    dirtmap("index", "scan", "plain.qcow2")
    with untouched():
        done = json_of("index", "scan", ".")
    assert [Path(twin["filename"]).name for twin in done["twins"]] == ["copy.qcow2"]
    assert [Path(twin["original"]).name for twin in done["twins"]] == ["q0.qcow2"]
    dirtmap("node", "add", "--new-identity", "q9", "copy.qcow2")
    assert json_of("index", "scan", ".")["twins"] == []
    uuids = [node["uuid"] for node in json_of("node", "list")]
    assert len(set(uuids)) == len(uuids) == 6


# Files move, graphs change.


@pytest.mark.parametrize("node", ["q0", "q1"])
def test_an_image_that_was_moved_is_found_again(node: str) -> None:
    dirtmap("add", node, "b")
    dirtmap("mark", node, "b", MIB, 1)
    dirtmap("add", "d0", "b")
    dirtmap("mark", "d0", "b", 2 * MIB, 1)
    os.mkdir("folder")
    for path in ("folder/moved.qcow2", "again.qcow2", f"{node}.qcow2"):
        (old,) = (found["filename"] for found in json_of("node", "list") if found["name"] == node)
        os.rename(old, path)
        message = refused("map", node, "b")
        assert "'index scan' finds one that was moved" in message
        done = json_of("index", "scan", ".")
        assert done["moved"] == [{"filename": str(Path(path).absolute()), "node": node}]
        assert done["gone"] == []
        assert mapped(node, "b") == mapped(path, "b") == [(MIB, 64 * KIB)]
        if node == "q0":  # its root's image has another name, and with it another time of the last change
            assert mapped("d0", "b") == ALL
            dirtmap("device", "set-root", "d0", "q0", "--content-unchanged")
        assert mapped("d0", "b") == [(2 * MIB, 64 * KIB)]
        assert json_of("index", "verify")["faults"] == []


def test_another_file_in_the_old_place_is_not_taken_for_the_image() -> None:
    dirtmap("add", "q0", "b")
    dirtmap("add", "q1", "b")
    os.rename("q0.qcow2", "x")
    os.rename("q1.qcow2", "q0.qcow2")
    os.rename("x", "q1.qcow2")
    for node in ("q0", "q1"):
        assert "is not its image any more" in refused("map", node, "b")
    done = json_of("index", "scan", ".")
    assert len(done["moved"]) == 2
    dirtmap("mark", "q0", "b", 0, 1)
    assert (mapped("q1.qcow2", "b"), mapped("q0.qcow2", "b")) == ([(0, 64 * KIB)], [])
    assert (mapped("q0", "b"), mapped("q1", "b")) == ([(0, 64 * KIB)], [])


def test_a_node_whose_place_another_image_has_taken_is_not_changed() -> None:
    os.rename("q0.qcow2", "x")
    os.rename("q1.qcow2", "q0.qcow2")
    assert "is not its image any more" in refused("node", "rename", "q0", "new", "--with-bitmaps")
    assert "is not its image any more" in refused("device", "add", "d1", "--root", "q0")
    assert "is not its image any more" in refused("device", "set-root", "d0", "q0", "--content-unchanged")
    assert "its image cannot be read" in refused("device", "add", "d1", "--root", "q1")
    dirtmap("device", "remove", "d0")
    images = {name: data for name, data in everything().items() if not name.endswith(".dmap")}
    dirtmap("node", "remove", "q0")  # is forgotten, and comes back by a scan
    assert everything() | images == everything()
    dirtmap("index", "scan", ".")
    assert {Path(n["filename"]).name: n["name"] for n in json_of("node", "list")}.items() >= {
        ("q0.qcow2", "q1"),
        ("x", "q0"),
    }


def test_an_image_put_back_from_a_backup_stays_the_one_meant() -> None:
    dirtmap("add", "q0", "b")
    shutil.copy("q0.qcow2", "backup")
    dirtmap("mark", "q0", "b", MIB, 1)
    shutil.copy("backup", "new")
    os.replace("new", "q0.qcow2")  # another file now, with the same identity
    assert mapped("q0", "b") == []
    for _ in range(2):
        assert "a copy of" in refused("map", "backup", "b")
        done = json_of("index", "scan", ".")
        assert [Path(twin["filename"]).name for twin in done["twins"]] == ["backup"]
        assert done["moved"] == []
        assert json_of("list", "q0")[0]["filename"].endswith("q0.qcow2")


@pytest.mark.parametrize("name", ["aside", "z-aside"])
def test_an_image_moved_aside_and_copied_back(name: str) -> None:
    """The copy is at the old path, and the file that is remembered elsewhere: that is the original."""
    os.rename("q0.qcow2", name)
    shutil.copy(name, "q0.qcow2")
    done = json_of("index", "scan", ".")
    assert [Path(twin["filename"]).name for twin in done["twins"]] == ["q0.qcow2"]
    assert [Path(moved["filename"]).name for moved in done["moved"]] == [name]
    assert "a copy of" in refused("list", "q0.qcow2")
    assert json_of("list", "q0")[0]["filename"].endswith(name)


def test_snapshots_and_other_acts_of_qemu_keep_addresses() -> None:
    dirtmap("add", "q0", "b")
    dirtmap("mark", "q0", "b", MIB, 1)
    expected = [(MIB, 64 * KIB)]
    for act in (
        lambda: qemu.qemu_img("snapshot", "-c", "s", "q0.qcow2"),
        lambda: qemu.qemu_img("snapshot", "-d", "s", "q0.qcow2"),
        lambda: qemu.qemu_img("amend", "-o", "lazy_refcounts=on", "q0.qcow2"),
        lambda: qemu.qemu_img("bitmap", "--add", "q0.qcow2", "mine"),
        lambda: qemu.qemu_img("check", "-q", "q0.qcow2"),
        lambda: qemu.qemu_img("rebase", "-q", "-u", "-b", "", "q0.qcow2"),
    ):
        act()
        assert mapped("q0", "b") == expected
    assert names("q0") == ["b", "mine"]
    assert [hit["node"] for hit in json_of("find", "mine")] == ["q0"]
    # An overlay becomes the root; a commit or a stream brings the old one back.
    dirtmap("device", "remove", "d0")
    dirtmap("device", "add", "d0", "--root", "q0")
    fill_device()
    qemu.qemu_img("create", "-q", "-f", "qcow2", "-b", "q0.qcow2", "-F", "qcow2", "top.qcow2")
    dirtmap("node", "add", "top", "top.qcow2")
    dirtmap("device", "set-root", "d0", "top", "--content-unchanged")
    assert mapped("d0", "b") == expected
    assert names("top") == []
    assert mapped("q0", "b") == expected
    qemu.qemu_img("convert", "-O", "qcow2", "q0.qcow2", "converted.qcow2")
    assert json_of("index", "scan", ".")["twins"] == []
    assert names("converted.qcow2") == []


# Transactions, lists, finds.


def action(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": f"block-dirty-bitmap-{kind}", "data": data}


def document(*actions: dict[str, Any]) -> str:
    return json.dumps({"actions": actions})


def test_a_transaction_over_nodes_and_devices_of_one_store() -> None:
    given = document(
        *(action("add", node=name, name="b", granularity=65536) for name in ("one", "node:two", "device:d0")),
        action("disable", node="two", name="b"),
        action("merge", node="d0", target="b", bitmaps=[{"node": "q0", "name": "s"}, {"node": "one", "name": "b"}]),
    )
    assert "no such bitmap" in refused("transaction", "-", given=given)
    dirtmap("add", "q0", "s")
    dirtmap("mark", "q0", "s", MIB, 1)
    dirtmap("transaction", "-", given=given)
    assert mapped("d0", "b") == [(MIB, 64 * KIB)]
    assert [names(name) for name in ("one", "two", "d0")] == [["b"]] * 3
    assert "the name is taken" in refused("transaction", "-", given=given)


@pytest.mark.parametrize("second", ["other", "q0", "plain.qcow2", "q1"])
def test_a_transaction_that_spans_containers_is_refused(second: str) -> None:
    for first in ("one", "d0"):
        for pair in ((first, second), (second, first)):
            given = document(*(action("add", node=name, name="b") for name in pair))
            message = refused("transaction", "-", given=given)
            assert "another container than" in message
            assert "a transaction changes one" in message


def test_a_list_without_a_target_has_every_bitmap() -> None:
    dirtmap("add", "plain.qcow2", "unnamed")
    dirtmap("index", "scan", ".")
    for target in (*NODES, "d0"):
        dirtmap("add", target, f"of-{target}")
    found = json_of("list")
    assert {Path(image["filename"]).name for image in found} == {
        *("default.dmap", "other.dmap", "q0.qcow2", "q1.qcow2", "plain.qcow2")
    }
    for image in found:
        for bitmap in image["bitmaps"]:
            holder = bitmap.get("node") or bitmap.get("device")
            assert bitmap["name"] == (f"of-{holder}" if holder else "unnamed")
            assert ("device" in bitmap) == (holder == "d0")
    assert sum(len(image["bitmaps"]) for image in found) == 7
    human = dirtmap("list").out
    for text in ("of-one", "of-other", "of-q1", "of-d0", "unnamed", "device d0"):
        assert text in human
    assert dirtmap("list", "-q").out == ""
    os.remove("q1.qcow2")
    done = dirtmap("list", status=1)
    assert "of-one" in done.out
    assert "q1.qcow2" in done.error


def test_a_list_of_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DIRTMAP_STORE")
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "no" / "index"))
    assert json_of("list") == []
    assert "no store yet; 'index scan' and 'node add' make it" in dirtmap("list").error
    assert json_of("find", "b") == []
    assert not Path("no").exists()


def test_find_says_where_each_is() -> None:
    dirtmap("add", "plain.qcow2", "b", "-g", "4K", "--disabled")
    dirtmap("index", "scan", "plain.qcow2")
    for target in ("one", "other", "q0", "d0"):
        dirtmap("add", target, "b", "-g", "64K")
    dirtmap("add", "two", "c")
    found = json_of("find", "b")
    assert all(
        set(hit)
        == {"node", "device", "name", "filename", "format", "namespace", "granularity", "recording"} | {"inconsistent"}
        for hit in found
    )
    uuids = {each["name"]: each["uuid"] for each in json_of("node", "list") + json_of("device", "list")}
    assert {
        (hit["node"], hit["device"], Path(hit["filename"]).name, hit["format"], hit["namespace"]) for hit in found
    } == {
        ("one", None, "default.dmap", "dirtmap", uuids["one"]),
        ("other", None, "other.dmap", "dirtmap", uuids["other"]),
        (None, "d0", "default.dmap", "dirtmap", uuids["d0"]),
        ("q0", None, "q0.qcow2", "qcow2", uuids["q0"]),
        (None, None, "plain.qcow2", "qcow2", None),
    }
    assert [hit["granularity"] for hit in found if not hit["recording"]] == [4096]
    assert "5 bitmaps" in dirtmap("find", "b").out
    assert json_of("find", "none") == []
    with qemu.StorageDaemon("q0.qcow2"):
        assert len(json_of("find", "b", status=1)) == 4
        assert len(json_of("find", "-U", "b")) == 5
        assert len(json_of("find", "b", status=1)) == 4
    assert len(json_of("find", "b")) == 5


def test_find_tells_what_it_cannot_read() -> None:
    dirtmap("add", "one", "b")
    for name in ("gone", "damaged", "held"):
        shutil.copy("plain.qcow2", f"{name}.qcow2")
    dirtmap("index", "scan", ".")
    os.remove("gone.qcow2")
    Path("damaged.qcow2").write_bytes(Path("plain.qcow2").read_bytes()[:60])
    with qemu.StorageDaemon("held.qcow2"):
        for _ in range(2):  # also where nothing has changed since
            done = dirtmap("find", "b", status=1)
            assert "b: 1 bitmap\n" in done.out
            assert sorted(Path(line.split(":")[1]).name for line in done.error.splitlines()) == [
                *("damaged.qcow2", "gone.qcow2", "held.qcow2")
            ]
            assert set(done.error.splitlines()) == set(dirtmap("list", status=1).error.splitlines())
            quiet = dirtmap("find", "b", "-q", status=1)
            assert (quiet.out, quiet.error) == ("", done.error)
        assert "held.qcow2" not in dirtmap("find", "-U", "b", status=1).error


def test_a_list_says_which_node_an_image_is() -> None:
    dirtmap("add", "q0", "b")
    lines = dirtmap("list").out.splitlines()
    assert any("q0.qcow2: qcow2, node q0, 8 MiB" in line for line in lines)
    assert "plain.qcow2: qcow2, 8 MiB" in dirtmap("list", "plain.qcow2").out


def test_odd_names() -> None:
    odd = ["ä", "\udcff\udc80", " ", "n" * 300, "files:x", "..", "q/0"]
    for number, name in enumerate(odd):
        Path(f"odd{number}.raw").write_bytes(bytes(SIZE))
        dirtmap("node", "add", "--", name, f"odd{number}.raw")
        dirtmap("add", "--", f"node:{name}", name)
        dirtmap("mark", "--", f"node:{name}", name, number * 512 * KIB, 1)
    for number, name in enumerate(odd):
        done = dirtmap("map", "--dirty", "--output=json", "--", f"node:{name}", name)
        assert [extent["offset"] for extent in json.loads(done.out)] == [number * 512 * KIB]
        (hit,) = json.loads(dirtmap("find", "--output=json", "--", name).out)
        assert hit["node"] == hit["name"]
    assert json_of("index", "verify")["faults"] == []
