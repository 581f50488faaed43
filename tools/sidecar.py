"""`dirtmap sidecar`: makes a qcow2 file in which QEMU keeps the bitmaps of a raw disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.tools import options

if TYPE_CHECKING:
    from dirtmap.engine import Host


@options.command(
    "sidecar",
    examples="""
    dirtmap sidecar disk.raw disk.qcow2
    dirtmap add disk.qcow2 monday
    """,
)
@click.argument("raw", type=click.Path())
@click.argument("qcow2", type=click.Path())
@click.option("--raw", "insist", is_flag=True, help="RAW is a raw disk, although it looks like another format.")
@options.named
@options.quiet
def sidecar_command(host: Host, raw: str, qcow2: str, insist: bool) -> None:
    """Make a qcow2 file that has RAW as its external data.

    From then on let QEMU open QCOW2. Through it, QEMU reads and writes RAW, byte for byte as before, and keeps bitmaps
    of what it writes in QCOW2. What is written to RAW without going through QCOW2 is not recorded, so RAW must not be
    tracked. QCOW2 must not exist yet; it remembers the absolute path of RAW.

    A RAW that is an image of another format (qcow2, VMDK, VHD, VHDX, VDI, ...) is refused: as a raw disk it would be
    overwritten. --raw insists.
    """
    host.make_sidecar(raw, qcow2, raw=insist)
