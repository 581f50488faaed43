"""`Options`: how an image is tracked, validated before anything is written."""

from __future__ import annotations

import numbers
import operator
import os
import threading
from dataclasses import dataclass
from typing import Final, SupportsIndex

from dirtmap.engine.session.livefile import default_folder, user_folder
from dirtmap.fmt import geometry, live
from dirtmap.fmt.errors import BitmapError

INTENTS: Final = {"off": live.INTENT_OFF, "region": live.INTENT_REGION}
SAVE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """How to track.

    Attributes:
        live: the folder for live files. It should be on a tmpfs, which survives a killed process at the speed of
            memory. None for ``$DIRTMAP_LIVE``, else ``/dev/shm``.
        intent: what is dirty after a power loss. ``region``: what was saved, and all regions written to since;
            ``off``: everything.
        region_size: bytes of the disk per region of the intent log, a power of two; None for a default by disk size.
        save_interval: seconds between saves; 0 saves only when asked.

    Raises:
        BitmapError: a value is not possible.
        TypeError: a value has the wrong type.
    """

    live: str | os.PathLike[str] | None = None
    intent: str = "region"
    region_size: SupportsIndex | None = None
    save_interval: float = SAVE_SECONDS

    def __post_init__(self) -> None:
        if self.live is not None:
            os.fspath(self.live)
        if self.intent not in INTENTS:
            raise BitmapError("intent", f"'{self.intent}' is none of {', '.join(INTENTS)}")
        if self.region_size is not None:
            size, least, most = operator.index(self.region_size), 1 << live.MIN_REGION_BITS, 1 << live.MAX_REGION_BITS
            if not (geometry.is_power_of_two(size) and least <= size <= most):
                raise BitmapError("region size", f"{size} is no power of two from {least} to {most} bytes")
        if not isinstance(self.save_interval, numbers.Real):
            raise TypeError(f"save_interval is a number of seconds, not {type(self.save_interval).__name__}")
        if not 0 <= self.save_interval <= threading.TIMEOUT_MAX:  # nor NaN
            raise BitmapError("save interval", f"{self.save_interval} seconds cannot be waited for")

    @property
    def live_root(self) -> str:
        """The folder that all users share. This user's live files are in a folder below it."""
        return os.fspath(self.live or default_folder())

    @property
    def live_folder(self) -> str:
        """The folder for this user's live files; absolute, because the process may change its working folder."""
        return user_folder(os.path.abspath(self.live_root))

    def region_bits(self, size: int) -> int:
        """log2 of the region size in bytes, for a disk of ``size`` bytes.

        Raises:
            BitmapError: the region size asked for is too small for the disk.
        """
        if self.region_size is None:
            return live.region_bits(size)
        chosen = operator.index(self.region_size).bit_length() - 1
        if size >> chosen >= live.MAX_REGIONS:
            what = f"{self.region_size} bytes are too small for a disk of {size}: {live.MAX_REGIONS} regions or more"
            raise BitmapError("region size", what)
        return chosen
