"""The tables in SPEC.md, "What a reader must refuse", with QEMU as the judge: each row has images that show it.

Every image is made by QEMU and then changed in one or two places. QEMU opens it in three ways, from the least to the
most that it looks at: for its information, for reading, for writing. A verdict says which of them QEMU refuses.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import qemu
from support.craft import Craft, Place

import dirtmap.engine as dm
from dirtmap.fmt import directory, extensions, qcow2
from dirtmap.fmt.extensions import build_extension
from dirtmap.fmt.parsers.qcow2 import CRYPTO_EXTENSION

SPEC = (Path(__file__).parents[2] / "SPEC.md").read_text()
MIB = 1 << 20
CLUSTER = 4096

# Who refuses an image. dirtmap refuses all but those of the first row, for reading and for writing.
NOBODY = ()
INFO = ("info", "read", "write")
READ = ("read", "write")
WRITE = ("write",)
DIRTMAP = ("nothing of QEMU's",)

Change = Callable[[Craft], object]


def header(name: str, value: int) -> Change:
    return lambda craft: craft.set(craft.header(name), value)


def bitmaps(name: str, value: int) -> Change:
    return lambda craft: craft.set(craft.bitmaps(name), value)


def entry(name: str, value: int, index: int = 1) -> Change:
    return lambda craft: craft.set(craft.entry(index, name), value)


def table(value: int, index: int = 1) -> Change:
    return lambda craft: craft.set(craft.table(index), value)


def snapshot(name: str, value: int) -> Change:
    return lambda craft: craft.set(craft.snapshot(0, name), value)


def crypto(name: str, value: int) -> Change:
    def change(craft: Craft) -> None:
        field = CRYPTO_EXTENSION.field(name)
        craft.set(Place(craft.extension(qcow2.EXTENSION_CRYPTO) + 8 + field.offset, field.size), value)

    return change


def both(*changes: Change) -> Change:
    return lambda craft: [change(craft) for change in changes]


def end_of(craft: Craft) -> int:
    """The first cluster past the end of the file."""
    return -(-len(craft.data) // craft.cluster_size) * craft.cluster_size


def at(place: Callable[[Craft], Place], value: Callable[[Craft], int]) -> Change:
    return lambda craft: craft.set(place(craft), value(craft))


def cut(length: Callable[[Craft], int]) -> Change:
    def change(craft: Craft) -> None:
        del craft.data[length(craft) :]

    return change


def name_at(distance: int) -> Change:
    """The backing file's name that many bytes behind the last extension, whose end marker it overwrites."""

    def change(craft: Craft) -> None:
        old, size = (craft.get(craft.header(f"backing_file_{what}")) for what in ("offset", "size"))
        start = craft.extension(extensions.END) + distance
        craft.put(start, bytes(craft.data[old : old + size]))
        craft.set(craft.header("backing_file_offset"), start)

    return change


def text(kind: int, value: bytes) -> Change:
    """Other data in an extension, as many bytes as are there."""

    def change(craft: Craft) -> None:
        size = craft.get(craft.head("length", kind))
        craft.put(craft.extension(kind) + 8, value.ljust(size, b"\0")[:size])

    return change


def length(kind: int, value: int) -> Change:
    return lambda craft: craft.set(craft.head("length", kind), value)


def extension(kind: int, data: bytes) -> Change:
    """One more, at the end; the backing file's name, where there is one, moves out of the way."""

    def change(craft: Craft) -> None:
        old, size = (craft.get(craft.header(f"backing_file_{what}")) for what in ("offset", "size"))
        name = bytes(craft.data[old : old + size])
        start = craft.extension(extensions.END)
        craft.put(start, build_extension(kind, data) + extensions.END_MARKER)
        if old:
            craft.put(CLUSTER // 2, name)
            craft.set(craft.header("backing_file_offset"), CLUSTER // 2)

    return change


def named(index: int, value: bytes) -> Change:
    """Another name for a bitmap, padded as the old one is."""

    def change(craft: Craft) -> None:
        where, old = craft.name(index)
        assert -(-len(value) // 8) == -(-len(old) // 8)
        craft.put(where, value.ljust(len(old), b"\0"))
        craft.set(craft.entry(index, "name_size"), len(value))

    return change


def doubled(craft: Craft) -> None:
    head = craft.extension(qcow2.EXTENSION_BITMAPS)
    extension(qcow2.EXTENSION_BITMAPS, bytes(craft.data[head + 8 : head + 32]))(craft)


def without_extension(craft: Craft) -> None:
    craft.set(craft.head("type"), 0x12345678)


def nameless(craft: Craft) -> None:
    kind = qcow2.EXTENSION_DATA_FILE
    craft.put(craft.extension(kind), build_extension(kind, b"") + extensions.END_MARKER)


def one_too_many(craft: Craft) -> None:
    craft.set(craft.bitmaps("nb_bitmaps"), craft.get(craft.bitmaps("nb_bitmaps")) + 1)


def huge(bits: int) -> Change:
    """A disk of 2**bits bytes, with a bitmap in use."""

    def change(craft: Craft) -> None:
        entries = (1 << bits) // (craft.cluster_size * craft.cluster_size // 8)
        assert entries * 8 <= craft.cluster_size
        craft.set(craft.header("size"), 1 << bits).set(craft.header("l1_size"), entries)
        craft.set(craft.entry(0, "flags"), directory.FLAG_IN_USE)

    return change


@dataclass(frozen=True)
class Case:
    """An image.

    Attributes:
        field: as the tables name it.
        change: what is done to a sound image.
        verdict: which of QEMU's ways to open it fail; `DIRTMAP` none of them, `NOBODY` not dirtmap either.
        base: which sound image.
    """

    field: str
    change: Change
    verdict: tuple[str, ...] = INFO
    base: str = "plain"


CASES = {
    # The header.
    "ends inside the header": Case("header", cut(lambda craft: 71)),
    "ends behind the header": Case("any of the tables above", cut(lambda craft: 512), DIRTMAP, "bare"),
    "magic": Case("magic", lambda craft: craft.put(0, b"QFI\xfa")),
    "version 1": Case("version", header("version", 1)),
    "version 4": Case("version", header("version", 4)),
    "unknown incompatible bit": Case("incompatible_features", header("incompatible_features", 1 << 5)),
    "extended L2 entries, small clusters": Case("incompatible_features", header("incompatible_features", 1 << 4)),
    "unknown compatible bit": Case("compatible_features", header("compatible_features", 1 << 40), NOBODY),
    "clusters of 256 bytes": Case("cluster_bits", header("cluster_bits", 8)),
    "clusters of 4 MiB": Case("cluster_bits", header("cluster_bits", 22)),
    "header_length 96": Case("header_length", header("header_length", 96)),
    "header_length above a cluster": Case("header_length", header("header_length", CLUSTER + 8)),
    "header_length 105": Case("header_length", header("header_length", 105)),
    "raw external data without a data file": Case("autoclear_features", header("autoclear_features", 3), READ),
    "unknown autoclear bit": Case("autoclear_features", header("autoclear_features", 1 | 1 << 40), NOBODY),
    "refcount_order 7": Case("refcount_order", header("refcount_order", 7)),
    "crypt_method 3": Case("crypt_method", header("crypt_method", 3)),
    "size 2**63": Case("size", header("size", 1 << 63)),
    "size with a part of a sector": Case("size", header("size", 64 * MIB - 100), NOBODY),
    "compression_type 2": Case("compression_type", header("compression_type", 2)),
    "compression_type without its bit": Case("compression_type", header("compression_type", 1)),
    "compression bit without a type": Case("compression_type", header("incompatible_features", 1 << 3)),
    "l1_size above the limit": Case("l1_size", header("l1_size", qcow2.MAX_L1_BYTES // 8 + 1)),
    "l1_size 0": Case("l1_size", header("l1_size", 0)),
    "l1_table_offset askew": Case("l1_table_offset", header("l1_table_offset", CLUSTER + 512)),
    "l1_table_offset past 2**63": Case("l1_table_offset", header("l1_table_offset", (1 << 64) - CLUSTER)),
    "l1_table_offset 0": Case("l1_table_offset", header("l1_table_offset", 0), DIRTMAP, "bare"),
    "no refcount table": Case("refcount_table_clusters", header("refcount_table_clusters", 0)),
    "a refcount table above the limit": Case(
        "refcount_table_clusters", header("refcount_table_clusters", qcow2.MAX_REFCOUNT_TABLE_BYTES // CLUSTER + 1)
    ),
    "refcount_table_offset askew": Case("refcount_table_offset", header("refcount_table_offset", CLUSTER + 8)),
    "refcount_table_offset 0": Case("refcount_table_offset", header("refcount_table_offset", 0), DIRTMAP, "bare"),
    "nb_snapshots above the limit": Case("nb_snapshots", header("nb_snapshots", qcow2.MAX_SNAPSHOTS + 1)),
    "snapshots_offset askew": Case("snapshots_offset", header("snapshots_offset", 8)),
    "snapshots_offset askew, no snapshots": Case("snapshots_offset", header("snapshots_offset", 8), INFO, "bare"),
    "snapshot, too much extra data": Case("snapshot", snapshot("extra_data_size", 1025)),
    "snapshot, a lot of extra data": Case("snapshot", snapshot("extra_data_size", 1024), NOBODY),
    "snapshot, no extra data": Case("snapshot", snapshot("extra_data_size", 0), NOBODY),
    "snapshot, an L1 table over all others": Case("any of the tables above", snapshot("l1_size", 1 << 23), WRITE),
    "snapshot, an L1 table past the end": Case(
        "any of the tables above", at(lambda c: c.snapshot(0, "l1_table_offset"), end_of), NOBODY
    ),
    "L1 table over the refcount table": Case(
        "any of the tables above",
        at(lambda c: c.header("l1_table_offset"), lambda c: c.get(c.header("refcount_table_offset"))),
        DIRTMAP,
        "bare",
    ),
    "L1 table past the end": Case(
        "any of the tables above", at(lambda c: c.header("l1_table_offset"), end_of), DIRTMAP, "bare"
    ),
    "backing_file_offset behind the first cluster": Case(
        "backing_file_offset", header("backing_file_offset", CLUSTER + 1)
    ),
    "backing_file_offset at its end, no name": Case(
        "backing_file_offset",
        both(header("backing_file_offset", CLUSTER), header("backing_file_size", 0)),
        NOBODY,
    ),
    "backing_file_offset inside the header": Case("backing_file_offset", header("backing_file_offset", 104), DIRTMAP),
    "backing_file_size above the limit": Case("backing_file_size", header("backing_file_size", 1024)),
    "backing_file_size at the limit": Case("backing_file_size", header("backing_file_size", 1023), NOBODY),
    "backing_file_size leaves the cluster": Case("backing_file_size", header("backing_file_offset", CLUSTER - 1)),
    "backing file name empty to C": Case(
        "backing_file_size",
        lambda craft: craft.put(craft.get(craft.header("backing_file_offset")), b"\0"),
        NOBODY,
    ),
    "name right behind the last extension": Case("header extensions", name_at(0), NOBODY),
    "name 1 byte behind it": Case("header extensions", name_at(1)),
    "name 2 bytes behind it": Case("header extensions", name_at(2)),
    "name 3 bytes behind it": Case("header extensions", name_at(3)),
    "name 4 bytes behind it": Case("header extensions", name_at(4)),
    "name 5 bytes behind it": Case("header extensions", name_at(5)),
    "name 6 bytes behind it": Case("header extensions", name_at(6)),
    "name 7 bytes behind it": Case("header extensions", name_at(7)),
    "name 9 bytes behind it": Case("header extensions", name_at(9), NOBODY),
    "an extension longer than the room": Case("header extensions", length(qcow2.EXTENSION_BITMAPS, CLUSTER)),
    "a known extension twice": Case("header extensions", doubled, DIRTMAP),
    "an unknown extension": Case("header extensions", extension(0x12345678, b"unknown"), NOBODY),
    "backing file format of 16 bytes": Case(
        "backing file format", extension(qcow2.EXTENSION_BACKING_FORMAT, b"x" * 16), INFO, "bare"
    ),
    "backing file format of 15 bytes": Case(
        "backing file format", extension(qcow2.EXTENSION_BACKING_FORMAT, b"x" * 15), NOBODY, "bare"
    ),
    "data file with an empty name": Case("external data file", nameless, READ, "data file, no bitmaps"),
    "data file with a name that is empty to C": Case(
        "external data file", text(qcow2.EXTENSION_DATA_FILE, b"\0data"), READ, "data file"
    ),
    "no data file": Case("external data file", header("incompatible_features", 1 << 2), READ),
    "encryption header without encryption": Case(
        "full disk encryption header", header("crypt_method", 0), INFO, "encrypted"
    ),
    "encryption without its header": Case("full disk encryption header", header("crypt_method", 2)),
    "encryption header of 8 bytes": Case(
        "full disk encryption header", length(qcow2.EXTENSION_CRYPTO, 8), INFO, "encrypted"
    ),
    "encryption header askew": Case("full disk encryption header.offset", crypto("offset", 520), INFO, "encrypted"),
    "encryption header too short": Case("full disk encryption header.length", crypto("length", 591), INFO, "encrypted"),
    "encryption header too long": Case(
        "full disk encryption header.length", crypto("length", qcow2.MAX_CRYPTO_BYTES + 1), DIRTMAP, "encrypted"
    ),
    "encryption header of another magic": Case(
        "LUKS header", lambda craft: craft.put(luks(craft), b"luks"), INFO, "encrypted"
    ),
    "encryption header of version 2": Case(
        "LUKS header", lambda craft: craft.put(luks(craft) + 6, b"\0\2"), INFO, "encrypted"
    ),
    "namespace without a UUID": Case("uuid", extension(qcow2.EXTENSION_NAMESPACE, bytes(15)), DIRTMAP),
    "namespace without a name": Case("name", extension(qcow2.EXTENSION_NAMESPACE, bytes(16)), DIRTMAP),
    "namespace with a NUL": Case("name", extension(qcow2.EXTENSION_NAMESPACE, bytes(16) + b"\0a"), DIRTMAP),
    "namespace": Case("name", extension(qcow2.EXTENSION_NAMESPACE, bytes(16) + b"a"), NOBODY),
    # The bitmaps extension.
    "the bit without an extension": Case("bitmaps extension", without_extension, DIRTMAP),
    "bitmaps extension of 16 bytes": Case("length", length(qcow2.EXTENSION_BITMAPS, 16)),
    "void bitmaps extension of 16 bytes": Case(
        "length", both(length(qcow2.EXTENSION_BITMAPS, 16), header("autoclear_features", 0))
    ),
    "reserved": Case("reserved", bitmaps("reserved", 1)),
    "void, reserved": Case("reserved", both(bitmaps("reserved", 1), header("autoclear_features", 0)), NOBODY),
    "nb_bitmaps 0": Case("nb_bitmaps", bitmaps("nb_bitmaps", 0)),
    "nb_bitmaps above the limit": Case("nb_bitmaps", bitmaps("nb_bitmaps", 65536)),
    "nb_bitmaps too low": Case("nb_bitmaps", bitmaps("nb_bitmaps", 1)),
    "nb_bitmaps too high": Case("nb_bitmaps", one_too_many),
    "directory_size 0": Case("directory_size", bitmaps("directory_size", 0)),
    "directory_size above the limit": Case(
        "directory_size", bitmaps("directory_size", directory.MAX_DIRECTORY_SIZE + 1)
    ),
    "directory_size too small": Case("directory_size", bitmaps("directory_size", 40)),
    "directory_offset 0": Case("directory_offset", bitmaps("directory_offset", 0)),
    "directory_offset askew": Case("directory_offset", bitmaps("directory_offset", CLUSTER + 512)),
    "directory past the end": Case("directory_offset", at(lambda c: c.bitmaps("directory_offset"), end_of)),
    # The directory and the tables.
    "an entry longer than the directory": Case("bitmap directory entry", entry("name_size", 1023)),
    "type 2": Case("type", entry("type", 2)),
    "an unknown flag": Case("flags", entry("flags", 4)),
    "all known flags": Case("flags", entry("flags", 3), NOBODY),
    "extra data": Case("extra_data_size", both(entry("extra_data_size", 8), bitmaps("directory_size", 72))),
    "a name of 1,024 bytes": Case("name", both(entry("name_size", 1024), bitmaps("directory_size", 32 + 1048))),
    "an empty name": Case("name", both(entry("name_size", 0), bitmaps("directory_size", 32 + 24)), DIRTMAP),
    "a name that is empty to C": Case("name", named(1, b"\0b"), WRITE),
    "a name that is a NUL": Case("name", named(1, b"\0"), WRITE),
    "a name with a NUL in it": Case("name", named(1, b"b\0c"), DIRTMAP),
    "a name that is another's to C": Case("name", named(1, b"a\0c")),
    "a name twice": Case("name", named(1, b"a")),
    "a name twice, the second in use": Case("name", both(named(1, b"a"), entry("flags", 1)), DIRTMAP),
    "granularity_bits 8": Case("granularity_bits", entry("granularity_bits", 8)),
    "granularity_bits 32": Case("granularity_bits", entry("granularity_bits", 32)),
    "in use, 2**43 granules": Case("granularity_bits", huge(52), INFO, "large clusters"),
    "in use, of a disk of 32 TiB": Case("granularity_bits", huge(45), NOBODY, "large clusters"),
    "table_offset 0": Case("table_offset", entry("table_offset", 0)),
    "table_offset askew": Case("table_offset", entry("table_offset", CLUSTER + 512)),
    "table past the end": Case("table_offset", at(lambda c: c.entry(1, "table_offset"), end_of), DIRTMAP),
    "table_size 0": Case("table_size", entry("table_size", 0)),
    "table_size above the limit": Case("table_size", entry("table_size", directory.MAX_DATA_BYTES // CLUSTER + 1)),
    "table_size of another disk": Case("table_size", entry("table_size", 2)),
    "in use, table_size of another disk": Case("table_size", both(entry("table_size", 2), entry("flags", 1)), NOBODY),
    "a table entry with a low reserved bit": Case("table", table(1 << 8)),
    "a table entry with a high reserved bit": Case("table", table(1 << 56)),
    "a table entry with bit 0 and an offset": Case("table", table(CLUSTER + 1)),
    "a table entry askew": Case("table", table(CLUSTER + 512)),
    "a table entry of all ones": Case("table", table(1), NOBODY),
    "in use, a bad table entry": Case("table", both(table(1 << 8), entry("flags", 1)), DIRTMAP),
    "bits past the end": Case("table", at(lambda c: c.table(1), end_of), DIRTMAP),
    "bits over the L1 table": Case(
        "bitmap", at(lambda c: c.table(1), lambda c: c.get(c.header("l1_table_offset"))), DIRTMAP
    ),
}


def luks(craft: Craft) -> int:
    return craft.get(Place(craft.extension(qcow2.EXTENSION_CRYPTO) + 8, 8))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Craft]]:
    """The sound images, each in a folder with the files that it needs."""
    folder = tmp_path_factory.mktemp("bases")
    qemu.create(folder / "back", 64 * MIB)
    plain = folder / "plain.qcow2"
    qemu.create(plain, 64 * MIB, f"cluster_size={CLUSTER}", "-b", folder / "back", "-F", "qcow2")
    made = {"plain": plain, "bare": folder / "bare.qcow2", "data file, no bitmaps": folder / "data1.qcow2"}
    made |= {"data file": folder / "data2.qcow2", "encrypted": folder / "encrypted.qcow2"}
    qemu.create(made["bare"], 64 * MIB, f"cluster_size={CLUSTER}")
    for number, name in ((1, "data file, no bitmaps"), (2, "data file")):
        raw = folder / f"data{number}"
        qemu.create(made[name], 64 * MIB, f"cluster_size={CLUSTER},data_file={raw},data_file_raw=on")
    made["large clusters"] = folder / "large.qcow2"
    qemu.create(made["large clusters"], MIB, "cluster_size=2M")
    qemu.qemu_img("bitmap", "--add", "-g", "512", made["large clusters"], "a")
    qemu.create(made["encrypted"], MIB, f"cluster_size={CLUSTER}", encrypted=True)
    for path in (plain, made["data file"]):
        for name in "ab":
            qemu.qemu_img("bitmap", "--add", path, name)
    qemu.qemu_io(plain, "write -q 0 64k")
    qemu.qemu_img("snapshot", "-c", "s", plain)
    return {name: (path, Craft(path)) for name, path in made.items()}


def refusals_of_qemu(path: Path) -> set[str]:
    """Which of its ways to open the image fail. Opening for writing changes the image."""
    ways = {
        "info": ["qemu-img", "info", "-f", "qcow2", path],
        "read": ["qemu-io", "-r", "-f", "qcow2", "-c", "quit", path],
        "write": ["qemu-io", "-f", "qcow2", "-c", "quit", path],
    }
    return {
        way
        for way, command in ways.items()
        if subprocess.run(command, capture_output=True, check=False, timeout=60).returncode
    }


@pytest.mark.parametrize("name", CASES)
def test_qemu_and_dirtmap_refuse_the_same(name: str, bases: dict[str, tuple[Path, Craft]]) -> None:
    case = CASES[name]
    place, sound = bases[case.base]
    craft = sound.copy()
    case.change(craft)
    assert craft.data != sound.data
    path = place.with_name("changed.qcow2")  # where its backing file and its data file are
    craft.save(path)
    refused = False
    try:
        dm.open(path).close()
    except dm.FormatError:
        refused = True
    assert refused == bool(case.verdict)
    found = refusals_of_qemu(path)
    if case.base == "encrypted":
        found -= set(READ)  # they want a password in any case
        assert found == set(case.verdict) - set(READ) - set(DIRTMAP)
    else:
        assert found == set(case.verdict) - set(DIRTMAP)


def test_every_row_of_the_tables_has_an_image() -> None:
    chapter = SPEC.partition(" What a reader must refuse\n\n")[2].partition("\n### ")[0]
    listed = re.findall(r"^\| ([a-z_. A-Z0-9]+) \| [^|]+ \| [^|]*(?:QEMU|dirtmap)[^|]* \| [^|]+ \|$", chapter, re.M)
    assert len(listed) > 30
    assert set(listed) - {case.field for case in CASES.values()} == {"tables of all bitmaps"}  # see test_hostile
