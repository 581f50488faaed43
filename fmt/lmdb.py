"""LMDB databases: the two meta pages at their beginning, which say which pages are in use.

Numbers are in the byte order of the machine that made the database, and as wide as on 64-bit machines. On any other
machine the database is not recognized. The structure is in `dirtmap.fmt.structures.lmdb`.
Source: LMDB's mdb.c (MDB_page, MDB_meta, MDB_db, mdb_env_read_header).
"""

from __future__ import annotations

MAGIC, VERSION = 0xBEEFC0DE, 1
FLAG_META = 0x08  # flag of a page: it is a meta page
FLAGS_FREE = 0x08  # flags of the free list: its keys are integers
NO_ROOT = 2**64 - 1  # root page of an empty tree
PAGE_SIZES = tuple(1 << bits for bits in range(9, 17))
MAX_SPACE = 1 << 46  # bytes; a process cannot map much more
META_BYTES = 2 * PAGE_SIZES[-1]  # as much of a file as has both meta pages, whatever the page size
