"""A store cut short, filled with garbage, or with areas that were swapped: what can be read has lost no dirty bit."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from support.damage import Sound, found_damage, use

from dirtmap.fmt import store
from dirtmap.fmt.errors import Error


def test_store_cut_at_every_sector(sound: Sound) -> None:
    for length in range(0, len(sound.data), 512):
        sound.write(sound.data[:length])
        answers = use(sound)
        assert found_damage(answers) or answers["names"] == set(sound.bits)


def test_store_cut_and_filled_up_with_zeros(sound: Sound) -> None:
    for length in range(0, len(sound.data), 512):
        sound.write(sound.data[:length].ljust(len(sound.data), b"\0"))
        use(sound)


@pytest.mark.parametrize("seed", range(6))
def test_garbage_in_places(sound: Sound, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        damaged = bytearray(sound.data)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(damaged))
            length = rng.choice([1, 4, 8, 100, 512, 4096, 20000])
            garbage = rng.choice([rng.randbytes(length), bytes(length), b"\xff" * length])
            damaged[at : at + length] = garbage[: len(damaged) - at]
        sound.write(damaged)
        use(sound)


def test_nothing_but_garbage(sound: Sound) -> None:
    rng = random.Random(7)
    for _ in range(100):
        data = store.MAGIC + rng.randbytes(rng.choice([0, 1, 91, 92, 4092, 16380, 60000]))
        sound.write(data)
        answers = use(sound)
        assert not answers["names"]
        assert isinstance(answers["change"], Error)


def test_areas_swapped_with_each_other(sound: Sound) -> None:
    """A cluster that was written to the wrong place, or never: old content, sound in itself."""
    clusters = range(store.RESERVED, len(sound.data) - 4096, 4096)
    for one, other in pairwise(clusters):
        damaged = bytearray(sound.data)
        damaged[one : one + 4096], damaged[other : other + 4096] = (
            sound.data[other : other + 4096],
            sound.data[one : one + 4096],
        )
        sound.write(damaged)
        use(sound)
