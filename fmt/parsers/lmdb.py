"""How the structures of `dirtmap.fmt.structures.lmdb` are parsed and built.

Made by `make parsers`: do not edit.
"""

from __future__ import annotations

from struct import Struct

from dirtmap.fmt.structure import Field, Structure

_meta_page = Struct("=QHHLLLQQLHHQQQQQLHHQQQQQQQ")


class RawMetaPage:
    """The fields of a structure: lmdb meta page."""

    __slots__ = (
        "number",
        "pad",
        "flags",
        "bounds",
        "magic",
        "version",
        "address",
        "mapsize",
        "page_size",
        "free_flags",
        "free_depth",
        "free_branch_pages",
        "free_leaf_pages",
        "free_overflow_pages",
        "free_entries",
        "free_root",
        "main_pad",
        "main_flags",
        "main_depth",
        "branch_pages",
        "leaf_pages",
        "overflow_pages",
        "entries",
        "root",
        "last_page",
        "transaction",
    )

    def __init__(
        self,
        number: int,
        pad: int,
        flags: int,
        bounds: int,
        magic: int,
        version: int,
        address: int,
        mapsize: int,
        page_size: int,
        free_flags: int,
        free_depth: int,
        free_branch_pages: int,
        free_leaf_pages: int,
        free_overflow_pages: int,
        free_entries: int,
        free_root: int,
        main_pad: int,
        main_flags: int,
        main_depth: int,
        branch_pages: int,
        leaf_pages: int,
        overflow_pages: int,
        entries: int,
        root: int,
        last_page: int,
        transaction: int,
    ) -> None:
        self.number = number
        self.pad = pad
        self.flags = flags
        self.bounds = bounds
        self.magic = magic
        self.version = version
        self.address = address
        self.mapsize = mapsize
        self.page_size = page_size
        self.free_flags = free_flags
        self.free_depth = free_depth
        self.free_branch_pages = free_branch_pages
        self.free_leaf_pages = free_leaf_pages
        self.free_overflow_pages = free_overflow_pages
        self.free_entries = free_entries
        self.free_root = free_root
        self.main_pad = main_pad
        self.main_flags = main_flags
        self.main_depth = main_depth
        self.branch_pages = branch_pages
        self.leaf_pages = leaf_pages
        self.overflow_pages = overflow_pages
        self.entries = entries
        self.root = root
        self.last_page = last_page
        self.transaction = transaction


def _build_meta_page(
    *,
    number: int,
    pad: int,
    flags: int,
    bounds: int,
    magic: int,
    version: int,
    address: int,
    mapsize: int,
    page_size: int,
    free_flags: int,
    free_depth: int,
    free_branch_pages: int,
    free_leaf_pages: int,
    free_overflow_pages: int,
    free_entries: int,
    free_root: int,
    main_pad: int,
    main_flags: int,
    main_depth: int,
    branch_pages: int,
    leaf_pages: int,
    overflow_pages: int,
    entries: int,
    root: int,
    last_page: int,
    transaction: int,
) -> bytes:
    return _meta_page.pack(
        number,
        pad,
        flags,
        bounds,
        magic,
        version,
        address,
        mapsize,
        page_size,
        free_flags,
        free_depth,
        free_branch_pages,
        free_leaf_pages,
        free_overflow_pages,
        free_entries,
        free_root,
        main_pad,
        main_flags,
        main_depth,
        branch_pages,
        leaf_pages,
        overflow_pages,
        entries,
        root,
        last_page,
        transaction,
    )


META_PAGE = Structure(
    "lmdb meta page",
    _meta_page,
    RawMetaPage,
    _build_meta_page,
    Field("number", 0, 8),
    Field("pad", 8, 2),
    Field("flags", 10, 2),
    Field("bounds", 12, 4),
    Field("magic", 16, 4),
    Field("version", 20, 4),
    Field("address", 24, 8),
    Field("mapsize", 32, 8),
    Field("page_size", 40, 4),
    Field("free_flags", 44, 2),
    Field("free_depth", 46, 2),
    Field("free_branch_pages", 48, 8),
    Field("free_leaf_pages", 56, 8),
    Field("free_overflow_pages", 64, 8),
    Field("free_entries", 72, 8),
    Field("free_root", 80, 8),
    Field("main_pad", 88, 4),
    Field("main_flags", 92, 2),
    Field("main_depth", 94, 2),
    Field("branch_pages", 96, 8),
    Field("leaf_pages", 104, 8),
    Field("overflow_pages", 112, 8),
    Field("entries", 120, 8),
    Field("root", 128, 8),
    Field("last_page", 136, 8),
    Field("transaction", 144, 8),
)
