"""`dirtmap store`: makes and compacts store files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dirtmap.fmt.errors import counted, printable
from dirtmap.tools import options
from dirtmap.tools.output import complain, write_json
from dirtmap.tools.sizes import human_size

if TYPE_CHECKING:
    from dirtmap.engine import Host


@click.group("store", no_args_is_help=False)
def store_command() -> None:
    """Make and compact stores, which have bitmaps of many images.

    Each image has a namespace of its own in its store.
    """


@options.command(
    "create",
    examples="""
    dirtmap store create backup.dmap
    dirtmap store create --cluster-size 64K big.dmap
    """,
)
@click.argument("file", type=click.Path())
@click.option("--cluster-size", type=options.SIZE, default="4K", show_default=True, help="4K to 2M, a power of two.")
@options.waiting
@options.quiet
def create_command(file: str, cluster_size: int) -> None:
    """Make an empty store.

    FILE must not exist. Then "dirtmap node add" gives it images to hold bitmaps for.
    """
    from dirtmap.engine import create_store
    from dirtmap.fmt.geometry import is_power_of_two

    if not is_power_of_two(cluster_size):
        raise click.BadParameter(f"{cluster_size} is not a power of two", param_hint="--cluster-size")
    create_store(file, cluster_bits=cluster_size.bit_length() - 1)


@options.command(
    "compact",
    examples="""
    dirtmap store compact backup.dmap
    """,
)
@click.argument("file", type=click.Path())
@options.named
@options.speaking
def compact_command(host: Host, file: str, quiet: bool, output: str) -> None:
    """Write a store anew without its free space, in its own place.

    The new file replaces the old one when it is durable; a crash before that leaves the old one. A store in which a
    bitmap is held is refused.
    """
    result = host.compact(file)
    if output == "json" and not quiet:
        write_json({"filename": file, "before": result.before, "after": result.after, "namespaces": result.namespaces})
    elif not quiet:
        print(
            f"{printable(file)}: {human_size(result.before)} -> {human_size(result.after)}, "
            f"{counted(result.namespaces, 'namespace')}"
        )


@options.command(
    "new-identity",
    examples="""
    cp backup.dmap copy.dmap && dirtmap store new-identity copy.dmap
    """,
)
@click.argument("file", type=click.Path())
@options.named
@options.quiet
def new_identity_command(host: Host, file: str) -> None:
    """Make a copy of a store one of its own.

    A copied store is refused, because it and the original would be the home of the same bitmaps. This command gives the
    copy, its nodes and its devices new UUIDs. If an image was tracked when its store was copied, its bitmaps are all
    dirty in the copy. If the original is not found, as where a backup of the store was put in its place, all bitmaps
    are: the copy may lack what was written since. A store is refused while one of its bitmaps is held, and, if it is
    not known to be a copy, while one of its images is tracked.
    """
    for line in host.new_identity(file).made_dirty:
        complain(f"{file}: all dirty now: {line}")


for _command in (create_command, compact_command, new_identity_command):
    store_command.add_command(_command)
