"""`dirtmap serve`: serves a raw disk over NBD by nbdkit, and marks what its clients write.

    NBD clients --> nbdkit [ dirtmap-filter | file plugin ] --> raw file, block device
                               |
                            marking.h        the session's live files
                               |
    dirtmap serve:           tracker         cuts, saves, checkpoints

The filter, `dirtmap-filter.c`, marks in the session by itself: the tracker may die, and another one take over, while
clients go on.
"""

from __future__ import annotations

from dirtmap.tools.serve.serving import Serving, adopt, serve

__all__ = ["Serving", "adopt", "serve"]
