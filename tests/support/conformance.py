"""What a `Namespace` promises, as tests that run unchanged for every kind of it.

A subclass for each kind gives the fixture ``maker``. Where a kind breaks a promise, its class names the test in
``broken``, with the reason; a test that needs what a kind rightly lacks is left out there (see `CAPABILITIES`).

Bits are held against a model as plain as can be: a bitmap is the set of the numbers of its dirty granules.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import dirtmap.engine as dm
from support.child import in_child
from support.namespaces import CAPABILITIES, Made, Maker

F = TypeVar("F", bound=Callable[..., Any])

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = MIB + 1536  # whole sectors, and no whole granule of 4 KiB or more
GRANULE = 65536
GRANULARITIES = [512, 4096, 65536, MIB, 2 * GIB]

# Names that a bitmap can have: of the longest kind, not ASCII, not UTF-8, not printable, of other meaning elsewhere.
NAMES = [
    "x" * 1023,
    "ä" * 511,
    "日曜日",
    "\udcff",
    "a\udc80b",
    "a/b.qcow2",
    "node:x",
    " ",
    "\n\x1b[1m",
    "'",
    "..",
    "%s",
]
# And that none can have.
NO_NAMES = {"empty": "", "long": "x" * 1024, "long in bytes": "ä" * 512, "NUL": "a\0b", "surrogate": "a\ud800"}
NO_STRINGS = [5, None, b"a", ("a",), 1.5]


def needs(*capabilities: str) -> Callable[[F], F]:
    """Leaves a test out for kinds that lack one of these."""
    assert set(capabilities) <= CAPABILITIES.keys()

    def mark(test: F) -> F:
        test.needs = capabilities  # type: ignore[attr-defined]
        return test

    return mark


def lacking(capability: str) -> Callable[[F], F]:
    """A test for kinds that lack this, and for no other."""
    assert capability in CAPABILITIES

    def mark(test: F) -> F:
        test.lacking = capability  # type: ignore[attr-defined]
        return test

    return mark


# The model.


def dirty(bitmap: dm.Bitmap) -> set[int]:
    """The numbers of the dirty granules, by its extents, which are clipped to the disk, and held against its count."""
    found: set[int] = set()
    last = -1
    for offset, length in zip(*(each.tolist() for each in bitmap.extents()), strict=True):
        end = offset + length
        assert last < offset < end <= bitmap.size
        assert offset % bitmap.granularity == 0
        assert end % bitmap.granularity == 0 or end == bitmap.size
        found.update(range(offset // bitmap.granularity, -(-end // bitmap.granularity)))
        last = end
    assert bitmap.count == len(found) * bitmap.granularity
    return found


def touched(offset: int, length: int, granularity: int) -> set[int]:
    """The granules that have a byte of a range."""
    return set(range(offset // granularity, (offset + length - 1) // granularity + 1)) if length else set()


def widened(granules: set[int], size: int, granularity: int, other: int) -> set[int]:
    """The granules of another size that have a byte of these."""
    found: set[int] = set()
    for number in granules:
        start = number * granularity
        found |= touched(start, min(granularity, size - start), other)
    return found


def everything(size: int, granularity: int) -> set[int]:
    """All granules of a disk."""
    return set(range(-(-size // granularity)))


Shape = tuple[int, int, bool, bool, set[int]]


def shape(bitmap: dm.Bitmap) -> Shape:
    """All that there is to say about a usable bitmap."""
    return bitmap.size, bitmap.granularity, bitmap.recording, bitmap.inconsistent, dirty(bitmap)


def shapes(namespace: Mapping[str, dm.Bitmap]) -> list[tuple[str, Shape]]:
    """All that there is to say about usable bitmaps, in their order."""
    return [(name, shape(bitmap)) for name, bitmap in namespace.items()]


def read(made: Made) -> list[tuple[str, Shape]]:
    """The same, of a handle of its own."""
    with made.open() as namespace:
        return shapes(namespace)


def marked(size: int, *ranges: tuple[int, int], granularity: int = GRANULE, recording: bool = True) -> dm.Bitmap:
    """A bitmap with these ranges dirty."""
    return dm.Bitmap.from_extents(size, *zip(*ranges, strict=True), granularity, recording)  # type: ignore[arg-type]


def some(size: int = SIZE) -> dict[str, dm.Bitmap]:
    """Three bitmaps that differ in all ways, not in the order of their names."""
    return {
        "c": marked(size, (0, 1), (size - 1, 1)),
        "a": marked(size, (5000, 9000), granularity=4096, recording=False),
        "b": dm.Bitmap(size, 512),
    }


@contextlib.contextmanager
def unchanged(made: Made) -> Iterator[None]:
    """Nothing that can be read differs behind the block."""
    before = read(made)
    yield
    assert read(made) == before


Act = Callable[[dm.Transaction], object]


def change(made: Made, *acts: Act) -> None:
    """One transaction that does all of this."""
    with made.changing() as bitmaps:
        for act in acts:
            act(bitmaps)


class Abort(Exception):
    """Ends a transaction without a commit."""


class NamespaceConformance:
    """Promises of a `Namespace`; subclasses give the maker.

    Attributes:
        broken: names of tests, with or without their parameters, that fail for this kind, and why they do.
    """

    broken: ClassVar[Mapping[str, str]] = {}

    @pytest.fixture
    def maker(self) -> Iterator[Maker]:
        """What makes namespaces of the kind."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def judged(self, request: pytest.FixtureRequest, maker: Maker) -> None:
        """Leaves a test out, or expects it to fail, as the kind says."""
        test = request.function
        assert maker.lacks.keys() <= CAPABILITIES.keys()
        for capability in getattr(test, "needs", ()):
            if reason := maker.lacks.get(capability):
                pytest.skip(reason)
        if (lacking := getattr(test, "lacking", None)) and lacking not in maker.lacks:
            pytest.skip(CAPABILITIES[lacking])
        for name in (request.node.name, request.node.name.partition("[")[0]):
            if reason := self.broken.get(name):
                request.node.add_marker(pytest.mark.xfail(strict=True, reason=reason))

    @pytest.fixture
    def hurried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever waits for others to end has less patience."""
        real = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() * 20)

    # What it is.

    def test_attributes(self, maker: Maker) -> None:
        made = maker.make(SIZE)
        with made.open() as namespace:
            assert isinstance(namespace, dm.Namespace)
            assert (type(namespace.size), namespace.size) == (int, SIZE)
            assert namespace.format in maker.formats
            assert namespace.cluster_size >= 512
            assert namespace.cluster_size & (namespace.cluster_size - 1) == 0
            assert namespace.where.startswith(namespace.path)
            assert repr(namespace)

    @needs("file")
    def test_path(self, maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace:
            monkeypatch.chdir("/")  # a handle is good wherever the process goes
            assert os.path.samefile(namespace.path, made.file)
            assert shapes(namespace) == shapes(some())

    @needs("name")
    def test_name_and_uuid_are_lasting(self, maker: Maker) -> None:
        made, other = maker.make(SIZE), maker.make(SIZE)
        with made.open() as namespace, made.open() as again, other.open() as another:
            assert namespace.name == made.target.partition(":")[2] or made.target
            assert (namespace.name, namespace.uuid) == (again.name, again.uuid)
            assert str(namespace.uuid).count("-") == 4
            assert another.uuid != namespace.uuid
            assert another.name != namespace.name

    @lacking("name")
    def test_without_a_name(self, maker: Maker) -> None:
        with maker.make(SIZE).open() as namespace:
            assert (namespace.name, namespace.uuid) == (None, None)

    @pytest.mark.parametrize(
        "size", [1, 511, 512, 513, 65535, 65537, 1_000_001, GIB + 1, 100 * GIB + 513, 3 * 1024 * GIB + 7]
    )
    def test_sizes(self, maker: Maker, size: int) -> None:
        size = maker.fitting(size)
        granularity = max(512, 1 << (size >> 16).bit_length())
        last = marked(size, (size - 1, 1), granularity=granularity)
        full = marked(size, (0, size), granularity=granularity)
        made = maker.make(size, {"last": last, "full": full, "empty": dm.Bitmap(size, granularity)})
        with made.open() as namespace:
            assert namespace.size == size
            for name, count in (("last", 1), ("full", len(everything(size, granularity))), ("empty", 0)):
                assert namespace[name].size == size
                assert namespace[name].count == count * granularity
            (offset,), (length,) = (each.tolist() for each in namespace["last"].extents())
            assert offset + length == size
            assert [each.tolist() for each in namespace["full"].extents()] == [[0], [size]]

    @pytest.mark.parametrize("size", [SIZE, GIB + 1])
    def test_granularities(self, maker: Maker, size: int) -> None:
        size = maker.fitting(size)
        spots = [(0, 1), (size // 3, 12345), (size - 1, 1)]
        bitmaps = {str(each): marked(size, *spots, granularity=each) for each in GRANULARITIES}
        made = maker.make(size, bitmaps)
        assert read(made) == [
            (str(each), (size, each, True, False, set().union(*(touched(*spot, each) for spot in spots))))
            for each in GRANULARITIES
        ]

    # A mapping.

    def test_empty(self, maker: Maker) -> None:
        with maker.make(SIZE).open() as namespace:
            assert len(namespace) == 0
            assert not namespace
            assert list(namespace) == []
            assert "a" not in namespace
            assert namespace.get("a") is None
            assert namespace.info().bitmaps == ()

    def test_mapping(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace:
            assert list(namespace) == list(namespace.keys()) == ["c", "a", "b"]
            assert len(namespace) == 3
            assert namespace
            assert all(name in namespace for name in "abc")
            assert shapes(namespace) == shapes(some())
            assert [shape(bitmap) for bitmap in namespace.values()] == [shape(bitmap) for bitmap in some().values()]
            assert namespace.get("nope") is None
            assert namespace == some()

    def test_iteration_is_of_one_moment(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).open() as namespace:
            names = iter(namespace)
            assert next(names) == "c"
            assert list(namespace) == ["c", "a", "b"]
            assert list(names) == ["a", "b"]

    def test_missing(self, maker: Maker) -> None:
        shown = {"nope": "nope", "A": "A", "": "", "\udcff": "\\xff", "x" * 1024: "x" * 1024, "a\0": "a\\x00"}
        with maker.make(SIZE, some()).open() as namespace:
            for name, text in shown.items():
                assert name not in namespace
                assert namespace.get(name) is None
                with pytest.raises(dm.BitmapNotFoundError) as caught:
                    namespace[name]
                assert isinstance(caught.value, KeyError)
                assert isinstance(caught.value, dm.BitmapError)
                assert str(caught.value) == f"{namespace.where}: bitmap '{text}': there is no such bitmap"

    def test_what_no_bitmap_is_called_is_not_in_it(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).open() as namespace:
            for key in (*NO_STRINGS, *NO_NAMES.values(), "\ud800"):
                assert key not in namespace

    def test_looking_up_a_lone_surrogate(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).open() as namespace:
            assert namespace.get("\ud800") is None
            with pytest.raises(dm.BitmapNotFoundError):
                namespace["\ud800"]

    def test_looking_up_what_is_no_string(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).open() as namespace:
            for key in NO_STRINGS:
                with pytest.raises((KeyError, TypeError)):
                    namespace[key]  # type: ignore[index]
                assert namespace.get(key) is None  # type: ignore[call-overload]

    def test_names(self, maker: Maker) -> None:
        bitmaps = {name: marked(SIZE, (number * 4096, 1), granularity=4096) for number, name in enumerate(NAMES)}
        made = maker.make(SIZE, bitmaps)
        assert read(made) == shapes(bitmaps)
        with made.open() as namespace:
            for name in NAMES:
                assert name in namespace
                assert shape(namespace[name]) == shape(bitmaps[name])
            assert [bitmap.name for bitmap in namespace.info().bitmaps] == NAMES

    # Values.

    def test_values_are_frozen(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).open() as namespace:
            value = namespace["c"]
            assert value.frozen
            for act in (lambda: value.mark(0, 1), lambda: value.mark_many([0], [1]), lambda: value.clear(0, SIZE)):
                with pytest.raises(dm.BitmapError, match="frozen"):
                    act()
            with pytest.raises(ValueError, match="read-only"):
                value.words[0] = 0
            assert namespace["c"] is not value
            copy = value.copy()
            copy.mark(0, SIZE)
            assert shape(value) == shape(namespace["c"]) == shape(some()["c"])

    def test_values_outlive_the_handle(self, maker: Maker) -> None:
        namespace = maker.make(SIZE, some()).open()
        values = dict(namespace)
        namespace.close()
        assert shapes(values) == shapes(some())

    @needs("change")
    def test_values_never_change_under_you(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace:
            values, info = dict(namespace), namespace.info()
            names = iter(namespace)
            with made.changing() as bitmaps:
                bitmaps["c"].mark(0, SIZE)
                del bitmaps["a"]
            assert shapes(values) == shapes(some())
            assert [bitmap.name for bitmap in info.bitmaps] == list(names) == ["c", "a", "b"]

    # What is told about it.

    def test_info_equals_the_mapping(self, maker: Maker) -> None:
        made = maker.make(SIZE, {**some(), "\udcff": marked(SIZE, (0, SIZE), granularity=512)})
        with made.open() as namespace:
            info = namespace.info()
            assert (info.path, info.format) == (namespace.path, namespace.format)
            assert (info.size, info.cluster_size) == (namespace.size, namespace.cluster_size)
            assert info.errors == ()
            assert info.doubt == namespace.doubt()
            told = [(b.name, b.granularity, b.recording, b.inconsistent, b.busy, b.count) for b in info.bitmaps]
            assert told == [
                (name, b.granularity, b.recording, b.inconsistent, b.busy, b.count) for name, b in namespace.items()
            ]
            assert not any(bitmap.damaged for bitmap in info.bitmaps)
            assert all("\n" not in note for note in info.notes)

    def test_info_tells_the_uuid(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).open() as namespace:
            assert namespace.info().uuid == namespace.uuid

    @needs("node")
    def test_info_tells_the_node(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).open() as namespace:
            assert namespace.info().node == namespace.name

    def test_describe_tells_the_same(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace:
            assert made.describe() == namespace.info()

    def test_there_is_no_doubt(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).open() as namespace:
            assert namespace.doubt() is None
            assert namespace.info().doubt is None

    @needs("rest")
    def test_nobody_tracks_it(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).open() as namespace:
            assert namespace.tracking() is None
            assert namespace.info().notes == ()

    @lacking("rest")
    def test_somebody_tracks_it(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).open() as namespace:
            status = namespace.tracking()
            assert status is not None
            assert status.alive == ("recover" in maker.lacks)
            assert len(namespace.info().notes) == 1

    # Its end.

    def test_context_manager(self, maker: Maker) -> None:
        namespace = maker.make(SIZE, some()).open()
        with namespace as entered:
            assert entered is namespace
            assert len(namespace) == 3
        with pytest.raises(dm.Error):
            len(namespace)
        namespace = maker.make(SIZE).open()
        with pytest.raises(Abort), namespace:
            raise Abort
        with pytest.raises(dm.Error):
            len(namespace)

    def test_closing_twice(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        namespace, other = made.open(), made.open()
        namespace.close()
        namespace.close()
        assert shapes(other) == shapes(some())
        other.close()

    @pytest.mark.parametrize(
        "use",
        [
            lambda namespace: namespace["a"],
            lambda namespace: "a" in namespace,
            lambda namespace: list(namespace),
            lambda namespace: len(namespace),
            lambda namespace: namespace.info(),
            lambda namespace: namespace.tracking(),
        ],
        ids=["lookup", "contains", "iter", "len", "info", "tracking"],
    )
    def test_reading_after_close(self, maker: Maker, use: Callable[[dm.Namespace], object]) -> None:
        namespace = maker.make(SIZE, some()).open()
        namespace.close()
        with pytest.raises(dm.Error):
            use(namespace)

    @needs("change")
    def test_a_transaction_after_close(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        namespace = made.open()
        namespace.close()
        with unchanged(made), pytest.raises(dm.Error), namespace.transaction() as bitmaps:
            bitmaps.clear()

    @needs("recover")
    def test_recovery_after_close(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        namespace = made.open()
        namespace.close()
        with unchanged(made), pytest.raises(dm.Error):
            namespace.recover()

    @needs("change")
    def test_a_hold_after_close(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        namespace = made.open()
        namespace.close()
        with unchanged(made), pytest.raises(dm.Error), namespace.hold("a"):
            pass

    # Transactions: one mapping, changed.

    @needs("change")
    def test_a_transaction_is_the_mapping(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace:
            where = namespace.where
        with made.changing() as bitmaps:
            assert isinstance(bitmaps, dm.Transaction)
            assert bitmaps.size == SIZE
            assert bitmaps.default_granularity in (4096, 8192, 16384, 32768, 65536)
            assert os.path.abspath(bitmaps.where) == os.path.abspath(where)
            assert list(bitmaps) == ["c", "a", "b"]
            assert len(bitmaps) == 3
            assert "a" in bitmaps
            assert "nope" not in bitmaps
            assert shapes(bitmaps) == shapes(some())
            assert not any(bitmap.frozen or bitmap.busy for bitmap in bitmaps.values())
            for act in (lambda: bitmaps["nope"], lambda: bitmaps.pop("nope"), lambda: bitmaps.rename("nope", "yes")):
                with pytest.raises(dm.BitmapNotFoundError) as caught:
                    act()
                assert str(caught.value) == f"{bitmaps.where}: bitmap 'nope': there is no such bitmap"
            with pytest.raises(dm.BitmapNotFoundError):
                del bitmaps["nope"]
        assert read(made) == shapes(some())

    @needs("change")
    def test_what_no_bitmap_is_called_is_in_no_transaction(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).changing() as bitmaps:
            for key in (*NO_STRINGS, "\ud800"):
                assert key not in bitmaps
                assert bitmaps.get(key) is None  # type: ignore[call-overload]

    @needs("change")
    def test_all_ways_to_change(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        model = {name: bitmap.copy() for name, bitmap in some().items()}
        with made.changing() as bitmaps:
            for mapping in (bitmaps, model):
                mapping["c"].mark(300_000, 100_000)
                mapping["c"].clear(0, 65536)
                mapping["b"].mark_many([0, 700], [1, 1])
                mapping["new"] = marked(SIZE, (1, 1), granularity=MIB)
                mapping["a"] = mapping["a"].replace(recording=True)
                mapping["both"] = mapping["a"] | mapping["b"]
                mapping.update(more=mapping.pop("new"))
                mapping.setdefault("c", dm.Bitmap(SIZE))
                mapping.setdefault("last", dm.Bitmap(SIZE, recording=False))
            assert shapes(bitmaps) == shapes(model)
        assert read(made) == shapes(model)

    @needs("change")
    def test_order(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.changing() as bitmaps:
            bitmaps["z"] = dm.Bitmap(SIZE)
            bitmaps["a"] = marked(SIZE, (0, 1))
            again = bitmaps["c"].copy()
            del bitmaps["c"]
            bitmaps["c"] = again
            bitmaps.rename("b", "B")
            assert list(bitmaps) == ["a", "B", "z", "c"]
        assert [name for name, _ in read(made)] == ["a", "B", "z", "c"]

    @needs("change")
    def test_none_and_one(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.changing() as bitmaps:
            bitmaps.clear()
        assert read(made) == []
        with made.changing():
            pass
        assert read(made) == []
        with made.changing() as bitmaps:
            bitmaps["a"] = dm.Bitmap(SIZE)
        assert read(made) == shapes({"a": dm.Bitmap(SIZE)})

    @needs("change")
    def test_many(self, maker: Maker) -> None:
        bitmaps = {
            f"{number:03}": marked(SIZE, (number, 1), granularity=512, recording=number % 2 == 0)
            for number in range(100, 0, -1)
        }
        made = maker.make(SIZE, bitmaps)
        with made.changing() as changed:
            for number in range(1, 101, 3):
                del changed[f"{number:03}"], bitmaps[f"{number:03}"]
        assert read(made) == shapes(bitmaps)

    @needs("change")
    @pytest.mark.long
    def test_too_many(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with unchanged(made), pytest.raises(dm.BitmapError, match="more than 65535"):
            change(made, lambda bitmaps: bitmaps.update((str(each), dm.Bitmap(SIZE)) for each in range(65533)))

    @needs("change")
    def test_recording(self, maker: Maker) -> None:
        bitmaps = {
            f"{granularity} {recording}": marked(SIZE, (70000, 1), granularity=granularity, recording=recording)
            for granularity in GRANULARITIES
            for recording in (True, False)
        }
        made = maker.make(SIZE, bitmaps)
        with made.changing() as changed:
            for mapping in (changed, bitmaps):
                for name in list(mapping):
                    mapping[name] = mapping[name].replace(recording=not mapping[name].recording)
        assert read(made) == shapes(bitmaps)

    @needs("change")
    def test_nothing_changes_by_looking(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.changing() as bitmaps:
            bitmaps["a"] = bitmaps["a"]
        before = made.stored()
        with made.changing() as bitmaps:
            assert shapes(bitmaps) == shapes(some())
        assert made.stored() == before

    # What is put in, and got out.

    @needs("change")
    def test_what_is_put_in_is_copied(self, maker: Maker) -> None:
        made = maker.make(SIZE)
        mine = marked(SIZE, (0, 1))
        expected = shape(mine)
        with made.changing() as bitmaps:
            bitmaps["a"] = mine
            bitmaps["b"] = bitmaps["a"]
            bitmaps["c"] = mine.copy().freeze()
            assert bitmaps["a"] is not mine
            assert bitmaps["a"] is not bitmaps["b"]
            mine.mark(0, SIZE)
            bitmaps["b"].mark(SIZE - 1, 1)
            bitmaps["c"].clear(0, SIZE)
        with made.open() as namespace:
            assert shape(namespace["a"]) == expected
            assert dirty(namespace["b"]) == {0, SIZE // GRANULE}
            assert dirty(namespace["c"]) == set()
        assert dirty(mine) == everything(SIZE, GRANULE)

    @needs("change")
    def test_bitmaps_of_other_namespaces(self, maker: Maker) -> None:
        source, made = maker.make(SIZE, some()), maker.make(SIZE, {"c": dm.Bitmap(SIZE)})
        with source.open() as namespace, made.changing() as bitmaps:
            bitmaps.update(namespace)
        assert read(made) == shapes(some())
        with source.changing() as bitmaps:
            bitmaps.clear()
        assert read(made) == shapes(some())

    @needs("change")
    @pytest.mark.parametrize("name", list(NO_NAMES.values()), ids=list(NO_NAMES))
    def test_names_that_are_refused(self, maker: Maker, name: str) -> None:
        made = maker.make(SIZE, some())
        with unchanged(made):
            for act in (
                lambda bitmaps: bitmaps.update({"good": dm.Bitmap(SIZE), name: dm.Bitmap(SIZE)}),
                lambda bitmaps: bitmaps.rename("a", name),
            ):
                with pytest.raises(dm.BitmapError) as caught, made.changing() as bitmaps:
                    act(bitmaps)
                assert not isinstance(caught.value, KeyError)
                assert "\n" not in str(caught.value)

    @needs("change")
    def test_one_name_in_two_spellings(self, maker: Maker) -> None:
        """Both stand for the same bytes, so there can be one such bitmap at most."""
        for names in (("\udcc3\udca9", "é"), ("é", "\udcc3\udca9")):
            made = maker.make(SIZE)
            with contextlib.suppress(dm.BitmapError), made.changing() as bitmaps:
                bitmaps.update(dict.fromkeys(names, dm.Bitmap(SIZE)))
            with made.open() as namespace:
                assert list(namespace) in (["é"], [])
            with made.changing() as bitmaps:
                bitmaps.clear()

    @needs("change")
    @pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1, 2 * SIZE, 2**63 - 1])
    def test_other_sizes_are_refused(self, maker: Maker, size: int) -> None:
        made = maker.make(SIZE, some())
        with unchanged(made), pytest.raises(dm.BitmapError, match=r"'a'.*bytes"):
            change(made, lambda bitmaps: bitmaps.pop("b"), lambda bitmaps: bitmaps.update(a=dm.Bitmap(size)))

    @needs("change")
    def test_a_bitmap_that_is_too_fine_is_refused(self, maker: Maker) -> None:
        """Of a bitmap in a store no disk that can be made here asks too much: see `store.MAX_CHUNKS`."""
        made = maker.make(3 * 1024 * GIB)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dirtmap.fmt.store.MAX_CHUNKS", 100_000)
            with pytest.raises(dm.BitmapError, match=r"granularity 512 needs \d+ bytes"), made.changing() as bitmaps:
                bitmaps["a"] = dm.Bitmap(bitmaps.size, 512)
        assert read(made) == []

    @needs("change")
    def test_rename(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.changing() as bitmaps:
            bitmaps["b"].mark(0, 1)
            bitmaps.rename("a", "\udcff")
            bitmaps.rename("b", "a")
        expected = some()
        expected["b"].mark(0, 1)
        assert read(made) == [
            ("c", shape(expected["c"])),
            ("\udcff", shape(expected["a"])),
            ("a", shape(expected["b"])),
        ]

    @needs("change")
    def test_a_swap_of_names(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.changing() as bitmaps:
            bitmaps.rename("a", "t")
            bitmaps.rename("c", "a")
            bitmaps.rename("t", "c")
        assert read(made) == [("a", shape(some()["c"])), ("c", shape(some()["a"])), ("b", shape(some()["b"]))]

    # All or nothing.

    @needs("change")
    def test_nothing_on_an_exception(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())

        def fail(error: BaseException) -> None:
            raise error

        for error in (Abort(), KeyboardInterrupt(), GeneratorExit(), dm.BitmapError("x", "y")):
            with unchanged(made), pytest.raises(type(error)):
                change(
                    made,
                    lambda bitmaps: bitmaps.update(new=dm.Bitmap(SIZE)),
                    lambda bitmaps: bitmaps["c"].mark(0, SIZE),
                    lambda bitmaps: bitmaps.pop("a"),
                    lambda bitmaps: bitmaps.rename("b", "B"),
                    lambda _, error=error: fail(error),
                )

    @needs("change")
    @pytest.mark.parametrize("new", ["b", "a", "x" * 1024, "\ud800"], ids=["taken", "itself", "long", "surrogate"])
    def test_nothing_on_a_refused_rename(self, maker: Maker, new: str) -> None:
        made = maker.make(SIZE, some())
        with unchanged(made), pytest.raises(dm.BitmapError):
            change(made, lambda bitmaps: bitmaps.pop("c"), lambda bitmaps: bitmaps.rename("a", new))

    @needs("change")
    def test_what_was_refused_may_be_got_over(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.changing() as bitmaps:
            with pytest.raises(dm.BitmapError, match="'b': the name is taken"):
                bitmaps.rename("a", "b")
            with pytest.raises(dm.BitmapError):
                bitmaps["a"] = dm.Bitmap(SIZE + 1)
            with pytest.raises(dm.RangeError):
                bitmaps["b"].mark_many([0, SIZE], [1, 1])
            del bitmaps["c"]
        assert read(made) == shapes(some())[1:]

    @needs("change")
    def test_use_after_the_end(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        for error in (None, Abort):
            with contextlib.suppress(Abort), made.changing() as bitmaps:
                copy, lazy = bitmaps["c"], bitmaps["a"]
                assert dirty(copy)
                if error:
                    raise error
            with unchanged(made):
                for act in (
                    lambda ended: ended["c"],
                    lambda ended: "c" in ended,
                    lambda ended: ended.update(c=dm.Bitmap(SIZE)),
                    lambda ended: ended.pop("c"),
                    lambda ended: ended.rename("c", "d"),
                    lambda ended: ended.clear(),
                ):
                    with pytest.raises(dm.Error, match="the transaction has ended"):
                        act(bitmaps)
                copy.mark(0, SIZE)
                if maker.lazy:
                    with pytest.raises(dm.Error, match="the transaction has ended"):
                        _ = lazy.count

    @needs("change")
    def test_a_copy_lasts(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.changing() as bitmaps:
            kept = {name: bitmap.copy() for name, bitmap in bitmaps.items()}
        assert shapes(kept) == shapes(some())
        for name, bitmap in kept.items():
            bitmap.mark(0, 1)
            assert dirty(bitmap) == dirty(some()[name]) | {0}

    @needs("change")
    def test_a_transaction_is_entered_once(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace:
            transaction = namespace.transaction()
            with transaction as bitmaps:
                del bitmaps["a"]
            with pytest.raises((AttributeError, RuntimeError, dm.Error)), transaction as bitmaps:
                del bitmaps["b"]
        assert [name for name, _ in read(made)] == ["c", "b"]

    @needs("change")
    def test_one_that_is_not_entered_does_nothing(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with unchanged(made), made.open() as namespace:
            namespace.transaction()
        with made.changing() as bitmaps:
            del bitmaps["a"]

    # Several handles, several processes.

    @needs("change")
    def test_a_handle_sees_its_own_change(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace:
            with namespace.transaction() as bitmaps:
                del bitmaps["a"]
            assert list(namespace) == ["c", "b"]
            with namespace.transaction() as bitmaps:
                bitmaps["d"] = dm.Bitmap(SIZE)
            assert [bitmap.name for bitmap in namespace.info().bitmaps] == ["c", "b", "d"]

    @needs("recover")
    def test_a_handle_goes_on_after_recovery(self, maker: Maker) -> None:
        with maker.make(SIZE, some()).open() as namespace:
            namespace.recover()
            assert shapes(namespace) == shapes(some())
            assert namespace.tracking() is None

    @needs("change")
    def test_a_reader_sees_the_change_of_another(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as reader:
            assert len(reader) == 3
            with made.changing() as bitmaps:
                bitmaps["b"].mark(0, 1)
                del bitmaps["a"]
            assert list(reader) == ["c", "b"]
            assert dirty(reader["b"]) == {0}
            assert "a" not in reader
            assert reader.get("a") is None

    @needs("change", "meanwhile")
    def test_a_reader_sees_nothing_before_the_end(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as reader, made.changing() as bitmaps:
            bitmaps.clear()
            assert shapes(reader) == read(made) == shapes(some())

    @needs("change")
    @lacking("meanwhile")
    @pytest.mark.usefixtures("hurried")
    def test_readers_are_kept_out_meanwhile(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.changing() as bitmaps:
            bitmaps.clear()
            with pytest.raises(dm.LockedError, match="this very process"):
                made.open()
        with made.open() as reader, made.changing():
            for use in (lambda: reader["a"], lambda: list(reader), reader.info):
                with pytest.raises(dm.LockedError, match="this very process"):
                    use()

    @needs("change")
    def test_transactions_of_two_handles_in_sequence(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as one, made.open() as other:
            with one.transaction() as bitmaps:
                bitmaps["b"].mark(0, 1)
            with other.transaction() as bitmaps:
                assert dirty(bitmaps["b"]) == {0}
                bitmaps["b"].mark(512, 1)
            with one.transaction() as bitmaps:
                assert dirty(bitmaps["b"]) == {0, 1}
                del bitmaps["c"]
        assert [name for name, _ in read(made)] == ["a", "b"]

    @needs("change")
    @pytest.mark.usefixtures("hurried")
    def test_overlapping_transactions_are_refused(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as other, made.changing() as bitmaps:
            del bitmaps["a"]
            for _ in range(2):
                with pytest.raises(dm.LockedError, match="this very process"), other.transaction() as more:
                    more.clear()
            assert list(bitmaps) == ["c", "b"]
        assert read(made) == [each for each in shapes(some()) if each[0] != "a"]

    @needs("change", "process")
    @pytest.mark.usefixtures("hurried")
    def test_another_process_is_kept_out_meanwhile(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())

        def change() -> str:
            try:
                with made.changing() as bitmaps:
                    bitmaps.clear()
            except dm.LockedError as error:
                return error.where
            return "changed"

        with made.changing() as bitmaps:
            del bitmaps["a"]
            assert in_child(change) == str(made.container)
        assert in_child(change) == "changed"
        assert read(made) == []

    @needs("process")
    def test_another_process_reads_the_same(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        assert made.elsewhere(shapes) == shapes(some())

    @needs("change", "process")
    def test_a_fresh_process_sees_what_was_committed(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.changing() as bitmaps:
            bitmaps["b"].mark(SIZE - 1, 1)
            bitmaps.rename("a", "A")
            run = (
                "import json, sys, dirtmap.engine as dm\n"
                "image = dm.open(sys.argv[1])\n"
                "print(json.dumps([[name, *(each.tolist() for each in b.extents())] for name, b in image.items()]))"
            )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", run, made.target],
            stdout=subprocess.PIPE,
            timeout=60,
            check=True,
        )
        expected = [(name, *(each.tolist() for each in bitmap.extents())) for name, bitmap in some().items()]
        expected[1] = ("A", *expected[1][1:])
        expected[2] = ("b", [SIZE - 512], [512])
        assert [tuple(each) for each in json.loads(done.stdout)] == expected

    @needs("change", "process")
    def test_a_process_that_dies_in_a_transaction_has_done_nothing(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())

        def begin(namespace: dm.Namespace) -> object:
            transaction = namespace.transaction()
            bitmaps = transaction.__enter__()
            bitmaps["c"].mark(0, SIZE)
            del bitmaps["a"]
            return transaction

        with unchanged(made):
            made.killed(begin)
        with made.changing() as bitmaps:
            del bitmaps["a"]

    @needs("change", "process")
    def test_changes_of_many_processes_add_up(self, maker: Maker) -> None:
        made = maker.make(SIZE, {"a": dm.Bitmap(SIZE, 512)})
        for number in range(4):

            def change(namespace: dm.Namespace, number: int = number) -> None:
                with namespace.transaction() as bitmaps:
                    bitmaps["a"].mark(number * 1024, 1)

            made.elsewhere(change)
        assert read(made) == [("a", (SIZE, 512, True, False, {0, 2, 4, 6}))]

    @needs("change")
    def test_what_happens_nearby_changes_nothing(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        for _ in range(2):
            with unchanged(made):
                made.interlude()
            with made.changing() as bitmaps:
                bitmaps["b"].mark(0, 1)

    # Merging.

    @needs("change")
    def test_merge(self, maker: Maker) -> None:
        first, second = [(0, 1), (SIZE // 2, 5000)], [(4096, 1), (SIZE - 1, 1), (777_777, 0)]
        mine = {each: set().union(*(touched(*spot, each) for spot in first)) for each in GRANULARITIES}
        others = {each: set().union(*(touched(*spot, each) for spot in second)) for each in GRANULARITIES}
        bitmaps = {f"mine {each}": marked(SIZE, *first, granularity=each) for each in GRANULARITIES}
        bitmaps |= {f"other {each}": marked(SIZE, *second, granularity=each) for each in GRANULARITIES}
        made = maker.make(SIZE, bitmaps)
        expected = []
        with made.changing() as bitmaps:
            for a, b in itertools.product(GRANULARITIES, repeat=2):
                name, finer = f"{a} {b}", min(a, b)
                bitmaps[name] = bitmaps[f"mine {a}"]
                bitmaps[name] |= bitmaps[f"other {b}"]
                both = widened(mine[a], SIZE, a, finer) | widened(others[b], SIZE, b, finer)
                expected.append((name, (SIZE, finer, True, False, both)))
                bitmaps[f"{name} kept"] = bitmaps[f"mine {a}"] | bitmaps[f"other {b}"].at(a)
                kept = widened(mine[a] | widened(others[b], SIZE, b, a), SIZE, a, a)
                expected.append((f"{name} kept", (SIZE, a, True, False, kept)))
        assert read(made)[: 2 * len(GRANULARITIES)] == [
            *((f"mine {each}", (SIZE, each, True, False, mine[each])) for each in GRANULARITIES),
            *((f"other {each}", (SIZE, each, True, False, others[each])) for each in GRANULARITIES),
        ]
        assert read(made)[2 * len(GRANULARITIES) :] == expected

    # Bitmaps that a writer has left in use.

    @needs("inconsistent")
    def test_an_inconsistent_bitmap_is_told(self, maker: Maker) -> None:
        made = maker.make(SIZE, some(), ["bad"])
        with made.open() as namespace:
            assert list(namespace) == ["c", "a", "b", "bad"]
            bitmap = namespace["bad"]
            assert (bitmap.size, bitmap.granularity, bitmap.inconsistent, bitmap.frozen) == (SIZE, GRANULE, True, True)
            for use in (lambda: bitmap.count, lambda: bitmap.extents(), lambda: bitmap | dm.Bitmap(SIZE)):
                with pytest.raises(dm.BitmapError, match="inconsistent"):
                    use()
            told = namespace.info().bitmaps[3]
            assert (told.inconsistent, told.count, told.damaged) == (True, None, False)
            assert not any(told.inconsistent or told.count is None for told in namespace.info().bitmaps[:3])

    @needs("inconsistent", "apart")
    def test_an_inconsistent_bitmap_says_nothing_about_others(self, maker: Maker) -> None:
        made = maker.make(SIZE, some(), ["bad"])
        with made.open() as namespace:
            assert [(name, shape(namespace[name])) for name in "cab"] == shapes(some())

    @needs("inconsistent")
    def test_an_inconsistent_bitmap_stays_so(self, maker: Maker) -> None:
        made = maker.make(SIZE, some(), ["bad"])
        with made.changing() as bitmaps:
            del bitmaps["a"]
            bitmaps["b"].mark(0, 1)
        with made.changing() as bitmaps:
            bitmaps.rename("bad", "worse")
        with made.open() as namespace:
            assert {name: bitmap.inconsistent for name, bitmap in namespace.items()} == {
                "c": False,
                "b": False,
                "worse": True,
            }

    @needs("inconsistent")
    def test_an_inconsistent_bitmap_is_not_copied(self, maker: Maker) -> None:
        made = maker.make(SIZE, {}, ["bad"])
        for name in ("copy", "other"):
            with pytest.raises(dm.BitmapError, match="inconsistent"), made.changing() as bitmaps:
                bitmaps[name] = bitmaps["bad"]
        with made.open() as namespace:
            assert list(namespace) == ["bad"]

    @needs("inconsistent")
    def test_an_inconsistent_bitmap_goes_to_no_other_namespace(self, maker: Maker) -> None:
        made, other = maker.make(SIZE, {}, ["bad"]), maker.make(SIZE, some())
        with made.open() as namespace, unchanged(other), pytest.raises(dm.BitmapError, match="inconsistent"):
            change(other, lambda bitmaps: bitmaps.update(bad=namespace["bad"]))

    @needs("inconsistent")
    def test_an_inconsistent_bitmap_can_be_removed_or_replaced(self, maker: Maker) -> None:
        made = maker.make(SIZE, some(), ["bad", "worse"])
        with made.changing() as bitmaps:
            del bitmaps["bad"]
            bitmaps["worse"] = dm.Bitmap(SIZE)
        with made.open() as namespace:
            assert list(namespace) == ["c", "a", "b", "worse"]
            assert shape(namespace["worse"]) == shape(dm.Bitmap(SIZE))

    @needs("inconsistent", "apart")
    def test_recover(self, maker: Maker) -> None:
        made = maker.make(SIZE, some(), ["bad", "worse"])
        with made.open() as namespace:
            recovered = namespace.recover(["worse"])
        assert [each.name for each in recovered] == ["worse"]
        assert recovered[0].how.startswith("all dirty: ")
        with made.open() as namespace:
            assert namespace["bad"].inconsistent
            assert dirty(namespace["worse"]) == everything(SIZE, GRANULE)
            assert [each.name for each in namespace.recover()] == ["bad"]
        full = marked(SIZE, (0, SIZE))
        assert read(made) == shapes({**some(), "bad": full, "worse": full})

    @needs("inconsistent")
    def test_an_inconsistent_bitmap_is_recovered_after_all(self, maker: Maker) -> None:
        made = maker.make(SIZE, some(), ["bad"])
        for _ in range(2):
            with made.open() as namespace:
                namespace.recover()
        with made.open() as namespace:
            assert dirty(namespace["bad"]) == everything(SIZE, GRANULE)
            assert namespace.recover() == []

    @needs("inconsistent")
    def test_one_recovery_recovers_all(self, maker: Maker) -> None:
        made = maker.make(SIZE, some(), ["bad"])
        with made.open() as namespace:
            assert "bad" in [each.name for each in namespace.recover()]
        with made.open() as namespace:
            assert not namespace["bad"].inconsistent

    @needs("rest")
    def test_nothing_to_recover(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with unchanged(made), made.open() as namespace:
            for names in ([], ["a"], ["b", "c"]):
                assert namespace.recover(names) == []

    @needs("recover")
    def test_nothing_is_recovered_twice(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with unchanged(made):
            with made.open() as namespace:
                recovered = namespace.recover()
                assert all(isinstance(each, dm.Recovery) for each in recovered)
                assert len(recovered) in (0, 3)
            with made.open() as namespace:
                assert namespace.recover() == []
                assert made.recover() == []

    @needs("recover")
    def test_recovering_what_is_not_there(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        match = "'nope': there is no such bitmap"
        with unchanged(made), made.open() as namespace, pytest.raises(dm.BitmapNotFoundError, match=match):
            namespace.recover(["a", "nope"])

    @needs("recover")
    def test_settle(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with unchanged(made), made.open() as namespace:
            namespace.recover_session()
        with made.open() as namespace:
            assert namespace.tracking() is None

    # Doubt.

    @needs("doubt")
    def test_a_doubt_is_told(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        made.put_in_doubt()
        with made.open() as namespace:
            assert namespace.doubt()
            assert namespace.info().doubt == namespace.doubt()
            assert len(namespace.info().notes) == 1

    @needs("doubt")
    def test_what_is_in_doubt_is_all_dirty(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        made.put_in_doubt()
        with made.open() as namespace:
            assert list(namespace) == ["c", "a", "b"]
            for told in namespace.info().bitmaps:
                bitmap = namespace[told.name]
                assert dirty(bitmap) == everything(SIZE, bitmap.granularity)
                assert told.count == bitmap.count
        with made.changing() as bitmaps:
            bitmaps["b"].clear(0, 512)
        with made.open() as namespace:
            assert dirty(namespace["b"]) == everything(SIZE, 512) - {0}
            assert dirty(namespace["c"]) == everything(SIZE, GRANULE)
            assert namespace.doubt() is None

    @needs("doubt")
    def test_recover_ends_a_doubt(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        made.put_in_doubt()
        with made.open() as namespace:
            recovered = namespace.recover()
        assert [each.name for each in recovered] == ["c", "a", "b"]
        assert all(each.how.startswith("all dirty: ") for each in recovered)
        with made.open() as namespace:
            assert namespace.doubt() is None
            assert namespace.recover() == []
            assert all(dirty(bitmap) == everything(SIZE, bitmap.granularity) for bitmap in namespace.values())

    # Holds.

    @needs("hold")
    def test_hold(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace, namespace.hold("c", "a backup") as held:
            assert shape(held) == shape(some()["c"])
            assert held.frozen
            assert held.busy
            with made.open() as other:
                assert [bitmap.busy for bitmap in other.values()] == [True, False, False]
                assert [bitmap.busy for bitmap in other.info().bitmaps] == [True, False, False]
                assert [bitmap.busy for bitmap in made.describe().bitmaps] == [True, False, False]
            with made.changing() as bitmaps:
                assert bitmaps["c"].busy
                assert not bitmaps["a"].busy
        with made.open() as other:
            assert not any(bitmap.busy for bitmap in other.values())
            assert not any(bitmap.busy for bitmap in other.info().bitmaps)

    @needs("hold")
    def test_what_is_held_is_not_changed(self, maker: Maker) -> None:
        """What changes it in place is noticed at the end only, and nothing else of the transaction happens then."""
        made = maker.make(SIZE, some())
        acts: list[Act] = [
            lambda bitmaps: bitmaps.pop("c"),
            lambda bitmaps: bitmaps.update(c=dm.Bitmap(SIZE)),
            lambda bitmaps: bitmaps.update(c=bitmaps["c"].replace(recording=False)),
            lambda bitmaps: bitmaps.rename("c", "d"),
            lambda bitmaps: bitmaps["c"].mark(SIZE // 2, 1),
            lambda bitmaps: bitmaps["c"].clear(0, SIZE),
            lambda bitmaps: bitmaps.clear(),
        ]
        with made.open() as namespace, namespace.hold("c", "a backup"), unchanged(made):
            for act in acts:
                with pytest.raises(dm.BitmapError, match=r"'c'.*busy: held by.*a backup"):
                    change(made, lambda bitmaps: bitmaps.pop("b"), act)
        for act in acts:
            with contextlib.suppress(Abort), made.changing() as bitmaps:
                act(bitmaps)  # the hold has ended with its block
                raise Abort

    @needs("hold")
    def test_what_is_not_held_is_changed(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace, namespace.hold("c"):
            with made.changing() as bitmaps:
                bitmaps["b"] = bitmaps["c"] | bitmaps["b"]
                bitmaps["copy"] = bitmaps["c"]
                del bitmaps["a"]
            with made.open() as other:
                assert [(name, bitmap.busy) for name, bitmap in other.items()] == [
                    ("c", True),
                    ("b", False),
                    ("copy", False),
                ]
                assert dirty(other["copy"]) == dirty(other["c"]) == dirty(some()["c"])

    @needs("hold")
    def test_a_hold_ends_by_an_exception(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with pytest.raises(Abort), made.open() as namespace, namespace.hold("c"):
            raise Abort
        with made.changing() as bitmaps:
            del bitmaps["c"]
        assert [name for name, _ in read(made)] == ["a", "b"]

    @needs("hold", "process")
    def test_a_hold_ends_with_its_process(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())

        def hold(namespace: dm.Namespace) -> object:
            held = namespace.hold("c")
            assert held.__enter__().busy
            return held

        made.killed(hold)
        with made.open() as namespace:
            assert not namespace["c"].busy
        with made.changing() as bitmaps:
            del bitmaps["c"]

    @needs("hold", "process")
    def test_a_hold_is_seen_by_other_processes(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace, namespace.hold("c"):
            assert made.elsewhere(lambda other: [bitmap.busy for bitmap in other.values()]) == [True, False, False]

    @needs("hold")
    def test_holds_of_several(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace, made.open() as other, namespace.hold("c", "one"):
            with other.hold("c", "two"), other.hold("a"), made.open() as third:
                assert [bitmap.busy for bitmap in third.values()] == [True, True, False]
            with made.open() as third:
                assert [bitmap.busy for bitmap in third.values()] == [True, False, False]

    @needs("hold")
    def test_a_hold_on_nothing(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        match = "'nope': there is no such bitmap"
        with unchanged(made), made.open() as namespace, pytest.raises(dm.BitmapNotFoundError, match=match):
            namespace.hold("nope").__enter__()

    @needs("hold", "inconsistent")
    def test_a_hold_on_an_inconsistent_bitmap(self, maker: Maker) -> None:
        made = maker.make(SIZE, some(), ["bad"])
        with made.open() as namespace, pytest.raises(dm.BitmapError, match="'bad': inconsistent"):
            namespace.hold("bad").__enter__()

    @lacking("hold")
    def test_a_hold_that_is_refused(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with unchanged(made), made.open() as namespace, pytest.raises(dm.Error) as caught, namespace.hold("nope"):
            pass
        assert isinstance(caught.value, dm.BitmapError | dm.LockedError | dm.UnsupportedError)

    # Tracking.

    @needs("track")
    def test_track(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        expected = some()
        with made.open() as namespace, namespace.track(save_interval=0) as tracker:
            tracker.mark(400_000, 5000)
            for name in "cb":  # "a" does not record
                expected[name].mark(400_000, 5000)
            assert read(made) == shapes(expected)
            with made.open() as other:
                status = other.tracking()
                assert status is not None
                assert status.alive
                assert other.doubt() is None
                with other.hold("c") as held:  # its tracker does that
                    assert held == expected["c"]
                with pytest.raises(dm.LockedError, match="tracked by"):
                    other.recover()
                with pytest.raises(dm.LockedError, match="tracked by"):
                    other.track()
        assert read(made) == shapes(expected)
        with made.open() as namespace:
            assert namespace.tracking() is None
            assert namespace.recover() == []

    @needs("track", "process")
    def test_a_tracker_that_dies_loses_nothing(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        expected = some()
        for name in "cb":
            expected[name].mark(400_000, 5000)

        def track(namespace: dm.Namespace) -> object:
            tracker = namespace.track(save_interval=0)
            tracker.mark(400_000, 5000)
            return tracker

        made.killed(track)
        with unchanged(made):
            with made.open() as namespace:
                assert shapes(namespace) == shapes(expected)
                status = namespace.tracking()
                assert status is not None
                assert not status.alive
                recovered = namespace.recover()
                assert [each.name for each in recovered] == ["c", "a", "b"]
                assert all(each.how.startswith("exact") for each in recovered)
            with made.open() as namespace:
                assert namespace.tracking() is None

    @needs("track")
    def test_a_reader_stays_right_while_somebody_tracks(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as reader, made.open() as namespace:
            with namespace.track(save_interval=0) as tracker:
                tracker.mark(0, 1)
                told = [(told.name, told.inconsistent) for told in reader.info().bitmaps]
                assert told == [(name, False) for name in "cab"]
                assert dirty(reader["b"]) == {0}
                assert reader.tracking() is not None
            assert dirty(reader["b"]) == {0}
            assert reader.tracking() is None

    @needs("track")
    def test_the_trackers_handle_goes_on(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with made.open() as namespace:
            with namespace.track(save_interval=0) as tracker:
                tracker.mark(0, 1)
            assert dirty(namespace["b"]) == {0}
            with namespace.transaction() as bitmaps:
                del bitmaps["b"]
            assert list(namespace) == ["c", "a"]

    @lacking("track")
    def test_tracking_that_is_refused(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with unchanged(made), made.open() as namespace, pytest.raises(dm.Error) as caught:
            namespace.track()
        assert isinstance(caught.value, dm.BitmapError | dm.LockedError | dm.UnsupportedError)

    @lacking("recover")
    def test_recovery_that_is_refused(self, maker: Maker) -> None:
        made = maker.make(SIZE, some())
        with unchanged(made), made.open() as namespace:
            for act in (namespace.recover, namespace.recover_session):
                with pytest.raises(dm.LockedError, match="tracked by"):
                    act()

    # All of it, in any order.

    @needs("change")
    def test_against_a_model(self, maker: Maker) -> None:
        made = maker.make(MACHINE_SIZE)
        some_examples = settings(max_examples=8, stateful_step_count=10)
        run_state_machine_as_test(lambda: Machine(made), settings=some_examples)


MACHINE_SIZE = 300_032  # whole sectors, and no whole granule of 4 KiB


@dataclass
class Model:
    """A bitmap: the numbers of its dirty granules."""

    granularity: int
    recording: bool
    dirty: set[int] = field(default_factory=set)

    def copy(self) -> Model:
        return Model(self.granularity, self.recording, set(self.dirty))

    def mark(self, offset: int, length: int) -> None:
        self.dirty |= touched(offset, length, self.granularity)

    def clear(self, offset: int, length: int) -> None:
        self.dirty -= {
            number
            for number in self.dirty
            if offset <= number * self.granularity
            and min((number + 1) * self.granularity, MACHINE_SIZE) <= offset + length
        }

    def merge(self, other: Model) -> None:
        finer = min(self.granularity, other.granularity)
        self.dirty = widened(self.dirty, MACHINE_SIZE, self.granularity, finer) | widened(
            other.dirty, MACHINE_SIZE, other.granularity, finer
        )
        self.granularity = finer


NAME = st.sampled_from(["x", "y", "z", "\udcfe", "m" * 1023])
RANGE = st.tuples(st.integers(0, MACHINE_SIZE - 1), st.integers(0, MACHINE_SIZE)).map(
    lambda pair: (pair[0], min(pair[1], MACHINE_SIZE - pair[0]))
)
ACT = st.one_of(
    st.tuples(st.just("put"), NAME, st.sampled_from([512, 4096, 65536, 2 * GIB]), st.booleans(), RANGE),
    st.tuples(st.sampled_from(["mark", "clear"]), NAME, RANGE),
    st.tuples(st.sampled_from(["merge", "rename", "copy"]), NAME, NAME),
    st.tuples(st.sampled_from(["remove", "record"]), NAME),
)


def change_model(model: dict[str, Model], act: tuple[Any, ...]) -> bool:
    """What an act does, as plain as can be; False where it is refused."""
    kind, name, *rest = act
    if kind == "put":
        model[name] = Model(rest[0], rest[1])
        model[name].mark(*rest[2])
        return True
    if name not in model:
        return False
    if kind == "merge":
        if rest[0] not in model:
            return False
        model[name].merge(model[rest[0]])
    elif kind == "rename":
        if rest[0] in model:
            return False
        items = [(rest[0] if key == name else key, value) for key, value in model.items()]
        model.clear()
        model.update(items)
    elif kind == "copy":
        model[rest[0]] = model[name].copy()
    elif kind == "remove":
        del model[name]
    elif kind == "record":
        model[name].recording = not model[name].recording
    else:
        getattr(model[name], kind)(*rest[0])
    return True


def change_bitmaps(bitmaps: dm.Transaction, act: tuple[Any, ...]) -> bool:
    """The same with a transaction."""
    kind, name, *rest = act
    try:
        if kind == "put":
            bitmaps[name] = marked(bitmaps.size, rest[2], granularity=rest[0], recording=rest[1])
        elif kind == "merge":
            bitmaps[name] |= bitmaps[rest[0]]
        elif kind == "rename":
            bitmaps.rename(name, rest[0])
        elif kind == "copy":
            bitmaps[rest[0]] = bitmaps[name]
        elif kind == "remove":
            del bitmaps[name]
        elif kind == "record":
            bitmaps[name] = bitmaps[name].replace(recording=not bitmaps[name].recording)
        else:
            getattr(bitmaps[name], kind)(*rest[0])
    except dm.BitmapError:
        return False
    return True


class Machine(RuleBasedStateMachine):
    """A namespace and a naive model of it go through the same changes, and must never differ."""

    def __init__(self, made: Made) -> None:
        super().__init__()
        self.made = made
        self.model: dict[str, Model] = {}
        self.kept: list[tuple[dm.Bitmap, bytes]] = []

    @initialize()
    def empty(self) -> None:
        with self.made.changing() as bitmaps:
            bitmaps.clear()

    @rule(acts=st.lists(ACT, min_size=1, max_size=5), end=st.sampled_from(["commit", "commit", "commit", "abort"]))
    def change(self, acts: list[tuple[Any, ...]], end: str) -> None:
        model = {name: bitmap.copy() for name, bitmap in self.model.items()}
        with contextlib.suppress(Abort), self.made.changing() as bitmaps:
            for act in acts:
                assert change_bitmaps(bitmaps, act) == change_model(model, act)
                assert list(bitmaps) == list(model)
            if end == "abort":
                raise Abort
        if end == "commit":
            self.model = model

    @rule(name=NAME, act=ACT)
    def hold(self, name: str, act: tuple[Any, ...]) -> None:
        """What is held is not changed by anybody; all else is."""
        if name not in self.model or "hold" in self.made.maker.lacks:
            return
        model = {each: bitmap.copy() for each, bitmap in self.model.items()}
        done = change_model(model, act)
        with self.made.open() as namespace, namespace.hold(name) as held:
            before = bytes(held.packed())
            try:
                with self.made.changing() as bitmaps:
                    done = change_bitmaps(bitmaps, act)
            except dm.BitmapError:
                done = False
            assert bytes(held.packed()) == before
            with self.made.open() as other:
                assert name in other
                assert other[name].busy
        if done:
            assert model[name] == self.model[name]
            self.model = model

    @rule()
    def interlude(self) -> None:
        self.made.interlude()

    @rule(name=NAME)
    def keep(self, name: str) -> None:
        """A value that somebody goes on using."""
        if name in self.model:
            with self.made.open() as namespace:
                bitmap = namespace[name]
            self.kept.append((bitmap, bytes(bitmap.packed())))

    @invariant()
    def same(self) -> None:
        with self.made.open() as namespace:
            assert list(namespace) == list(self.model)
            assert len(namespace) == len(self.model)
            for (name, bitmap), told in zip(namespace.items(), namespace.info().bitmaps, strict=True):
                model = self.model[name]
                assert shape(bitmap) == (MACHINE_SIZE, model.granularity, model.recording, False, model.dirty)
                assert (told.name, told.granularity, told.recording) == (name, model.granularity, model.recording)
                assert (told.count, told.busy) == (bitmap.count, False)
        for bitmap, packed in self.kept:
            assert bytes(bitmap.packed()) == packed
