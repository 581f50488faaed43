"""`Held`: how bitmaps are held where a store remembers holds: those of its own, and those of qcow2 images."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from dirtmap.engine.model.namespace import Namespace
from dirtmap.engine.model.naming import label

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap


class Held(Namespace):
    """A namespace whose holds are remembered; see `Namespace.hold`."""

    @abc.abstractmethod
    def _holding(self, where: str, names: list[str], owner: str) -> contextlib.AbstractContextManager[None]:
        """Remembers a hold of these bitmaps for the time of the block; errors name ``where``."""

    @contextlib.contextmanager
    def hold(self, name: str, owner: str = "dirtmap") -> Iterator[Bitmap]:
        """Holds a bitmap for a backup; see `Namespace.hold`."""
        where = f"{self.where}: {label(name)}"
        self[name].required(where)
        with self._holding(where, [name], owner):
            yield self[name].required(where)

    @contextlib.contextmanager
    def hold_all(self, names: Iterable[str], owner: str = "dirtmap") -> Iterator[Mapping[str, Bitmap]]:
        """Holds several bitmaps, by one commit; see `Namespace.hold_all`."""
        chosen = list(dict.fromkeys(names))
        for name in chosen:
            self[name].required(f"{self.where}: {label(name)}")
        with self._holding(self.where, chosen, owner) if chosen else contextlib.nullcontext():
            yield self
