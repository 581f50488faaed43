"""`Resolver`: what a name means across all containers of a host.

The containers are the truth; the index only makes finding it fast. So every answer is the same without an index, and an
answer from the index is verified before it is used.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dirtmap.engine.host.kind import Kind
from dirtmap.engine.host.stores import Stores
from dirtmap.engine.index.database import ForbiddenError
from dirtmap.engine.index.index import Index
from dirtmap.engine.index.reading import Container
from dirtmap.engine.model.naming import decode_name, encode_name
from dirtmap.engine.namespaces.devices import Root
from dirtmap.engine.namespaces.ports import HostPort
from dirtmap.engine.namespaces.whereabouts import is_checked_out
from dirtmap.engine.qcow2.reading import read_identity, require_header
from dirtmap.engine.system.probe import STORE, probe_path
from dirtmap.fmt import index as layout
from dirtmap.fmt import store
from dirtmap.fmt.directory import FLAG_AUTO, FLAG_IN_USE
from dirtmap.fmt.errors import BitmapError, BitmapNotFoundError, Error, FormatError, StorageError, printable
from dirtmap.fmt.index import KIND_QCOW2, Member
from dirtmap.fmt.spelling import spellings


@dataclass(frozen=True, slots=True)
class NodeMatch:
    """The node or device that a name means.

    Attributes:
        name: of the node or device.
        kind: ``KIND_NODE`` or ``KIND_DEVICE`` for bitmaps in a store; ``KIND_PLACE`` for a qcow2 image.
        uuid: of the namespace, 16 bytes.
        root_uuid: of a device's root, 16 bytes.
        store: the store that has its record.
        path: of the image; for a device, of its root's image.
        size: of the disk, in bytes.
    """

    name: str
    kind: int
    uuid: bytes
    root_uuid: bytes
    store: str
    path: str
    size: int

    @property
    def is_device(self) -> bool:
        """True for a device, False for a node."""
        return self.kind == store.KIND_DEVICE

    @property
    def what(self) -> str:
        """``node`` or ``device``."""
        return "device" if self.is_device else "node"

    @property
    def in_store(self) -> bool:
        """True if its bitmaps are in a store, False if they are in the image itself."""
        return self.kind != store.KIND_PLACE

    @property
    def container(self) -> str:
        """The path of the container that has its bitmaps."""
        return self.store if self.in_store else self.path


@dataclass(frozen=True, slots=True)
class BitmapMatch:
    """A bitmap that was found by its name.

    Attributes:
        path: of the container.
        format: of the container, as `Kind.name`.
        kind: what the bitmap is attached to: ``image`` (without a name), ``node`` or ``device``.
        holder: name of the node or device, or path of the image.
        bitmap: name of the bitmap.
        namespace: UUID of the namespace as text; None for an image without a name.
        granularity: in bytes.
        recording: as in `BitmapInfo`.
        inconsistent: as in `BitmapInfo`.
    """

    path: str
    format: str
    kind: str
    holder: str
    bitmap: str
    namespace: str | None
    granularity: int
    recording: bool
    inconsistent: bool


class Resolver:
    """Finds the nodes, devices and bitmaps of a host by name.

    Args:
        stores: of the host.
        kinds: the kinds of containers.
        host: asked for the places of images.
    """

    def __init__(self, stores: Stores, kinds: Iterable[Kind], host: HostPort) -> None:
        self._stores, self._kinds, self._host = stores, kinds, host
        fallback = stores.fallback
        self._fallback = None if fallback is None else Resolver(fallback, kinds, host)

    def resolve(self, name: str) -> NodeMatch | None:
        """The node or device of that name, as its container says; None if there is none.

        Raises:
            BitmapError: the name is not unique; the error names both places.
            BitmapNotFoundError: its image is not in its recorded place.
            Error: it was not found, and a store that may have it cannot be read.
            As `Stores.opened`.
        """
        found = self.unique(name)
        if found:
            with contextlib.suppress(FormatError):  # the caller reports the damage, or repairs it
                _require_its_image(found)
        return found

    def unique(self, name: str) -> NodeMatch | None:
        """Like `resolve`, but does not require that the image of a node is in its recorded place."""
        found = self.claims(name)
        # A name in the default store stays unique, whatever other stores turn up.
        found = [claim for claim in found if claim.store == self._stores.store] or found
        if len(found) > 1:
            one, other = found[:2]
            what = f"names a namespace of {one.store}, and another of {other.store}; say which with --store"
            raise BitmapError(f"node '{printable(name)}'", what)
        if not found:
            self.require_all_stores(name)
        return found[0] if found else None

    def require_all_stores(self, name: str) -> None:
        """Refuses to say that a name does not exist while a store, or a part of it, that may have it cannot be read.

        Raises:
            Error: what is wrong with that store.
        """
        for problem in self._stores.hiding(encode_name(name)):
            raise problem

    def claims(self, name: str) -> list[NodeMatch]:
        """All nodes and devices of a name, those of the default store first. More than one: the name is not unique."""
        raw_name = encode_name(name)
        unique: dict[bytes, NodeMatch] = {}
        for found in self._in_stores(lambda index: index.namespaces(raw_name)):
            unique.setdefault(found.uuid, found)
        return list(unique.values())

    def _in_stores(
        self,
        claims: Callable[[Index], list[tuple[int, Member]]],
        is_enough: Callable[[list[NodeMatch]], bool] = lambda found: True,
    ) -> list[NodeMatch]:
        """Those of the index's claims that a readable store of the host makes, the default store's first.

        Args:
            claims: what the index is asked.
            is_enough: tells whether an answer is good although a part of the default store cannot be read.

        Raises:
            Error: it is not, and a part cannot be read.
        """

        def ask(index: Index) -> list[NodeMatch]:
            survey = self._stores.survey()
            stores = self._stores.readable(survey)
            found = [
                self._found(path, member)
                for path, member in ((index.path_of(number), member) for number, member in claims(index))
                if path in stores and member.kind != store.KIND_CONTAINER
            ]
            if (problem := survey.get(self._stores.home)) and not is_enough(found):
                raise problem
            return found

        found = self._stores.asking(ask) if self._stores.exists else []
        return sorted(found, key=lambda claim: claim.store != self._stores.store)  # the default store's first

    def _found(self, path: str, member: Member) -> NodeMatch:
        return NodeMatch(
            name=decode_name(member.name),
            kind=member.kind,
            uuid=member.uuid,
            root_uuid=member.root_uuid,
            store=self._stores.store if path == self._stores.home else path,
            path=os.fsdecode(member.path),
            size=member.size,
        )

    def by_uuid(self, namespace_uuid: bytes) -> NodeMatch | None:
        """The node or device of that UUID, 16 bytes; None if no readable store of the host knows it."""
        found = self._in_stores(lambda index: index.carriers(namespace_uuid), bool)
        return found[0] if found else None

    def place_of(self, name: str, image_uuid: bytes) -> NodeMatch | None:
        """The place of a qcow2 image, from whichever store of the host has it; None if none does.

        Args:
            name: of the node, as the image has it. If a rename was killed halfway, the store has another name.
            image_uuid: 16 bytes.
        """

        def place(here: Resolver) -> list[NodeMatch]:
            if not here._stores.exists:
                return []
            try:
                if not here._stores.index.exists and (found := here._place_at_home(name, image_uuid)):
                    return [found]
                carriers = here._in_stores(lambda index: index.carriers(image_uuid), bool)
            except ForbiddenError:
                if (found := here._place_at_home(name, image_uuid)) is None:
                    raise
                return [found]
            return [found for found in carriers if found.kind == store.KIND_PLACE]

        found = self.asked(place)
        return found[0] if found else None

    def _place_at_home(self, name: str, image_uuid: bytes) -> NodeMatch | None:
        """Like `place_of`, but asks the default store alone, which needs no index."""
        with self._stores.opened() as target:
            record = target.record(encode_name(name))
        if record is None or record.kind != store.KIND_PLACE or record.uuid != image_uuid:
            return None
        member = Member(record.name, record.kind, record.uuid, record.root_uuid, record.size, record.path)
        return self._found(self._stores.home, member)

    def asked(self, question: Callable[[Resolver], list[NodeMatch]]) -> list[NodeMatch]:
        """The answer of the stores that the default store knows; if it is empty, that of the fallback's stores.

        A default store chosen with --store need not know what the user's normal one knows. If the fallback cannot be
        read, its stores are ignored.
        """
        if (found := question(self)) or self._fallback is None:
            return found
        with contextlib.suppress(Error):
            found = question(self._fallback)
        return found

    def every_store(self) -> list[str]:
        """The paths of the stores that the default store knows, then of those that the fallback knows."""
        found = self._stores.stores()
        if self._stores.fallback is not None:
            with contextlib.suppress(Error):
                found += self._stores.fallback.stores()
        return list(dict.fromkeys(found))

    def devices_of(self, root: bytes) -> dict[str, list[bytes]]:
        """The devices whose root has that UUID, 16 bytes: raw names, by the absolute path of their store."""
        names: dict[str, list[bytes]] = {}
        for here in (self, self._fallback):
            # The fallback's stores count whichever default store was chosen, as long as they can be read.
            with contextlib.nullcontext() if here is self else contextlib.suppress(Error):
                on_it = here._in_stores(lambda index: index.devices(root), lambda found: False) if here else []
                for found in on_it:
                    known = names.setdefault(os.path.abspath(found.store), [])
                    known += [name for name in [encode_name(found.name)] if name not in known]
        return names

    def find(
        self, bitmap: str, *, force_share: bool = False, told: Callable[[Error], object] | None = None
    ) -> list[BitmapMatch]:
        """Every bitmap of that name, in all containers that can be read, ordered by holder.

        Args:
            bitmap: name of the bitmap.
            force_share: reads images even while another process writes to them.
            told: called with the reason for each container that could not be read.
        """
        raw_name = encode_name(bitmap)

        formats = {kind.number: kind.name for kind in self._kinds}

        def ask(index: Index) -> tuple[list[BitmapMatch], list[Error]]:
            sound, problems = self._stores.refresh(force_share=force_share)
            found = []
            for holder, claims in index.find(raw_name):
                for claim in claims:
                    if container := sound.get(claim.container):
                        kind, name = _kind_of(index, container, holder), decode_name(holder[1:])
                        in_use = bool(claim.flags & FLAG_IN_USE)
                        if in_use and container.kind == KIND_QCOW2:  # its tracker may have what the image lacks
                            in_use = not is_checked_out(self._host, name, claim.uuid, container.path)
                        namespace = str(uuid.UUID(bytes=claim.uuid)) if any(claim.uuid) else None
                        granularity = 1 << claim.granularity_bits
                        recording = bool(claim.flags & FLAG_AUTO)
                        how = kind, name, bitmap, namespace, granularity, recording, in_use
                        found.append(BitmapMatch(container.path, formats[container.kind], *how))
            return sorted(found, key=lambda match: (match.holder, match.path)), problems

        found, problems = self._stores.asking(ask) if self._stores.exists else ([], [])
        for problem in problems:
            if told:
                told(problem)
        return found

    def require(self, name: str, *kinds: int) -> NodeMatch:
        """The node or device of that name, or else the one that JSON shows so; see `dirtmap.fmt.spelling`.

        Raises:
            BitmapNotFoundError: there is none, or it is not of these kinds.
            As `unique`.
        """
        found = next(filter(None, map(self.unique, spellings(name))), None)
        if found is None or (kinds and found.kind not in kinds):
            what = "device" if kinds == (store.KIND_DEVICE,) else "node"
            other = f"; it is a {store.KIND_NAMES[found.kind]}" if found and found.kind != store.KIND_PLACE else ""
            raise BitmapNotFoundError(
                f"{self._stores.store}: {what} '{printable(name)}'", f"there is no such {what}{other}"
            )
        return found

    def root(self, name: str) -> Root:
        """The node of that name, to be the root of a device.

        Raises:
            BitmapNotFoundError: there is no such node, or its image is not in its recorded place.
            FormatError: its image is damaged.
        """
        found = self.require(name, store.KIND_NODE, store.KIND_PLACE)
        _require_its_image(found)
        return Root(found.uuid, found.path)


def _require_its_image(found: NodeMatch) -> None:
    """Refuses a node whose image is not in its recorded place.

    Raises:
        BitmapNotFoundError: the image is elsewhere; the error says how to find it.
        FormatError: the header of the file is so damaged that it cannot be told.
    """
    if found.in_store:
        return
    where = f"node '{printable(found.name)}'"
    try:
        identity = read_identity(found.path)
    except StorageError as error:
        what = f"its image cannot be read ({error}); 'index scan' finds one that was moved"
        raise BitmapNotFoundError(where, what) from None
    if identity is None and probe_path(found.path) != STORE:
        require_header(found.path)
    if identity != (found.name, str(uuid.UUID(bytes=found.uuid))):
        what = f"{found.path} is not its image any more; 'index scan' finds one that was moved"
        raise BitmapNotFoundError(where, what)


def _kind_of(index: Index, container: Container, holder: bytes) -> str:
    """What holds a container's bitmaps under that key of the index: ``image``, ``node`` or ``device``."""
    if holder[:1] != layout.NAMED:
        return "image"
    kinds = {member.kind for number, member in index.namespaces(holder[1:]) if number == container.number}
    return "device" if store.KIND_DEVICE in kinds else "node"
