"""`dirtmap completion`: lets a shell complete commands, options, files and names."""

from __future__ import annotations

import click

from dirtmap.tools import options
from dirtmap.tools.output import PROGRAM


@options.command(
    "completion",
    examples="""
    dirtmap completion bash >/etc/bash_completion.d/dirtmap
    dirtmap completion zsh >"${fpath[1]}/_dirtmap"
    dirtmap completion fish >~/.config/fish/completions/dirtmap.fish
    """,
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    Commands, options, files, and the names of nodes, devices and bitmaps are completed.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # the choices are those that click knows
    click.echo(kind(ctx.find_root().command, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source())
