"""`dirtmap transaction`: makes several changes to one image or store, all or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import click

import dirtmap.engine as dm
from dirtmap.fmt.spelling import shown_as
from dirtmap.tools import options
from dirtmap.tools.inputs import read_document
from dirtmap.tools.output import complain
from dirtmap.tools.targets import same_container, same_image, usable

if TYPE_CHECKING:
    from dirtmap.engine import Bitmap, Host, Target, Transaction
    from dirtmap.tools.qmp import Action


@options.command(
    "transaction",
    examples="""
    dirtmap transaction actions.json
    echo '{"actions": [
      {"type": "block-dirty-bitmap-disable", "data": {"node": "disk.qcow2", "name": "monday"}},
      {"type": "block-dirty-bitmap-add", "data": {"node": "disk.qcow2", "name": "tuesday"}}
    ]}' | dirtmap transaction -
    """,
)
@click.argument("file", type=click.Path(allow_dash=True))
@options.named
@options.quiet
def transaction_command(host: Host, file: str) -> None:
    """Change several bitmaps of one image or store: all or nothing.

    FILE, or standard input for "-", is the document of a QMP "transaction" command, {"actions": [{"type": ..., "data":
    {...}}, ...]}, with the types block-dirty-bitmap-add, -remove, -clear, -enable, -disable and -merge. A "node" is a
    TARGET: the path of an image, or a node's name. All actions change the same container, a qcow2 image or a store; the
    sources of a merge may be elsewhere. A disk that is tracked is changed through its tracker, and by itself. The
    actions are carried out in their order. If one fails, nothing has changed.
    FILE has 4 MiB at most.
    """
    from dirtmap.tools.qmp import parse_transaction

    actions = parse_transaction(*read_document(file))
    if not actions:
        return
    node = actions[0].node
    for action in actions:
        if not same_container(host, action.node, node):
            what = f"'{action.node}' is in another container than '{node}'; a transaction changes one"
            raise dm.UnsupportedError(f"{action.place}.data.node", what)
    recovered = dict(_dead_trackers(host, {action.node for action in actions}))
    with (
        contextlib.ExitStack() as others,
        host.transaction([action.node for action in actions]) as nodes,
    ):
        for action in actions:
            try:
                _apply(host, nodes, action, others)
            except dm.Error as error:
                raise dm.Error(f"{action.place}: {error.where}", error.what) from error
    for note in dict.fromkeys(f"{bitmaps.where}: {note}" for bitmaps in nodes.values() for note in bitmaps.notes):
        complain(note)
    for node, how in recovered.items():
        complain(f"{node}: recovered first: {how}")


def _dead_trackers(host: Host, nodes: set[str]) -> Iterator[tuple[str, str]]:
    """The nodes whose tracker is dead, and how they will be recovered."""
    for node in sorted(nodes):
        with host.open(node, force_share=True) as image:
            if (tracking := image.tracking()) and not tracking.alive:
                yield node, tracking.how


def _shown_as(text: str, bitmaps: Mapping[str, object]) -> str:
    """The name of an existing bitmap that a document means; see `dirtmap.fmt.spelling`."""
    try:
        return shown_as(text, list(bitmaps))
    except ValueError as error:
        raise dm.BitmapError("name", str(error)) from error


def _apply(host: Host, nodes: dict[Target, Transaction], action: Action, others: contextlib.ExitStack) -> None:
    from dirtmap.engine import changes

    bitmaps = nodes[action.node]
    if action.verb == "add":
        changes.add(bitmaps, action.name, action.granularity, recording=not action.disabled)
        return
    name = _shown_as(action.name, bitmaps)
    if action.verb == "remove":
        changes.remove(bitmaps, name)
    elif action.verb == "clear":
        changes.clear(bitmaps, name)
    elif action.verb == "merge":

        def source(node: str | None, name: str) -> Bitmap:
            if node is None:
                return usable(bitmaps.where, bitmaps, _shown_as(name, bitmaps))
            for changed, there in nodes.items():
                # A bitmap that is being changed is read as the actions before this one have left it.
                if node == changed or same_image(host, node, str(changed)):
                    return usable(there.where, there, _shown_as(name, there))
            image = others.enter_context(host.open(node))
            return usable(image.where, image, _shown_as(name, image))

        changes.merge(bitmaps, name, (source(*item) for item in action.sources))
    else:
        changes.set_recording(bitmaps, name, action.verb == "enable")
