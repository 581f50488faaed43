"""`dirtmap index`: finds the containers of a host, and maintains the index of what is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.fmt.errors import counted, printable
from dirtmap.tools import options
from dirtmap.tools.output import complain, progress_bar, write_json, write_table

if TYPE_CHECKING:
    from dirtmap.engine import Host, Summary


@click.group("index", no_args_is_help=False)
def index_command() -> None:
    """Find images and stores, and keep an index of what they have.

    The index is never the truth: delete it, and every answer stays the same, only slower.
    """


@options.command(
    "scan",
    examples="""
    dirtmap index scan /var/lib/libvirt/images
    dirtmap index scan --output=json /srv/vm1 /srv/vm2
    """,
)
@click.argument("paths", metavar="PATH...", type=click.Path(), nargs=-1, required=True)
@options.force_share
@options.named
@options.speaking
def scan_command(host: Host, paths: tuple[str, ...], force_share: bool, quiet: bool, output: str) -> None:
    """Find every qcow2 image and store below folders.

    The default store remembers where they are. An image that was moved is found again by its UUID. A name that an image
    has and no store knows is learned from the image. A file that is no longer a store is forgotten. Of an image
    that another process has open for writing, only its name and its place are taken, unless you give -U.

    Copies that still carry the identity of another image are reported, and so are images whose name belongs to another.
    Neither is taken: "dirtmap list" and "dirtmap find" leave such an image out until "dirtmap node add --new-identity"
    gives it an identity of its own.
    """
    from dirtmap.engine import scan

    with progress_bar("scanning", quiet=quiet) as progress:
        summary = scan(host, paths, force_share=force_share, progress=progress)
    _complain(summary)
    if quiet:
        return
    if output == "json":
        write_json(
            {
                "images": summary.images,
                "stores": summary.stores,
                "bitmaps": summary.bitmaps,
                "inconsistent": summary.inconsistent,
                "new": summary.learned,
                "held": summary.held,
                "damaged": [{"filename": path, "what": what} for path, what in summary.damaged],
                "twins": [{"filename": path, "original": first} for path, first in summary.twins + summary.copies],
                "clashes": [{"filename": path, "node": name} for path, name in summary.clashes],
                "moved": [{"filename": path, "node": name} for path, name in summary.moved],
                "gone": [{"filename": path, "node": name or None} for path, name in summary.gone],
                "unreadable": [{"filename": path, "what": what} for path, what in summary.unreadable],
            }
        )
        return
    bitmaps = f"{counted(summary.bitmaps, 'bitmap')}, {summary.inconsistent} of them inconsistent"
    twins = counted(len(summary.twins + summary.copies), "twin")
    clashes = counted(len(summary.clashes), "name that clashes", "names that clash")
    print(
        f"{counted(summary.images, 'image')}, {counted(summary.stores, 'store')}, {bitmaps}; "
        f"{summary.learned} new, {len(summary.moved)} moved, {len(summary.held)} held, {len(summary.damaged)} damaged, "
        f"{twins}, {clashes}, {len(summary.gone)} gone, {len(summary.unreadable)} unreadable"
    )


def _complain_of_stores(host: Host) -> None:
    """Reports the stores that the index cannot read."""
    for problem in host.problems():
        complain(f"left out: {problem}")


def _complain(summary: Summary) -> None:
    for path in summary.held:
        complain(f"{path}: skipped: open for writing elsewhere; -U reads it all the same")
    for path, what in summary.damaged:
        complain(f"{path}: damaged: {what}")
    for path, original in summary.twins:
        complain(f"{path}: a twin of {original}; 'node add --new-identity' gives it an identity of its own")
    for path, original in summary.copies:
        complain(f"{path}: a copy of {original}; 'store new-identity' gives it an identity of its own")
    for path, name in summary.clashes:
        what = "'node add --new-identity' gives an image another, 'node rename --store' a node of a store"
        complain(f"{path}: its name '{name}' is another's; {what}")
    for path, name in summary.moved:
        complain(f"{path}: here is node '{name}' now")
    for path, name in summary.gone:
        complain(f"{path}: gone" + (f": the image of '{name}'" if name else ""))
    for path, what in summary.unreadable:
        complain(f"{path}: skipped: {what}")


@options.command(
    "verify",
    examples="""
    dirtmap index verify
    """,
)
@options.named
@options.speaking
def verify_command(host: Host, quiet: bool, output: str) -> None:
    """Read the whole index, and compare it with what the containers say.

    It is read in a process of its own, since damage inside can kill the reader. If anything is wrong, the index is
    rebuilt, and nothing is lost by that.
    """
    from dirtmap.engine import verify_index

    with progress_bar("reading containers", quiet=quiet) as progress:
        result = verify_index(host, progress)
    for what in result.faults:
        complain(what)
    _complain_of_stores(host)
    if quiet:
        return
    if output == "json":
        write_json({"entries": result.entries, "faults": result.faults, "rebuilt": result.rebuilt})
    else:
        how = "rebuilt" if result.rebuilt else "all as the containers say"
        print(f"{counted(result.entries, 'entry', 'entries')}, {how}")


@options.command(
    "rebuild",
    examples="""
    dirtmap index rebuild
    """,
)
@options.named
@options.speaking
def rebuild_command(host: Host, quiet: bool, output: str) -> None:
    """Rebuild the index from the containers that the default store knows."""
    from dirtmap.engine import rebuild_index

    with progress_bar("reading containers", quiet=quiet) as progress:
        count = rebuild_index(host, progress)
    _complain_of_stores(host)
    if quiet:
        return
    if output == "json":
        write_json({"containers": count})
    else:
        print(counted(count, "container"))


@options.command(
    "stats",
    examples="""
    dirtmap index stats --output=json
    """,
)
@options.named
@options.speaking
def stats_command(host: Host, quiet: bool, output: str) -> None:
    """Tell how much is in the index."""
    from dirtmap.engine import index_stats

    found = index_stats(host)
    if quiet:
        return
    if output == "json":
        write_json({"filename": host.index_path, **found})
    else:
        rows = [(key, str(value)) for key, value in found.items()]
        write_table(printable(host.index_path), ("WHAT", "NUMBER"), rows, right=(1,))


for _command in (scan_command, verify_command, rebuild_command, stats_command):
    index_command.add_command(_command)
