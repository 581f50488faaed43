"""`Transaction`: the bitmaps of a namespace while they are being changed. Pure: its container commits the result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING

from dirtmap.engine.model.naming import a_checkpoint, as_stored, decode_name, encode_name, label, not_found
from dirtmap.fmt import geometry
from dirtmap.fmt.directory import MAX_DATA_BYTES, name_fault
from dirtmap.fmt.errors import BitmapError, Error

if TYPE_CHECKING:
    from dirtmap.engine.model.bitmap import Bitmap


class Transaction(MutableMapping[str, "Bitmap"]):
    """The bitmaps of a namespace during a change: a mutable mapping of names to bitmaps, in directory order.

    A bitmap read from the mapping is a working copy: marking it changes what will be committed. A bitmap assigned to a
    name is copied. What was read from the mapping may be read from the container as late as when it is used, and so not
    after the end; a `Bitmap.copy` of it, unless it is large, may.

    Attributes:
        where: the image, for messages.
        size: of the virtual disk, in bytes.
        default_granularity: in bytes; for bitmaps added without a granularity.
        checkpoints: the chain of `dirtmap.engine.model.checkpoints`, as it will be committed. Others rely on the bits
            of a checkpoint: it may gain bits, or be taken over by the checkpoint before it, and nothing else.
        notes: what the commit did that the caller did not ask for, one line each; set once it is done.
        origins: of each bitmap that was there before, under whichever name now, the name that it had. One that was
            removed, and added again, is another.
        most_bytes: of bits that the container can hold for a bitmap.
        fresh: names of the bitmaps that were added empty, and are not what another one was when it was read.
    """

    def __init__(
        self,
        where: str,
        size: int,
        default_granularity: int,
        bitmaps: Mapping[str, Bitmap],
        held: Mapping[str, str] | None = None,
        checkpoints: Iterable[str] = (),
        *,
        most_bytes: int = MAX_DATA_BYTES,
    ) -> None:
        self.where = where
        self.size = size
        self.default_granularity = default_granularity
        self.most_bytes = most_bytes
        self._bitmaps = dict(bitmaps)
        self.origins = {name: name for name in bitmaps}
        holders = {name: who for name, who in (held or {}).items() if name in bitmaps}
        self._held = {name: (who, self._bitmaps[name].replace()) for name, who in holders.items()}
        for name in self._held:
            self._bitmaps[name].busy = True
        self.checkpoints = list(checkpoints)
        self._relied_on = {name: self._bitmaps[name].replace() for name in self.checkpoints if name in bitmaps}
        self.notes: list[str] = []
        self.fresh: set[str] = set()
        self._open = True

    def __getitem__(self, name: str) -> Bitmap:
        self._require_open()
        name = as_stored(self.where, name)
        try:
            return self._bitmaps[name]
        except KeyError:
            raise not_found(self.where, name) from None

    def __contains__(self, name: object) -> bool:
        self._require_open()
        with contextlib.suppress(BitmapError):  # a name that no bitmap can have
            return isinstance(name, str) and as_stored(self.where, name) in self._bitmaps
        return False

    def __setitem__(self, name: str, bitmap: Bitmap) -> None:
        self._require_open()
        from dirtmap.engine.model.bitmap import Bitmap

        if not isinstance(name, str) or not isinstance(bitmap, Bitmap):
            what = f"a name and a Bitmap are asked for, not {type(name).__name__} and {type(bitmap).__name__}"
            raise TypeError(f"{self.where}: {what}")
        name = decode_name(encode_name(name))  # the one spelling of the name
        self.refuse_held(name)
        where = f"{self.where}: {label(name)}"
        if fault := name_fault(encode_name(name)):
            raise BitmapError(where, fault)
        if bitmap.size != self.size:
            what = f"made for a disk of {bitmap.size} bytes, and this one has {self.size}"
            raise BitmapError(where, what)
        if not geometry.is_granularity(bitmap.granularity):
            raise BitmapError(where, f"granularity {bitmap.granularity} is not a power of two from 512 bytes to 2 GiB")
        needed = geometry.packed_bytes(self.size, bitmap.granularity)
        if needed > self.most_bytes:  # refused before so many bits are allocated
            what = f"granularity {bitmap.granularity} needs {needed} bytes of bits, more than {self.most_bytes}"
            raise BitmapError(where, what)
        self._bitmaps[name] = bitmap.replace()
        self._bitmaps[name].busy = False
        self.fresh.discard(name)

    def __delitem__(self, name: str) -> None:
        self[name]
        name = as_stored(self.where, name)
        self.refuse_held(name)
        if name in self._relied_on:
            self._hand_over(name)
        del self._bitmaps[name]
        self.origins.pop(name, None)

    def _hand_over(self, name: str) -> None:
        """Removes a checkpoint from the chain: the checkpoint before it takes over its bits, if it can."""
        from dirtmap.engine.model import checkpoints

        predecessor = checkpoints.predecessor(self.checkpoints, name)
        gone = self._bitmaps[name]
        older = self._bitmaps.get(predecessor) if predecessor is not None else None
        if predecessor is None or (older and not older.inconsistent and not gone.inconsistent):
            if predecessor is not None and older:
                self[predecessor] = checkpoints.take_over(older, gone)
                self._relied_on[predecessor] = self._bitmaps[predecessor].replace()
            self.checkpoints = checkpoints.without(self.checkpoints, name)
        else:
            self.checkpoints = checkpoints.broken(self.checkpoints, name)
        del self._relied_on[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bitmaps)

    def __len__(self) -> int:
        return len(self._bitmaps)

    def rename(self, name: str, new: str) -> None:
        """Renames a bitmap, which keeps its place in the order.

        Raises:
            BitmapError: no such bitmap, it is held or a checkpoint, or the new name is taken or not allowed.
        """
        bitmap = self[name]
        name, new = as_stored(self.where, name), decode_name(encode_name(new))
        self.refuse_held(name)
        self.refuse_checkpoint(name)
        if new in self:
            raise BitmapError(f"{self.where}: {label(new)}", "the name is taken")
        self[new] = bitmap
        if name in self.origins:
            self.origins[new] = self.origins.pop(name)
        self._bitmaps = {new if key == name else key: value for key, value in self._bitmaps.items() if key != new}

    def validate(self) -> None:
        """Validates the changes made in place, before the commit.

        Raises:
            BitmapError: the bits of a held bitmap were changed, or a checkpoint lost bits or its recording flag
                changed. The error names the bitmap and its holder.
        """
        for name, (_, bitmap) in self._held.items():
            if self._bitmaps[name]._source is not bitmap._source:
                self.refuse_held(name)
        for name, before in self._relied_on.items():
            now = self._bitmaps[name]
            changed = now._source is None or now._source is not before._source
            if now.recording != before.recording or (changed and not before.inconsistent and (before - now).count):
                self.refuse_checkpoint(name)

    def refuse_checkpoint(self, name: str) -> None:
        """Refuses a change to a checkpoint.

        Raises:
            BitmapError: the bitmap is a checkpoint.
        """
        if name in self._relied_on:
            raise a_checkpoint(self.where, name)

    def refuse_held(self, name: str) -> None:
        """Refuses a change to a held bitmap.

        Raises:
            BitmapError: the bitmap is held; the error names it and its holder.
        """
        if name in self._held:
            raise BitmapError(f"{self.where}: {label(name)}", f"busy: held by {self._held[name][0]}")

    def close(self) -> None:
        """Ends the transaction: every later access is refused, because it would not be committed."""
        self._open = False

    def _require_open(self) -> None:
        if not self._open:
            raise Error(self.where, "the transaction has ended")
