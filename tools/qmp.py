"""Reads a QMP ``transaction`` document: its actions, and the nodes that they change.

    {"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "disk.qcow2", "name": "b0"}}, ...]}

Everything is validated before anything is done. An error names the place, such as ``actions[1].data.node``.
Source: QEMU's qapi/transaction.json and qapi/block-core.json. A node is a TARGET of dirtmap.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from dirtmap.fmt.errors import FormatError
from dirtmap.tools.foreign.jsonstream import unique

_ADD = "block-dirty-bitmap-add"
_MERGE = "block-dirty-bitmap-merge"
_PREFIX = "block-dirty-bitmap-"
_ON_ONE: dict[str, type] = {"node": str, "name": str}
# The keys of each type of action's data. The first two are required; a merge requires all of its keys.
_KEYS: dict[str, dict[str, type]] = {
    _ADD: {**_ON_ONE, "granularity": int, "persistent": bool, "disabled": bool},
    _MERGE: {"node": str, "target": str, "bitmaps": list},
    **{_PREFIX + verb: _ON_ONE for verb in ("remove", "clear", "enable", "disable")},
}
_KINDS = {str: "a string", int: "an integer", bool: "true or false", list: "an array", dict: "an object"}


class Source(NamedTuple):
    """A source bitmap of a merge; ``node`` is None if it is in the node of the merge itself."""

    node: str | None
    name: str


class Action(NamedTuple):
    """One action.

    Attributes:
        place: of the action in the document, for messages.
        verb: ``add``, ``remove``, ``clear``, ``enable``, ``disable`` or ``merge``.
        node: the node of the bitmap.
        name: of the bitmap that changes.
        granularity: for ``add``, in bytes; None for the default.
        disabled: for ``add``, whether the bitmap does not record.
        sources: for ``merge``.
    """

    place: str
    verb: str
    node: str
    name: str
    granularity: int | None = None
    disabled: bool = False
    sources: tuple[Source, ...] = ()


def parse_transaction(data: bytes, where: str) -> list[Action]:
    """The actions of a document.

    Args:
        data: the whole document, UTF-8.
        where: the name of the document in messages.

    Raises:
        FormatError: names the first place that is wrong, or that asks for what cannot be done to a file.
    """
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(where, f"not valid JSON: {error}") from error
    top = _object(document, where, {"actions": list, "properties": dict}, needed=1, inside=f"{where}: ")
    properties = _object(top.get("properties", {}), f"{where}: properties", {"completion-mode": str}, needed=0)
    mode = properties.get("completion-mode", "individual")
    if mode != "individual":
        raise FormatError(f"{where}: properties.completion-mode", f"'{mode}' is not 'individual'")
    return [_action(item, f"{where}: actions[{index}]") for index, item in enumerate(top["actions"])]


def _action(item: Any, place: str) -> Action:
    action = _object(item, place, {"type": str, "data": dict}, needed=2)
    kind, data = action["type"], action["data"]
    if kind not in _KEYS:
        raise FormatError(f"{place}.type", f"'{kind}' is not known; known are {', '.join(sorted(_KEYS))}")
    _object(data, f"{place}.data", _KEYS[kind], needed=3 if kind == _MERGE else 2)
    verb, node = kind.removeprefix(_PREFIX), _node(data["node"], f"{place}.data.node")
    if kind == _MERGE:
        sources = tuple(_source(x, f"{place}.data.bitmaps[{index}]") for index, x in enumerate(data["bitmaps"]))
        return Action(place, verb, node, data["target"], sources=sources)
    if not data.get("persistent", True):
        raise FormatError(f"{place}.data.persistent", "false: a bitmap in a file is persistent")
    return Action(place, verb, node, data["name"], data.get("granularity"), data.get("disabled", False))


def _source(item: Any, place: str) -> Source:
    if isinstance(item, str):
        return Source(None, item)
    data = _object(item, place, _ON_ONE, needed=2)
    return Source(_node(data["node"], f"{place}.node"), data["name"])


def _node(path: str, place: str) -> str:
    """Checks that the operating system can take a text as a path, and returns it."""
    if "\0" in path or any(0xD800 <= ord(char) < 0xDC80 or 0xDCFF < ord(char) <= 0xDFFF for char in path):
        raise FormatError(place, "not a path")
    return path


def _object(item: Any, place: str, keys: dict[str, type], needed: int, inside: str | None = None) -> dict[str, Any]:
    """Checks that an object has the first ``needed`` of ``keys``, and none but these keys, with values of their types.

    ``inside`` comes before a key in messages; if it is None, the place and a dot do.
    """
    inside = f"{place}." if inside is None else inside
    if not isinstance(item, dict):
        raise FormatError(place, "not an object")
    for key in list(keys)[:needed]:
        if key not in item:
            raise FormatError(place, f"'{key}' is missing")
    for key, value in item.items():
        if key not in keys:
            raise FormatError(f"{inside}{key}", "not known")
        if type(value) is not keys[key]:
            raise FormatError(f"{inside}{key}", f"not {_KINDS[keys[key]]}")
    return item
