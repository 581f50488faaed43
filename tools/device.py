"""`dirtmap device`: what guests see, with bitmaps of its own, whichever image is behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.engine.host.opening import remember, this_host
from dirtmap.fmt.errors import printable
from dirtmap.tools import options
from dirtmap.tools.output import complain, write_json, write_table
from dirtmap.tools.sizes import human_size
from dirtmap.tools.targets import gather

if TYPE_CHECKING:
    from dirtmap.engine.namespaces.devices import Device


@click.group("device", no_args_is_help=False)
def device_command() -> None:
    """Name what a guest sees: a device has a root node, and bitmaps of its own that stay when the root changes."""


@options.command(
    "add",
    examples="""
    dirtmap device add drive0 --root system
    """,
)
@click.argument("name", type=options.NAME)
@click.option("--root", required=True, metavar="NODE", type=options.NODE, help="The node that it reads from.")
@options.host
@options.quiet
def add_command(name: str, root: str, store: str | None, index: str | None) -> None:
    """Make a device on a node.

    Its bitmaps live in the default store, and record what is written through the device. A device's name is never
    another name for its root: "drive0" and the node under it have different bitmaps.
    """
    this_host(store, index).add_device(name, root)
    remember(store, index)


@options.command(
    "set-root",
    examples="""
    dirtmap device set-root --content-unchanged drive0 overlay
    """,
)
@click.argument("name", type=options.DEVICE)
@click.argument("node", type=options.NODE)
@click.option("--content-unchanged", is_flag=True, help="NODE reads as the old root: a new overlay, a finished mirror.")
@options.host
@options.quiet
def set_root_command(name: str, node: str, content_unchanged: bool, store: str | None, index: str | None) -> None:
    """Give a device another root node.

    All its bitmaps are dirty then, unless you state that the content is unchanged. Bitmaps of nodes never move.
    """
    this_host(store, index).set_root(name, node, content_unchanged=content_unchanged)


@options.command(
    "remove",
    examples="""
    dirtmap device remove drive0
    """,
)
@click.argument("name", type=options.DEVICE)
@options.host
@options.quiet
def remove_command(name: str, store: str | None, index: str | None) -> None:
    """Forget a device; it must not have bitmaps."""
    this_host(store, index).remove_device(name)


@options.command(
    "list",
    examples="""
    dirtmap device list --output=json
    """,
)
@options.host
@options.speaking
@click.pass_context
def list_command(ctx: click.Context, store: str | None, index: str | None, quiet: bool, output: str) -> None:
    """List the devices of all stores that are known, and their root nodes."""
    import uuid

    from dirtmap.engine.namespaces.devices import devices

    here = this_host(store, index)
    found, complete = gather(here, devices)
    found.sort(key=lambda device: device.name)
    roots = {device.root_uuid: here.by_uuid(uuid.UUID(device.root_uuid).bytes) for device in found}
    names = {key: root.name if root else None for key, root in roots.items()}
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
        _show(here.store, found, names)
    if not complete:
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
