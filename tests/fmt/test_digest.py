"""The CRC32C is that of another implementation, at each level that it is compiled for and this processor has."""

from __future__ import annotations

import random
import subprocess
import sys

import crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.compiled import levels

from dirtmap.fmt import _crc32c, digest

level = levels(_crc32c.BEST_LEVEL, _crc32c.use_level)
at_each_level = pytest.mark.usefixtures("level")


@at_each_level
@given(st.binary(max_size=300), st.binary(max_size=10))
def test_crc32c(data: bytes, before: bytes) -> None:
    expected = crc32c.crc32c(data)
    assert digest.crc32c(data) == expected
    assert digest.crc32c(np.frombuffer(b"x" + data, np.uint8)[1:]) == expected, "an array is not copied"
    assert digest.crc32c_after(digest.crc32c(before), data) == crc32c.crc32c(before + data)


@at_each_level
@given(st.integers(1, 70), st.integers(0, 10), st.randoms(use_true_random=False))
def test_crc32c_of_each(size: int, count: int, random: random.Random) -> None:
    data = random.randbytes(1 + size * count)[1:]
    sums = np.full(count + 2, -1)
    digest.crc32c_each(memoryview(data), size, sums[1:-1])
    expected = [crc32c.crc32c(data[at : at + size]) for at in range(0, len(data), size)]
    assert sums.tolist() == [-1, *expected, -1]


@at_each_level
def test_crc32c_of_more_than_one_thread_waits_for() -> None:
    data, size = np.random.default_rng(1).bytes(1025 * 4096), 4096
    sums = np.zeros(1025, np.int64)
    digest.crc32c_each(memoryview(data), size, sums)
    assert sums.tolist() == [crc32c.crc32c(data[at : at + size]) for at in range(0, len(data), size)]
    assert digest.crc32c(data) == crc32c.crc32c(data)


@pytest.mark.parametrize(
    ("length", "size", "count"), [(8, 4, 1), (8, 4, 3), (8, 3, 2), (0, 4, 1), (8, -4, 2), (8, 0, 1)]
)
def test_sums_of_another_length_are_refused(length: int, size: int, count: int) -> None:
    with pytest.raises(ValueError, match="times"):
        digest.crc32c_each(memoryview(bytes(length)), size, np.zeros(count, np.int64))


def test_sums_of_another_kind_are_refused() -> None:
    for sums in (np.zeros(2, np.int32), np.zeros(2), np.zeros((2, 1), np.int64)):
        with pytest.raises(TypeError, match="int64"):
            digest.crc32c_each(memoryview(bytes(8)), 4, sums)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read-only"):
        digest.crc32c_each(memoryview(bytes(8)), 4, np.frombuffer(bytes(16), np.int64))


@at_each_level
def test_crc32c_of_the_source() -> None:
    """RFC 3720, appendix B.4."""
    assert digest.crc32c(b"123456789") == 0xE3069283
    assert digest.crc32c(bytes(32)) == 0x8A9136AA
    assert digest.crc32c(bytes(range(32))) == 0x46DD794E


def test_crc32c_costs_no_slow_import() -> None:
    code = "import sys, dirtmap.fmt.digest\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"importlib.metadata", "hashlib", "numpy", "argparse"} & set(done.stdout.split())
