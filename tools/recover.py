"""`dirtmap recover`: makes inconsistent bitmaps usable again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.fmt.errors import printable
from dirtmap.tools import options
from dirtmap.tools.output import write_json
from dirtmap.tools.targets import address

if TYPE_CHECKING:
    from dirtmap.engine import Host


@options.command(
    "recover",
    examples="""
    dirtmap recover disk.qcow2
    dirtmap recover disk.qcow2 monday
    """,
)
@options.target
@click.argument("bitmaps", metavar="[BITMAP]...", type=options.BITMAP, nargs=-1)
@options.reporting
def recover_command(host: Host, target: str, bitmaps: tuple[str, ...], quiet: bool, output: str) -> None:
    """Make inconsistent bitmaps usable again.

    A bitmap is inconsistent when a program that recorded into it did not finish, for example after a crash of QEMU.
    What the bitmap missed cannot be known, and QEMU refuses to use it. It becomes dirty all over, so that the next
    backup copies everything and loses nothing. With no BITMAP, all inconsistent ones are recovered; others are left
    alone. Says what was done to each, and why.

    Bitmaps of a qcow2 image that software without bitmaps has made void are brought back, all of them, dirty all over.
    If they cannot be told any more, that is an error, and the next change starts from none.

    Damage in a store is recovered in the same way. Bits whose checksum is wrong become dirty all over. If the directory
    of a node is damaged, all its bitmaps that can still be named become dirty all over and record, whichever you name.
    'dirtmap check -r all' repairs damage to the store as a whole.

    What a tracker left when it died is recovered as exactly as possible, from the store that it used: the default one,
    or the one that --store names. If there is no session of a tracked image in that store, its tracker's store is taken
    to be lost, and all its bitmaps become dirty all over; do that only once its tracker has ended. If a device was
    tracked, recovering the device recovers its own bitmaps only; recovering its root node recovers both.
    """
    recovered = host.recover(target, bitmaps)
    if quiet:
        return
    if output == "json":
        found = [{"name": item.name, "result": item.how} for item in recovered]
        write_json({**address(host, target), "recovered": found})
        return
    for item in recovered:
        print(f"{printable(item.name)}: {item.how}")
