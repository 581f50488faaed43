"""`dirtmap list`: lists the bitmaps of images, or of the whole host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import dirtmap.engine as dm
from dirtmap.fmt.errors import printable
from dirtmap.tools import options
from dirtmap.tools.output import complain, write_json, write_table
from dirtmap.tools.sizes import human_share, human_size
from dirtmap.tools.times import iso_time, local_time

if TYPE_CHECKING:
    from dirtmap.engine import BitmapInfo, Host, ImageInfo


@options.command(
    "list",
    examples="""
    dirtmap list disk.qcow2
    dirtmap list -U running.qcow2
    dirtmap list --output=json *.qcow2 | jq '.[].bitmaps[].name'
    dirtmap list
    """,
)
@click.argument("targets", metavar="[TARGET]...", type=options.TARGET, nargs=-1)
@options.force_share
@options.reporting
@click.pass_context
def list_command(
    ctx: click.Context, host: Host, targets: tuple[str, ...], force_share: bool, quiet: bool, output: str
) -> None:
    """List the bitmaps of images.

    Shows each bitmap's granularity, how much of the disk it calls dirty (in whole granules, as QEMU counts), and
    whether QEMU goes on recording into it, or that it is a checkpoint of a tracker, which other checkpoints rely on,
    since when, and how much was written since. In JSON, "checkpoints" names these, oldest first; "began" is when each
    began, and "since" how many bytes were written since, in it and in all later ones; null where that is not known.

    An inconsistent bitmap is in use by a writer, or was left so by one that died. The bits of a damaged bitmap are not
    what was written; see "dirtmap recover". Without a TARGET, lists all bitmaps of the host, in every image and store
    that it knows; see "dirtmap index scan". If a TARGET cannot be read, a bitmap is damaged, or a disk has another size
    than its bitmaps, the others are listed, and the exit status is 1. In JSON, "errors" has a line for each of these.
    """
    failed = False
    documents = []
    if not targets:
        options.tell_no_store(host, quiet=quiet)
        targets = tuple(f"file:{path}" for path in host.containers())
    for target in targets:
        try:
            info = host.describe(target, force_share=force_share)
        except dm.Error as error:
            complain(str(error))
            failed = True
            continue
        for damage in info.errors:
            complain(damage)
            failed = True
        if quiet:
            continue
        for note in info.notes:
            complain(f"{info.path}: {note}")
        if output == "json":
            documents.append(_document(info))
        else:
            _show(info)
    if output == "json" and not quiet:
        write_json(documents)
    if failed:
        ctx.exit(1)


def _document(info: ImageInfo) -> dict[str, Any]:
    return {
        "filename": info.path,
        "format": info.format,
        "virtual-size": info.size,
        "cluster-size": info.cluster_size,
        "notes": list(info.notes),
        "doubt": info.doubt,
        "errors": list(info.errors),
        "checkpoints": list(info.checkpoints),
        "bitmaps": [
            {
                "name": bitmap.name,
                "granularity": bitmap.granularity,
                "flags": ["in-use"] * bitmap.inconsistent + ["auto"] * bitmap.recording,
                "recording": bitmap.recording,
                "inconsistent": bitmap.inconsistent,
                "damaged": bitmap.damaged,
                "busy": bitmap.busy,
                "checkpoint": bitmap.checkpoint,
                "began": iso_time(bitmap.began),
                "since": bitmap.since,
                "count": bitmap.count,
                "uuid": bitmap.uuid,
                "generation": bitmap.generation,
                **_attachment(info, bitmap),
            }
            for bitmap in info.bitmaps
        ],
    }


def _attachment(info: ImageInfo, bitmap: BitmapInfo) -> dict[str, str | None]:
    """The node or device that a bitmap is attached to, by its JSON key, and the namespace; empty without a name."""
    if bitmap.device is not None:
        return {"namespace": bitmap.namespace, "device": bitmap.device}
    if bitmap.namespace is not None:
        return {"namespace": bitmap.namespace, "node": bitmap.node}
    return {} if info.node is None else {"namespace": info.uuid, "node": info.node}


def _show(info: ImageInfo) -> None:
    size = "" if info.size is None else f", {human_size(info.size)} ({info.size} bytes)"
    none = "" if info.bitmaps or info.errors else ", no bitmaps"  # a damaged image may have bitmaps
    node = f", node {printable(info.node)}" if info.format == "qcow2" and info.node is not None else ""
    title = f"{printable(info.path)}: {info.format}{node}{size}{none}"
    rows = [_row(bitmap, info.size) for bitmap in info.bitmaps]
    columns = ("BITMAP", "GRANULARITY", "DIRTY", "", "STATE")
    if info.format == "qcow2":
        write_table(title, columns, rows, right=(1, 2, 3))
    else:
        holders = [
            f"device {printable(bitmap.device)}" if bitmap.device is not None else printable(bitmap.node or "")
            for bitmap in info.bitmaps
        ]
        rows = [(holder, *row) for holder, row in zip(holders, rows, strict=True)]
        write_table(title, ("NODE", *columns), rows, right=(2, 3, 4))


def _row(bitmap: BitmapInfo, size: int | None) -> tuple[str, ...]:
    dirty, share = "?", ""
    state = "recording" if bitmap.recording else "checkpoint" if bitmap.checkpoint else "disabled"
    if bitmap.count is not None:
        dirty = human_size(bitmap.count)
        share = human_share(bitmap.count, size or 0)
    else:
        state = "damaged" if bitmap.damaged else "inconsistent"
    if bitmap.checkpoint and state != "checkpoint":
        state += ", checkpoint"
    if bitmap.checkpoint:
        state += f" since {local_time(bitmap.began)}" * (bitmap.began is not None)
        state += "" if bitmap.since is None else f": {human_size(bitmap.since)} written"
    return printable(bitmap.name), human_size(bitmap.granularity), dirty, share, state + ", busy" * bitmap.busy
