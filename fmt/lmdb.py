"""LMDB databases: the two meta pages at their beginning, which say which pages are in use.

Numbers are in the byte order of the machine that made the database, and as wide as on 64-bit machines. On any other
machine the database is not recognized. The structure is in `dirtmap.fmt.structures.lmdb`.
Source: LMDB's mdb.c (MDB_page, MDB_meta, MDB_db, mdb_env_read_header).
"""

from __future__ import annotations

from dirtmap.fmt.parsers.lmdb import META_PAGE

MAGIC, VERSION = 0xBEEFC0DE, 1
FLAG_META = 0x08  # flag of a page: it is a meta page
FLAGS_FREE = 0x08  # flags of the free list: its keys are integers
NO_ROOT = 2**64 - 1  # root page of an empty tree
PAGE_SIZES = tuple(1 << bits for bits in range(9, 17))
MAX_SPACE = 1 << 46  # bytes; a process cannot map much more
META_BYTES = 2 * PAGE_SIZES[-1]  # as much of a file as has both meta pages, whatever the page size


def meta_fault(pages: bytes, size: int) -> str | None:
    """Returns why a file must not be mapped as an LMDB database (one without named databases), or None if it may.

    LMDB itself would end the process with a signal if it read a page that is not there.

    Args:
        pages: the first `META_BYTES` of the file, or all of it if it is shorter.
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
