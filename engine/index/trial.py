"""Reads all of a database in a process of its own: ``python -m dirtmap.engine.index.trial PATH``.

LMDB trusts its pages: one that is damaged may end whoever reads it with a signal. Here that costs this process only.
It ends with 0 where every page that LMDB can come upon was read, its list of free pages included, each key is found by
itself and each value's checksum is right; else with 1 and what is wrong; with 2 and why, where it could not read.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import lmdb

from dirtmap.engine.model.later import later
from dirtmap.fmt import index as layout

if TYPE_CHECKING:
    import signal
    import subprocess
else:  # hardly ever needed
    later(globals(), signal="signal", subprocess="subprocess")

DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.InvalidError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
    lmdb.BadTxnError,
    lmdb.BadValsizeError,
)
_DAMAGED, _UNREADABLE = 1, 2
_PATIENCE_SECONDS = 300.0  # a damaged page may send LMDB in circles


def trial(path: str) -> str | None:
    """What is wrong with the database in that directory, so far as reading it tells; None where nothing is.

    Raises:
        OSError: nobody can tell: no process can be started, it was ended by somebody, or it could not read.
    """
    command = [sys.executable, "-m", __name__, path]
    try:
        done = subprocess.run(
            command, capture_output=True, check=False, stdin=subprocess.DEVNULL, timeout=_PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"reading it took more than {_PATIENCE_SECONDS:.0f} seconds"
    if done.returncode == 0:
        return None
    deadly = signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL
    if done.returncode == _DAMAGED or -done.returncode in deadly:
        return ending(done)
    raise OSError(ending(done))


def ending(done: subprocess.CompletedProcess[bytes]) -> str:
    """How a process that read an index ended before it had read everything."""
    if done.returncode < 0:
        return f"reading it ended with {signal.Signals(-done.returncode).name}"
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return f"reading it failed: {said[-1] if said else done.returncode}"


def _read(path: str) -> str | None:
    with lmdb.open(path, readonly=True, max_dbs=0) as env:
        with env.begin(buffers=True) as txn, txn.cursor() as cursor:
            last = b""
            for key, value in cursor:
                found = bytes(key)
                if found <= last or txn.get(found) is None:
                    return f"{layout.key_text(found)}: not in its place"
                if not layout.is_sound(found, bytes(value)):
                    return layout.damage(found)
                last = found
        with open(os.devnull, "wb") as nowhere:
            env.copyfd(nowhere.fileno(), compact=True)  # reads the list of free pages, too, and adds all pages up
    return None


def main() -> int:
    """The command."""
    try:
        what = _read(sys.argv[1])
        status = _DAMAGED if what else 0
    except DAMAGE as error:
        what, status = str(error), _DAMAGED
    except (lmdb.Error, OSError, MemoryError) as error:
        what, status = str(error), _UNREADABLE
    if what:
        print(what.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
