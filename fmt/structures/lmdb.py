"""The structure of LMDB's meta pages; the check that a file may be mapped as a database."""

from __future__ import annotations

from construct import Int16un, Int32un, Int64un

from dirtmap.fmt.lmdb import FLAG_META, FLAGS_FREE, MAGIC, MAX_SPACE, NO_ROOT, PAGE_SIZES, VERSION
from dirtmap.fmt.structure import Structure

META_PAGE = Structure(
    "lmdb meta page",
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


def meta_fault(pages: bytes, size: int) -> str | None:
    """Returns why a file must not be mapped as an LMDB database (one without named databases), or None if it may.

    LMDB itself would end the process with a signal if it read a page that is not there.

    Args:
        pages: the first `dirtmap.fmt.lmdb.META_BYTES` of the file, or all of it if it is shorter.
        size: of the file, bytes.
    """
    if len(pages) < META_PAGE.size:
        return "is cut short"
    page_size = META_PAGE.parse(pages).page_size
    if page_size not in PAGE_SIZES or len(pages) < page_size + META_PAGE.size:
        return "has no second meta page"
    metas = [META_PAGE.parse(pages), META_PAGE.parse(pages, page_size)]
    for meta in metas:
        if meta.magic != MAGIC or meta.version != VERSION or not meta.flags & FLAG_META:
            return "is not an LMDB database"
        if (meta.page_size, meta.free_flags, meta.main_flags) != (page_size, FLAGS_FREE, 0):
            return "has flags that an index does not have"
        if meta.mapsize > MAX_SPACE or meta.last_page > MAX_SPACE // page_size:
            return "says to be larger than any file can be"
    newest = max(metas, key=lambda meta: int(meta.transaction))
    if (newest.last_page + 1) * page_size > size:
        return "is cut short"
    if any(root != NO_ROOT and root > newest.last_page for root in (newest.root, newest.free_root)):
        return "has a root outside of the file"
    return None
