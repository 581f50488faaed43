"""The demonstration runs to its end, on a fresh folder, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from support.cli import COMMAND

DEMO = Path(__file__).parent.parent.parent / "demo.sh"


def test_demo(tmp_path: Path) -> None:
    path = f"{Path(COMMAND).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", DEMO],
        env=os.environ | {"PATH": path, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\nDone.\n")
    assert done.stdout.count("(no difference)") == 3
    assert "is inconsistent and cannot be used" in done.stdout
    assert "Images are identical." in done.stdout
    assert list(tmp_path.iterdir()) == []
