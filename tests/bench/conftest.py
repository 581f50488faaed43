"""What every benchmark needs."""

from __future__ import annotations

import os
from typing import Any

import pytest
from support.measuring import Against

# What tests look for and users do not pay for.
os.environ.pop("DIRTMAP_CHECK_LOCKS", None)


@pytest.fixture
def against(benchmark: Any, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Against:
    """Measures a call beside others; the module's ``SECTION`` says where in BENCHMARKS.md the row belongs."""

    def say(line: str) -> None:
        with capsys.disabled():
            print(line)

    return Against(benchmark, request.module.SECTION, say)
