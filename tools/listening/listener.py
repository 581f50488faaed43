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

    @property
    def where(self) -> str:
        """How messages name it, and a URI: the path of the socket, or the IP address and the port."""
        if self.unix is not None:
            return self.unix
        return f"[{self.bind}]:{self.port}" if ":" in self.bind else f"{self.bind}:{self.port}"

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
        return f"{scheme}://{self.where}/{name}"

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Refuses what no server could listen with, before it starts; removes the Unix socket in the end.

        A socket at which nobody listens, as a server leaves it that was killed, is removed at once. Nothing is at the
        path before the server is, for whom others may wait there; and what is there in the end, and lives, stays.

        Raises:
            ArgumentError: the path of the socket is too long.
            StorageError: something is there, which QEMU would remove; or nobody can listen there; or a file of ``tls``
                cannot be read.
        """
        if self.tls is not None:
            for name in _CERTIFICATES:
                _require_readable(os.path.join(self.tls, name))
        if self.unix is None:
            with _storage_errors(self.where):
                _try_port(self.bind, self.port)
            yield
            return
        if (length := len(os.fsencode(self.unix))) > _MOST_BYTES:
            what = f"has {length} bytes, and the path of a Unix socket {_MOST_BYTES} at most"
            raise ArgumentError(self.unix, what)
        path = Path(self.unix)
        with _storage_errors(self.unix):
            if os.path.lexists(path):
                if not _is_dead_socket(self.unix):
                    raise StorageError(self.unix, "exists already")
                path.unlink(missing_ok=True)  # another one may have found it dead, too
            _try_folder(path.parent)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if _is_dead_socket(self.unix):
                    path.unlink()


@contextlib.contextmanager
def _storage_errors(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(where, error.strerror or str(error), error.errno) from error


def _require_readable(path: str) -> None:
    with _storage_errors(path), open(path, "rb"):
        pass


def _try_port(host: str, port: int | None) -> None:
    """Binds to it for a moment, with the options that servers set."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if probe.family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 may have the port for something else
        probe.bind((host, port))


def _try_folder(folder: Path) -> None:
    """Makes a socket there for a moment, of another name."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # noqa: TID251  no data: a short path of the folder
    try:
        name = f"/proc/self/fd/{fd}/.dirtmap-{os.urandom(8).hex()}"
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(name)
        Path(name).unlink()
    finally:
        os.close(fd)


def _is_dead_socket(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)  # where many wait to be let in, it is not dead
            client.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False
