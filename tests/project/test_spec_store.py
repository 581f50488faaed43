"""SPEC.md, "The store", says what the code does: its tables, its numbers, and its example, byte for byte.

Its byte tables and limits are compared with the declarations where those of qcow2 are: test_spec.py.
"""

from __future__ import annotations

import itertools
import re
import uuid
from pathlib import Path

import crc32c
import pytest
from support.documents import EXAMPLES, SPEC, judged, rows

import dirtmap.engine as dm
from dirtmap.engine import identity as looks
from dirtmap.engine.host.kind import Address
from dirtmap.engine.namespaces import nodes
from dirtmap.engine.storefile import file as engine
from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.system import locks
from dirtmap.engine.system.file import File
from dirtmap.fmt import store
from dirtmap.fmt.identity import FilePlace, Identity
from dirtmap.fmt.parsers.store import CHECKSUM, HEADER, NODE_POINTER

# On ext4.
IMAGE = Identity(
    bytes.fromhex("65787434000000000123456789abcdef"), 1234, 16 * 10**17, 1 << 20, 17 * 10**17, 17 * 10**17
)

CHAPTER = SPEC[SPEC.index("\n## 4. The store\n") :]
EXAMPLE = EXAMPLES[EXAMPLES.index("\n## Example of a store\n") : EXAMPLES.index("\n## Example of a killed tracker\n")]
# Offset, bytes and a comment, with two spaces between.
LINES = {
    int(at, 16): bytes.fromhex(data)
    for at, data in re.findall(r"^([0-9a-f]{5})  ((?:[0-9a-f]{2} ?)+)(?= |$)", EXAMPLE, re.M)
}


def test_extensions() -> None:
    found = rows("type", "ASCII", "name", "data")
    assert {int(row["type"], 16): row["name"] for row in found} == store.EXTENSION_NAMES
    assert all(bytes.fromhex(row["type"][2:]).decode() == row["ASCII"] for row in found)


def test_record_extensions() -> None:
    found = rows("record extension", "ASCII", "critical", "what it is")
    assert sorted(int(row["record extension"], 16) for row in found) == sorted(store.RECORD_EXTENSIONS)
    for row in found:
        kind = int(row["record extension"], 16)
        assert bool(kind & store.CRITICAL) == (row["critical"] == "yes")
        assert (kind & ~store.CRITICAL).to_bytes(4, "big").decode() == row["ASCII"]


def test_kinds() -> None:
    assert {int(row["kind"]): row["name"] for row in rows("kind", "name", "meaning")} == store.KIND_NAMES


def test_numbers_in_the_text() -> None:
    text = " ".join(CHAPTER.split())
    for said in (
        f"A block has {store.BLOCK} bytes",
        f"the CRC32C of the {store.BLOCK - CHECKSUM.size} bytes before",
        f"more than {store.NODE_BYTES} bytes, unless it is a leaf",
        f"less than {store.NODE_BYTES // 4} bytes, with a neighbour",
        f"is no multiple of {NODE_POINTER.size}",
        f"lock on byte {engine._WRITER} of the file",
        f"tries again for {locks.PATIENCE_SECONDS:.0f} seconds",
        f"below {HEADER.size}, above {store.BLOCK - CHECKSUM.size}",
        f"`{store.MAGIC.hex(' ')}`",
        f"{crc32c.crc32c(b'123456789'):#x}".replace("0xe3069283", "0xE3069283"),
        "blocks 0 and 2 those of slot A, blocks 1 and 3 those of slot B",
    ):
        assert said in text
    assert store.COPIES == ((0, 2), (1, 3))


def test_writer_is_this_version() -> None:
    assert store.WRITER.decode() == f"dirtmap {dm.__version__}"


def test_size_of_an_empty_store(tmp_path: Path) -> None:
    create(str(tmp_path / "empty"))
    assert f"an empty store takes {(tmp_path / 'empty').stat().st_size >> 10} KiB" in " ".join(CHAPTER.split())


def test_every_field_that_can_be_at_fault_is_listed() -> None:
    listed = {
        name.strip() for row in rows("concerns", "field", "is refused", "reason") for name in row["field"].split(",")
    }
    # The fields of area pointers are listed as that.
    assert judged(store) - {"offset", "length"} <= listed
    source = Path(str(headers.__file__)).read_text()
    assert set(re.findall(r"\{path\}: header\.(\w+)", source)) - {"magic"} <= listed
    assert set(re.findall(r"\{path\}: namespaces extension\.(\w+)", source)) <= listed
    assert "A file without the magic" in CHAPTER


def test_one_commit_later_is_as_the_table_says() -> None:
    """The rule of reuse: which commits' headers the slots hold, worked out anew."""
    found = rows("commit", "N - 1", "N", "N + 1", "N + 2")
    writing = next(row for row in found if row["commit"] == "slots while it writes areas")
    done = next(row for row in found if row["commit"] == "slots when it is done")

    def relative(text: str) -> int:
        return int((text.replace("N", "").replace(" ", "")) or 0)

    for commit, text in writing.items():
        if commit != "commit":
            number = relative(commit)
            assert [relative(part) for part in text.split(",")] == [number - 1, number - 2]
            assert [relative(part) for part in done[commit].split(",")] == [number, number - 1]


def _of_the_lines(size: int) -> bytearray:
    """What the lines of the example say: blocks 2 and 3 are as 0 and 1, but for the lines that are shown of them."""
    image = bytearray(size)
    for at, data in sorted(LINES.items()):
        if at == min(line for line in LINES if line >= 2 * store.BLOCK):
            image[2 * store.BLOCK : 4 * store.BLOCK] = image[: 2 * store.BLOCK]
        image[at : at + len(data)] = data
    return image


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store of the example, made as its text says."""
    digits = itertools.count(1)
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(f"{next(digits)}" * 32))
    for module in (looks, nodes):
        monkeypatch.setattr(module, "identity_of", lambda path: IMAGE)
    monkeypatch.setattr(nodes, "probe_path", lambda path: None)
    monkeypatch.setattr(File, "place", lambda file: FilePlace(bytes(8) + (0x801).to_bytes(8, "big"), 4321, 0))
    monkeypatch.setattr(engine, "time_ns", lambda: 18 * 10**17)
    path = tmp_path / "example"
    create(str(path))
    with Store(str(path)) as target:
        nodes.add_node(target, "disk", "/images/disk.raw", raw=True)
    with dm.open(Address(str(path), "disk")) as image, image.transaction() as bitmaps:
        bitmaps["monday"] = dm.Bitmap.from_extents(image.size, [64 << 10], [192 << 10], 64 << 10)
    return path


def test_example_is_what_dirtmap_writes(example: Path) -> None:
    written = example.read_bytes()
    described = bytearray(len(written))
    assert len(LINES) > 50
    for at, data in LINES.items():
        assert written[at : at + len(data)] == data[: len(written) - at], f"{at:05x}"
    described[:] = _of_the_lines(len(written))
    del described[len(written) :]
    assert bytes(described) == written


def test_example_is_what_dirtmap_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way round: the bytes of the document alone make a store."""
    image = _of_the_lines(max(at + len(data) for at, data in LINES.items()))
    path = tmp_path / "example"
    path.write_bytes(image)
    report = dm.check(str(path))
    assert (report.corruptions, report.leaks) == (0, 0)
    assert [finding.what.partition(":")[0] for finding in report.findings] == ["counts as all dirty"], "no such image"
    monkeypatch.setattr(looks, "identity_of", lambda path: IMAGE)
    assert not dm.check(str(path)).findings
    with dm.open(Address(str(path), "disk")) as opened:
        offsets, lengths = opened["monday"].extents()
        assert (offsets.tolist(), lengths.tolist()) == ([64 << 10], [192 << 10])
        assert opened["monday"].recording
        assert opened.uuid == "33333333-3333-3333-3333-333333333333"


def test_copies_of_the_example_are_alike(example: Path) -> None:
    chosen = headers.choose("example", example.read_bytes())
    assert (chosen.header.generation, chosen.slot, chosen.in_doubt, chosen.repairs) == (4, 1, False, ())
