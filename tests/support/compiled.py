"""What is compiled once for each level of processors, tried at each that the one at hand has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


def levels(best: int, use: Callable[[int], None]) -> Any:
    """A fixture of a test module: the loops run at one level after the other, and at the best one again in the end.

    Args:
        best: the highest level that this processor has.
        use: makes all that follows run at a level.
    """

    @pytest.fixture(scope="module", params=range(best + 1), ids="level={}".format)
    def level(request: pytest.FixtureRequest) -> Iterator[int]:
        use(request.param)
        yield request.param
        use(best)

    return level
