"""The CRC32C is that of another implementation."""

from __future__ import annotations

import subprocess
import sys

import crc32c
import google_crc32c
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dirtmap.fmt import digest


@given(st.binary(max_size=300), st.binary(max_size=10))
def test_crc32c(data: bytes, before: bytes) -> None:
    expected = crc32c.crc32c(data)
    assert digest.crc32c(data) == expected
    assert digest.crc32c(np.frombuffer(b"x" + data, np.uint8)[1:]) == expected, "an array is not copied"
    assert digest.crc32c_after(digest.crc32c(before), data) == crc32c.crc32c(before + data)


def test_crc32c_of_the_source() -> None:
    """RFC 3720, appendix B.4."""
    assert digest.crc32c(b"123456789") == 0xE3069283
    assert digest.crc32c(bytes(32)) == 0x8A9136AA
    assert digest.crc32c(bytes(range(32))) == 0x46DD794E


def test_crc32c_is_compiled_and_costs_no_slow_import() -> None:
    assert google_crc32c.implementation == "c"
    code = "import sys, dirtmap.fmt.digest\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"importlib.metadata", "hashlib", "numpy", "argparse"} & set(done.stdout.split())
