"""Certificates, for servers and clients."""

from __future__ import annotations

from pathlib import Path

from support import qemu

PARTIES = ("server", "client")


def certificates_in(folder: Path) -> Path:
    """Makes a folder with a CA, and with what that has signed for 127.0.0.1 and for a client; returns it."""
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
