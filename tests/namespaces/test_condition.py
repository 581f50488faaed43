"""The condition of a namespace: when each of its facts is looked at."""

from pathlib import Path

import pytest

import dirtmap.engine as dm
from dirtmap.engine.namespaces.condition import Condition
from dirtmap.engine.namespaces.nodes import add_node
from dirtmap.engine.namespaces.stored_place import holding
from dirtmap.engine.storefile.file import Snapshot, Store, create

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The image of the node ``drive0``, which has the bitmap ``b0`` in the default store."""
    monkeypatch.setenv("DIRTMAP_STORE", str(tmp_path / "s.dmap"))
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "index"))
    path = tmp_path / "drive0.raw"
    path.write_bytes(bytes(MIB))
    create(str(tmp_path / "s.dmap"))
    with Store(str(tmp_path / "s.dmap")) as target:
        add_node(target, "drive0", str(path))
    with dm.open("drive0") as node, node.transaction() as bitmaps:
        bitmaps["b0"] = dm.Bitmap(MIB, 65536)
    return path


def condition(snapshot: Snapshot) -> Condition:
    record = snapshot.record(b"drive0")
    assert record
    return Condition(snapshot, record)


def test_a_fact_about_the_image_stays_as_it_was_first_seen(image: Path) -> None:
    with Store(str(image.with_name("s.dmap"))) as target:
        snapshot = target.read(lambda snapshot: snapshot)
        early, late = condition(snapshot), condition(snapshot)
        assert (early.doubt, early.resized) == (None, False)
        image.write_bytes(bytes(2 * MIB))
        assert (early.doubt, early.size_now, early.resized) == (None, MIB, False)
        assert (late.doubt, late.size_now) == ("the image has changed while nobody tracked it", 2 * MIB)
        assert late.doubted
        assert late.resized


def test_holders_are_looked_for_at_each_call(image: Path) -> None:
    path = str(image.with_name("s.dmap"))
    with Store(path) as target:
        with holding(target, b"drive0", ["b0"], "backup"):
            snapshot = target.read(lambda snapshot: snapshot)
            now = condition(snapshot)
            assert now.busy == {b"b0"}
            with pytest.raises(dm.BitmapError, match=r"b0.*busy: held by 'backup'"):
                now.refuse_held()
        now.refuse_held()
        assert now.busy == {b"b0"}
