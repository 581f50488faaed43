"""The face of the engine exports every type that its functions take or return."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import dirtmap.engine as dm

ENGINE = Path(str(dm.__file__)).parent
# Whoever writes a kind of container is inside: what it takes is of the rooms.
INSIDE = {"Kind", "Handle.track_with"}
# Arrays of numpy; a class of that name elsewhere is another thing.
ALIASES = {"Words"}


def our_classes() -> set[str]:
    found = set()
    for path in [*ENGINE.rglob("*.py"), *(ENGINE.parent / "fmt").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        found |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    return found


def annotations(thing: object) -> str:
    try:
        signature = inspect.signature(thing)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    parts = [str(parameter.annotation) for parameter in signature.parameters.values()]
    return " ".join([*parts, str(signature.return_annotation)])


def test_every_type_that_is_met_is_exported() -> None:
    ours, missing = our_classes(), []
    for name in dm.__all__:
        thing = getattr(dm, name)
        if name in INSIDE:
            continue
        members = {name: thing} if inspect.isroutine(thing) else {}
        if inspect.isclass(thing):
            members = {
                f"{name}.{key}": member.fget if isinstance(member, property) else member
                for key, member in vars(thing).items()
                if not key.startswith("_")
            }
        for where, member in members.items():
            if where in INSIDE:
                continue
            for word in re.findall(r"\w+", annotations(member)):
                if word in ours - ALIASES and word not in dm.__all__:
                    missing.append(f"{where}: {word}")
    assert not missing
