"""`dirtmap plot`: what is drawn, in the terminal, as JSON, PNG and SVG."""

from __future__ import annotations

import builtins
import os
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import qemu
from support.cli import COMMAND, dirtmap, error_of, json_of
from support.plotted import GIB, KIB, MIB, TIB, make

import dirtmap.engine as dm
from dirtmap.tools.plot import files
from dirtmap.tools.plot.cells import cells, even_edges, round_edges, runs

EXTENTS = {"monday": [(0, 16 * GIB), (40 * GIB, 1)], "tuesday": []}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An image in the working folder; the terminal is 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "disk.qcow2", 64 * GIB, EXTENTS)
    return "disk.qcow2"


# Cells.

sizes = st.one_of(st.integers(0, 5000), st.integers(0, 300_000))
granularities = st.sampled_from([512, 1024, 4096])


@given(sizes, granularities, st.integers(1, 60), st.booleans(), st.data())
def test_cells_against_a_flag_for_each_byte(
    size: int, granularity: int, number: int, is_round: bool, data: st.DataObject
) -> None:
    bitmap, flags = dm.Bitmap(size, granularity), np.zeros(size, np.bool_)
    for _ in range(data.draw(st.integers(0, 8)) if size else 0):
        offset = data.draw(st.integers(0, size - 1))
        length = data.draw(st.integers(1, size - offset))
        bitmap.mark(offset, length)
        flags[offset // granularity * granularity : -(-(offset + length) // granularity) * granularity] = True
    edges = (round_edges if is_round else even_edges)(size, [granularity], number)
    assert edges[-1] == size
    assert len(edges) <= number + 1
    found = cells(bitmap, edges)
    begins = flags & ~np.append(False, flags[:-1])[:size]
    for index, (start, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        here = flags[start:end]
        assert found.dirty[index] == here.sum()
        assert found.extents[index] == begins[start:end].sum()
        assert (found.levels[index] > 0) == here.any(), "nothing that is dirty vanishes"
        assert (found.levels[index] == 4) == (here.all() and len(here) > 0)
    drawn = np.zeros(len(found.levels), np.int64)
    for first, behind in zip(*(places.tolist() for places in runs(found.levels)), strict=True):
        assert len(set(found.levels[first:behind].tolist())) == 1
        drawn[first:behind] = found.levels[first]
    assert np.array_equal(drawn, found.levels)


def test_round_edges_are_round() -> None:
    assert round_edges(100, [65536], 2048).tolist() == [0, 100]
    assert round_edges(0, [], 2048).tolist() == [0]
    edges = round_edges(100 * GIB, [4096, 65536], 2048)
    assert set(np.diff(edges).tolist()) == {64 * MIB}
    assert round_edges(2**63 - 1, [2**31], 2048)[-1] == 2**63 - 1


# In the terminal, and as JSON.


def test_in_the_terminal(disk: str) -> None:
    assert dirtmap("plot", disk).out.splitlines() == [
        "disk.qcow2: 64 GiB, a character is 1.3 GiB",
        "         '0 B        '16 GiB      '32 GiB      '48 GiB      '64 GiB",
        "monday  │████████████▓" + "·" * 18 + "░" + "·" * 19 + "│ 16.0 GiB (25.0%)",
        "tuesday │" + "·" * 51 + "│ 0 B",
        "         · clean  ░▒▓█ dirty",
    ]


def test_chosen_bitmaps_come_in_their_order(disk: str) -> None:
    lines = dirtmap("plot", disk, "tuesday", "monday").out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["tuesday", "monday"]
    assert [bitmap["name"] for bitmap in json_of("plot", disk, "tuesday", "monday")] == ["tuesday", "monday"]


@pytest.mark.parametrize("columns", ["1", "40", "80", "300"])
def test_lines_fit_the_terminal(columns: str, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lines = dirtmap("plot", disk).out.splitlines()
    assert len(set(map(len, (re.sub("│[^│]*$", "", line) for line in lines[2:4])))) == 1
    if int(columns) >= 80:
        assert max(map(len, lines)) <= int(columns)
    assert lines[2].count("█") >= 3


def test_names_that_could_harm_a_terminal(tmp_path: Path) -> None:
    make(tmp_path / "disk.qcow2", MIB, {"new\nline\x1b[31m": [], "漢字" * 20: []})
    lines = dirtmap("plot", tmp_path / "disk.qcow2").out.splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("new\\nline\\x1b[31m ")
    assert lines[3].startswith("漢字" * 5)


def test_colour_is_for_terminals(disk: str) -> None:
    assert "\x1b" not in dirtmap("plot", disk).out
    done = subprocess.run(["script", "-qec", f"{COMMAND} plot {disk}", "/dev/null"], capture_output=True, check=True)
    assert b"\x1b[31m" in done.stdout


def test_output_without_such_characters(disk: str) -> None:
    done = subprocess.run(
        [COMMAND, "plot", disk], capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert b"monday  |####" in done.stdout


def test_json_has_what_is_not_clean(disk: str) -> None:
    monday, tuesday = json_of("plot", disk)
    assert tuesday["cells"] == []
    assert monday["cell-size"] == 32 * MIB
    assert monday["cells"] == [
        *({"offset": n * 32 * MIB, "length": 32 * MIB, "dirty": 32 * MIB, "extents": int(n == 0)} for n in range(512)),
        {"offset": 40 * GIB, "length": 32 * MIB, "dirty": 64 * KIB, "extents": 1},
    ]
    del monday["cells"]
    assert monday == {
        "filename": "disk.qcow2",
        "name": "monday",
        "virtual-size": 64 * GIB,
        "granularity": 64 * KIB,
        "checkpoint": False,
        "began": None,
        "count": 16 * GIB + 64 * KIB,
        "doubt": None,
        "incomplete": False,
        "cell-size": 32 * MIB,
    }


def raw_drive(folder: Path) -> Path:
    """A raw disk, which is the node "drive", with a bitmap "b"."""
    raw = folder / "raw"
    raw.touch()
    os.truncate(raw, GIB)
    dirtmap("node", "add", "drive", raw)
    dirtmap("add", "drive", "b")
    return raw


def test_checkpoints_say_when_they_began(tmp_path: Path) -> None:
    raw_drive(tmp_path)
    with dm.open("drive") as image, image.track() as tracker:
        tracker.checkpoint("noon")
        tracker.mark(GIB // 2, 1)
    plain, noon = json_of("plot", "drive")
    assert (plain["name"], plain["checkpoint"], plain["began"]) == ("b", False, None)
    assert (noon["name"], noon["checkpoint"], noon["count"]) == ("noon", True, 64 * KIB)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", noon["began"])
    assert re.match(r"noon, \d{4}-\d\d-\d\d \d\d:\d\d │", dirtmap("plot", "drive").out.splitlines()[3])


def test_no_bitmaps(tmp_path: Path) -> None:
    make(tmp_path / "disk.qcow2", MIB, {})
    assert json_of("plot", tmp_path / "disk.qcow2") == []
    assert len(dirtmap("plot", tmp_path / "disk.qcow2").out.splitlines()) == 3
    for ending in files.ENDINGS:
        dirtmap("plot", tmp_path / "disk.qcow2", "-o", tmp_path / f"disk{ending}")


def test_quiet(disk: str) -> None:
    assert dirtmap("plot", "-q", disk).out == ""


# What is not known.


def test_an_inconsistent_bitmap_is_drawn_in_another_way(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", GIB, {"lost": []})
    with qemu.StorageDaemon(path):
        pass
    dirtmap("add", path, "kept")
    dirtmap("mark", path, "kept", 0, 1)
    lines = dirtmap("plot", path).out.splitlines()
    assert re.fullmatch(r"lost │\?+│ not known", lines[2])
    assert "inconsistent" in lines[3]
    assert re.fullmatch(r"kept │░·+│ 64 KiB \(<0.1%\)", lines[4])
    assert lines[5].endswith("? counts as dirty, not known")
    lost, kept = json_of("plot", path)
    assert lost["count"] is None
    assert lost["doubt"].startswith("inconsistent")
    assert sum(cell["dirty"] for cell in lost["cells"]) == GIB
    assert kept["doubt"] is None
    colours = colours_of(svg(path, tmp_path))
    assert "#e69f00" in colours


def test_a_doubt_is_drawn_in_another_way(tmp_path: Path) -> None:
    raw = raw_drive(tmp_path)
    os.utime(raw, (1, 1))  # as if somebody had written to it
    done = dirtmap("plot", "drive")
    assert "its bitmaps count as all dirty" in done.error
    lines = done.out.splitlines()
    assert re.fullmatch(r"b │\?+│ 1 GiB \(100.0%\)", lines[2])
    assert "counts as dirty where it may be clean" in lines[3]
    assert json_of("plot", "drive")[0]["doubt"]


# Files.


def svg(path: Path, folder: Path) -> ElementTree.Element:
    """The picture of an image, as SVG."""
    out = folder / "out.svg"
    assert dirtmap("plot", path, "-o", out).out == ""
    return ElementTree.parse(out).getroot()


def bars(root: ElementTree.Element) -> list[tuple[str, float, float]]:
    """What is drawn in the rows: the colour, where it begins and how wide it is, in pixels."""
    found = []
    for group in root.iter("{http://www.w3.org/2000/svg}g"):
        if re.search(r"\bmark-rect role-mark layer_\d_marks\b", group.get("class", "")):
            for path in group.iter("{http://www.w3.org/2000/svg}path"):
                x, width = re.findall(r"M([-\d.]+),[-\d.]+h([\d.]+)", path.get("d", ""))[0]
                found.append((path.get("fill", ""), float(x), float(width)))
    return found


def colours_of(root: ElementTree.Element) -> set[str]:
    return {colour for colour, _, _ in bars(root)}


def test_svg(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 100 * GIB, {"<monday> & co": [(10 * GIB, 20 * GIB)], "empty": []})
    root = svg(path, tmp_path)
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<monday> & co", "empty", "20 GiB (20.0%)", "0 B", "0", "16 GiB", "96 GiB"} <= set(texts)
    assert any("100 GiB" in text and "cells of 64 MiB" in text for text in texts)
    assert colours_of(root) == {"#e9edf2", "#08264d"}
    assert "http" not in (tmp_path / "out.svg").read_text().replace("http://www.w3.org/", "")


def test_one_granule_of_the_largest_disk_is_seen(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2", 16 * TIB, {"one": [(11 * TIB, 1)]})
    ((_, x, width),) = (bar for bar in bars(svg(path, tmp_path)) if bar[0] == "#8fc1e3")
    assert width >= 1.99
    assert x <= 1024 * 11 / 16 + 1 <= x + width + 1
    assert "░" in dirtmap("plot", path).out.splitlines()[2]


def test_the_example_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "plot.md").read_text()
    (script,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    monkeypatch.setenv("PATH", f"{Path(COMMAND).parent}:{os.environ['PATH']}")
    subprocess.run(["sh", "-e", "-c", script], cwd=tmp_path, check=True)
    made, there = (bars(ElementTree.parse(folder / "plot.svg").getroot()) for folder in (tmp_path, docs))
    assert [(colour, round(x), round(width)) for colour, x, width in made] == [
        (colour, round(x), round(width)) for colour, x, width in there
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (shown,) = re.findall(r"    \$ dirtmap plot disk.qcow2\n((?:    .*\n)+)", text)
    assert dirtmap("plot", "disk.qcow2").out.splitlines() == [line[4:] for line in shown.splitlines()]


def test_png(tmp_path: Path) -> None:
    heights = []
    for rows in (1, 40):
        path = tmp_path / f"{rows}.qcow2"
        make(path, GIB, {f"bitmap {number}": [(number * MIB, MIB)] for number in range(rows)})
        out = tmp_path / f"{rows}.PNG"
        dirtmap("plot", path, "-o", out)
        content = out.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", content[16:24])
        assert 2 * 1024 < width < 2 * 1600
        heights.append(height)
    assert 2 * 40 < heights[0] < 2 * 200
    assert 2 * 40 * 13 < heights[1] < 2 * 1200


def test_a_file_is_replaced_as_a_whole(disk: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.svg"
    out.write_text("old")
    out.chmod(0o640)
    (tmp_path / "link.svg").symlink_to(out)
    dirtmap("plot", disk, "-o", tmp_path / "link.svg")
    assert (tmp_path / "link.svg").is_symlink()
    assert out.read_text().startswith("<svg")
    assert out.stat().st_mode & 0o777 == 0o640
    before = sorted(os.listdir(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out.write_text("old")
    monkeypatch.setattr(Path, "replace", full)
    assert error_of("plot", disk, "-o", out) == f"{out}: No space left on device"
    assert out.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == before


def test_refused_files(disk: str, tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    assert error_of("plot", disk, "-o", "folder.svg") == "folder.svg: is there, and is no regular file"
    assert error_of("plot", disk, "-o", "no/out.svg") == "no/out.svg: No such file or directory"
    for name in ("out.gif", "out", ".svg", "svg"):
        assert error_of("plot", disk, "-o", name) == "plot: -o takes a FILE that ends in .png, .svg or .html."
    assert error_of("plot", disk, "-o", "out.svg", "--output=json") == "plot: -o does not go with --output=json."
    assert error_of("plot", disk, "nope", "-o", "out.svg") == "disk.qcow2: bitmap 'nope': there is no such bitmap"
    Path(disk).rename("disk.svg")
    (tmp_path / "same.svg").hardlink_to("disk.svg")
    assert error_of("plot", "disk.svg", "-o", "same.svg").startswith("same.svg: has the disk or its bitmaps")
    assert not (tmp_path / "out.svg").exists()


def test_a_raw_disk_is_not_replaced(tmp_path: Path) -> None:
    raw = tmp_path / "disk.png"
    raw.touch()
    os.truncate(raw, MIB)
    dirtmap("node", "add", "drive", raw)
    assert error_of("plot", "drive", "-o", raw).startswith(f"{raw}: has the disk or its bitmaps")
    assert raw.stat().st_size == MIB


@pytest.mark.parametrize("missing", ["altair", "vl_convert"])
def test_without_the_extra(missing: str, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == missing:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("out.png", "out.svg", "out.html"):
        assert error_of("plot", disk, "-o", name) == (
            f"{name}: a picture as a file needs the Python package {missing}: pip install 'dirtmap[plot]'"
        )
    assert dirtmap("plot", disk).out


def test_the_terminal_needs_none_of_the_extra(disk: str) -> None:
    script = "import sys; from dirtmap.tools.cli import main\ntry: main()\nfinally: print('altair' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, "plot", disk], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
