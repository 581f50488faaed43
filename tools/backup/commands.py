"""`dirtmap backup`: the commands."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from dirtmap.fmt.errors import Error, counted, printable
from dirtmap.fmt.spelling import escaped
from dirtmap.tools import options
from dirtmap.tools.listening.announcing import pid_file
from dirtmap.tools.listening.options import listener_of, listening, refuse_contradictions
from dirtmap.tools.output import complain, write_json, write_table
from dirtmap.tools.sizes import human_share, human_size

if TYPE_CHECKING:
    from dirtmap.engine import Host
    from dirtmap.tools.backup.creating import Watcher
    from dirtmap.tools.backup.document import Backup
    from dirtmap.tools.backup.mounting import Mounted


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
    dirtmap backup create --compress=zstd disk.qcow2 /backups/web
    dirtmap backup create data /backups/web --source /dev/vg0/snap --snapshot 'lvcreate -qs -L 10G -n snap vg0/data'
    """,
)
@click.argument("targets", metavar="TARGET...", nargs=-1, required=True, type=options.TARGET)
@_repo
@click.option(
    "--source",
    "sources",
    metavar="[TARGET=]PATH",
    multiple=True,
    help="Read a snapshot of a disk that is being written; one for each TARGET, in their order, or by its name.",
)
@click.option(
    "--snapshot",
    metavar="COMMAND",
    help="Have a shell run COMMAND to make what --source names, while nothing is written to the disks.",
)
@click.option("--live", is_flag=True, help="Read disks while they are written: what is copied is not of one moment.")
@click.option("--compress", type=click.Choice(["zstd"]), help="Have QEMU compress the images.")
@options.reporting
@click.pass_context
def create_command(
    ctx: click.Context,
    host: Host,
    targets: tuple[str, ...],
    repo: str,
    sources: tuple[str, ...],
    snapshot: str | None,
    live: bool,
    compress: str | None,
    quiet: bool,
    output: str,
) -> None:
    """Back up disks.

    The first backup of a disk is a full one. Each later one has what the disk's bitmap calls dirty since the one
    before, and is put on top of that. Where that cannot be, it is a full one again, and says why. TARGET is the path of
    a qcow2 image, or the name of a node: a raw disk has to be one, see "dirtmap node add". REPO is made where it is not
    there.

    A disk that "dirtmap serve" or another program tracks goes on being written: its file is cloned, on XFS and btrfs,
    at the instant at which the new bitmap begins, for all such disks at once. Elsewhere --source reads a snapshot. One
    that was made already has to be younger than the last backup; what was written before that is copied once more.
    --live reads the disk itself. All other disks are kept from being written to until they are copied.
    """
    from dirtmap.tools.backup.creating import create

    with _watching("backup", quiet=quiet) as watch:
        chosen = _chosen(targets, sources)
        wait = options.patience(ctx)
        made = create(
            host, targets, repo, sources=chosen, snapshot=snapshot, live=live, compress=compress, wait=wait, watch=watch
        )
    if quiet:
        return
    if output == "json":
        write_json([backup.document() for backup in made])
        return
    for backup in made:
        print(f"{printable(backup.disk)}: backup {backup.number}, {_kind(backup)}")
        copied = f"{human_size(backup.copied)} and {human_size(backup.zeros)} of zeros"
        print(f"  {human_size(backup.dirty)} dirty, {copied} copied in {backup.seconds:.1f} s")


def _chosen(targets: tuple[str, ...], sources: tuple[str, ...]) -> dict[str, str]:
    """The snapshot of each target that has one."""
    named, others = dict[str, str](), list[str]()
    for source in sources:
        target, equals, path = source.partition("=")
        if not equals or target not in targets:
            others.append(source)
        elif target in named:
            raise click.UsageError(f"Two --source for {printable(target)}.")
        else:
            named[target] = path
    if others and (named or len(others) != len(targets)):
        given = f"{len(sources)} --source for {counted(len(targets), 'target')}"
        raise click.UsageError(f"{given}: each has its own, in the same order, or as TARGET=PATH.")
    return named or dict(zip(targets, others, strict=bool(others)))


def _kind(backup: Backup) -> str:
    how = {"offline": "", "live": ", live: not of one moment"}.get(backup.frozen, f", {printable(backup.frozen)}")
    kind = "full" if backup.parent is None else "incremental"
    return f"{kind}{how}: {printable(backup.why)}" if backup.why else f"{kind}{how}"


@contextlib.contextmanager
def _watching(what: str, *, quiet: bool) -> Iterator[Watcher]:
    """Shows a progress bar with throughput and the time that remains, where standard error is a terminal."""
    import sys

    if quiet or not sys.stderr.isatty():
        yield lambda disk, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def watch(disk: str, done: int, total: int) -> None:
            if disk not in tasks:
                tasks[disk] = bar.add_task(f"{what} {printable(disk)}", total=total)
            bar.update(tasks[disk], completed=done)

        yield watch


@options.command(
    "list",
    examples="""
    dirtmap backup list /backups/web
    dirtmap backup list --output=json /backups/web disk.qcow2 | jq '.[-1].time'
    """,
)
@_repo
@click.argument("disk", required=False, type=options.NAME)
@options.speaking
@click.pass_context
def list_command(ctx: click.Context, repo: str, disk: str | None, quiet: bool, output: str) -> None:
    """List the backups in a repository.

    Those of DISK, or else of all disks, oldest first. Reads the heads of documents, and no image. A document that
    cannot be read is told on standard error; the others are listed, and the exit status is 1.
    """
    from dirtmap.tools.backup.repository import Repository

    place = Repository(repo)
    found = place.backups(disk)
    for problem in place.problems:
        complain(str(problem))
    if disk is not None and not found and not place.problems:
        place.disk(disk)  # says which there are
    if not quiet and output == "json":
        write_json([backup.document() for backup in found])
    elif not quiet:
        columns = ("DISK", "NUMBER", "TIME", "KIND", "SIZE", "DIRTY", "FILE")
        sizes = [tuple(map(human_size, (backup.size, backup.dirty, backup.image_size))) for backup in found]
        rows = [
            (printable(backup.disk), str(backup.number), _local(backup), _short_kind(backup), *three)
            for backup, three in zip(found, sizes, strict=True)
        ]
        none = "" if rows else ", no backups"
        write_table(f"{printable(place.path)}: {place.uuid}{none}", columns, rows, right=(1, 4, 5, 6))
    if place.problems:
        ctx.exit(1)


def _short_kind(backup: Backup) -> str:
    return f"{backup.kind}, live" if backup.frozen == "live" else backup.kind


def _local(backup: Backup) -> str:
    from datetime import datetime

    return datetime.fromisoformat(backup.time).astimezone().isoformat(" ", "seconds")


_at = click.option(
    "--at", metavar="N|TIME", help="The number of a backup, or a time as 2026-11-30T22:00: the newest one then."
)


@options.command(
    "info",
    examples="""
    dirtmap backup info /backups/web disk.qcow2
    dirtmap backup info --at=3 --output=json /backups/web disk.qcow2
    """,
)
@_repo
@click.argument("disk", type=options.NAME)
@_at
@options.speaking
def info_command(repo: str, disk: str, at: str | None, quiet: bool, output: str) -> None:
    """Tell all that is known of one backup.

    It is the newest of DISK, or that of --at. In JSON, "chain" has the ids of the backups that it needs, itself first.
    Where one is missing, or its file has another length than it had, that is an error.
    """
    from dirtmap.tools.backup.repository import Repository

    place = Repository(repo)
    backup = place.at(disk, at)
    chain = place.chain(backup)
    if quiet:
        return
    if output == "json":
        write_json({**backup.document(), "image": place.image(backup), "chain": [each.id for each in chain]})
        return
    print(f"{printable(backup.disk)}: backup {backup.number} of {_local(backup)}, {_kind(backup)}")
    print(f"  disk    {human_size(backup.size)} ({backup.size} bytes), {backup.format}, {printable(backup.path)}")
    print(f"  image   {human_size(backup.image_size)}, {printable(place.image(backup))}")
    print(f"  copied  {human_size(backup.copied)}, and {human_size(backup.zeros)} of zeros, in {backup.seconds:.1f} s")
    print(f"  bitmap  {backup.bitmap}, {human_size(backup.granularity)} granules")
    print(f"  needs   {', '.join(f'backup {each.number}' for each in chain[1:]) or 'no other backup'}")


@options.command(
    "restore",
    examples="""
    dirtmap backup restore /backups/web disk.qcow2 disk.qcow2
    dirtmap backup restore --at=2026-11-30T22:00 /backups/web data data.raw
    dirtmap backup restore --force --at=3 /backups/web data /dev/vg/data
    """,
)
@_repo
@click.argument("disk", type=options.NAME)
@click.argument("out", type=click.Path())
@_at
@click.option(
    "-f", "--format", "form", type=click.Choice(["raw", "qcow2"]), help="Of OUT.  [default: as its name ends]"
)
@click.option("--force", is_flag=True, help="Replace a file, or write over a block device.")
@options.quiet
@options.named
@click.pass_context
def restore_command(
    ctx: click.Context, host: Host, repo: str, disk: str, out: str, at: str | None, form: str | None, force: bool
) -> None:
    """Write a disk as it was at a backup.

    The newest backup of DISK, or that of --at, is written to OUT. All that is read is held against its digest; what is
    damaged is an error. A file gets its name once all of it is right. It is sparse, and has no bitmaps. A block device
    must be large enough and not in use; it is zero where the disk is, and if it is a node, its bitmaps are all dirty
    afterwards.
    """
    from dirtmap.tools.backup.restoring import restore

    with _watching("restore", quiet=options.is_quiet(ctx)) as watch:
        wait = options.patience(ctx)
        backup = restore(host, repo, disk, out, at=at, form=form, force=force, wait=wait, watch=watch)
    if not options.is_quiet(ctx):
        print(f"{printable(out)}: {printable(backup.disk)} as of {_local(backup)}, backup {backup.number}")


class _Share(click.ParamType):  # type: ignore[type-arg]
    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", str(value), re.ASCII)
        share = float(found[1]) / 100 if found else 0.0
        if not 0 < share <= 1:
            self.fail(f"'{value}' is no share as 1%, above 0% and 100% at most", param, ctx)
        return share


@options.command(
    "verify",
    examples="""
    dirtmap backup verify /backups/web
    dirtmap backup verify --output=json /backups/web disk.qcow2
    dirtmap backup verify --sample=1% /backups/web disk.qcow2
    """,
)
@_repo
@click.argument("target", required=False, type=options.TARGET)
@click.option("--sample", metavar="N%", type=_Share(), default="100%", help="Read so much, drawn by lot, and not all.")
@options.reporting
@click.pass_context
def verify_command(
    ctx: click.Context, host: Host, repo: str, target: str | None, sample: float, quiet: bool, output: str
) -> None:
    """Verify backups, or a disk against its newest one.

    Without TARGET all images are read, once, and held against their documents: digests, what each image has and on
    which it is. With TARGET the disk is compared with its newest backup. What differs where the disk's bitmap says that
    nothing was written is a write that the bitmap has missed, and that the next backup would miss. A raw disk that is
    tracked, as by "dirtmap serve", may be written to meanwhile; no other. Exit status: 0 nothing is wrong, 2 something
    is, 1 it could not be found out.

    With --sample=1%, it is every hundredth piece of 1 MiB that has data, beginning with one of the first hundred that
    is drawn by lot each time: each piece is as likely as any other. What is wrong elsewhere is not found.
    """
    from dirtmap.tools.backup.comparing import Sample
    from dirtmap.tools.backup.verifying import verify, verify_disk

    wait, faults, differences = options.patience(ctx), list[Error](), list[tuple[int, int]]()
    read = Sample(sample)
    with _watching("verify", quiet=quiet) as watch:
        if target is None:
            faults = verify(repo, sample=read, wait=wait, watch=watch)
        else:
            backup, differences = verify_disk(host, repo, target, sample=read, wait=wait, watch=watch)
    for fault in faults:
        complain(str(fault))
    if quiet:
        pass
    elif output == "json":
        sizes = {"data": read.data, "compared": read.chosen}
        if target is None:
            write_json({"faults": [{"where": fault.where, "what": fault.what} for fault in faults], **sizes})
        else:
            found = [{"offset": offset, "length": length} for offset, length in differences]
            write_json({"disk": backup.disk, "number": backup.number, "differences": found, **sizes})
    else:
        for offset, length in differences:
            print(f"{offset:>16} {length:>16}  differs, and is clean in the bitmap")
        part = f"{human_size(read.chosen)} of {human_size(read.data)} ({human_share(read.chosen, read.data) or '0%'})"
        share = f"sampled {part}, " if sample < 1 else ""
        if target is None:
            print(f"{printable(repo)}: {share}{counted(len(faults), 'fault') if faults else 'no faults'}")
        else:
            count = counted(len(differences), "difference") if differences else "no differences"
            what = f"{share}{count} from backup {backup.number} that the bitmap does not tell"
            print(f"{printable(backup.disk)}: {what}")
    if faults or differences:
        ctx.exit(2)


@options.command(
    "rebuild",
    examples="""
    dirtmap rebuild disk.qcow2 dirtmap-backup-6ec3e75a5cbfb49834d43a67 --against /backups/web
    dirtmap rebuild --output=json data dirtmap-backup-6ec3e75a90a1c7d21f3b5e08 --against /backups/web
    """,
)
@options.target
@click.argument("bitmap", type=options.BITMAP)
@click.option("--against", metavar="REPO", type=click.Path(), required=True, help="A repository of backups.")
@click.option("--at", metavar="N|TIME", help="Of which backup BITMAP is; refused if it is not.")
@options.reporting
@click.pass_context
def rebuild_command(
    ctx: click.Context, host: Host, target: str, bitmap: str, against: str, at: str | None, quiet: bool, output: str
) -> None:
    """Rebuild a bitmap that was lost.

    After QEMU was killed or the power failed, a backup's bitmap is inconsistent, or all dirty, and the next backup has
    to be a full one. This compares the disk with the newest backup in REPO, at which BITMAP must have begun ("dirtmap
    backup info" tells its name), and makes dirty what differs, and nothing else. So the next backup is an increment.

    What neither of the two has is not read. Nobody may write to the disk meanwhile, unless it is tracked, as by
    "dirtmap serve": what is written then is dirty, too. Until all is compared, BITMAP stays as it was; one of a qcow2
    image that is of no use is removed, and an interrupted rebuild can be done again.
    """
    from dirtmap.tools.backup.rebuilding import rebuild

    with _watching("rebuild", quiet=quiet) as watch:
        done = rebuild(host, target, bitmap, against, at=at, wait=options.patience(ctx), watch=watch)
    if quiet:
        return
    if output == "json":
        told = {"disk": done.backup.disk, "number": done.backup.number, "bitmap": escaped(bitmap)}
        sizes = {"differing": done.differing, "compared": done.compared}
        write_json({**told, **sizes, "tracked": done.tracked, "seconds": done.seconds})
        return
    name, what = printable(done.backup.disk), f"{human_size(done.compared)} compared in {done.seconds:.1f} s"
    print(
        f"{name}: {printable(bitmap)} rebuilt: {human_size(done.differing)} changed since backup {done.backup.number}"
    )
    print(f"  {what}{'; what was written meanwhile is dirty, too' if done.tracked else ''}")


@options.command(
    "prune",
    examples="""
    dirtmap backup prune --keep=30 /backups/web
    dirtmap backup prune --keep=1 /backups/web disk.qcow2
    """,
)
@_repo
@click.argument("disk", required=False, type=options.NAME)
@click.option("--keep", metavar="N", type=click.IntRange(min=1), required=True, help="How many of each disk stay.")
@options.waiting
@options.speaking
@click.pass_context
def prune_command(ctx: click.Context, repo: str, disk: str | None, keep: int, quiet: bool, output: str) -> None:
    """Remove all but the newest backups.

    Of DISK, or else of each disk in REPO. The oldest one that stays becomes a full one, which needs room for that until
    the others are gone. An end at any point loses nothing. The bitmaps are removed from the disks by their next
    backups.
    """
    from dirtmap.tools.backup.pruning import prune

    with _watching("prune", quiet=quiet) as watch:
        removed = prune(repo, keep, disk=disk, wait=options.patience(ctx), watch=watch)
    if not quiet and output == "json":
        write_json([backup.document() for backup in removed])
    elif not quiet:
        for backup in removed:
            print(f"{printable(backup.disk)}: removed backup {backup.number} of {_local(backup)}")


@options.command(
    "mount",
    examples="""
    dirtmap backup mount --unix=/run/web.sock /backups/web disk.qcow2
    dirtmap backup mount --at=2026-11-30T22:00 --run='nbdcopy "$uri" data.raw' /backups/web data
    nbd-client -unix /run/web.sock -N disk -readonly /dev/nbd0 && mount -o ro,noload /dev/nbd0 /mnt
    """,
)
@_repo
@click.argument("disk", type=options.NAME)
@_at
@listening
@options.waiting
@options.speaking
@click.pass_context
def mount_command(
    ctx: click.Context,
    repo: str,
    disk: str,
    at: str | None,
    unix: str | None,
    port: int | None,
    bind: str,
    tls: str | None,
    command: str | None,
    pidfile: str | None,
    quiet: bool,
    output: str,
) -> None:
    """Serve a disk as it was at a backup, over NBD.

    It is the newest backup of DISK, or that of --at, and read-only. Backups can be made and pruned meanwhile. The
    export is called "disk". Digests are not looked at: see "dirtmap backup verify".

    Prints a line once it is ready, "ready:" and a URI, or with --output=json an object. SIGINT, SIGTERM or SIGHUP end
    it, with exit status 0. With --run, the end of COMMAND does, whose exit status it has, and nothing is printed;
    without --unix and --port it listens on a Unix socket of its own then.
    """
    from dirtmap.tools.backup.mounting import mount
    from dirtmap.tools.listening.stopping import Stop, attend

    refuse_contradictions(unix, port, bind, command, output)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop())
        listener = listener_of(stack, unix, port, bind, tls)
        with mount(repo, disk, listener, at=at, wait=options.patience(ctx)) as mounted, pid_file(pidfile):
            told = functools.partial(_tell_ready, mounted, output, quiet=quiet)
            status = attend(stop, mounted, [mounted.uri], command, told)
    if status:
        ctx.exit(status)


def _tell_ready(mounted: Mounted, output: str, *, quiet: bool) -> None:
    if quiet:
        return
    backup = mounted.backup
    if output == "json":
        told = {"disk": backup.disk, "number": backup.number, "uri": mounted.uri, "virtual-size": backup.size}
        write_json(told)
    else:
        click.echo(f"ready: {mounted.uri}")


for _command in (
    create_command,
    list_command,
    info_command,
    restore_command,
    verify_command,
    prune_command,
    mount_command,
):
    backup_command.add_command(_command)
