"""A logger for each room of the engine, under ``dirtmap.engine``. They are silent until a program gives them a handler.

What is logged is what a user may ask about later: recoveries, doubts that were committed, repairs, rebuilt indexes.
`logging` is imported only when something is logged, because most commands log nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging


def logger(room: str) -> logging.Logger:
    """The logger of a room.

    Args:
        room: the ``__name__`` of a module in it.
    """
    import logging

    root = logging.getLogger("dirtmap.engine")
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    return logging.getLogger(".".join(room.split(".")[:3]))
