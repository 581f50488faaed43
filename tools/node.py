"""`dirtmap node`: gives names to images, and lists where they and their bitmaps are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.fmt.errors import printable
from dirtmap.tools import options
from dirtmap.tools.output import complain, write_json, write_table
from dirtmap.tools.sizes import human_size

if TYPE_CHECKING:
    from dirtmap.engine import Error, Host, Node


@click.group("node", no_args_is_help=False)
def node_command() -> None:
    """Name images: a node is an image with a name.

    The name is unique on the host.
    """


@options.command(
    "add",
    examples="""
    dirtmap node add drive0 /dev/vg/disk --store backup.dmap
    dirtmap node add drive1 disk.qcow2
    dirtmap node add --new-identity drive2 copy-of-disk.qcow2
    """,
)
@click.argument("name", type=options.NAME)
@click.argument("image", type=click.Path())
@options.named
@click.option("--new-identity", is_flag=True, help="IMAGE is a copy of another qcow2 image; make it one of its own.")
@click.option("--raw", is_flag=True, help="IMAGE is a raw disk, although it looks like an image of another format.")
@options.quiet
def add_command(host: Host, name: str, image: str, new_identity: bool, raw: bool) -> None:
    """Give an image a name and an identity.

    A qcow2 image keeps its name and its UUID in its own header, and its bitmaps as before; the store remembers where it
    is. For a raw file or a block device the store will hold the bitmaps. An image of another format (VMDK, VHD, VHDX,
    VDI, ...) is refused: as a raw disk it would be overwritten. --raw insists.
    """
    if not raw and host.keeps_bitmaps(image):
        host.add_qcow2(name, image, new_identity=new_identity)
    elif new_identity:
        raise click.UsageError("--new-identity is for qcow2 images.")
    else:
        host.add_node(name, image, raw=raw)


@options.command(
    "remove",
    examples="""
    dirtmap node remove drive0
    """,
)
@click.argument("name", type=options.NODE)
@options.named
@options.quiet
def remove_command(host: Host, name: str) -> None:
    """Forget a node; it must not have bitmaps."""
    host.remove_node(name)


@options.command(
    "rename",
    examples="""
    dirtmap node rename drive0 system
    dirtmap node rename --with-bitmaps drive0 system
    """,
)
@click.argument("old", type=options.NODE)
@click.argument("new", type=options.NAME)
@click.option("--with-bitmaps", is_flag=True, help="Also where it has bitmaps, whose addresses change.")
@options.named
@options.quiet
def rename_command(host: Host, old: str, new: str, with_bitmaps: bool) -> None:
    """Give a node another name."""
    host.rename_node(old, new, with_bitmaps=with_bitmaps)


@options.command(
    "resize",
    examples="""
    truncate -s 20G disk.raw && dirtmap node resize drive0
    """,
)
@click.argument("name", type=options.NODE)
@options.named
@options.quiet
def resize_command(host: Host, name: str) -> None:
    """Adopt the size that a node's image has now.

    Old bits stay, new space is dirty. You state with this command that the image was resized and nothing else. If it
    was also written to, use "dirtmap recover" instead, which adopts the size and makes everything dirty. This command
    makes everything dirty, too, if another file is in the image's place.
    """
    host.resize_node(name)


@options.command(
    "confirm",
    examples="""
    touch disk.raw && dirtmap node confirm drive0
    """,
)
@click.argument("name", type=options.NODE)
@options.named
@options.quiet
def confirm_command(host: Host, name: str) -> None:
    """State that a node's bitmaps are right although its image looks changed.

    If an image was changed while nobody tracked it, its bitmaps count as all dirty. Use this command only if nothing
    but its times, owner or mode changed, or another file with the same content is in its place. If the image is at
    another path now, use "dirtmap node relocate" instead. If anything was written to the image, its bitmaps have missed
    it.
    """
    host.confirm_node(name)


@options.command(
    "relocate",
    examples="""
    dirtmap node relocate --move drive0 /srv/new/disk.raw
    mv disk.raw /srv/new/ && dirtmap node relocate --confirm drive0 /srv/new/disk.raw
    """,
)
@click.argument("name", type=options.NODE)
@click.argument("path", type=click.Path())
@click.option("--confirm", is_flag=True, help="You state that it is the same disk, and was moved and not written to.")
@click.option("--move", is_flag=True, help="Rename the file itself, in its file system; bitmaps stay right.")
@click.option("--raw", is_flag=True, help="PATH is a raw disk, although it looks like an image of another format.")
@options.named
@options.quiet
def relocate_command(host: Host, name: str, path: str, confirm: bool, move: bool, raw: bool) -> None:
    """Point a node to the PATH where its image is now: a raw file that was moved, or a block device.

    With --confirm its bitmaps stay as they are, if the size and the time of the last write are as they were; otherwise
    they become all dirty, and you are told. Devices on it follow. Another file than the node had is refused where it
    looks like an image of another format, as in "dirtmap node add"; --raw insists. A node that is a qcow2 image says
    itself what it is: "dirtmap index scan" finds where it is.
    """
    if not host.relocate_node(name, path, confirm=confirm, move=move, raw=raw):
        complain(f"{printable(name)}: its bitmaps count as all dirty: nobody knows that {printable(path)} is as it was")


@options.command(
    "list",
    examples="""
    dirtmap node list
    dirtmap node list --store backup.dmap --output=json
    """,
)
@options.named
@click.option(
    "--output", type=click.Choice(["human", "json"]), default="human", show_default=True, help="How to report."
)
@options.told_quiet
@click.pass_context
def list_command(ctx: click.Context, host: Host, output: str, quiet: bool) -> None:
    """List the nodes of all stores that are known, and where their images are."""
    options.tell_no_store(host, quiet=quiet)
    problems: list[Error] = []
    found = host.nodes(problems)
    for problem in problems:
        complain(str(problem))
    if output == "json" and not quiet:
        keys = ("name", "uuid", "path", "size", "bitmaps", "doubt")
        names = {"path": "filename", "size": "virtual-size"}
        write_json([{names.get(key, key): getattr(node, key) for key in keys} for node in found])
    elif not quiet:
        _show(host.store, found)
    if problems:
        ctx.exit(1)


def _show(title: str, found: list[Node]) -> None:
    for node in found:
        if node.doubt:
            complain(f"{node.name}: its bitmaps count as all dirty: {node.doubt}")
    rows = [
        (
            printable(node.name),
            human_size(node.size),
            "in the image" if node.bitmaps is None else str(node.bitmaps),
            printable(node.path),
        )
        for node in found
    ]
    none = "" if rows else ", no nodes"
    write_table(f"{printable(title)}{none}", ("NODE", "SIZE", "BITMAPS", "IMAGE"), rows, right=(1,))


for _command in (
    add_command,
    remove_command,
    rename_command,
    resize_command,
    confirm_command,
    relocate_command,
    list_command,
):
    node_command.add_command(_command)
