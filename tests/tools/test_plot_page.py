"""The page that `dirtmap plot` makes, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import Browser
from support.cli import dirtmap
from support.plotted import GIB, KIB, MIB, TIB, make

HOSTILE = "</script><script>window.harmed = 1</script><b>"
MANY = [(number * MIB, 64 * KIB) for number in range(3000)]
CLEAN, FULL = [0xE9, 0xED, 0xF2, 255], [0x08, 0x26, 0x4D, 255]


def is_like(one: list[int], other: list[int]) -> bool:
    """True if two colours look the same: where marks overlap, their edges are mixed."""
    return all(abs(a - b) <= 8 for a, b in zip(one, other, strict=True))


class Page:
    """The page of the picture, opened."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def place(self, offset: int, row: int) -> tuple[float, float]:
        """Where on the page the disk's byte at that offset is drawn, in the middle of that row."""
        x, y = self.browser.evaluate(
            f"""window.drawn.then(({{view}}) => {{
                const box = view.container().querySelector("canvas").getBoundingClientRect();
                const [left, top] = view.origin(), pad = view.padding(), rows = view.scale("y");
                return [box.left + pad.left + left + view.scale("x")({offset}),
                        box.top + pad.top + top + rows({row}) + rows.bandwidth() / 2];
            }})"""
        )
        return x, y

    def colour(self, offset: int, row: int, aside: float = 1.0) -> list[int]:
        """Red, green, blue and opacity of what is drawn there, or so many pixels to the right."""
        x, y = self.place(offset, row)
        found: list[int] = self.browser.evaluate(
            f"""(() => {{
                const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
                const at = [({x + aside} - box.left), ({y} - box.top)].map(n => n * canvas.width / box.width);
                return [...canvas.getContext("2d").getImageData(at[0], at[1], 1, 1).data];
            }})()"""
        )
        return found

    def told(self, offset: int, row: int, aside: float = 1.0) -> dict[str, str]:
        """What the page tells of what is under a pointer there."""
        x, y = self.place(offset, row)
        self.browser.mouse("mouseMoved", 5, 5)
        self.browser.mouse("mouseMoved", x + aside, y)
        found: dict[str, str] = self.browser.evaluate(
            """new Promise(tell => {
                const look = () => {
                    const shown = document.querySelector("#vg-tooltip-element.visible");
                    if (!shown) { setTimeout(look, 20); return; }
                    const cells = [...shown.querySelectorAll("tr")].map(row => [...row.cells].map(c => c.textContent));
                    tell(Object.fromEntries(cells.map(([key, value]) => [key.replace(":", ""), value])));
                };
                look();
            })"""
        )
        return found

    def shown(self) -> tuple[float, float]:
        """Which part of the disk is shown, in bytes."""
        first, end = self.browser.evaluate("window.drawn.then(({view}) => [...view.scale('x').domain()])")
        return first, end

    def wheel(self, offset: int, turns: int) -> None:
        """Turns the wheel above that offset, towards the disk."""
        x, y = self.place(offset, 0)
        self.browser.mouse("mouseMoved", x, y)
        for _ in range(turns):
            self.browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-500)


def data_of(path: Path) -> dict[str, Any]:
    """The data sets that are in the page."""
    _, _, behind = path.read_text().partition('vegaEmbed("#chart", ')
    chart, _ = json.JSONDecoder().raw_decode(behind)
    found: dict[str, Any] = chart["datasets"]
    return found


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as started:
        yield started


def test_the_page(browser: Browser, tmp_path: Path) -> None:
    bitmaps = {
        "monday": [(10 * GIB, 20 * GIB), (50 * GIB, 64 * KIB), (50 * GIB + MIB, 128 * KIB)],
        "many": MANY,
        HOSTILE: [],
    }
    make(tmp_path / "disk.qcow2", 100 * GIB, bitmaps)
    path = tmp_path / "disk.html"
    assert dirtmap("plot", tmp_path / "disk.qcow2", "-o", path).out == ""
    browser.open(path)
    page = Page(browser)

    # Marks are drawn, and nothing else.
    assert is_like(page.colour(20 * GIB, 0), FULL)
    assert page.colour(5 * GIB, 0) == CLEAN
    assert not any(is_like(page.colour(50 * GIB, 0), other) for other in (CLEAN, FULL))
    assert not any(is_like(page.colour(GIB, 1), other) for other in (CLEAN, FULL))
    assert page.colour(GIB, 2) == CLEAN

    # Exact extents are told, also of a mark that is a thousandth of a pixel wide in truth.
    told = page.told(20 * GIB, 0)
    assert told["bitmap"] == "monday"
    assert told["offset"] == f"{10 * GIB} (10 GiB)"
    assert told["length"] == f"{20 * GIB} (20 GiB)"
    thin = page.told(50 * GIB, 0, aside=0.5)
    assert (thin["offset"], thin["length"]) in [
        (f"{50 * GIB} (50 GiB)", "65536 (64 KiB)"),
        (f"{50 * GIB + MIB} (50 GiB)", "131072 (128 KiB)"),
    ]
    # Of too many extents, the cells; and the page says so.
    cell = page.told(GIB, 1)
    assert cell["length"] == f"{64 * MIB} (64 MiB)"
    assert cell["dirty"] == f"{64 * 64 * KIB} (4 MiB)"
    assert cell["extents"] == "64 begin here"
    assert "many has 3000 extents" in browser.evaluate("document.body.innerText")

    # Zoomed in, extents are seen one by one.
    page.wheel(50 * GIB, 20)
    first, end = page.shown()
    assert 0 < end - first < 16 * MIB
    assert first < 50 * GIB < end
    assert is_like(page.colour(50 * GIB + 32 * KIB, 0, aside=0), FULL)
    assert not is_like(page.colour(50 * GIB + 512 * KIB, 0, aside=0), FULL)
    assert page.told(50 * GIB + MIB + KIB, 0)["length"] == "131072 (128 KiB)"
    x, y = page.place(50 * GIB, 0)
    for count in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            browser.mouse(kind, x, y, button="left", clickCount=count)
    assert page.shown() == (0, 100 * GIB)

    # Nothing came from elsewhere, no name was taken for a script, and nothing went wrong.
    assert browser.requests[0] == path.as_uri()
    assert {address.partition(":")[0] for address in browser.requests[1:]} <= {"data", "blob"}
    assert browser.evaluate("window.harmed") is None
    # What is read from a canvas often would be read faster from another kind of canvas: that advice is for this test.
    assert [complaint for complaint in browser.complaints if "readback" not in complaint] == []


def test_one_granule_of_the_largest_disk_is_seen(browser: Browser, tmp_path: Path) -> None:
    place = 11 * TIB + 12345 * 4 * KIB
    make(tmp_path / "disk.qcow2", 16 * TIB, {"one": [(place, 1)]}, granularity=64 * KIB)
    dirtmap("plot", tmp_path / "disk.qcow2", "-o", tmp_path / "disk.html")
    browser.open(tmp_path / "disk.html")
    page = Page(browser)
    assert page.told(place, 0, aside=0)["offset"].startswith(f"{place // (64 * KIB) * 64 * KIB} (")
    assert not is_like(page.colour(place, 0, aside=0), CLEAN)


def test_page_forbids_what_it_does_not_need(browser: Browser, tmp_path: Path) -> None:
    """So that also a fault in a library could not tell anybody what a disk looks like."""
    make(tmp_path / "disk.qcow2", MIB, {"b": []})
    dirtmap("plot", tmp_path / "disk.qcow2", "-o", tmp_path / "disk.html")
    browser.open(tmp_path / "disk.html")
    tried = "fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')"
    assert browser.evaluate(tried) == "refused"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


def test_data_of_a_page(tmp_path: Path) -> None:
    bitmaps = {"few": [(0, MIB), (5 * MIB, 64 * KIB)], "many": MANY}
    make(tmp_path / "disk.qcow2", 4 * GIB, bitmaps)
    dirtmap("plot", tmp_path / "disk.qcow2", "-o", tmp_path / "disk.html")
    data = data_of(tmp_path / "disk.html")
    assert [(row["bitmap"], row["amount"]) for row in data["rows"]] == [
        ("few", "1.1 MiB (<0.1%)"),
        ("many", "187.5 MiB (4.6%)"),
    ]
    extents = [(each["row"], each["start"], each["start_end"]) for each in data["extents"]]
    assert extents == [(0, 0, MIB), (0, 5 * MIB, 5 * MIB + 64 * KIB)]
    assert sum(cell["extents"] for cell in data["cells"] if cell["row"] == 1) == 3000
