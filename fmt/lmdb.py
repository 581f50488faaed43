"""The two meta pages that an LMDB database begins with: which transaction's pages count, and how many there are.

Numbers are in the byte order of the machine that made it, and as wide as on 64-bit machines; elsewhere a database would
look foreign at every opening. Source: LMDB's mdb.c (MDB_page, MDB_meta, MDB_db, mdb_env_read_header).
"""

from __future__ import annotations

MAGIC, VERSION = 0xBEEFC0DE, 1
FLAG_META = 0x08  # of a page
FLAGS_FREE = 0x08  # of the free list: its keys are integers
NO_ROOT = 2**64 - 1
PAGE_SIZES = tuple(1 << bits for bits in range(9, 17))
MAX_SPACE = 1 << 46  # bytes; what a process can map is not much more
META_BYTES = 2 * PAGE_SIZES[-1]  # enough of a file to have both meta pages
