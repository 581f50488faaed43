"""`dirtmap export --tls`: whoever has no certificate of the CA reads nothing."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from support import qemu
from support.exported import exporting
from support.tracking import make_node

PARTIES = ("server", "client")


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with a CA, and what it has signed for 127.0.0.1 and for a client."""
    folder = tmp_path / "tls"
    folder.mkdir()

    def openssl(*arguments: str) -> None:
        qemu.run("openssl", *arguments)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
    ca = ["-CA", f"{folder}/ca-cert.pem", "-CAkey", f"{folder}/ca-key.pem"]
    openssl(
        *("req", "-x509", *key, "-keyout", f"{folder}/ca-key.pem", "-out", f"{folder}/ca-cert.pem", "-subj", "/CN=ca"),
        *("-addext", "keyUsage=critical,keyCertSign"),
    )
    for party in PARTIES:
        named = ["-subj", f"/CN={party}", "-addext", "subjectAltName=IP:127.0.0.1"]
        files = ["-keyout", f"{folder}/{party}-key.pem", "-out", f"{folder}/{party}-cert.pem"]
        openssl("req", "-x509", *key, *files, *named, *ca, "-addext", "basicConstraints=critical,CA:false")
    return folder


@pytest.mark.long
def test_tls(certificates: Path, tmp_path: Path) -> None:
    make_node(tmp_path, 1 << 20)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with exporting("drive0", "--port", str(port), "--tls", certificates) as process:
        (served,) = process.ready
        assert served["uri"] == f"nbds://127.0.0.1:{port}/drive0"
        found = json.loads(qemu.run("nbdinfo", "--json", f"{served['uri']}?tls-certificates={certificates}"))
        assert found["TLS"] is True
        assert "qemu:dirty-bitmap:b0" in found["exports"][0]["contexts"]
        with pytest.raises(qemu.ToolError):
            qemu.run("nbdinfo", f"nbd://127.0.0.1:{port}/drive0")
        (certificates / "client-cert.pem").unlink()
        with pytest.raises(qemu.ToolError):
            qemu.run("nbdinfo", f"{served['uri']}?tls-certificates={certificates}")
