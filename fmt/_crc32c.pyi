"""The types of `_crc32c.pyx`. What arguments mean is said in `digest`."""

from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Octets: TypeAlias = NDArray[np.unsignedinteger[Any]] | bytes | bytearray | memoryview

BEST_LEVEL: Final[int]

def use_level(level: int) -> None: ...
def crc32c(data: _Octets, /) -> int: ...
def crc32c_after(before: int, data: _Octets, /) -> int: ...
def crc32c_each(data: _Octets, size: int, sums: NDArray[np.int64]) -> None: ...
