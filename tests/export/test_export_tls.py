"""`dirtmap export --tls`: whoever has no certificate of the CA reads nothing."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from support import qemu
from support.exported import exporting
from support.tls import certificates_in
from support.tracking import make_node


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    return certificates_in(tmp_path / "tls")


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
