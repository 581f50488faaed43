"""The `dirtmap` command: a group that imports a command's module only when that is used, and reports every failure.

Start-up time is a feature: `dirtmap list` imports neither numpy nor rich, and no other command. So the modules of this
package import numpy, rich, json and the heavier rooms of the engine inside the functions that need them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any, NoReturn

import click

from dirtmap.fmt.errors import Error
from dirtmap.tools.exits import INTERRUPTED
from dirtmap.tools.options import write_examples
from dirtmap.tools.output import PROGRAM, complain

# In the order of the help. The value is the module of dirtmap.tools that has the command, as `VERB_command`.
_HOMES = {
    "list": "list",
    "map": "map",
    "plot": "plot.command",
    "find": "find",
    "add": "change",
    "remove": "change",
    "clear": "change",
    "enable": "change",
    "disable": "change",
    "rename": "change",
    "merge": "merge",
    "copy": "copy",
    "move": "copy",
    "mark": "mark",
    "transaction": "transaction",
    "serve": "serve.command",
    "checkpoint": "checkpoint",
    "track": "track",
    "sidecar": "sidecar",
    "backup": "backup.commands",
    "rebuild": "backup.commands",
    "export": "export.command",
    "hold": "hold",
    "check": "check",
    "recover": "recover",
    "dump": "dump",
    "node": "node",
    "device": "device",
    "store": "store",
    "index": "index",
    "completion": "completion",
}
# What the help says above a command, and all that follow it.
_HEADINGS = {
    "list": "Look at bitmaps",
    "add": "Change bitmaps",
    "serve": "Record what is written to a disk",
    "backup": "Copy what was written",
    "check": "Find damage, and repair it",
    "node": "Give disks names, and keep their bitmaps",
    "completion": "Use dirtmap",
}

_EXAMPLES = """
    dirtmap list disk.qcow2
    dirtmap plot disk.qcow2
    dirtmap backup create disk.qcow2 /srv/backup/
"""


class _Commands(click.Group):
    """Finds commands by name. Turns what they raise into one line on standard error and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _HOMES:
            return None
        module = importlib.import_module(f"dirtmap.tools.{_HOMES[cmd_name]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands under their headings, all explanations in one column."""
        width = max(map(len, _HOMES))
        rows: dict[str, list[tuple[str, str]]] = {}
        heading = ""
        for name in _HOMES:
            heading = _HEADINGS.get(name, heading)
            command = self.get_command(ctx, name)
            assert command is not None  # it has a home
            line = command.get_short_help_str(formatter.width - width - 6)
            rows.setdefault(heading, []).append((name.ljust(width), line))
        for heading, commands in rows.items():
            with formatter.section(heading):
                formatter.write_dl(commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_examples(_EXAMPLES, formatter)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        finally:
            sys.stdout.flush()  # now, while a full disk or a closed pipe can still be reported

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Runs the command line, and exits with 0, 1 or the command's own code, or with 130 after an interrupt."""
        _prepare_streams()
        extra |= {"prog_name": PROGRAM, "standalone_mode": False}
        sys.exit(self._run(*args, **extra))

    def _run(self, *args: Any, **extra: Any) -> int:
        try:
            code = super().main(*args, **extra)
            return code if isinstance(code, int) else 0
        except click.ClickException as error:
            path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else PROGRAM
            # click puts a list of choices on several lines.
            message = " ".join(error.format_message().split())
            where = path.removeprefix(PROGRAM).strip()
            complain(f"{where}: {message}" if where else f"{message} See {PROGRAM} --help.")
        except Error as error:
            complain(str(error))
        except (click.Abort, KeyboardInterrupt):
            return INTERRUPTED
        except MemoryError:
            complain("not enough memory")
        except OSError as error:  # errors of the engine were handled above; what is left is the standard streams
            _abandon_output()
            complain(f"{error.filename or 'standard output'}: {error.strerror or error}")
        except Exception as error:
            import traceback

            place = traceback.extract_tb(error.__traceback__)[-1]
            module = os.path.basename(place.filename)
            complain(f"a bug in {module}, line {place.lineno}: {type(error).__name__}: {error}")
        return 1


def _prepare_streams() -> None:
    """Makes the standard streams accept any text, and opens those that are closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It was closed. An image opened now would become file 1 or 2: the lowest free number is taken first.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  for as long as we run
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _abandon_output() -> None:
    """Discards what is still buffered. At exit, Python would try to write it, and report the failure again."""
    with contextlib.suppress(Exception):
        number = sys.stdout.fileno()
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), number)


@click.group(
    cls=_Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="dirtmap", message="%(prog)s %(version)s")
def main() -> None:
    """Dirty bitmaps of disk images, without QEMU.

    A dirty bitmap says which parts of a disk were written since a point in time; backup programs copy only those.
    TARGET is the path of a qcow2 image, or the name of a node or device. Sizes are bytes, 0x and hexadecimal digits, or
    take one of k K M G T P, or KiB to PiB (×1024). Exit status: 0 success, 1 error or wrong usage; "check" also 2
    (corrupt) and 3 (leaks only).
    """


if __name__ == "__main__":
    main()
