"""`dirtmap device`: names disks as guests see them, with bitmaps of their own, whichever image is behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.fmt.errors import printable
from dirtmap.tools import options
from dirtmap.tools.output import complain, write_json, write_table
from dirtmap.tools.sizes import human_size

if TYPE_CHECKING:
    from dirtmap.engine import Device, Error, Host


@click.group("device", no_args_is_help=False)
def device_command() -> None:
    """Name what a guest sees: a device, whichever node is its root.

    A device has bitmaps of its own, which stay when the root changes.
    """


@options.command(
    "add",
    examples="""
    dirtmap device add drive0 --root system
    """,
)
@click.argument("name", type=options.NAME)
@click.option("--root", required=True, metavar="NODE", type=options.NODE, help="The node that it reads from.")
@options.named
@options.quiet
def add_command(host: Host, name: str, root: str) -> None:
    """Make a device on a node.

    Its bitmaps are in the default store, and record what is written through the device. A device is not another name
    for its root: "drive0" and the node under it have different bitmaps.
    """
    host.add_device(name, root)


@options.command(
    "set-root",
    examples="""
    dirtmap device set-root --content-unchanged drive0 overlay
    dirtmap device set-root --content-unchanged drive0 system     # its image was renamed, and nothing else
    """,
)
@click.argument("name", type=options.DEVICE)
@click.argument("node", type=options.NODE)
@click.option("--content-unchanged", is_flag=True, help="NODE reads as the old root: a new overlay, a finished mirror.")
@options.named
@options.quiet
def set_root_command(host: Host, name: str, node: str, content_unchanged: bool) -> None:
    """Give a device another root node.

    All its bitmaps become dirty, unless you state that the content is unchanged. Bitmaps of nodes never move. The root
    that it has can be given again: to state that its image, which looks changed, is not.
    """
    host.set_root(name, node, content_unchanged=content_unchanged)


@options.command(
    "remove",
    examples="""
    dirtmap device remove drive0
    """,
)
@click.argument("name", type=options.DEVICE)
@options.named
@options.quiet
def remove_command(host: Host, name: str) -> None:
    """Forget a device; it must not have bitmaps."""
    host.remove_device(name)


@options.command(
    "list",
    examples="""
    dirtmap device list --output=json
    """,
)
@options.named
@options.speaking
@click.pass_context
def list_command(ctx: click.Context, host: Host, quiet: bool, output: str) -> None:
    """List the devices of all stores that are known, and their root nodes."""
    options.tell_no_store(host, quiet=quiet)
    problems: list[Error] = []
    found = host.devices(problems)
    for problem in problems:
        complain(str(problem))
    names = {device.root_uuid: host.node_of(device.root_uuid) for device in found}
    if output == "json" and not quiet:
        write_json(
            [
                {
                    "name": device.name,
                    "uuid": device.uuid,
                    "root": names[device.root_uuid],
                    "root-uuid": device.root_uuid,
                    "filename": device.path,
                    "virtual-size": device.size,
                    "bitmaps": device.bitmaps,
                    "doubt": device.doubt,
                }
                for device in found
            ]
        )
    elif not quiet:
        _show(host.store, found, names)
    if problems:
        ctx.exit(1)


def _show(title: str, found: list[Device], names: dict[str, str | None]) -> None:
    for device in found:
        if device.doubt:
            complain(f"{device.name}: its bitmaps count as all dirty: {device.doubt}")
    rows = [
        (
            printable(device.name),
            printable(names[device.root_uuid] or device.root_uuid),
            human_size(device.size),
            str(device.bitmaps),
            printable(device.path),
        )
        for device in found
    ]
    none = "" if rows else ", no devices"
    write_table(f"{printable(title)}{none}", ("DEVICE", "ROOT", "SIZE", "BITMAPS", "IMAGE"), rows, right=(2,))


for _command in (add_command, set_root_command, remove_command, list_command):
    device_command.add_command(_command)
