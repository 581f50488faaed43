"""A host of nothing but the files that are named: for tests of the rooms below the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from dirtmap.engine.host.kinds import KINDS
from dirtmap.engine.index.index import Index
from dirtmap.engine.namespaces.image import Image
from dirtmap.engine.namespaces.nodes import add_qcow2, remove_node, rename_node
from dirtmap.engine.namespaces.stored import StoredImage
from dirtmap.engine.storefile.file import Store
from dirtmap.engine.system.locks import USUAL


class Alone:
    """The port of a namespace that has no host; see `dirtmap.engine.namespaces.ports.HostPort`."""

    locking = USUAL

    @contextlib.contextmanager
    def opened(self, path: str | None = None) -> Iterator[Store]:
        assert path is not None
        with Store(path) as target:
            yield target

    def watch(self, store: Store) -> None:
        pass

    def report(self, store: Store) -> None:
        pass

    def devices_on(self, root: bytes) -> dict[str, list[bytes]]:
        return {}

    def place_of(self, name: str, uuid: bytes) -> tuple[str, bytes] | None:
        return None


ALONE = Alone()


def stored(target: Store, name: str) -> StoredImage:
    return StoredImage(target, name, ALONE)


def image(path: str | Path, *, force_share: bool = False) -> Image:
    return Image(str(path), ALONE, force_share=force_share)


def name_image(path: str | Path, name: str | None, image_uuid: bytes | None = None) -> None:
    """Gives a qcow2 image a name, or takes name and UUID away."""
    with image(path) as opened, opened.naming() as naming:
        if name is None:
            naming.remove()
        else:
            naming.set(name, image_uuid)


def index_at(path: str | Path) -> Index:
    def opened(where: str) -> AbstractContextManager[Store]:
        return Store(where)

    return Index(str(path), [reader for kind in KINDS if (reader := kind.reader(opened))])


def of_alone(act: Callable[..., None]) -> Callable[..., None]:
    return lambda target, *names, **options: act(ALONE, target, *names, **options)


add_image, remove, rename = map(of_alone, (add_qcow2, remove_node, rename_node))
