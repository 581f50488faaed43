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

    A bitmap is inconsistent when a program that recorded into it did not finish, as after a crash of QEMU: what it
    missed cannot be known, and QEMU refuses to use it. It becomes dirty all over, so that the next backup copies
    everything and loses nothing. With no BITMAP, all inconsistent ones are recovered; others are left alone. Says what
    became of each, and why.

    Bitmaps of a qcow2 image that software without bitmaps has made void are brought back, all of them, dirty all over.
    Where they cannot be told any more, that is an error, and the next change starts from none.

    Damage in a store is recovered in the same way: bits whose checksum is wrong, and a damaged directory of a node: all
    its bitmaps that can still be named, whichever you name, become dirty all over, and record. 'dirtmap check -r all'
    mends what concerns the store as a whole.

    What a tracker left when it died is recovered as exactly as can be, from the store that it used: the default one, or
    that which --store names. Where no session is found there, a tracked image is taken for one whose store is lost: all
    its bitmaps become dirty all over. Do that only once its tracker has ended. Of a device that was tracked, only the
    device's bitmaps are recovered; recovering its root node recovers both.
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
