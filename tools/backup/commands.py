"""`dirtmap backup`: the commands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from dirtmap.fmt.errors import printable
from dirtmap.tools import options
from dirtmap.tools.output import write_json
from dirtmap.tools.sizes import human_size

if TYPE_CHECKING:
    from dirtmap.engine import Host
    from dirtmap.tools.backup.creating import Watcher
    from dirtmap.tools.backup.document import Backup


@click.group("backup")
def backup_command() -> None:
    """Back up disks, and restore them.

    REPO is a folder with the backups of any number of disks: qcow2 images that are on each other, and a JSON document
    each; docs/backup.md describes both. DISK is the name of a disk in it: that of its node, or else of its file.
    """


_repo = click.argument("repo", type=click.Path())


@options.command(
    "create",
    examples="""
    dirtmap backup create disk.qcow2 /backups/web
    dirtmap backup create --output=json system data /backups/web
    """,
)
@click.argument("targets", metavar="TARGET...", nargs=-1, required=True, type=options.TARGET)
@_repo
@options.reporting
@click.pass_context
def create_command(
    ctx: click.Context, host: Host, targets: tuple[str, ...], repo: str, quiet: bool, output: str
) -> None:
    """Back up disks that nobody writes to at the moment.

    The first backup of a disk is a full one. Each later one has what the disk's bitmap calls dirty since the one
    before, and is put on top of that. Where that cannot be, it is a full one again, and says why. TARGET is the path of
    a qcow2 image, or the name of a node: a raw disk has to be one, see "dirtmap node add". All of them are kept from
    being written to until they are copied. REPO is made where it is not there.
    """
    from dirtmap.tools.backup.creating import create

    with _watching("backup", quiet=quiet) as watch:
        made = create(host, targets, repo, wait=options.patience(ctx), watch=watch)
    if quiet:
        return
    if output == "json":
        write_json([backup.document() for backup in made])
        return
    for backup in made:
        print(f"{printable(backup.disk)}: backup {backup.number}, {_kind(backup)}")
        copied = f"{human_size(backup.copied)} and {human_size(backup.zeros)} of zeros"
        print(f"  {human_size(backup.dirty)} dirty, {copied} copied in {backup.seconds:.1f} s")


def _kind(backup: Backup) -> str:
    if backup.parent is not None:
        return "incremental"
    return f"full: {printable(backup.why)}" if backup.why else "full"


@contextlib.contextmanager
def _watching(what: str, *, quiet: bool) -> Iterator[Watcher]:
    """Shows a progress bar with throughput and the time that remains, where standard error is a terminal."""
    import sys

    if quiet or not sys.stderr.isatty():
        yield lambda disk, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def watch(disk: str, done: int, total: int) -> None:
            if disk not in tasks:
                tasks[disk] = bar.add_task(f"{what} {printable(disk)}", total=total)
            bar.update(tasks[disk], completed=done)

        yield watch


backup_command.add_command(create_command)
