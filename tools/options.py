"""Arguments and options that commands share."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dirtmap.engine.host.opening import Named, Target, require_format
from dirtmap.tools.sizes import parse_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from dirtmap.engine.host.registry import Host

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
    from dirtmap.engine.model.naming import decode_name

    text = os.fsencode(name)
    return decode_name(re.sub(rb"\\x([89a-f][0-9a-f])", lambda match: bytes([int(match[1], 16)]), text))


class _Name(click.ParamType):  # type: ignore[type-arg]
    """A name as the engine has it, whatever bytes the shell gave."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from dirtmap.engine.model.naming import decode_name

        return decode_name(os.fsencode(value))


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
            return [bitmap.name for bitmap in dm.describe(target, force_share=True).bitmaps] if target else []
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
    from dirtmap.engine.host.opening import this_host
    from dirtmap.engine.namespaces.devices import devices
    from dirtmap.engine.namespaces.nodes import nodes

    found: list[str] = []
    with contextlib.suppress(dm.Error):
        here = this_host(*(ctx.params.get(key) or ctx.meta.get(meta) for key, meta in _WHERE.items()))
        for path in here.stores():
            with contextlib.suppress(dm.Error), here.opened(path) as store:
                found += [node.name for node in nodes(store)] if "node" in kinds else []
                found += [device.name for device in devices(store)] if "device" in kinds else []
    return sorted(found)


class _Target(click.Path):
    """What holds bitmaps; held against ``-f`` where that was given."""

    name = "target"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Target:  # type: ignore[override]
        found: Target = value
        if ctx and (ctx.meta.get(_STORE) or ctx.meta.get(_INDEX)):
            found = Named(value, ctx.meta.get(_STORE), ctx.meta.get(_INDEX))
        if ctx and (wanted := ctx.meta.get(_FORMAT)):
            require_format(found, wanted)
        return found

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
_WHERE = {"store": _STORE, "index": _INDEX}


def _remember_format(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_FORMAT] = value


def _remember_store(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_STORE] = value


def _remember_index(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    ctx.meta[_INDEX] = value


target = click.argument("target", type=TARGET)
bitmap = click.argument("bitmap", type=BITMAP)
new_bitmap = click.argument("bitmap", type=NAME)
force_share = click.option("-U", "--force-share", is_flag=True, help="Read although another process writes to it.")
quiet = click.option("-q", "--quiet", is_flag=True, expose_value=False, help="Print nothing but errors.")
_told_quiet = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
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


def host(command: Decorated) -> Decorated:
    """Options of a command that takes names and no TARGET; it is passed ``store`` and ``index``."""
    store = click.option("--store", type=click.Path(), metavar="STORE", help=_STORE_HELP)
    index = click.option("--index", type=click.Path(), metavar="PATH", help=_INDEX_HELP)
    return store(index(command))


def where(ctx: click.Context) -> dict[str, Any]:
    """The default store and the index that the user asked for, as the engine's functions take them."""
    return {"store": ctx.meta.get(_STORE), "index": ctx.meta.get(_INDEX)}


def host_of(ctx: click.Context) -> Host:
    """The host, as the default store and the index of the user's choice tell of it."""
    from dirtmap.engine.host.opening import this_host

    return this_host(**where(ctx))


def speaking(command: Decorated) -> Decorated:
    """Options of a command that reports on no TARGET; it is passed ``quiet`` and ``output``."""
    return _output(_told_quiet(command))


def reporting(command: Decorated) -> Decorated:
    """Options of a command that reports; it is passed ``quiet`` and ``output``."""
    return speaking(_store(_index(_format(command))))


def changing(command: Decorated) -> Decorated:
    """Options of a command that changes bitmaps and has nothing to report."""
    return quiet(_store(_index(_format(command))))
