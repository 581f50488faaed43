"""`Listener`: where an NBD server listens, as QEMU and as a client says it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dirtmap.fmt.errors import ArgumentError, StorageError

LOOPBACK = "127.0.0.1"
_MOST_BYTES = 107  # of the path of a Unix socket. Source: unix(7), sun_path, which ends with a NUL
_CERTIFICATES = "ca-cert.pem", "server-cert.pem", "server-key.pem"


@dataclass(frozen=True, slots=True)
class Listener:
    """Where to listen.

    Attributes:
        unix: path of a Unix socket, to be made, for this user alone; None for TCP.
        port: of TCP, 1 to 65535.
        bind: the IP address to listen at.
        tls: a folder with ca-cert.pem, server-cert.pem and server-key.pem. A client needs a certificate of that CA.

    Raises:
        ArgumentError: neither ``unix`` nor ``port`` is given, or both; or ``bind`` is not an IP address, or one that
            other machines reach, without TLS.
    """

    unix: str | None = None
    port: int | None = None
    bind: str = LOOPBACK
    tls: str | None = None

    def __post_init__(self) -> None:
        if (self.unix is None) == (self.port is None):
            raise ArgumentError("listener", "needs either a Unix socket or a port")
        if self.port is not None and not 0 < self.port < 65536:
            raise ArgumentError("port", f"{self.port} is not from 1 to 65535")
        try:
            address = ipaddress.ip_address(self.bind)
        except ValueError:
            raise ArgumentError("bind", f"'{self.bind}' is no IP address") from None
        if not address.is_loopback and self.tls is None:
            what = f"other machines reach {self.bind}, and anybody there could open the disk; that needs TLS"
            raise ArgumentError("bind", what)

    def address(self) -> dict[str, Any]:
        """The address as QMP has it: ``SocketAddress``."""
        if self.unix is not None:
            return {"type": "unix", "data": {"path": self.unix}}
        return {"type": "inet", "data": {"host": self.bind, "port": str(self.port)}}

    def uri(self, export: str) -> str:
        """The URI of an export. Source: NBD's doc/uri.md."""
        scheme, name = "nbds" if self.tls else "nbd", quote(export, safe="")
        if self.unix is not None:
            return f"{scheme}+unix:///{name}?socket={quote(os.fsencode(self.unix), safe='/')}"
        host = f"[{self.bind}]" if ":" in self.bind else self.bind
        return f"{scheme}://{host}:{self.port}/{name}"

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Refuses what no server could listen with, before it starts; removes the Unix socket in the end.

        A socket at which nobody listens, as a server leaves it that was killed, is removed at once.

        Raises:
            ArgumentError: the path of the socket is too long.
            StorageError: something is there, which QEMU would remove; or nobody can listen there; or a file of ``tls``
                cannot be read.
        """
        if self.tls is not None:
            for name in _CERTIFICATES:
                _require_readable(os.path.join(self.tls, name))
        if self.unix is None:
            family = socket.AF_INET6 if ":" in self.bind else socket.AF_INET
            _require_free(f"{self.bind}:{self.port}", family, (self.bind, self.port))
            yield
            return
        if (length := len(os.fsencode(self.unix))) > _MOST_BYTES:
            what = f"has {length} bytes, and the path of a Unix socket {_MOST_BYTES} at most"
            raise ArgumentError(self.unix, what)
        path = Path(self.unix)
        if os.path.lexists(path):
            if not _is_dead_socket(self.unix):
                raise StorageError(self.unix, "exists already")
            path.unlink()
        _require_free(self.unix, socket.AF_UNIX, self.unix)
        path.unlink()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(path.lstat().st_mode):
                    path.unlink()


def _require_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise StorageError(path, error.strerror or str(error), error.errno) from error


def _require_free(where: str, family: int, address: Any) -> None:
    """Refuses an address at which nobody can listen. A Unix socket is there afterwards."""
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            probe.bind(address)
    except OSError as error:
        raise StorageError(where, error.strerror or str(error), error.errno) from error


def _is_dead_socket(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False
