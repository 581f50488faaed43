"""The arguments and options that commands share."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dirtmap.fmt.errors import Error
from dirtmap.fmt.spelling import escaped, shown_as
from dirtmap.tools.output import complain
from dirtmap.tools.sizes import parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from dirtmap.engine import Host

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class Command(click.Command):
    """A command whose help ends with examples, one per line."""

    def __init__(self, *args: Any, examples: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the examples as they are, because rewrapped they could not be copied."""
        write_examples(self.examples, formatter)


def write_examples(examples: str, formatter: click.HelpFormatter) -> None:
    """Writes the section of examples of a help text."""
    import inspect

    with formatter.section("Examples"):
        for line in inspect.cleandoc(examples).splitlines():
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def command(name: str, *, examples: str) -> Callable[[Callable[..., Any]], Command]:
    """Makes a function a command. Its docstring is the help, and ``examples`` come at the end of that."""
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


class _Seconds(click.ParamType):  # type: ignore[type-arg]
    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, str) and not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value, re.ASCII):
            self.fail(f"'{value}' is no number of seconds", param, ctx)
        return float(value)


class _Name(click.ParamType):  # type: ignore[type-arg]
    """A name in the form of the engine, whatever bytes the shell gave."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return os.fsencode(value).decode("utf-8", "surrogateescape")


class _Bitmap(_Name):
    """The name of an existing bitmap.

    A name that is not UTF-8 may be given as JSON shows it (see `escaped`), unless a bitmap has that very text as name.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = super().convert(value, param, ctx)
        if "\\x" not in name or ctx is None:
            return name
        try:
            return shown_as(name, self._there(ctx))
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _items(map(escaped, self._there(ctx)), incomplete)

    def _there(self, ctx: click.Context) -> list[str]:
        """The names of all bitmaps of each target; for a source, of its own target if the command has one."""
        import dirtmap.engine as dm

        target = ctx.params.get("target")
        if self is SOURCE:
            target = ctx.params.get("source_target") or target
        names: dict[str, None] = {}
        # While an option's value is being completed, click has not told arguments from each other.
        for each in (target,) if target else ctx.params.get("targets") or ctx.args:
            with contextlib.suppress(dm.Error):
                names.update(dict.fromkeys(b.name for b in host_of(ctx).describe(each, force_share=True).bitmaps))
        return list(names)


class _Holder(_Name):
    """The name of an existing node or device."""

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
    """A target, which holds bitmaps. It must have the format that ``-f`` names, if given."""

    name = "target"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if ctx and (wanted := ctx.meta.get(_FORMAT)):
            host_of(ctx).require_format(value, wanted)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Completes names of nodes and devices; if none fits, leaves files to the shell."""
        named = _items(_holders(ctx, "node", "device"), incomplete)
        return [*named, *super().shell_complete(ctx, param, incomplete)]


class _Word(click.types.UnprocessedParamType):
    """One word of a command to be run."""

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
_TRUST = "dirtmap.trust"
_HOST = "dirtmap.host"
_WAIT = "dirtmap.wait"
_NO_LOCK = "dirtmap.no-lock"
_PATIENCE_SECONDS = 5.0
_QUIET = "dirtmap.quiet"


def _remember_format(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_FORMAT] = value


def _remember_store(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_STORE] = value


def _remember_wait(ctx: click.Context, _: click.Parameter, value: float) -> None:
    ctx.meta[_WAIT] = value


def _remember_no_lock(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_NO_LOCK] = value


def _remember_index(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_INDEX] = value


def _remember_quiet(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta[_QUIET] = value
    return value


def _remember_trust(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_TRUST] = value


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
_trust = click.option(
    "--trust",
    is_flag=True,
    callback=_remember_trust,
    is_eager=True,
    expose_value=False,
    help="As root, trust a default store and an index that another user can replace.",
)
_index_path = click.option(
    "--index",
    type=click.Path(),
    metavar="PATH",
    callback=_remember_index,
    is_eager=True,
    expose_value=False,
    help=_INDEX_HELP,
)


waiting = click.option(
    "--wait",
    type=_Seconds(),
    default=_PATIENCE_SECONDS,
    show_default=True,
    metavar="SECONDS",
    callback=_remember_wait,
    is_eager=True,
    expose_value=False,
    help="How long to wait for whoever holds what is needed; 0 does not wait.",
)

_no_lock = click.option(
    "--no-lock",
    is_flag=True,
    callback=_remember_no_lock,
    is_eager=True,
    expose_value=False,
    help="Also on a file system without locks that others see. You know that nobody else uses the files.",
)


def _index(command: Callable[..., Any]) -> Callable[..., Any]:
    return _index_path(_trust(command))


def host_of(ctx: click.Context) -> Host:
    """The host of a command, from the default store and the index that the user chose. It is made once per command."""
    import dirtmap.engine as dm

    if _HOST not in ctx.meta:
        chosen = ctx.meta.get(_STORE), ctx.meta.get(_INDEX)
        wait, lock = ctx.meta.get(_WAIT, _PATIENCE_SECONDS), not ctx.meta.get(_NO_LOCK)
        host = dm.Host(*chosen, wait=wait, lock=lock, trust=ctx.meta.get(_TRUST, False))
        ctx.meta[_HOST] = ctx.find_root().with_resource(host)
    found: Host = ctx.meta[_HOST]
    return found


def tell_no_store(host: Host, *, quiet: bool) -> None:
    """Says so where the user's normal default store was never made, and answers are empty for that reason."""
    if not host.has_store() and not quiet:
        complain(f"{host.store}: no store yet; 'index scan' and 'node add' make it")


def pass_host(command: Callable[..., Any]) -> Callable[..., Any]:
    """Passes the host to a command as its first argument. Tells at the end why the index could not be used, if so."""

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


def _of_host(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say which host it is, and how it is used."""
    return _store(_index(waiting(_no_lock(command))))


def named(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a command that takes names and no TARGET. The command gets the host first."""
    return _of_host(pass_host(command))


def speaking(command: Decorated) -> Decorated:
    """Adds the options of a command that reports on no TARGET. The command gets ``quiet`` and ``output``."""
    return _output(told_quiet(command))


def reporting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a command that reports. The command gets the host first, and ``quiet`` and ``output``."""
    return speaking(_of_host(_format(pass_host(command))))


def changing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a command that changes bitmaps and reports nothing. The command gets the host first."""
    return quiet(_of_host(_format(pass_host(command))))
