"""`dirtmap track`: shows what programs that track writes are doing, and asks them."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from dirtmap.fmt.errors import counted, printable
from dirtmap.tools import options
from dirtmap.tools.output import colourful, write_json
from dirtmap.tools.sizes import human_share, human_size
from dirtmap.tools.targets import address
from dirtmap.tools.times import local_time

if TYPE_CHECKING:
    from dirtmap.engine import Host, Status

_REFRESH_SECONDS = 0.5


@click.group("track")
def track_command() -> None:
    """Look at programs that track writes to an image, and ask them."""


@options.command(
    "status",
    examples="""
    dirtmap track status drive0
    dirtmap track status --output=json disk.qcow2 | jq .dirty
    """,
)
@options.target
@click.option("--once", is_flag=True, help="On a terminal: show it once, as to a pipe.")
@options.reporting
def status_command(host: Host, target: str, once: bool, quiet: bool, output: str) -> None:
    """Tell which program tracks TARGET, since when, and what it has marked and logged.

    "writes" counts the writes whose begin and end the program reports. Writes that it only marks are not counted, but
    what they made dirty is.

    On a terminal the answer is kept up to date until you interrupt it, or until the program ends. If the program has
    died, tells what "dirtmap recover" will do.
    """
    with host.open(target, force_share=True) as image:
        status = image.tracking()
    if quiet:
        return
    if output == "json":
        write_json({**address(host, target), **_document(status)})
    elif once or status is None or not status.alive or not colourful():
        print("\n".join(_lines(str(target), status)))
    else:
        _watch(host, target)


def _watch(host: Host, target: str) -> None:
    """Shows the status until the tracker ends."""
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as shown:
        while True:
            with host.open(target, force_share=True) as image:
                status = image.tracking()
            shown.update(Text("\n".join(_lines(str(target), status))), refresh=True)
            if status is None or not status.alive:
                return
            time.sleep(_REFRESH_SECONDS)


def _document(status: Status | None) -> dict[str, Any]:
    if status is None:
        return {"tracked": False}
    named = {key.replace("_", "-"): value for key, value in asdict(status).items() if key not in ("alive", "how")}
    return {"tracked": status.alive, "recovery": None if status.alive else status.how, **named}


def _lines(target: str, status: Status | None) -> list[str]:
    name = printable(target)
    if status is None:
        return [f"{name}: not tracked"]
    since = local_time(status.started)
    if not status.alive:
        return [f"{name}: its tracker has died; it began {since}", f"  recover   {printable(status.how)}"]
    ago = "never" if status.seen is None else f"{max(0.0, time.time() - status.seen):.1f} s ago"
    share = human_share(status.regions, status.regions_in_all)
    regions = f"{status.regions} of {status.regions_in_all} ({share}), {human_size(status.region_size)} each"
    failed = ["  failed    a sync: the tracker takes no more marks"] if status.poisoned else []
    if not status.kept:
        failed.append("  ended     while others mark: the next tracker goes on with what they mark")
    return [
        f"{name}: tracked by {printable(status.tracker)}",
        *failed,
        f"  since     {since}, last sign of life {ago}",
        f"  writes    {status.writes}",
        f"  dirty     {human_size(status.dirty)} to be saved, in {counted(status.intervals, 'interval')}",
        f"  logged    {regions if status.intent == 'region' else 'off'}",
        f"  live      {printable(status.live)}",
    ]


@options.command(
    "save",
    examples="""
    dirtmap track save drive0
    """,
)
@options.target
@options.changing
def save_command(host: Host, target: str) -> None:
    """Have the program that tracks TARGET write all marks to the store.

    They are durable then, and after a power loss dirty is what was written since, and what lies beside it.
    """
    with host.open(target, force_share=True) as image:
        image.save_tracked()


@options.command(
    "stop",
    examples="""
    dirtmap track stop drive0
    """,
)
@options.target
@options.changing
def stop_command(host: Host, target: str) -> None:
    """Have the program that tracks TARGET end its tracking, and wait for that.

    "dirtmap serve" ends then. In any other program each write is refused from then on.
    """
    with host.open(target, force_share=True) as image:
        image.stop_tracked()


track_command.add_command(status_command)
track_command.add_command(save_command)
track_command.add_command(stop_command)
