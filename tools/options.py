"""Arguments and options that commands share."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dirtmap.fmt.errors import Error
from dirtmap.tools.output import complain
from dirtmap.tools.sizes import parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from dirtmap.engine import Host

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Command(click.Command):
    """A command whose help ends with examples, a line each."""

    def __init__(self, *args: Any, examples: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes them as they are: rewrapped, they could not be copied."""
        write_examples(self.examples, formatter)


def write_examples(examples: str, formatter: click.HelpFormatter) -> None:
    """The section of examples of a help text."""
    import inspect

    with formatter.section("Examples"):
        for line in inspect.cleandoc(examples).splitlines():
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def command(name: str, *, examples: str) -> Callable[[Callable[..., Any]], Command]:
    """Makes a function a command; its docstring is the help, ``examples`` stand at the end of it."""
    return click.command(name, cls=Command, examples=examples)


class _Size(click.ParamType):  # type: ignore[type-arg]
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def escaped(name: str) -> str:
    """A name as JSON shows it: bytes that are not UTF-8 as a backslash, an x and two hexadecimal digits."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unescaped(name: str) -> str:
    """The name that `escaped` shows so, if it has no such text itself."""
    text = os.fsencode(name)
    found = re.sub(rb"\\x([89a-f][0-9a-f])", lambda match: bytes([int(match[1], 16)]), text)
    return found.decode("utf-8", "surrogateescape")


class _Name(click.ParamType):  # type: ignore[type-arg]
    """A name as the engine has it, whatever bytes the shell gave."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return os.fsencode(value).decode("utf-8", "surrogateescape")


class _Bitmap(_Name):
    """The name of a bitmap that is there.

    One that is not UTF-8 may be given as JSON shows it, see `escaped`, unless a bitmap's name is that very text.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = super().convert(value, param, ctx)
        if "\\x" not in name or ctx is None:
            return name
        there = self._there(ctx)
        meant = [found for found in there if escaped(found) == name]
        if name in there or not meant:
            return name
        if len(meant) > 1:
            self.fail(f"'{name}' is how {len(meant)} names are shown, none of which it is", param, ctx)
        return meant[0]

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _items(map(escaped, self._there(ctx)), incomplete)

    def _there(self, ctx: click.Context) -> list[str]:
        """The names of all bitmaps of the target; of another source than that where the command has one."""
        import dirtmap.engine as dm

        target = ctx.params.get("target")
        if self is SOURCE:
            target = ctx.params.get("source_target") or target
        try:
            return [bitmap.name for bitmap in host_of(ctx).describe(target, force_share=True).bitmaps] if target else []
        except dm.Error:
            return []


class _Holder(_Name):
    """The name of a node or device that is there."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _items(map(escaped, _holders(ctx, *self._kinds)), incomplete)


def _items(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(name) for name in names if name.isprintable() and name.startswith(incomplete)]


def _holders(ctx: click.Context, *kinds: str) -> list[str]:
    """The names of all nodes or devices of this host, as far as its stores can be read."""
    import dirtmap.engine as dm

    found: list[str] = []
    with contextlib.suppress(dm.Error):
        found += [node.name for node in host_of(ctx).nodes([])] if "node" in kinds else []
        found += [device.name for device in host_of(ctx).devices([])] if "device" in kinds else []
    return sorted(found)


class _Target(click.Path):
    """What holds bitmaps; held against ``-f`` where that was given."""

    name = "target"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if ctx and (wanted := ctx.meta.get(_FORMAT)):
            host_of(ctx).require_format(value, wanted)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Names of nodes and devices; files where none fits, as the shell has it."""
        named = _items(_holders(ctx, "node", "device"), incomplete)
        return [*named, *super().shell_complete(ctx, param, incomplete)]


class _Word(click.types.UnprocessedParamType):
    """A word of a command to run."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


SIZE = _Size()
NAME = _Name()
BITMAP = _Bitmap()
SOURCE = _Bitmap()
NODE = _Holder("node")
DEVICE = _Holder("device")
WORD = _Word()
TARGET = _Target()
_FORMAT = "dirtmap.format"
_STORE = "dirtmap.store"
_INDEX = "dirtmap.index"
_HOST = "dirtmap.host"
_QUIET = "dirtmap.quiet"


def _remember_format(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_FORMAT] = value


def _remember_store(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_STORE] = value


def _remember_index(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_INDEX] = value


def _remember_quiet(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta[_QUIET] = value
    return value


target = click.argument("target", type=TARGET)
bitmap = click.argument("bitmap", type=BITMAP)
new_bitmap = click.argument("bitmap", type=NAME)
force_share = click.option("-U", "--force-share", is_flag=True, help="Read although another process writes to it.")
_QUIET_HELP = "Print nothing but errors."
quiet = click.option("-q", "--quiet", is_flag=True, callback=_remember_quiet, expose_value=False, help=_QUIET_HELP)
told_quiet = click.option("-q", "--quiet", is_flag=True, callback=_remember_quiet, help=_QUIET_HELP)
_output = click.option(
    "--output", type=click.Choice(["human", "json"]), default="human", show_default=True, help="How to report."
)
_format = click.option(
    "-f",
    "--format",
    type=click.Choice(["qcow2", "dirtmap"]),
    callback=_remember_format,
    is_eager=True,
    expose_value=False,
    help="Refuse a TARGET of another format.",
)


_STORE_HELP = (
    "The default store, which knows all others.  [default: $DIRTMAP_STORE, else default.dmap beside the index]"
)
_INDEX_HELP = "The index.  [default: $DIRTMAP_INDEX, else /var/lib/dirtmap/index or ~/.local/state/dirtmap/index]"
_store = click.option(
    "--store",
    type=click.Path(),
    metavar="STORE",
    callback=_remember_store,
    is_eager=True,
    expose_value=False,
    help=_STORE_HELP,
)
_index = click.option(
    "--index",
    type=click.Path(),
    metavar="PATH",
    callback=_remember_index,
    is_eager=True,
    expose_value=False,
    help=_INDEX_HELP,
)


def host_of(ctx: click.Context) -> Host:
    """The host, as the default store and the index of the user's choice tell of it: one for each command."""
    import dirtmap.engine as dm

    if _HOST not in ctx.meta:
        ctx.meta[_HOST] = ctx.find_root().with_resource(dm.Host(ctx.meta.get(_STORE), ctx.meta.get(_INDEX)))
    host: Host = ctx.meta[_HOST]
    return host


def pass_host(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the host as its first argument, and tells at its end why the index could not be used, if so."""

    @functools.wraps(command)
    def with_host(*args: Any, **values: Any) -> Any:
        ctx = click.get_current_context()
        host = host_of(ctx)
        error: Error | None = None
        try:
            return command(host, *args, **values)
        except Error as raised:
            error = raised
            raise
        finally:
            # What the error says already is not told twice.
            if host.notice and not ctx.meta.get(_QUIET) and not (error and host.notice.startswith(str(error))):
                complain(host.notice)

    return with_host


def named(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a command that takes names and no TARGET; it is passed the host first."""
    return _store(_index(pass_host(command)))


def speaking(command: Decorated) -> Decorated:
    """Options of a command that reports on no TARGET; it is passed ``quiet`` and ``output``."""
    return _output(told_quiet(command))


def reporting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a command that reports; it is passed the host first, and ``quiet`` and ``output``."""
    return speaking(_store(_index(_format(pass_host(command)))))


def changing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a command that changes bitmaps and has nothing to report; it is passed the host first."""
    return quiet(_store(_index(_format(pass_host(command)))))
