"""`dirtmap map`: shows which parts of the disk a bitmap calls dirty, as extents, totals or a picture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import cycle, islice
from operator import add, sub
from typing import TYPE_CHECKING, NamedTuple

import click

from dirtmap.tools import options
from dirtmap.tools.output import colourful
from dirtmap.tools.targets import tell_damage, tell_doubt, usable

if TYPE_CHECKING:
    from dirtmap.engine import Host

    Ranges = Iterator[tuple[list[int], list[int]]]  # offsets and lengths of dirty extents, some at a time

_DESCRIPTIONS = ("clean", "dirty")
_RED, _PLAIN = "\x1b[31m", "\x1b[0m"


@options.command(
    "map",
    examples="""
    dirtmap map disk.qcow2 monday
    dirtmap map --picture disk.qcow2 monday
    dirtmap map --totals disk.qcow2 monday
    dirtmap map --dirty --output=json disk.qcow2 monday | jq '.[].offset'
    dirtmap map --dirty drive0 --since noon --until evening
    """,
)
@options.target
@click.argument("bitmap", type=options.BITMAP, required=False)
@click.option("--since", metavar="CHECKPOINT", type=options.BITMAP, help="Show what was written since CHECKPOINT.")
@click.option("--until", metavar="CHECKPOINT", type=options.BITMAP, help="And before this later CHECKPOINT began.")
@click.option("--dirty", "dirty_only", is_flag=True, help="Leave clean extents out.")
@click.option("--totals", is_flag=True, help="Sum up, as nbdinfo --totals does.")
@click.option("--picture", is_flag=True, help="Draw the disk, each character shaded by how much is dirty.")
@options.force_share
@options.reporting
def map_command(
    host: Host,
    target: str,
    bitmap: str | None,
    since: str | None,
    until: str | None,
    dirty_only: bool,
    totals: bool,
    picture: bool,
    force_share: bool,
    quiet: bool,
    output: str,
) -> None:
    """Show which parts of the disk are dirty.

    Prints the extents of the whole disk in order, clean and dirty, in bytes: offset, length, type and description, just
    as "nbdinfo --map=qemu:dirty-bitmap:NAME" prints them, and in the same JSON.

    Instead of a BITMAP, --since tells a checkpoint, see "dirtmap checkpoint": dirty is then what was written since, or
    before a later one began, whether TARGET is tracked or not.
    """
    if (bitmap is None) == (since is None):
        raise click.UsageError(
            "Missing argument 'BITMAP'. Or --since tells a checkpoint."
            if bitmap is None
            else "--since goes with no BITMAP."
        )
    if until is not None and since is None:
        raise click.UsageError("--until goes with --since only.")
    if picture and (totals or dirty_only or output == "json"):
        raise click.UsageError("--picture goes with neither --totals, --dirty nor --output=json.")
    with host.open(target, force_share=force_share) as image:
        if bitmap is None:
            assert since is not None
            found, shown = image.changed_since(since, until), f"since {since}" + (f" until {until}" if until else "")
        else:
            found, shown = usable(image.where, image, bitmap), bitmap
        tell_damage(image, shown, found.damage)
        tell_doubt(image, image.doubt())
    if quiet:
        return
    if picture:
        from dirtmap.tools.picture import draw

        for row in draw(f"{image.path}: {shown}", found, colour=colourful()):
            print(row)
    elif totals:
        _sum_up(found.size, sum(sum(lengths) for _, lengths in found.ranges()), dirty_only, output)
    elif output == "json":
        sys.stdout.write("[\n")
        separator = ",\n"
        skip = len(separator)
        for text in _text(found.size, found.ranges(), dirty_only, separator + _JSON, _DESCRIPTIONS):
            sys.stdout.write(text[skip:])
            skip = 0
        sys.stdout.write("\n]\n")
    else:
        words = ("clean", f"{_RED}dirty{_PLAIN}") if colourful() else _DESCRIPTIONS
        for text in _text(found.size, found.ranges(), dirty_only, "%%10d  %%10d  %3d  %s\n", words):
            sys.stdout.write(text)


# Two numbers are left open for each extent; its type and description are filled in beforehand.
_JSON = '{ "offset": %%d, "length": %%d, "type": %d, "description": "%s"}'


class _Run(NamedTuple):
    """Extents in order. Their types alternate, beginning with ``first``, or are all of that type.

    Offsets and lengths are in ``numbers`` in turn.
    """

    first: int
    alternating: bool
    numbers: list[int]


def _text(size: int, ranges: Ranges, dirty_only: bool, line: str, descriptions: tuple[str, str]) -> Iterator[str]:
    """The extents as text, thousands of lines at a time, which takes a fifth of the time of one by one."""
    lines = [line % (kind, description) for kind, description in enumerate(descriptions)]
    for run in _dirty_runs(ranges) if dirty_only else _runs(size, ranges):
        turns = (lines[run.first], lines[1 - run.first]) if run.alternating else (lines[run.first],)
        yield "".join(islice(cycle(turns), len(run.numbers) // 2)) % tuple(run.numbers)


def _dirty_runs(ranges: Ranges) -> Iterator[_Run]:
    for offsets, lengths in ranges:
        numbers = [0] * (2 * len(offsets))
        numbers[::2], numbers[1::2] = offsets, lengths
        yield _Run(1, False, numbers)


def _runs(size: int, ranges: Ranges) -> Iterator[_Run]:
    """The extents of the whole disk: before each dirty extent the clean one, and at last the rest."""
    done = 0
    for offsets, lengths in ranges:
        begins = [done, *map(add, offsets, lengths)]  # of clean extents; that of the last one is not known yet
        done = begins.pop()
        numbers = [0] * (4 * len(offsets))
        numbers[::4], numbers[1::4] = begins, map(sub, offsets, begins)
        numbers[2::4], numbers[3::4] = offsets, lengths
        dirty_first = int(not numbers[1])  # dirty from the very beginning of the disk
        yield _Run(dirty_first, True, numbers[2 * dirty_first :])
    if done < size:
        yield _Run(0, True, [done, size - done])


def _sum_up(size: int, dirty: int, dirty_only: bool, output: str) -> None:
    """Prints totals. Source of both formats: libnbd, info/map.c, print_totals."""
    sums = [(kind, total) for kind, total in enumerate((size - dirty, dirty)) if total and (kind or not dirty_only)]
    if output == "json":
        row = '{ "size": %d, "percent": %g, "type": %d, "description": "%s" }'
        rows = [row % (total, 100.0 * total / size, kind, _DESCRIPTIONS[kind]) for kind, total in sums]
        print("[\n" + ",\n".join(rows) + "\n]" if rows else "[]")
    else:
        for kind, total in sums:
            print(f"{total:10d} {100.0 * total / size:5.1f}% {kind:3d} {_DESCRIPTIONS[kind]}")
