"""Writes the modules of `dirtmap.fmt.parsers` from the declarations in `dirtmap.fmt.structures`: see `make parsers`.

construct takes longer to import than a command to do its work, and its parsers are slower than `struct` by far. So it
declares only, and what parses and builds at run time is this plain code. A test holds both against each other.

    python -m dirtmap.fmt.generate store >fmt/parsers/store.py
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import construct

from dirtmap.fmt import structures

_HEAD = '''"""How the structures of `dirtmap.fmt.structures.{name}` are parsed and built.

Made by `make parsers`: do not edit.
"""

from __future__ import annotations

from struct import Struct

from dirtmap.fmt.structure import Field, Structure
'''


class _Declared(NamedTuple):
    """A field: its name, its size in bytes, and the `struct` code of a number or "s"."""

    name: str
    size: int
    code: str


def formats() -> list[str]:
    """Returns the names of the formats that have declarations."""
    return [module.name for module in pkgutil.iter_modules(structures.__path__)]


def declarations(name: str) -> dict[str, Any]:
    """Returns what the format of that name declares: each `construct.Struct`, by the name of its constant."""
    module = importlib.import_module(f"{structures.__name__}.{name}")
    return {constant: value for constant, value in vars(module).items() if isinstance(value, construct.Renamed)}


def source(name: str) -> str:
    """Returns the source of the module that parses and builds the structures of the format of that name.

    Raises:
        TypeError: see `structure`.
    """
    parts = (structure(constant, declared) for constant, declared in declarations(name).items())
    return _HEAD.format(name=name) + "".join(parts)


def structure(constant: str, declared: Any) -> str:
    """Returns the source of one structure: its `struct` code, its record, its builder and its `Structure`.

    Args:
        constant: its name in Python.
        declared: ``"name" / construct.Struct(...)``. The type of each field is ``Bytes(n)`` or an unsigned number. All
            numbers have one byte order: big-endian, or the machine's own where the record never leaves the machine.

    Raises:
        TypeError: a field has another type, or the numbers have more than one byte order.
    """
    order, fields = _fields(declared)
    codes = "".join(f"{field.size}s" if field.code == "s" else field.code for field in fields)
    return "\n".join(_lines(constant, declared.name, order + codes, fields)) + "\n"


def _lines(constant: str, name: str, code: str, fields: list[_Declared]) -> Iterator[str]:
    low, record = constant.lower(), "Raw" + constant.title().replace("_", "")
    types = [(field.name, "bytes" if field.code == "s" else "int") for field in fields]
    yield f'\n_{low} = Struct("{code}")'
    yield f'\n\nclass {record}:\n    """The fields of a structure: {name}."""\n'
    if len(fields) == 1:  # as ruff formats it
        yield f'    __slots__ = ("{fields[0].name}",)\n'
    else:
        yield from ("    __slots__ = (", *(f'        "{field.name}",' for field in fields), "    )\n")
    yield from ("    def __init__(", "        self,", *(f"        {field}: {kind}," for field, kind in types))
    yield from ("    ) -> None:", *(f"        self.{field} = {field}" for field, _ in types))
    yield from (f"\n\ndef _build_{low}(", "    *,", *(f"    {field}: {kind}," for field, kind in types), ") -> bytes:")
    for field in fields:
        if field.code == "s":  # `struct` would silently pad or cut them
            yield f"    if len({field.name}) != {field.size}:"
            where = f"{name}.{field.name}: {{len({field.name})}} bytes, not {field.size}"
            yield f'        raise ValueError(f"{where}")'
    yield from (f"    return _{low}.pack(", *(f"        {field.name}," for field in fields), "    )")
    yield f"\n\n{constant} = Structure("
    yield from (f"    {argument}," for argument in (f'"{name}"', f"_{low}", record, f"_build_{low}"))
    offset = 0
    for field in fields:
        yield f'    Field("{field.name}", {offset}, {field.size}),'
        offset += field.size
    yield ")"


def _fields(declared: Any) -> tuple[str, list[_Declared]]:
    """Returns the byte order of a structure's numbers, as `struct` writes it, and its fields."""
    orders, fields = set(), []
    for field in declared.subcon.subcons:
        kind, code = field.subcon, "s"
        if not isinstance(kind, construct.Bytes):
            found = re.fullmatch("([>=])([BHLQ])", str(getattr(kind, "fmtstr", None)))
            if not found:
                raise TypeError(f"{declared.name}.{field.name}: neither an unsigned number nor bytes")
            orders.add(found[1])
            code = found[2]
        fields.append(_Declared(field.name, field.sizeof(), code))
    if len(orders) > 1:
        raise TypeError(f"{declared.name}: more than one byte order")
    return "".join(orders) or ">", fields


if __name__ == "__main__":
    print(source(sys.argv[1]), end="")
