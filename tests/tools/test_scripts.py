"""What docs/behaviour.md promises to scripts: the keys of JSON, as commands print them, and exit statuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.cli import dirtmap, error_of, json_of
from support.documents import BEHAVIOUR, tables

import dirtmap.engine as dm

MIB = 1 << 20
PROMISED = {
    row["command"].strip("`"): keys[1].split(", ")
    for table in tables(BEHAVIOUR)
    if table.columns == ("command", "JSON")
    for row in table.rows
    if (keys := re.search(r"\{([^}]*)\}", row["JSON"]))
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw node with a checkpoint, and a repository with a backup of it."""
    monkeypatch.chdir(tmp_path)
    Path("disk.raw").write_bytes(b"x" * MIB)
    dirtmap("node", "add", "disk", "disk.raw")
    with dm.open("disk") as image, image.track() as tracker:
        for name in ("early", "late"):
            tracker.checkpoint(name)
            tracker.mark(0, 1)
    dirtmap("backup", "create", "disk", "repo")


def keys_of(document: Any) -> set[str]:
    (first, *_) = document if isinstance(document, list) else [document]
    return set(first)


@pytest.mark.parametrize(
    ("promise", "command"),
    [
        ("map", "map disk --since early --until late"),
        ("map --totals", "map --totals disk --since early"),
        ("checkpoint list", "checkpoint list disk"),
        ("plot", "plot disk"),
        ("backup create", "backup create disk repo"),
        ("backup create", "backup create --compress=zstd disk other"),
        ("backup create", "backup list repo"),
        ("backup verify REPO", "backup verify repo --sample=1%"),
        ("backup verify REPO TARGET", "backup verify repo disk"),
        ("track status", "track status disk"),
    ],
)
def test_json_has_the_keys_that_are_promised(promise: str, command: str) -> None:
    assert keys_of(json_of(*command.split())) == set(PROMISED[promise])


def test_json_of_what_follows_from_another_command() -> None:
    info = json_of("backup", "info", "repo", "disk")
    assert set(info) == {*PROMISED["backup create"], *PROMISED["backup info"]}
    assert keys_of(json_of("rebuild", "disk", info["bitmap"], "--against", "repo")) == set(PROMISED["rebuild"])
    dirtmap("backup", "create", "disk", "repo")
    assert keys_of(json_of("backup", "prune", "--keep=1", "repo")) == set(PROMISED["backup create"])


def test_quiet_commands_print_no_json() -> None:
    assert dirtmap("map", "-q", "--output=json", "disk", "early").out == ""
    assert dirtmap("backup", "create", "-q", "--output=json", "disk", "repo").out == ""


def test_a_difference_has_an_exit_status_of_its_own() -> None:
    with open("disk.raw", "r+b") as file:
        file.write(b"y")
    dirtmap("node", "confirm", "disk")  # wrongly
    found = json.loads(dirtmap("backup", "verify", "--output=json", "repo", "disk", status=2).out)
    assert found["differences"] == [{"offset": 0, "length": 65536}]


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("map disk early --since late", "--since goes with no BITMAP"),
        ("map disk early --until late", "--until goes with --since only"),
        ("backup create disk repo --source snapshot", "is not tracked"),
        ("backup create disk repo --source disk=a --source disk=b", "Two --source for disk"),
        ("backup create disk repo --snapshot true", "--source has to say what the command makes"),
        ("checkpoint add disk noon", "not tracked"),
        ("serve --adopt disk", "no nbdkit that can be seen here serves it"),
        ("export --reflink --source snapshot --run true disk", "neither --source nor --live goes with it"),
    ],
)
def test_what_an_option_does_not_take_is_an_error(command: str, what: str) -> None:
    assert what in error_of(*command.split())
