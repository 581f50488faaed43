"""docs/backup.md says what there is, and its Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.backups import back_up, qcow2_disk

from dirtmap.tools import backup
from dirtmap.tools.backup import creating, pruning, state
from dirtmap.tools.backup.document import Backup

TEXT = (Path(__file__).parents[2] / "docs" / "backup.md").read_text()


def rows(heading: str) -> list[str]:
    """What the first column of the table below a line says in code."""
    (table,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_the_schema(tmp_path: Path) -> None:
    made = back_up(tmp_path / "repo", qcow2_disk(tmp_path / "disk.qcow2"))
    assert rows("key of `backup`") == list(made.document())
    assert len(Backup.__slots__) == len(made.document())


def test_the_reasons() -> None:
    there = {creating.FIRST, creating.RENAMED, creating.RESIZED, creating.BROKEN, pruning.PRUNED}
    assert set(rows("`reason`")) == there | {state.MISSING, state.UNUSABLE, state.ALL_DIRTY}


def test_the_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    qcow2_disk(tmp_path / "disk.qcow2")
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    seen: list[str] = []
    exec(code, {"look_into": seen.append})
    assert capsys.readouterr().out == f"disk.qcow2 1 full first {(3 << 20) + 2 * 65536}\n"
    assert len(seen) == 1
    assert (tmp_path / "again.raw").exists()


def test_every_name_is_there_and_the_help_needs_none() -> None:
    assert all(getattr(backup, name) for name in backup.__all__)
    assert set(backup.__all__) <= set(dir(backup))
    with pytest.raises(AttributeError):
        _ = backup.nothing
    code = "import dirtmap.tools.backup.commands, sys; assert not {'numpy', 'subprocess', 'hashlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
