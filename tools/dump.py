"""`dirtmap dump`: prints every structure on disk, field by field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from dirtmap.fmt.errors import counted, printable
from dirtmap.tools import options
from dirtmap.tools.output import write_json

if TYPE_CHECKING:
    from dirtmap.engine import Host


@options.command(
    "dump",
    examples="""
    dirtmap dump disk.qcow2
    dirtmap dump --hex disk.qcow2 | less
    dirtmap dump --output=json disk.qcow2 | jq '.faults'
    dirtmap dump backup.dmap
    dirtmap dump /var/lib/dirtmap/index
    """,
)
@click.argument("file", type=options.TARGET)
@click.option("--hex", "with_hex", is_flag=True, help="Also the bytes of each structure.")
@options.force_share
@options.reporting
def dump_command(host: Host, file: str, with_hex: bool, force_share: bool, quiet: bool, output: str) -> None:
    """Show every structure of an image, a store or an index.

    For an image, prints the header, feature bits by name, header extensions, bitmap directory and tables, field by
    field, each with its offset; for a store, its areas in the same way. Damaged structures are shown as far as they can
    be read, with everything that is wrong and where reading stopped. The exit status is 0 even so; use "dirtmap check"
    for a verdict.

    An index is given as its folder, or as the data.mdb in it. Prints its entries in the order of their keys, with
    offsets inside each entry. Use "dirtmap index verify" for a verdict.
    """
    document = host.dump(file, with_hex=with_hex, force_share=force_share)
    if quiet:
        return
    if output == "json":
        write_json(document)
        return
    print(f"{printable(document['filename'])}: {document['format']}, {document['file-size']} bytes")
    for structure in document["structures"]:
        for line in _structure(structure):
            print(line)
    print()
    for fault in document["faults"]:
        print(f"fault: {printable(fault['where'])}: {printable(fault['what'])}")
    if document["stopped"]:
        print(f"stopped: {printable(document['stopped'])}")
    elif not document["faults"]:
        print("no faults")


def _structure(structure: dict[str, Any]) -> Iterator[str]:
    number = structure.get("entries")
    entries = "" if number is None else f", {counted(number, 'entry', 'entries')}"
    yield ""
    place = "" if structure["offset"] is None else f" @ {structure['offset']:#x}"
    yield f"{printable(structure['name'])}{place}, {counted(structure['length'], 'byte')}{entries}"
    if "note" in structure:
        yield f"  note: {printable(structure['note'])}"
    rows = [
        (f"{field['offset']:#x}", printable(field["name"]), _value(field), printable(field.get("meaning", "")))
        for field in structure.get("fields", ())
    ]
    rows += [
        (f"[{run['index']}]", f"{run['count']} × {run['kind']}", f"@ {run['offset']:#x}" if run["offset"] else "", "")
        for run in structure.get("runs", ())
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    for offset, name, value, meaning in rows:
        yield f"  {offset:<{widths[0]}}  {name:<{widths[1]}}  {value:<{widths[2]}}  {meaning}".rstrip()
    if "hex" in structure:
        yield from _hex_lines(bytes.fromhex(structure["hex"]), structure["offset"] or 0)


def _value(field: dict[str, Any]) -> str:
    value = field["value"]
    if isinstance(value, str):
        return printable(value)
    # Offsets, bits and magic numbers are easier to recognise in hexadecimal, counts in decimal.
    name = field["name"]
    wants_hex = name.endswith(("offset", "features", "flags")) or (name == "type" and value > 0xFFFF)
    return f"{value:#x}" if wants_hex else str(value)


def _hex_lines(data: bytes, offset: int) -> Iterator[str]:
    """Lines of sixteen bytes. ``*`` stands for lines that are the same as the one before, as in hexdump -C."""
    previous, starred = b"", False
    for start in range(0, len(data), 16):
        line = data[start : start + 16]
        if line == previous:
            if not starred:
                yield "  *"
            starred = True
            continue
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in line)
        yield f"  {offset + start:08x}  {line.hex(' '):<47}  {text}"
        previous, starred = line, False
    if starred:
        yield f"  {offset + len(data):08x}"
