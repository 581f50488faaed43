"""How fast names are resolved and hosts scanned."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import qemu
from support.many import make_host
from support.measuring import Against, Peer

from dirtmap.engine.host.host import Host
from dirtmap.engine.host.lookup import Lookup
from dirtmap.engine.host.scan import scan
from dirtmap.engine.identity import identity_of
from dirtmap.engine.model import changes
from dirtmap.engine.namespaces.changing import transaction
from dirtmap.engine.qcow2.reading import describe
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.system.file import open_file
from dirtmap.fmt import index as layout
from dirtmap.fmt import store

SECTION = "Names across a host"
NODES, BITMAPS = 10_000, 100
IMAGES = 10_000
QUESTIONS = 2000


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host with a million bitmaps: a store of 10,000 nodes with 100 each."""
    folder = tmp_path_factory.mktemp("million")
    image = folder / "image"
    image.touch()
    os.truncate(image, 1 << 30)
    path = str(folder / "store")
    create(path)
    identity = identity_of(str(image))
    with Store(path) as target:
        with target.change() as change:
            for number in range(NODES):
                change.table.put(
                    store.Record(
                        name=b"node%05d" % number,
                        kind=store.KIND_NODE,
                        uuid=random.randbytes(16),
                        size=1 << 30,
                        path=os.fsencode(image),
                        identity=identity,
                    )
                )
        with transaction(target) as namespaces:
            for number in range(NODES):
                for bitmap in range(BITMAPS):
                    changes.add(namespaces[f"node{number:05}"], f"bitmap{bitmap:02}", 1 << 20)
    host = Host(path, str(folder / "index"))
    host._parts.stores.stores()
    yield host
    shutil.rmtree(folder)


@pytest.fixture
def questions() -> list[tuple[str, str]]:
    rng = random.Random(1)
    return [(f"node{rng.randrange(NODES):05}", f"bitmap{rng.randrange(BITMAPS):02}") for _ in range(QUESTIONS)]


def peers(host: Host, questions: list[tuple[str, str]], folder: Path, aim: float) -> dict[str, Peer]:
    """A bare get of the same entries, each in a transaction of its own; and sqlite with the same addresses."""
    environment = host._parts.stores.index.database._env
    keys = [layout.bitmap_key(layout.named(node.encode()), name.encode()) for node, name in questions]
    rows = ((f"node{node:05}", f"bitmap{name:02}", bytes(32)) for node in range(NODES) for name in range(BITMAPS))
    return getters(environment, keys, questions, rows, folder, aim)


def getters(
    environment: Any,
    keys: list[bytes],
    questions: list[tuple[str, str]],
    rows: Iterable[Any],
    folder: Path,
    aim: float | None = None,
) -> dict[str, Peer]:
    """The keys got from LMDB, the questions asked of a table in sqlite that has those rows; one after the other."""
    base = sqlite3.connect(folder / "peer.sqlite")
    base.execute("create table bitmaps (node text, name text, place blob, primary key (node, name)) without rowid")
    base.executemany("insert into bitmaps values (?, ?, ?)", rows)
    base.commit()

    def bare() -> None:
        for key in keys:
            with environment.begin() as txn:
                txn.get(key)

    def sqlite() -> None:
        for question in questions:
            base.execute("select place from bitmaps where node = ? and name = ?", question).fetchone()

    return {"a bare get of LMDB": Peer(bare, aim, limit=True), "the same table in sqlite": Peer(sqlite)}


def test_the_index_answers(against: Against, million: Host, questions: list[tuple[str, str]], tmp_path: Path) -> None:
    index = million._parts.stores.index

    def ours() -> None:
        for node, name in questions:
            index.bitmap(node, name)

    assert all(len(index.bitmap(*question)) == 1 for question in questions)
    others = peers(million, questions, tmp_path, 2.5)
    against("where (node, name) is, as the index says", ours, others, calls=QUESTIONS, rounds=21)


def test_an_answer_is_verified(
    against: Against, million: Host, questions: list[tuple[str, str]], tmp_path: Path
) -> None:
    with Lookup(million) as lookup:
        assert all(lookup.find(*question) for question in questions)
        assert lookup.find("node00000", "nothing") is None

        def ours() -> None:
            for node, name in questions:
                lookup.find(node, name)

        others = peers(million, questions, tmp_path, 10)
        against("an answer of Lookup, among a million bitmaps", ours, others, calls=QUESTIONS, rounds=21)


@pytest.fixture(scope="module", params=[1, 6, 21, 200])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, int]:
    """A host of so many stores, as the paths of its default store and of its index, and their number."""
    return *make_host(tmp_path_factory.mktemp("many"), request.param), request.param


WHAT = ["stored", "qcow2", "device"]


def named(what: str, stores: int) -> str:
    """A name in the store that was made last, or the image's or device's."""
    return {"stored": f"node{stores - 1}", "qcow2": "image", "device": "device"}[what]


@pytest.mark.parametrize("what", WHAT)
def test_an_answer_with_many_stores(against: Against, many: tuple[str, str, int], what: str, tmp_path: Path) -> None:
    """Aim: at most 25 us, whatever it is, and however many stores the host has."""
    home, index, stores = many
    node, calls = named(what, stores), 20
    with Host(home, index) as host, Lookup(host) as lookup:
        key = layout.bitmap_key(layout.named(node.encode()), b"b")
        environment = host._parts.stores.index.database._env
        assert lookup.find(node, "b")
        others = getters(environment, [key] * calls, [(node, "b")] * calls, [(node, "b", bytes(32))], tmp_path)

        def ours() -> None:
            for _ in range(calls):
                lookup.find(node, "b")

        against(f"an answer of Lookup, {what}, of {stores} stores", ours, others, calls=calls, rounds=201)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_opening_with_many_stores(against: Against, many: tuple[str, str, int], what: str, again: bool) -> None:
    """A target is opened by name, by a host that was made just now, or that has opened it before."""
    home, index, stores = many
    name = named(what, stores)
    container = os.path.join(os.path.dirname(home), "q.qcow2" if what == "qcow2" else "default.dmap")
    if what == "stored" and stores > 1:
        container = os.path.join(os.path.dirname(home), f"store{stores - 1}.dmap")

    def look() -> None:
        """What a survey of the stores cannot do without."""
        for path in paths:
            os.stat(path)

    def alone() -> None:
        if what == "qcow2":
            with open_file(container) as file:
                describe(file)
        else:
            with Store(container) as store:
                store.record(name.encode())

    with Host(home, index) as known:
        paths = known._parts.stores.stores()

        def ours() -> None:
            if again:
                known.open(name).close()
            else:
                with Host(home, index) as host:
                    host.open(name).close()

        others = {"its container alone": Peer(alone), "a stat of each store": Peer(look, limit=True)}
        host = "the same Host again" if again else "a new Host"
        against(f"opening by name, {what}, of {stores} stores, by {host}", ours, others, rounds=51)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of 10,000 qcow2 images with two bitmaps each."""
    folder = tmp_path_factory.mktemp("images")
    first = folder / "00000.qcow2"
    qemu.create(first, 1 << 30)
    for name in ("monday", "tuesday"):
        subprocess.run(["qemu-img", "bitmap", "--add", first, name], check=True)
    data = first.read_bytes()
    for number in range(1, IMAGES):
        (folder / f"{number:05}.qcow2").write_bytes(data)
    yield folder
    shutil.rmtree(folder)


def test_scan(against: Against, images: Path, tmp_path: Path) -> None:
    some = sorted(images.iterdir())[:50]
    rounds = iter(range(100))

    def info() -> None:
        for path in some:
            subprocess.run(["qemu-img", "info", path], check=True, stdout=subprocess.DEVNULL)

    def ours() -> None:
        number = next(rounds)
        summary = scan(Host(str(tmp_path / f"store{number}"), str(tmp_path / f"index{number}")), [str(images)])
        assert (summary.images, summary.bitmaps) == (IMAGES, 2 * IMAGES)

    others = {"a run of qemu-img info": Peer(info, 0.05, len(some))}
    against("'index scan' of 10,000 images, an image", ours, others, calls=IMAGES, rounds=3)


def test_rescan(against: Against, images: Path, tmp_path: Path) -> None:
    time.sleep(0.1)  # so that no image is as young as the clock's step
    host = Host(str(tmp_path / "store"), str(tmp_path / "index"))
    scan(host, [str(images)])
    rounds = iter(range(100))

    def first() -> None:
        number = next(rounds)
        scan(Host(str(tmp_path / f"store{number}"), str(tmp_path / f"index{number}")), [str(images)])

    others = {"the first scan": Peer(first, 0.2)}
    against(
        "'index scan' again, nothing changed, an image",
        lambda: scan(host, [str(images)]),
        others,
        calls=IMAGES,
        rounds=3,
    )
