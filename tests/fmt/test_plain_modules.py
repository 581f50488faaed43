"""What parses and builds costs no import of construct, and its constants agree with the declarations."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

from dirtmap import fmt
from dirtmap.fmt import directory, extensions, live, parsers, qcow2, store
from dirtmap.fmt import structures as declaring
from dirtmap.fmt.parsers.directory import DIRECTORY_ENTRY
from dirtmap.fmt.parsers.extensions import EXTENSION_HEAD
from dirtmap.fmt.parsers.live import LOG_RECORD, WINDOW
from dirtmap.fmt.parsers.qcow2 import HEADER_V2, HEADER_V3, NAMESPACE_EXTENSION, SNAPSHOT
from dirtmap.fmt.parsers.store import AREA, BITS, IDENTITY, POINTER

FORMATS = {module.name for module in pkgutil.iter_modules(declaring.__path__)}
PARSERS = {module.name for module in pkgutil.iter_modules(parsers.__path__)}
PLAIN = {module.name for module in pkgutil.iter_modules(fmt.__path__)} - {"generate", "structures"}


def imported_with(*modules: str) -> set[str]:
    """What a new process has imported after importing these modules and nothing else."""
    code = f"import sys, {', '.join(modules)}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_plain_modules_import_no_construct() -> None:
    found = imported_with("dirtmap.fmt", *(f"dirtmap.fmt.{name}" for name in PLAIN))
    assert {"dirtmap.fmt.qcow2", "dirtmap.fmt.live", "dirtmap.fmt.parsers.live"} <= found
    assert not [name for name in found if name.partition(".")[0] in ("construct", "numpy")]
    assert not [name for name in found if name.startswith("dirtmap.fmt.structures")]


def test_what_is_declared_is_beside_a_plain_module_and_its_parsers() -> None:
    assert FORMATS == PARSERS
    assert FORMATS < PLAIN


@pytest.mark.parametrize(
    ("constant", "declared"),
    [
        (directory.ENTRY_SIZE, DIRECTORY_ENTRY.size),
        (extensions.HEAD_SIZE, EXTENSION_HEAD.size),
        (live.LOG_RECORD_SIZE, LOG_RECORD.size),
        (qcow2.NAMESPACE_EXTENSION_SIZE, NAMESPACE_EXTENSION.size),
        (qcow2.SNAPSHOT_SIZE, SNAPSHOT.size),
        (qcow2.BACKING_FILE_OFFSET, HEADER_V2.field("backing_file_offset").offset),
        (qcow2.REFCOUNT_TABLE_OFFSET, HEADER_V2.field("refcount_table_offset").offset),
        (qcow2.V3_OFFSET, HEADER_V2.size),
        (qcow2.AUTOCLEAR_OFFSET, HEADER_V2.size + HEADER_V3.field("autoclear_features").offset),
        (qcow2.MORE_OFFSET, HEADER_V2.size + HEADER_V3.size),
        (store.AREA_SIZE, AREA.size),
        (store.POINTER_SIZE, POINTER.size),
        (store.ITEM_SIZES[store.ITEM_BITS], BITS.size),
        (store.ITEM_SIZES[store.ITEM_IDENTITY], IDENTITY.size),
        (store.ITEM_SIZES[store.ITEM_WINDOW], WINDOW.size),
    ],
)
def test_sizes_and_offsets_are_those_of_the_declarations(constant: int, declared: int) -> None:
    assert constant == declared


def test_the_end_marker_is_an_empty_extension() -> None:
    assert EXTENSION_HEAD.build(type=extensions.END, length=0) == extensions.END_MARKER
