"""Builds nbdkit's filter where it runs: nbdkit loads only a filter that was built for its very version."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import dirtmap.engine as dm
from dirtmap.fmt.errors import Error, StorageError

NAME = "nbdkit-dirtmap-filter.so"
SOURCE = Path(__file__).with_name("dirtmap-filter.c")
_PROBE = "#include <nbdkit-filter.h>\nNBDKIT_VERSION_STRING\n"
# Its thread-local variables are where those of nbdkit are, which is far cheaper than where a library's else are.
FLAGS = ["-std=c11", "-O2", "-Wall", "-Werror=implicit-function-declaration"]
FLAGS += ["-shared", "-fPIC", "-ftls-model=initial-exec", "-pthread"]


def built_filter() -> str:
    """The path of the filter for the installed nbdkit. It is built if it is not in the cache, which takes a second.

    The cache is ``$XDG_CACHE_HOME/dirtmap``; without that variable ``/var/cache/dirtmap`` for root, and
    ``~/.cache/dirtmap`` for others.

    Raises:
        Error: nbdkit, a compiler or nbdkit's headers are missing, which names their Debian packages; or the compiler
            failed, with what it said.
        StorageError: the cache cannot be written, or others could.
    """
    version = nbdkit_version()
    digest = hashlib.sha256(version.encode())
    digest.update(" ".join(FLAGS).encode())
    for source in (SOURCE, Path(dm.get_include(), "marking.h")):
        digest.update(source.read_bytes())
    folder = _cache() / f"nbdkit-{version}-{digest.hexdigest()[:16]}"
    path = folder / NAME
    try:
        for made in (folder.parent, folder):
            made.mkdir(mode=0o755, parents=True, exist_ok=True)
            _require_own(made)
        if path.exists():
            _require_own(path)
        else:
            _build(version, path)
    except OSError as error:
        raise StorageError(str(error.filename or path), error.strerror or str(error), error.errno) from error
    return str(path)


@functools.cache
def nbdkit_version() -> str:
    """The version of the installed nbdkit.

    Raises:
        Error: there is none.
    """
    if shutil.which("nbdkit") is None:
        raise Error("nbdkit", "no such program; Debian has it in the package nbdkit")
    said = subprocess.run(["nbdkit", "--dump-config"], capture_output=True, text=True, check=False).stdout
    found = [line.partition("=")[2] for line in said.splitlines() if line.startswith("version=")]
    if not found:
        raise Error("nbdkit", "does not tell its version")
    return found[0]


def _cache() -> Path:
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(os.path.abspath(chosen), "dirtmap")
    return Path("/var/cache/dirtmap") if os.geteuid() == 0 else Path.home() / ".cache" / "dirtmap"


def _require_own(path: Path) -> None:
    """Refuses to have nbdkit load what somebody else can change."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StorageError(str(path), "belongs to another user, or others can write to it; nothing is loaded from it")


def _build(version: str, path: Path) -> None:
    compiler = _compiler()
    probe = subprocess.run([compiler, "-E", "-P", "-x", "c", "-"], input=_PROBE, capture_output=True, text=True)
    if probe.returncode:
        raise Error(NAME, "has to be built for this nbdkit; please install the Debian package nbdkit-plugin-dev")
    if (headers := probe.stdout.split()[-1].strip('"')) != version:
        what = f"nbdkit is {version}, and its headers are of {headers}; please install nbdkit-plugin-dev {version}"
        raise Error(NAME, what)
    # Whoever looks meanwhile sees all of it or nothing.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
        made = Path(folder, NAME)
        command = [compiler, *FLAGS, f"-I{dm.get_include()}", "-o", str(made), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Error(NAME, f"{compiler} failed: {' '.join(done.stderr.split()) or f'status {done.returncode}'}")
        made.chmod(0o755)
        made.replace(path)


def _compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name) is not None:
            return name
    raise Error(NAME, "has to be built for this nbdkit; please install the Debian packages gcc and libc6-dev")
