"""Endless and huge documents: an error that names the file and the limit, soon, in bounded memory, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import qemu
from support.cli import COMMAND, dirtmap

MIB = 1 << 20
SIZE = 4 * MIB

# A child's maximum counts what its parent had in memory before the child's exec: so the parent is a small process.
MEASURE = """
import json, os, sys
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, used = os.wait4(pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_maxrss, used.ru_utime + used.ru_stime]))
"""

FEED = """
import os
head, again = os.fsencode(os.environ["HEAD"]), os.fsencode(os.environ["AGAIN"])
try:
    os.write(1, head)
    while again:
        os.write(1, again * (65536 // len(again)))
except BrokenPipeError:
    pass
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, SIZE)
    dirtmap("add", path, "b")
    return path


def measured(image: Path, *arguments: str | Path, given: tuple[str, str] | None = None) -> str:
    """What the command complains about; it has to be soon, small, and to have changed nothing."""
    before = image.read_bytes()
    environment = os.environ | {"HEAD": given[0], "AGAIN": given[1]} if given else os.environ
    feed = [sys.executable, "-S", "-c", FEED]
    feeder = subprocess.Popen(feed, stdout=subprocess.PIPE, env=environment) if given else None
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, COMMAND, *map(str, arguments)],
        stdin=feeder.stdout if feeder else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    if feeder and feeder.stdout:
        feeder.stdout.close()
        feeder.wait(60)
    status, kibibytes, seconds = json.loads(done.stdout)
    assert status == 1
    assert kibibytes < 256 << 10, done.stderr
    assert seconds < 2, done.stderr
    assert image.read_bytes() == before
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("dirtmap: ").rstrip("\n")


ROW = '{"offset": 0, "length": 512, "type": 1, "description": "dirty"}, '
MAP = '{"start": 0, "length": 512, "depth": 0, "present": true, "zero": false, "data": true}, '
PAGE = '{"startOffset": 0, "length": 4194304, "changedArea": ['
CSI = '[{"volume_capacity_bytes": 4194304, "block_metadata_type": 2, "block_metadata": ['


@pytest.mark.parametrize(
    ("head", "again", "message"),
    [
        ("", "y\n", "line 1: 1 word"),
        ("", "y", "perhaps base64"),
        ("", "0 ", "line 1: longer than 4096 bytes"),
        ("", "0 1\n", "line 65537: more than 65536 of them, the most that is read for a disk of 4194304 bytes"),
        ("", "1K 1K\n", "line 65537: more than 65536"),
        ("0 1\n", "\n", "line 65537: more than 65536"),
        ("0 1\n", " ", "line 2: longer than 4096 bytes"),
        ("", "\n", "begins with more than 4096 blanks"),
        ("", " ", "begins with more than 4096 blanks"),
        ("", "[", "entry 1: not clearly"),
        ("[]", " ", "not valid JSON: more than 65536 blanks"),
        ("[", ROW, "entry 2: begins at 0, before the end"),
        ("[", MAP, "entry 2: begins at 0, not at 512"),
        ("[" + MAP, " ", "not valid JSON: more than 65536 blanks"),
        ('[{"exists": "', "a", "not valid JSON: Unterminated string"),
        ('[{"exists": ', "1", "not valid JSON: "),
        ('[{"exists": ', "[", "not valid JSON: "),
        ('[{"exists": ', '{"exists": ', "not valid JSON: "),
        ('[{"zero": "},', '"},', "entry 1: 'start' is not a number of bytes"),
        (PAGE, '{"start": 0, "length": 1},', "entry 65537: more than 65536"),
        (PAGE, '{"start": 0, "length": 1} ,', "entry 65537: more than 65536"),
        (PAGE + "], ", '"length": 4194304, ', "page 1: a key appears twice"),
        (CSI, '{"size_bytes": 1},', "entry 2: begins at 0, before the end"),
        (CSI + "]}, ", '{"volume_capacity_bytes": 4194304, "block_metadata_type": 2}, ', "message 65537: more than"),
        ("[", '{"startOffset": 0, "length": 0}, ', "page 65537: more than"),
        ("<superblock ", "a", "a tag of more than 262144 bytes"),
        ('<superblock a="', " ", "a tag of more than 262144 bytes"),
        ("<blocks><!--", "- ", "a tag of more than 262144 bytes"),
        ("<blocks>", "<block block='0'/>", "entry 2: begins at 0, before the end"),
        ("<blocks>", "<blocks>", "<blocks> where era_invalidate prints none"),
        ("<blocks>", " ", "longer than 33554432 bytes"),
        ("<blocks>", "<!-- -->", "longer than 33554432 bytes"),
        ("<!DOCTYPE ", "c", "a tag of more than 262144 bytes"),
        ('<!DOCTYPE a [<!ENTITY b "', "c", "XML with a document type"),
        ('<!DOCTYPE a [<!ENTITY b "', '&b;"> <!ENTITY b "', "XML with a document type"),
    ],
)
def test_what_never_ends(head: str, again: str, message: str, image: Path) -> None:
    extra = ["--from-format", "era", "--block-size", "64K"] if head.startswith(("<b", "<!")) else []
    found = measured(image, "mark", image, "b", "--from", "-", *extra, given=(head, again))
    assert found.startswith("standard input: ")
    assert message in found


def test_a_bitmap_that_never_ends(image: Path) -> None:
    found = measured(image, "mark", image, "b", "--from", "-", "--from-format", "xapi", given=("", "A"))
    assert found == "standard input: longer than 1048588 bytes, the most that is read here"


def test_devices(image: Path) -> None:
    found = measured(image, "mark", image, "b", "--from", "/dev/zero")
    assert found == "/dev/zero: line 1: longer than 4096 bytes"
    found = measured(image, "transaction", "/dev/zero")
    assert found == "/dev/zero: longer than 4194304 bytes, the most that is read here"


def test_huge_files(image: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.write_text("[" + ROW)
    os.truncate(huge, 8 << 30)
    found = measured(image, "mark", image, "b", "--from", huge)
    assert found == f"{huge}: longer than 33554432 bytes, the most that is read here"
    found = measured(image, "transaction", huge)
    assert found == f"{huge}: longer than 4194304 bytes, the most that is read here"


@pytest.mark.parametrize("again", ['{"": 0},', "[],", "[", '{"a":'])
def test_a_transaction_that_never_ends(again: str, image: Path) -> None:
    found = measured(image, "transaction", "-", given=('{"actions": [', again))
    assert found == "standard input: longer than 4194304 bytes, the most that is read here"


@pytest.mark.parametrize("again", ['{"": 0}, ', "[], ", '"", ', "0, "])
def test_the_longest_transaction(again: str, image: Path, tmp_path: Path) -> None:
    file = tmp_path / "actions"
    head, end = '{"actions": [', "0]}"
    file.write_text(head + again * ((4 * MIB - len(head) - len(end)) // len(again)) + end)
    assert "actions[0]: " in measured(image, "transaction", file)


def test_a_big_disk_takes_no_more_memory(tmp_path: Path) -> None:
    """A million extents of a disk of 1 TiB are marked in the memory that the process takes anyway, and its bits."""
    image = tmp_path / "big.qcow2"
    qemu.create(image, 1 << 40)
    dirtmap("add", image, "b")
    head = "".join(f'{{"offset": {n << 20}, "length": 4096, "exists": "true"}},\n' for n in range(1 << 18))
    file = tmp_path / "extents"
    file.write_text(f"[{head}{{}}]")
    assert "entry 262145: 'offset' is not a number" in measured(image, "mark", image, "b", "--from", file)
