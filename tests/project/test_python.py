"""What an embedding program finds in `dirtmap.engine`: its names, what pydoc says of them, what importing it costs."""

from __future__ import annotations

import inspect
import pkgutil
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import dirtmap.engine as dm
from dirtmap import engine
from dirtmap.engine.tracking.options import Options


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pydoc_shows_every_name(tmp_path: Path) -> None:
    text = python("-m", "pydoc", "dirtmap.engine", cwd=tmp_path)
    for name in dm.__all__:
        kinds = (f"\n    class {name}(", f"\n    {name}(", f"\n    {name} = ")
        assert any(kind in text for kind in kinds) or name == "changes", name
    for entry in ("mark(self, offset: ", "take(self, name: ", "find(self, ", "track(self, *, live: "):
        assert f"\n     |  {entry}" in text


def test_importing_and_listing_the_names_import_nothing_else(tmp_path: Path) -> None:
    run = "import sys, dirtmap.engine\nprint(*dir(dirtmap.engine))\nprint(*sys.modules)"
    names, modules = (set(line.split()) for line in python("-c", run, cwd=tmp_path).splitlines())
    assert set(dm.__all__) <= names
    ours = {module for module in modules if module.startswith("dirtmap.")}
    assert ours == {"dirtmap.engine", "dirtmap.fmt", "dirtmap.fmt.errors"}
    assert "numpy" not in modules


@pytest.mark.parametrize("name", dm.__all__)
def test_every_name_is_explained(name: str) -> None:
    thing = getattr(dm, name)
    assert inspect.getdoc(thing)
    for method, member in vars(thing).items() if inspect.isclass(thing) else ():
        if not method.startswith("_") and inspect.isroutine(member):
            assert pydoc.getdoc(member), f"{name}.{method}"


def test_track_explains_its_options() -> None:
    text = inspect.getdoc(dm.Handle.track)
    assert text
    for option in [*Options.__dataclass_fields__, "store"]:
        assert f"\n    {option}: " in text
    assert "$DIRTMAP_LIVE" in text


def test_no_name_is_a_modules_too() -> None:
    """Importing a module sets its name in the package: `dm.scan` was the module once `index scan` had run."""
    assert engine._HOMES.keys().isdisjoint(module.name for module in pkgutil.iter_modules(engine.__path__))
