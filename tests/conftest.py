"""What every test run needs: the tools to compare with, and how hypothesis searches."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Many examples start a QEMU process each, so neither a deadline nor a rate of examples means anything.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", UNTIMED)
settings.register_profile("ci", UNTIMED, derandomize=True, database=None, print_blob=True)
# Whoever takes locks in an order that could end in a circle fails; child processes as well.
os.environ["DIRTMAP_CHECK_LOCKS"] = "1"
os.environ["PATH"] += ":/usr/sbin:/sbin"  # where mkfs is, and what not every user searches
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_sessionstart() -> None:
    """Ends the run at once where a tool is missing: a skipped comparison would look like a passed one."""
    needed = [line.split() for line in Path(__file__).with_name("tools.txt").read_text().splitlines()]
    missing = [f"{tool} (Debian package {package})" for tool, package in needed if not shutil.which(tool)]
    if missing:
        pytest.exit(f"the tests need {', '.join(missing)}: see `make tools`", returncode=1)


@pytest.fixture(autouse=True)
def no_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine keeps in its default store is none of the tests' business."""
    monkeypatch.setenv("DIRTMAP_STORE", str(tmp_path / "default.dmap"))
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "index"))


@pytest.fixture(autouse=True)
def no_live_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trackers that a test kills leave their live files on a tmpfs; not for good."""
    with tempfile.TemporaryDirectory(prefix="dirtmap-tests-", dir="/dev/shm") as folder:
        monkeypatch.setenv("DIRTMAP_LIVE", folder)
        yield
