"""`dirtmap check`: finds what is wrong with an image's bitmaps and refcounts, or with a store, and repairs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dirtmap.fmt.errors import counted, printable
from dirtmap.tools import options
from dirtmap.tools.output import progress_bar, write_json

if TYPE_CHECKING:
    from dirtmap.engine import CheckReport, Host

# The exit codes of qemu-img check.
_ERROR, _CORRUPT, _LEAKS = 1, 2, 3


@options.command(
    "check",
    examples="""
    dirtmap check disk.qcow2
    dirtmap check -r all disk.qcow2
    dirtmap check -q disk.qcow2 || echo "look at disk.qcow2"
    """,
)
@options.target
@click.option("-r", "--repair", type=click.Choice(["leaks", "all"]), help="Mend leaks, or everything that can be.")
@options.force_share
@options.reporting
@click.pass_context
def check_command(
    ctx: click.Context, host: Host, target: str, repair: str | None, force_share: bool, quiet: bool, output: str
) -> None:
    """Check an image's bitmaps and refcounts, or a store.

    "-r leaks" frees clusters that nothing uses. "-r all" also drops the bitmaps that make QEMU refuse the image, says
    which, keeps the others, and corrects refcounts. Guest data is never touched.

    A store is checked with all its nodes and devices. A repair writes what is sound into a new file, which replaces the
    store; "-r leaks" does so only if nothing else is wrong. "-r all" makes damaged bitmaps all dirty if they can still
    be named, gives up the others, and says which. If a directory is damaged, what a tracker had in it is lost, too; so
    the repair is refused while the tracker lives.

    Exit status: 0 sound (or repaired), 2 corrupt, 3 leaks only, 1 when something could not be checked.
    """
    if repair and force_share:
        raise click.UsageError("-U goes with reading only, not with -r.")
    with progress_bar("checking", quiet=quiet or output == "json") as progress:
        report = host.check(target, repair=repair, force_share=force_share, progress=progress)
    if not quiet:
        if output == "json":
            write_json(_document(report))
        else:
            _show(report)
    ctx.exit(_CORRUPT if report.corruptions else _ERROR if report.check_errors else _LEAKS if report.leaks else 0)


def _document(report: CheckReport) -> dict[str, Any]:
    return {
        "filename": report.path,
        "format": report.format,
        "check-errors": report.check_errors,
        "corruptions": report.corruptions,
        "leaks": report.leaks,
        "corruptions-fixed": report.corruptions_fixed,
        "leaks-fixed": report.leaks_fixed,
        "findings": [{"severity": f.severity, "where": f.where, "what": f.what} for f in report.findings],
        "dropped": report.dropped,
        "dropped-unnamed": report.dropped_unnamed,
        "made-dirty": report.made_dirty,
    }


def _show(report: CheckReport) -> None:
    for finding in report.findings:
        print(f"{finding.severity}: {printable(finding.where)}: {printable(finding.what)}")
    for lost in report.dropped:
        what = f"bitmap '{printable(lost)}'" if report.format == "qcow2" else printable(lost)
        print(f"dropped: {what}")
    if report.dropped_unnamed is None:
        print("dropped: bitmaps whose number and names are not known")
    elif report.dropped_unnamed:
        more = "more " if report.dropped else ""
        print(f"dropped: {counted(report.dropped_unnamed, f'{more}bitmap')} whose name is not known")
    for bitmap in report.made_dirty:
        print(f"all dirty now: {printable(bitmap)}")
    if report.corruptions_fixed or report.leaks_fixed:
        leaks = counted(report.leaks_fixed, "leaked cluster")
        print(f"mended: {counted(report.corruptions_fixed, 'corruption')}, {leaks}")
    found = [
        counted(number, one, many)
        for number, one, many in (
            (report.corruptions, "corruption", ""),
            (report.leaks, "leaked cluster", ""),
            (report.check_errors, "part not checked", "parts not checked"),
        )
        if number
    ]
    print(f"{printable(report.path)}: {', '.join(found) or 'no errors'}")
