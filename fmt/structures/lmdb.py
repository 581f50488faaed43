"""The structure of LMDB's meta pages."""

from __future__ import annotations

from construct import Int16un, Int32un, Int64un, Struct

META_PAGE = "lmdb meta page" / Struct(
    "number" / Int64un,
    "pad" / Int16un,
    "flags" / Int16un,
    "bounds" / Int32un,
    "magic" / Int32un,
    "version" / Int32un,
    "address" / Int64un,
    "mapsize" / Int64un,
    "page_size" / Int32un,  # md_pad of the free list
    "free_flags" / Int16un,
    "free_depth" / Int16un,
    "free_branch_pages" / Int64un,
    "free_leaf_pages" / Int64un,
    "free_overflow_pages" / Int64un,
    "free_entries" / Int64un,
    "free_root" / Int64un,
    "main_pad" / Int32un,
    "main_flags" / Int16un,
    "main_depth" / Int16un,
    "branch_pages" / Int64un,
    "leaf_pages" / Int64un,
    "overflow_pages" / Int64un,
    "entries" / Int64un,
    "root" / Int64un,
    "last_page" / Int64un,
    "transaction" / Int64un,
)
