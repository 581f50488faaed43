"""A store with numbers that lie under checksums that are right: bounded time and memory, and what is mended."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import crc32c
import numpy as np
import pytest
from support.damage import Forged, Sound, attempt, bounded, change, read_everything, set_fields, use

import dirtmap.engine as dm
from dirtmap.engine.host.kind import Address
from dirtmap.fmt import geometry, store
from dirtmap.fmt.directory import build_directory, parse_entries
from dirtmap.fmt.errors import Error
from dirtmap.fmt.parsers.directory import DIRECTORY_ENTRY
from dirtmap.fmt.parsers.store import AREA, HEADER, LEAF, NAMESPACES_EXTENSION, NODE_POINTER, RECORD, RUN
from dirtmap.fmt.store import Area


def _extremes(size: int) -> list[int]:
    most = 256**size - 1
    near = [0, 1, 2, 7, 8, 255, 4096, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 1 << 62, 1 << 63, most // 2, most - 7, most]
    return sorted({value for value in near if value <= most})


def _forgeries() -> Iterator[tuple[str, Callable[[Forged], None]]]:
    """Each numeric field of each structure at its limits and beyond."""
    for part, structure in (
        ("header", HEADER),
        ("namespaces", NAMESPACES_EXTENSION),
        ("space", AREA),
        ("released", AREA),
    ):
        for field in structure.fields:
            if field.size < 16 and field.name not in ("magic", "checksum"):
                for value in _extremes(field.size):
                    yield (
                        f"{part}.{field.name}={value:#x}",
                        lambda f, part=part, name=field.name, value=value: f.fields.update({part: {name: value}}),
                    )
    for target, structure in (
        ("record_fields", RECORD),
        ("pointer_fields", NODE_POINTER),
        ("leaf_fields", LEAF),
    ):
        for field in structure.fields:
            if field.size < 16 and field.name != "checksum":
                for value in _extremes(field.size):
                    yield (
                        f"{target}.{field.name}={value:#x}",
                        lambda f, target=target, name=field.name, value=value: getattr(f, target).update({name: value}),
                    )
    for field in DIRECTORY_ENTRY.fields:
        for value in _extremes(field.size):
            yield (
                f"entry.{field.name}={value:#x}",
                lambda f, name=field.name, value=value: set_fields(
                    DIRECTORY_ENTRY, f.directories[b"a"], 0, {name: value}
                ),
            )
    for field in RUN.fields:
        for value in _extremes(field.size):
            yield (
                f"run.{field.name}={value:#x}",
                lambda f, name=field.name, value=value: set_fields(RUN, f.released, 0, {name: value}),
            )
    for name in ("table", "root", "released", "leaf", "records"):
        for filler in (0, 0xFF, 0x55):
            yield (f"{name} of {filler:#x}", lambda f, name=name, filler=filler: _fill(f, name, filler))
    yield "all free", lambda f: _fill(f, "leaf", 0, then={"free": 32768})
    yield "all used", lambda f: _fill(f, "leaf", 0xFF, then={"free": 0})
    yield "headers free", lambda f: _free_headers(f)
    yield "all records twice", lambda f: [leaf.extend(leaf) for leaf in f.leaves]
    yield (
        "all records in each leaf",
        lambda f: f.leaves.__setitem__(slice(None), [[record for leaf in f.leaves for record in leaf]] * 3),
    )
    yield "two pointers to a leaf", lambda f: setattr(f.pointers[1], "offset", f.pointers[0].offset)
    yield "pointers that lead back", _lead_back
    yield "pointers to nothing", lambda f: _lead_back(f, zeros=True)
    yield (
        "shared directory",
        lambda f: f.leaves[1].__setitem__(
            0, replace(f.leaves[1][0], directory=f.leaves[0][0].directory, nb_bitmaps=f.leaves[0][0].nb_bitmaps)
        ),
    )


def _fill(forged: Forged, name: str, filler: int, then: dict[str, int] | None = None) -> None:
    if name == "records":
        forged.leaves = [[] for _ in forged.leaves]
        return
    raw = getattr(forged, name)
    raw[:] = bytes([filler]) * len(raw)
    forged.table_forged = name == "table"
    forged.leaf_fields.update(then or {})


def _lead_back(forged: Forged, *, zeros: bool = False) -> None:
    """A table of as many pointers as one can have, on as many levels, all of them to itself or to zeros.

    No checksum of a table can lead back to it; so those of the zeros are right, and those of itself are not.
    """
    count = store.MAX_NODE_BYTES // NODE_POINTER.size
    length = count * NODE_POINTER.size
    start = geometry.align_up(len(forged.raw), 4096)
    forged.raw += bytes(start + 2 * store.MAX_NODE_BYTES - len(forged.raw))
    place = (start + (store.MAX_NODE_BYTES if zeros else 0), length, crc32c.crc32c(bytes(length)))
    forged.table_forged = True
    forged.table = bytearray(b"".join(NODE_POINTER.pack(number, 1, *place) for number in range(count)))
    forged.header = replace(forged.header, table=Area(start, length, 0), depth=store.MAX_DEPTH)


def _free_headers(forged: Forged) -> None:
    forged.leaf[0] &= 0xF0
    forged.leaf_fields["free"] = 32768 - sum(map(int.bit_count, forged.leaf))


@contextmanager
def little_memory(extra: int = 256 << 20) -> Iterator[None]:
    """While active, this process may take that many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def use_forged(sound: Sound) -> None:
    """All that must not take long, or much memory, however large the numbers are.

    Bits are not read: a bitmap of 512 MiB is one that the format allows.
    """
    with bounded(2):
        attempt(lambda: dm.describe(sound.path))
    with bounded(2):
        attempt(lambda: dm.check(sound.path))
    with bounded(2):
        attempt(lambda: dm.dump(sound.path))
    for node in ("a", "b", "empty"):
        with bounded(2):
            image = attempt(lambda node=node: dm.open(Address(sound.path, node)))
            if isinstance(image, Error):
                continue
            with image:
                attempt(lambda image=image: list(image))
                attempt(lambda image=image: _add(image))
    with bounded(4):
        attempt(lambda: dm.check(sound.path, repair="all"))
    with bounded(2):
        attempt(lambda: dm.check(sound.path))


def _add(image: dm.Namespace) -> None:
    with image.transaction() as bitmaps:
        bitmaps["new"] = dm.Bitmap(image.size, 1 << 31)


def test_forging_nothing_changes_nothing(sound: Sound) -> None:
    sound.write(Forged(sound).data())
    assert not dm.check(sound.path).findings
    assert use(sound)["names"] == set(sound.bits)


@pytest.mark.parametrize("part", ["header", "namespaces", "space", "released", "record_fields", "pointer_fields",
                                  "leaf_fields", "entry", "run", "other"])  # fmt: skip
def test_numbers_that_lie(sound: Sound, part: str) -> None:
    parts = (
        "header",
        "namespaces",
        "space",
        "released",
        "record_fields",
        "pointer_fields",
        "leaf_fields",
        "entry",
        "run",
    )
    count = 0
    for name, forge in _forgeries():
        if (name.split(".")[0] if name.split(".")[0] in parts else "other") != part:
            continue
        forged = Forged(sound)
        forge(forged)
        sound.write(forged.data())
        try:
            with little_memory():
                use_forged(sound)
        except BaseException as error:
            error.add_note(f"forged: {name}")
            raise
        count += 1
    assert count


def test_forged_header_that_frees_itself_is_not_written_over(sound: Sound) -> None:
    forged = Forged(sound)
    _free_headers(forged)
    data = forged.data()
    sound.write(data)
    with pytest.raises(dm.FormatError, match="headers' clusters are marked as free"):
        change(sound.path)
    assert sound.read() == data


@pytest.mark.parametrize("length", [1 << 32, pytest.param(1 << 40, marks=pytest.mark.long), 1 << 45])
def test_long_areas_of_a_sparse_file(sound: Sound, length: int) -> None:
    """The file's length, which costs nothing, backs no claim."""
    cases = [
        lambda f: f.fields.update(space={"length": 4 << 20}),
        lambda f: f.fields.update(released={"length": 16 << 20}),
        lambda f: f.fields.update(namespaces={"length": store.MAX_NODE_BYTES, "depth": 8}),
        lambda f: f.pointer_fields.update(length=2**32 - 1),
        lambda f: f.pointer_fields.update(length=128 << 20),
        lambda f: f.record_fields.update(directory_length=2**32 - 1),
        lambda f: f.record_fields.update(directory_length=128 << 20),
        lambda f: f.record_fields.update(size=2**63 - 1),
    ]
    for forge in cases:
        forged = Forged(sound)
        forge(forged)
        sound.write(forged.data())
        with suppress(OSError):
            os.truncate(sound.path, length)
        with little_memory():
            use_forged(sound)
        sound.write(sound.data)


def test_sparse_areas_with_right_checksums(sound: Sound) -> None:
    """Zeros that nobody stored, with the checksum of so many zeros."""
    zeros = bytes(128 << 20)
    for part, length in (("pointer", 128 << 20), ("directory", 128 << 20), ("released", 16 << 20), ("space", 4 << 20)):
        forged = Forged(sound)
        start, checksum = 1 << 30, crc32c.crc32c(memoryview(zeros)[:length])
        where = {"offset": start, "length": length, "checksum": checksum}
        if part == "pointer":
            forged.pointer_fields.update(where)
        elif part == "directory":
            forged.record_fields.update({f"directory_{name}": value for name, value in where.items()}, nb_bitmaps=65535)
        else:
            forged.fields[part] = where
        sound.write(forged.data())
        os.truncate(sound.path, 1 << 34)
        with little_memory():
            use_forged(sound)
        sound.write(sound.data)


def test_leak_is_found_and_reclaimed(sound: Sound) -> None:
    forged = Forged(sound)
    used = forged.header.clusters - 1
    forged.leaf[used // 8] |= 0xF << used % 8 & 0xFF
    forged.leaf_fields["free"] = 32768 - sum(map(int.bit_count, forged.leaf))
    sound.write(forged.data())
    report = dm.check(sound.path)
    assert report.leaks > 0
    assert report.corruptions == 0
    report = dm.check(sound.path, repair="leaks")
    assert report.leaks == 0
    assert report.leaks_fixed > 0
    assert read_everything(sound) == sound.bits.keys()
    assert not dm.check(sound.path).findings


def _used_but_free(forged: Forged) -> None:
    cluster = forged.header.table.offset // 4096
    forged.leaf[cluster // 8] &= ~(1 << cluster % 8) & 0xFF
    forged.leaf_fields["free"] = 32768 - sum(map(int.bit_count, forged.leaf))


def _shared_bits(forged: Forged) -> None:
    (_, entry), *others = parse_entries(bytes(forged.directories[b"a"]))
    assert entry.name == b"monday"
    twin = replace(entry, name=b"clean")
    entries = [entry, *(twin if other.name == b"clean" else other for _, other in others)]
    forged.directories[b"a"] = bytearray(build_directory(entries))
    (record,) = forged.leaves[forged.first]
    area = record.directory._replace(length=store.OWNER_SIZE + len(forged.directories[b"a"]))
    forged.leaves[forged.first] = [replace(record, directory=area)]


def _released_but_used(forged: Forged) -> None:
    set_fields(RUN, forged.released, 0, {"first": forged.header.table.offset // 4096, "count": 1})


def _too_short(forged: Forged) -> None:
    forged.fields.update(
        header={"clusters": forged.header.space.offset // 4096}, released={"offset": 0, "length": 0, "checksum": 0}
    )


@pytest.mark.parametrize(
    ("forge", "where", "what"),
    [
        (_used_but_free, "clusters", "in use, but marked as free"),
        (_shared_bits, "bits of node 'a', bitmap 'clean'", "overlaps bits of node 'a', bitmap 'monday'"),
        (_released_but_used, "released clusters", "overlaps namespace table|out of range"),
        (_too_short, "space map", "behind the last cluster"),
        (lambda f: f.fields.update(namespaces={"namespaces": 4}), "namespaces extension.namespaces", "there are 3"),
        (
            lambda f: f.fields.update(namespaces={"namespaces": 1}),
            "namespaces extension.namespaces",
            "1, but there are 3",
        ),
        (
            lambda f: f.fields.update(namespaces={"namespaces": 0}),
            "namespaces extension.namespaces",
            "0, but there are 3",
        ),
        (lambda f: f.leaf_fields.update(free=3), "space map[0].free", "are free"),
    ],
)
def test_contradictions_are_found_and_mended(
    sound: Sound, forge: Callable[[Forged], None], where: str, what: str
) -> None:
    forged = Forged(sound)
    forge(forged)
    sound.write(forged.data())
    findings = dm.check(sound.path).findings
    assert any(where in f.where and re.search(what, f.what) and f.severity == "corruption" for f in findings), findings
    expected = dict(sound.bits)
    if forge is _shared_bits:
        expected["a", "clean"] = expected["a", "monday"]
    report = dm.check(sound.path, repair="all")
    assert (report.corruptions, report.leaks, report.dropped) == (0, 0, [])
    assert not dm.check(sound.path).findings
    for (node, name), words in expected.items():
        with dm.open(Address(sound.path, node)) as image:
            assert name == "clean" or np.array_equal(image[name].words, words)
    read_everything(sound)
