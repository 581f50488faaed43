"""What is closed says so, whatever it is asked, and nothing else happens; a host may be used again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hosts import make_host

import dirtmap.engine as dm
from dirtmap.engine.model import changes

USES: dict[str, Callable[[dm.Handle], Any]] = {
    "getitem": lambda image: image["b"],
    "getitem of what is not there": lambda image: image["nothing"],
    "get": lambda image: image.get("b"),
    "in": lambda image: "b" in image,
    "in, no name": lambda image: 5 in image,
    "in, a name that cannot be": lambda image: "" in image,
    "iter": list,
    "len": len,
    "keys": lambda image: list(image.keys()),
    "items": lambda image: list(image.items()),
    "values": lambda image: list(image.values()),
    "equal": lambda image: image == {},
    "where": lambda image: image.where,
    "info": lambda image: image.info(),
    "doubt": lambda image: image.doubt(),
    "tracking": lambda image: image.tracking(),
    "recover_session": lambda image: image.recover_session(),
    "recover": lambda image: image.recover(),
    "recover_dead": lambda image: image.recover_dead(),
    "transaction": lambda image: image.transaction().__enter__(),
    "hold": lambda image: image.hold("b").__enter__(),
    "track": lambda image: image.track(),
    "with": lambda image: image.__enter__(),
}


@pytest.fixture(params=["one", "q0", "d0", "plain.qcow2"])
def image(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dm.Handle:
    monkeypatch.setenv("DIRTMAP_INDEX", str(tmp_path / "index"))
    make_host(tmp_path, monkeypatch)
    image = dm.open(request.param)
    with image.transaction() as bitmaps:
        for name in ("a", "b"):
            changes.add(bitmaps, name, None)
    return image


def test_a_closed_handle_refuses_whatever_it_is_asked(image: dm.Handle) -> None:
    size, path = image.size, image.path
    image.close()
    for what, use in USES.items():
        with pytest.raises(dm.Error, match="is closed"):
            pytest.fail(f"{what}: {use(image)!r}")
    image.close()  # again
    assert (image.size, image.path) == (size, path)
    assert "closed" in repr(image)


def test_an_iteration_begun_before(image: dm.Handle) -> None:
    iterators = [iter(image), iter(image.keys()), iter(image.items()), iter(image.values())]
    for iterator in iterators:
        next(iterator)
    unbegun = iter(image)
    image.close()
    for iterator in [*iterators, unbegun]:
        with pytest.raises(dm.Error, match="is closed"):
            next(iterator)


def test_a_transaction_begun_before_goes_on(image: dm.Handle) -> None:
    target = image.name or image.path
    with image.transaction() as bitmaps:
        changes.add(bitmaps, "c", None)
        image.close()
    with dm.open(target) as again:
        assert list(again) == ["a", "b", "c"]


def test_a_handle_that_could_not_be_opened_anew_is_not_closed(
    image: dm.Handle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise dm.StorageError("here", "no")

    with monkeypatch.context() as patch:
        patch.setattr(type(image._kind), "open", fail)
        with pytest.raises(dm.StorageError, match="here: no"):
            image._open_anew()
    assert list(image) == ["a", "b"]
    image.close()


def test_a_host_may_be_used_again_and_its_handles_stay_open(image: dm.Handle) -> None:
    target = image.name or image.path
    with dm.Host() as host:
        opened = host.open(target)
    assert list(opened) == ["a", "b"]
    with host.open(target) as again:
        assert list(again) == ["a", "b"]
    opened.close()
    with pytest.raises(dm.Error, match="is closed"):
        list(opened)
