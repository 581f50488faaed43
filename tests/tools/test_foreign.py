"""`dirtmap mark --from`: what other programs print, real or by the letter of their documentation."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import qemu
from support.cli import dirtmap, error_of, mapped

import dirtmap.engine as dm
from dirtmap.tools.extents import read_extents
from dirtmap.tools.inputs import Input

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB


def parse(document: Any, size: int = SIZE, **options: Any) -> list[tuple[int, int]]:
    """What is marked on a disk of that size, in the order of the document."""
    text = document if isinstance(document, str | bytes) else json.dumps(document)
    found: list[tuple[int, int]] = []

    def put(offsets: Any, lengths: Any) -> None:
        found.extend(zip(offsets.tolist(), lengths.tolist(), strict=True))

    read_extents(Input(io.BytesIO(text if isinstance(text, bytes) else text.encode()), "F"), size, put, **options)
    return found


def refused(document: Any, size: int = SIZE, **options: Any) -> str:
    with pytest.raises(dm.Error) as caught:
        parse(document, size, **options)
    return str(caught.value)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu.create(path, SIZE)
    dirtmap("add", path, "b")
    return path


# nbdinfo.


def extent(offset: int, length: int, dirty: bool) -> dict[str, Any]:
    return {"offset": offset, "length": length, "type": int(dirty), "description": "dirty" if dirty else "clean"}


def test_the_map_of_a_bitmap_is_about_the_whole_disk() -> None:
    assert parse([extent(0, MIB, False), extent(MIB, 3 * MIB, True)]) == [(MIB, 3 * MIB)]
    assert parse([extent(MIB, KIB, True), extent(2 * MIB, KIB, True)]) == [(MIB, KIB), (2 * MIB, KIB)]  # map --dirty
    assert parse([extent(0, 1024, True), extent(1024, 512, False)], 1100) == [(0, 1024)]  # in sectors
    assert parse([extent(0, 512, False), extent(512, 1024, True)], 1100) == [(512, 588)]
    assert "a map of 1048576 bytes, but the disk has 4194304" in refused([extent(0, MIB, False)])
    assert "entry 1: the map says nothing of what is at 0" in refused([extent(MIB, 3 * MIB, False)])
    holes = [extent(0, KIB, True), extent(MIB, KIB, True), extent(2 * MIB, 2 * MIB, False)]
    assert "entry 3: the map says nothing of what is at 1024" in refused(holes)
    assert "entry 2: begins at 512, before the end" in refused([extent(0, KIB, True), extent(512, KIB, True)])
    assert "entry 2: begins at 0, before the end" in refused([extent(0, KIB, True), extent(0, SIZE, False)])
    assert "entry 1: a length of 0" in refused([extent(0, 0, True)])
    assert "entry 1: 4194816 bytes at 0 are not inside the disk" in refused([extent(0, SIZE + 512, False)])
    assert "entry 1: 1 byte at 4194304 is not inside the disk" in refused([extent(SIZE, 1, True)])


@pytest.mark.parametrize(
    ("kind", "word"),
    [(0, "data"), (1, "hole"), (2, "zero"), (3, "hole,zero"), (0, "unallocated"), (1, "local"), (2, "backing depth 2")],
)
def test_the_map_of_another_context(kind: int, word: str) -> None:
    message = refused([{"offset": 0, "length": SIZE, "type": kind, "description": word}])
    assert "F: entry 1: neither type 0, 'clean', nor type 1, 'dirty'" in message
    assert "nbdinfo --map=qemu:dirty-bitmap:NAME --json" in message


# qemu-img.


def test_a_bitmap_that_was_read_as_qemus_own_tests_read_it(image: Path, tmp_path: Path) -> None:
    qemu.qemu_io(image, "write -q 1M 64k")
    socket = tmp_path / "socket"
    pid = tmp_path / "pid"
    qemu.run("qemu-nbd", "--fork", "-r", "-B", "b", "-f", "qcow2", "-k", f"{socket}", f"--pid-file={pid}", f"{image}")
    # It ends with its only client.
    options = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:b"
    text = qemu.qemu_img("map", "--output=json", "--image-opts", options)
    assert [e["start"] for e in json.loads(text) if not e["data"]] == [MIB]  # dirty, and said to hold nothing
    dirtmap("add", image, "copy")
    before = image.read_bytes()
    message = error_of("mark", image, "copy", "--from", "-", given=text)
    assert message.startswith("standard input: entry 2: neither data nor zeros, as only where a bitmap is read through")
    assert "nbdinfo --map=qemu:dirty-bitmap:NAME --json" in message
    assert image.read_bytes() == before


def entry(start: int, length: int, **more: Any) -> dict[str, Any]:
    return {"start": start, "length": length, "depth": 0, "present": True, "zero": False, "data": True} | more


def test_the_map_of_an_image() -> None:
    assert parse([entry(0, MIB), entry(MIB, 3 * MIB, zero=True, data=False)]) == [(0, MIB), (MIB, 3 * MIB)]
    assert parse([entry(0, SIZE, zero=True, data=False, present=False)]) == []
    assert parse([entry(0, SIZE, zero=True, data=False, depth=1)]) == []
    assert parse([entry(0, 1024, zero=True, data=False)], 1000) == [(0, 1000)]  # QEMU rounds up to sectors
    old = entry(0, SIZE, zero=True, data=False)
    del old["present"]  # before QEMU 6.1: zeros that the image holds look like those that no image holds
    assert parse([old]) == [(0, SIZE)]
    for present in (True, False):
        assert "neither data nor zeros" in refused([entry(0, SIZE, data=False, present=present)])
    assert "entry 1: begins at 1048576, not at 0" in refused([entry(MIB, MIB)])  # --start-offset
    assert "a map of 1048576 bytes" in refused([entry(0, MIB)])  # --max-length, or another disk
    assert "entry 1: 8388608 bytes at 0 are not inside" in refused([entry(0, 2 * SIZE)])
    assert "entry 2: begins at 0, not at 1048576" in refused([entry(0, MIB), entry(0, SIZE)])
    assert "'depth' is not a number" in refused([entry(0, SIZE, depth=None)])
    assert "'present' is neither" in refused([entry(0, SIZE, present=1)])
    assert "a map of 0 bytes" in refused([], name="qemu-img")


# rbd.


def test_rbd_diff() -> None:
    def changed(offset: int, length: int, exists: Any = "true") -> dict[str, Any]:
        return {"offset": offset, "length": length, "exists": exists}

    assert parse([changed(0, 1), changed(1, 512, "false")]) == [(0, 1), (1, 512)]
    assert "neither true nor false" in refused([changed(0, 1, "zero")])
    assert "neither true nor false" in refused([changed(0, 1, 1)])
    assert "begins at 0, before the end" in refused([changed(0, 2), changed(0, 2)])
    assert "entry 2: begins at 5, before the end" in refused([changed(9, 2), changed(5, 2)])
    assert "line 1: 3 words" in refused("Offset Length Type\n0 4194304 data\n")
    assert "line 1: 3 words" in refused("0 4194304 zero\n")


# thin_delta.


def thin(*elements: str, block: int | str = 128) -> str:
    head = f'<superblock uuid="" time="1" transaction="2" version="2" data_block_size="{block}" nr_data_blocks="99">'
    return f'{head}\n  <diff left="1" right="2">\n    ' + "\n    ".join(elements) + "\n  </diff>\n</superblock>\n"


def test_thin_delta() -> None:
    document = thin(
        '<same begin="0" length="16"/>',
        '<different begin="16" length="2"/>',
        '<left_only begin="20" length="1"/>',
        '<right_only begin="63" length="1"/>',
    )
    block = 64 * KIB
    assert parse(document) == [(16 * block, 2 * block), (20 * block, block), (63 * block, block)]
    assert parse(document, SIZE - 1) == [(16 * block, 2 * block), (20 * block, block), (63 * block, block - 1)]
    assert parse(thin(block=1024).replace("</diff>", '<different begin="1" length="2"/></diff>')) == [
        (512 * KIB, MIB),
    ]
    assert parse(thin()) == []
    assert parse(f'<?xml version="1.0"?><!-- <blocks> -->{document}', name="thin-delta")


def test_thin_delta_verbose() -> None:
    inside = '<range begin="{}" left_data_begin="7" right_data_begin="8" data_begin="9" length="1"/>'
    document = thin(*(f"<{kind}>{inside.format(n)}</{kind}>" for n, kind in enumerate(("same", "different"))))
    assert parse(document) == [(64 * KIB, 64 * KIB)]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (thin('<different begin="64" length="1"/>'), "entry 1: 65536 bytes at 4194304 are not inside the disk"),
        (thin('<different begin="63" length="2"/>'), "entry 1: 131072 bytes at 4128768 are not inside the disk"),
        (thin('<same begin="2" length="2"/>', '<different begin="3" length="1"/>'), "entry 2: begins at 3, before"),
        (thin('<different begin="0" length="0"/>'), "entry 1: a length of 0"),
        (thin('<different begin="0"/>'), "entry 1: 'length' is not a number"),
        (thin('<different begin="-1" length="1"/>'), "entry 1: 'begin' is not a number"),
        (thin('<different begin="0x1" length="1"/>'), "entry 1: 'begin' is not a number"),
        (thin('<different begin="9999999999999999999" length="1"/>'), "are not inside the disk"),
        (thin('<unknown begin="0" length="1"/>'), "<unknown> where thin_delta prints none"),
        (thin("text"), "line 3: text between the elements"),
        (thin(block=64), "data_block_size: 64 sectors are no block of a thin pool"),
        (thin(block=129), "data_block_size: 129 sectors"),
        (thin(block="64K"), "'data_block_size' is not a number"),
        (thin()[:-15], "not well-formed XML: "),
        (thin() + thin(), "not well-formed XML: junk"),
        (thin().replace("diff", "device"), "<device> where thin_delta prints none"),  # thin_dump
        ('<superblock data_block_size="128"/>', "no <diff>"),
        ("<superblock/>", "'data_block_size' is not a number"),
        ('<!DOCTYPE x [<!ENTITY a "b">]>' + thin(), "XML with a document type"),
        ('<!DOCTYPE x SYSTEM "file:///etc/passwd">' + thin(), "XML with a document type"),
        ("<html/>", "XML, but neither of thin_delta nor of era_invalidate"),
        ("<", "XML, but neither"),
        (b"<superblock \xff/>", "not well-formed XML: "),
        ('<?xml version="1.0" encoding="nonsense"?>' + thin(), "not well-formed XML: "),
        (thin(f'<different begin="{" " * 600_000}1"/>'), "a tag of more than 262144 bytes"),
    ],
)
def test_what_is_no_thin_delta(document: str | bytes, message: str) -> None:
    assert message in refused(document)


# era_invalidate.


def test_era() -> None:
    document = '<blocks>\n  <block block="3"/>\n  <range begin="8" end = "12"/>\n</blocks>\n'
    assert parse(document, block_size=64 * KIB) == [(192 * KIB, 64 * KIB), (512 * KIB, 256 * KIB)]
    assert parse("<blocks>\n</blocks>", block_size=512) == []
    last = '<blocks><range begin="0" end="2"/></blocks>'
    assert parse(last, block_size=3 * MIB) == [(0, SIZE)]
    assert "era_invalidate does not print the size of a block; --block-size tells it" in refused(document)
    assert "--block-size: 1000 bytes, not" in refused(document, block_size=1000)
    assert "--block-size: 0 bytes, not" in refused(document, block_size=0)
    assert "entry 2: 4194304 bytes at 8388608 are not inside" in refused(document, block_size=MIB)
    assert "entry 1: ends at 2, and begins at 2" in refused('<blocks><range begin="2" end="2"/>', block_size=512)
    assert "entry 1: 'end' is not a number" in refused('<blocks><range begin="2" length="2"/>', block_size=512)
    assert "not well-formed XML" in refused(document[:-4], block_size=512)
    assert "<diff> where era_invalidate prints none" in refused("<blocks><diff/></blocks>", block_size=512)
    assert "--block-size goes with the format era only, not with lines" in refused("0 1\n", block_size=512)


# VMware.


def page(start: int, length: int, *areas: tuple[int, int]) -> dict[str, Any]:
    return {"startOffset": start, "length": length, "changedArea": [{"start": s, "length": n} for s, n in areas]}


def test_vmware() -> None:
    assert parse(page(0, SIZE, (0, KIB), (MIB, MIB))) == [(0, KIB), (MIB, MIB)]
    assert parse([page(0, MIB, (5, 1)), page(MIB, 3 * MIB, (MIB, 3 * MIB))]) == [(5, 1), (MIB, 3 * MIB)]
    assert parse({"startOffset": 0, "length": SIZE}) == []
    assert parse({"changedArea": None, "length": SIZE, "startOffset": 0}) == []
    named = {"_typeName": "DiskChangeExtent", "start": 0, "length": 1}
    assert parse({"changedArea": [named], "_typeName": "DiskChangeInfo", "startOffset": 0, "length": SIZE}) == [(0, 1)]
    assert "about 1048576 bytes, but the disk has 4194304; query again from 1048576 on" in refused(page(0, MIB))
    assert refused(page(0, 2 * SIZE)) == "F: about 8388608 bytes, but the disk has 4194304"
    assert "page 1: begins at 1048576; what is at 0 is not known" in refused(page(MIB, 3 * MIB))
    assert "page 2: begins at 0;" in refused([page(0, SIZE), page(0, SIZE)])
    assert "page 1: an area is outside the 1048576 bytes at 0" in refused([page(0, MIB, (MIB, 1)), page(MIB, 3 * MIB)])
    assert "entry 1: 2 bytes at 4194303 are not inside" in refused(page(0, SIZE, (SIZE - 1, 2)))
    assert "page 1: 'changedAreas' is not a key" in refused(page(0, SIZE) | {"changedAreas": []})
    assert "page 1: 'changedArea' is not an array" in refused(page(0, SIZE) | {"changedArea": {}})
    assert "page 1: 'length' is not a number" in refused(page(0, SIZE) | {"length": "4194304"})
    assert "page 1: 'startOffset' is not a number" in refused({"changedArea": [], "length": SIZE})
    assert "entry 1: not a changed area" in refused({"startOffset": 0, "length": SIZE, "changedArea": [5]})
    assert "entry 1: 'start' is not a number" in refused(page(0, SIZE) | {"changedArea": [{"length": 5}]})
    twice = '{"startOffset": 0, "startOffset": 0, "length": 4194304}'
    assert "page 1: a key appears twice" in refused(twice)
    assert "not valid JSON: cut off" in refused(json.dumps(page(0, SIZE, (0, 1)))[:-1])
    assert "not valid JSON: something follows" in refused(json.dumps(page(0, SIZE)) * 2)
    assert "about 0 bytes" in refused([], name="vmware")


# CSI.


def message(*ranges: dict[str, Any], capacity: Any = SIZE, kind: Any = 2) -> dict[str, Any]:
    return {"block_metadata_type": kind, "volume_capacity_bytes": capacity, "block_metadata": list(ranges)}


def test_csi() -> None:
    first, second = {"size_bytes": 1000}, {"byte_offset": 5000, "size_bytes": 1000}
    assert parse([message(first, second, kind=1)]) == [(0, 1000), (5000, 1000)]
    assert parse([message(first), message(second)]) == [(0, 1000), (5000, 1000)]
    assert parse([message()]) == []
    camel = {
        "blockMetadataType": "VARIABLE_LENGTH",
        "volumeCapacityBytes": "4194304",
        "blockMetadata": [{"byteOffset": "1048576", "sizeBytes": "65536"}],
    }
    assert parse([camel]) == [(MIB, 64 * KIB)]
    del camel["blockMetadata"]
    assert parse([camel]) == []
    tail = {"byte_offset": SIZE - 10, "size_bytes": 10}
    assert parse([message(first, tail, kind="FIXED_LENGTH")]) == [(0, 1000), (SIZE - 10, 10)]

    assert "message 1: of a volume of 5 bytes, but the disk has 4194304" in refused([message(first, capacity=5)])
    no_capacity = message(first)
    del no_capacity["volume_capacity_bytes"]
    assert "message 1: 'volume_capacity_bytes' is not" in refused([no_capacity])
    for kind in (0, 3, "UNKNOWN", None, True, [1]):
        assert "message 1: 'block_metadata_type' is neither" in refused([message(first, kind=kind)])
    assert "message 2: FIXED_LENGTH, unlike" in refused([message(first), message(second, kind=1)])
    assert "ranges of different lengths, although" in refused([message(first, {**second, "size_bytes": 9}, kind=1)])
    assert "entry 2: begins at 0, before the end" in refused([message(first), message(first)])
    assert "entry 1: a length of 0" in refused([message({"byte_offset": 5, "size_bytes": 0})])
    assert "entry 1: 'byte_offset' or 'size_bytes' is not" in refused([message({"byte_offset": 5})])
    assert "entry 1: 'byte_offset' or 'size_bytes' is not" in refused([message({"size_bytes": "0x10"})])
    assert "entry 1: not a range" in refused([message({"size_bytes": 1, "hole": True})])
    assert "entry 1: not a range" in refused([message({"size_bytes": 1, "sizeBytes": 2})])
    assert "entry 1: not a range" in refused([message({})])
    assert "entry 1: 4194305 bytes at 0 are not inside" in refused([message({"size_bytes": SIZE + 1})])
    assert "message 1: 'volume_capacity_bytes' appears twice" in refused([message(first) | {"volumeCapacityBytes": 5}])
    assert "message 1: 'next_offset' is not a key" in refused([message(first) | {"next_offset": 5}])
    assert "'block_metadata' is not a key of such a message, or not an array" in refused(
        [message() | {"block_metadata": {}}]
    )
    # As of grpcurl: were it cut off between two messages, it would look the same.
    assert "not an array of messages; without one" in refused(json.dumps(message(first)) + json.dumps(message(second)))
    assert "not valid JSON: cut off" in refused(json.dumps([message(first)])[:-1])


# XAPI.


def bitmap(*blocks: int, count: int = 64) -> str:
    data = bytearray(-(-count // 8))
    for block in blocks:
        data[block // 8] |= 0x80 >> block % 8
    return base64.b64encode(data).decode()


def test_xapi() -> None:
    block = 64 * KIB
    assert parse(bitmap(0, 1, 9, 63) + "\n", name="xapi") == [(0, 2 * block), (9 * block, block), (63 * block, block)]
    assert parse(base64.b64encode(b"\x80" + bytes(7)), name="xapi") == [(0, block)]  # not the eighth
    assert parse(bitmap(63), SIZE - 1, name="xapi") == [(63 * block, block - 1)]
    assert parse(bitmap(2, count=64), 5 * block, name="xapi") == [(2 * block, block)]  # tapdisk's words of 64 bits
    assert parse(bitmap(2, count=8), 5 * block, name="xapi") == [(2 * block, block)]
    assert "bits behind the last of 5 blocks are set" in refused(bitmap(5, count=8), 5 * block, name="xapi")
    assert "a bitmap of 7 bytes, but a disk of 4194304 bytes takes 8" in refused(bitmap(count=56), name="xapi")
    assert "a bitmap of 16 bytes" in refused(bitmap(count=128), name="xapi")
    assert "not base64" in refused(bitmap(0)[:-2], name="xapi")
    assert "not base64" in refused("0 65536\n", name="xapi")
    assert "perhaps base64; a bitmap of VDI.list_changed_blocks needs --from-format xapi" in refused(bitmap(3))


@given(st.sets(st.integers(0, 8_500_000), max_size=40))
def test_xapi_of_a_big_disk(blocks: set[int]) -> None:
    size = 8_500_001 * 64 * KIB
    found = dm.Bitmap(size)
    text = bitmap(*blocks, count=8_500_001).encode()
    read_extents(Input(io.BytesIO(text), "F"), size, found.mark_many, "xapi")
    assert found == dm.Bitmap.from_extents(size, [b << 16 for b in sorted(blocks)], [1] * len(blocks))


# All of them.

DOCUMENTS: dict[str, Any] = {
    "nbdinfo": [extent(0, MIB, False), extent(MIB, 3 * MIB, True)],
    "qemu-img": [entry(0, MIB, zero=True, data=False, present=False), entry(MIB, 3 * MIB)],
    "rbd": [{"offset": MIB, "length": 3 * MIB, "exists": "true"}],
    "lines": "1M 3M\n",
    "thin-delta": thin('<different begin="16" length="48"/>'),
    "era": '<blocks><range begin="16" end="64"/></blocks>',
    "vmware": page(0, SIZE, (MIB, 3 * MIB)),
    "csi": [message({"byte_offset": MIB, "size_bytes": 3 * MIB})],
    "xapi": bitmap(*range(16, 64)),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_from_the_command_line(name: str, image: Path) -> None:
    document = DOCUMENTS[name]
    text = document if isinstance(document, str) else json.dumps(document)
    extra = ["--block-size", "64KiB"] if name == "era" else []
    dirtmap("mark", image, "b", "--from", "-", "--from-format", name, *extra, given=text)
    assert mapped(image, "b") == [(MIB, 3 * MIB)]
    dirtmap("clear", image, "b")
    if name != "xapi":
        dirtmap("mark", image, "b", "--from", "-", *extra, given=text)  # recognised
        assert mapped(image, "b") == [(MIB, 3 * MIB)]


@pytest.mark.parametrize("asked", DOCUMENTS)
@pytest.mark.parametrize("given_", DOCUMENTS)
def test_none_is_taken_for_another(asked: str, given_: str) -> None:
    extra = {"block_size": 64 * KIB} if asked == "era" else {}
    if asked == given_:
        assert parse(DOCUMENTS[given_], name=asked, **extra) == [(MIB, 3 * MIB)]
    else:
        assert refused(DOCUMENTS[given_], name=asked, **extra).startswith("F: ")


@given(st.sampled_from(sorted(DOCUMENTS)), st.data())
def test_what_was_cut_off_marks_nothing_less(name: str, data: st.DataObject) -> None:
    """A document that lost its end is refused, and never taken for one that calls its rest clean."""
    document = DOCUMENTS[name]
    text = document if isinstance(document, str) else json.dumps(document)
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    if cut.strip() != text.strip():
        extra = {"block_size": 64 * KIB} if name == "era" else {}
        refused(cut, name=name, **extra)


def test_options_that_do_not_go_together(image: Path) -> None:
    assert "--from-format and --block-size go with --from only" in error_of("mark", image, "b", 0, 1, "--block-size", 1)
    assert "--from-format and --block-size" in error_of("mark", image, "b", 0, 1, "--from-format", "rbd")
    assert "no such bitmap" in error_of("mark", image, "c", "--from", "-", given="0 1\n")


def test_a_pipe_from_the_image_itself(image: Path) -> None:
    """It is not open while the other end of the pipe still reads it."""
    dirtmap("mark", image, "b", "--from", "-", given=qemu.qemu_img("map", "--output=json", image))
    assert mapped(image, "b") == []


def test_braces_in_strings_cost_no_more() -> None:
    """Pieces are cut behind "},", which may be inside of a string; then element by element, but not anew for each."""
    extents = [entry(number * 512, 512, filename='a"},{') for number in range(8192)]
    begin = time.perf_counter()
    assert len(parse(extents)) == 8192
    assert time.perf_counter() - begin < 2
