"""A store with a flipped bit in any area behind the headers: an error that says where, and never a lost dirty bit."""

from __future__ import annotations

import re

import crc32c
import pytest
from support.damage import Sound, flipped, found_damage, glance, use

import dirtmap.engine as dm
from dirtmap.fmt.errors import Error
from dirtmap.fmt.store import Area

METADATA = [
    "namespace table",
    "namespace record",
    "directory owner",
    "directory entry",
    "bits",
    "space map",
    "released clusters",
]


def _numbers(sound: Sound) -> set[int]:
    """The bits of all fields that say where something is, how long it is, or how many there are."""
    sound.write(sound.data)
    fields = [field for structure in dm.dump(sound.path)["structures"] for field in structure.get("fields", [])]
    telling = [field for field in fields if re.search("offset|length|size|first|count|nb_", field["name"])]
    return {bit for f in telling for bit in range(f["offset"] * 8, (f["offset"] + f["length"]) * 8)}


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", METADATA)
def test_flipped_bit_of_anything_else_is_an_error_at_most(sound: Sound, kind: str, step: int) -> None:
    """Every bit of the table, the records, the directories, the bits, the space map's root and the released runs.

    Each time all bitmaps are read and the store is checked; whoever else reads or writes has a go at those bits that
    lead somewhere, and at one in ``step`` of the others.
    """
    regions = [region for region in sound.regions if region.name.split(":")[0] == kind]
    assert regions
    numbers = _numbers(sound)
    for region in regions:
        bits = range(region.start * 8, region.stop * 8)
        if kind == "bits":  # a cluster of which little means something
            bits = sorted({*bits[:: step * 131], *bits[: 8 * 8]})
        for bit in flipped(sound, bits):
            whole = bit in numbers or bit % step == 0
            answers = use(sound) if whole else glance(sound)
            assert found_damage(answers), f"bit {bit} of {region.name}"
            assert not whole or answers["dump"]["faults"], f"bit {bit} of {region.name}"


@pytest.mark.parametrize("step", [127, pytest.param(1, marks=pytest.mark.long)])
def test_flipped_bit_of_a_space_map_leaf_is_an_error_at_most(sound: Sound, step: int) -> None:
    region = sound.region("space map leaf 0")
    used = range(region.start * 8, region.start * 8 + 64)
    for bit in flipped(sound, sorted({*used, *range(region.start * 8, region.stop * 8, step)})):
        answers = use(sound)
        assert answers["names"] == set(sound.bits), "readers do not need it"
        assert found_damage(answers), f"bit {bit}"
        assert isinstance(answers["change"], Error), "a writer does not trust it"


def test_every_flipped_bit_of_a_space_map_leaf_is_noticed(sound: Sound) -> None:
    region = sound.region("space map leaf 0")
    snapshot_area = Area(
        region.start, region.stop - region.start, crc32c.crc32c(sound.data[region.start : region.stop])
    )
    leaf = bytearray(sound.data[region.start : region.stop])
    for bit in range(len(leaf) * 8):
        leaf[bit // 8] ^= 1 << bit % 8
        assert crc32c.crc32c(leaf) != snapshot_area.checksum
        leaf[bit // 8] ^= 1 << bit % 8


def test_check_names_each_kind_of_damage_by_its_place(sound: Sound) -> None:
    for kind, where in (
        ("header copy 2 (slot A)", "header copy 2"),
        ("namespace table", "namespace table"),
        ("namespace record: node 'a'", "namespace table, keys "),
        ("directory entry: node 'a', bitmap 'monday'", "directory of node 'a'"),
        ("bits: node 'a', bitmap 'monday'", "bitmap 'monday'"),
        ("space map", "space map"),
        ("space map leaf 0", "space map leaf 0"),
        ("released clusters", "released clusters"),
    ):
        region = sound.region(kind)
        for _ in flipped(sound, [region.start * 8 + 3]):
            findings = dm.check(sound.path).findings
            assert any(where in finding.where for finding in findings), (kind, findings)
            severity = "note" if kind.startswith("header") else "corruption"
            assert severity in {finding.severity for finding in findings}
