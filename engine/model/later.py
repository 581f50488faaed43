"""`later`: modules that are imported when something of them is used first, and not by commands that touch no bits."""

from __future__ import annotations

import importlib
from typing import Any


class _Later:
    def __init__(self, names: dict[str, Any], name: str, module: str) -> None:
        self._put = names, name, module

    def __getattr__(self, attribute: str) -> Any:
        names, name, module = self._put
        names[name] = importlib.import_module(module)
        return getattr(names[name], attribute)


def later(names: dict[str, Any], **modules: str) -> None:
    """Gives a module the names of others, such as ``np``, without importing those.

    The first use of a name imports its module, which then takes the place of the name: later uses cost nothing. Types
    are for type checkers only, and so is the import statement that tells them what the names are:

        if TYPE_CHECKING:
            import numpy as np
        else:
            later(globals(), np="numpy")

    Args:
        names: of the module that uses them, its ``globals()``.
        modules: the full name of each.
    """
    for name, module in modules.items():
        names[name] = _Later(names, name, module)
