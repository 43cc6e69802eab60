"""Certificates for tests: an authority, files, and clients that trust it."""

from __future__ import annotations

import datetime
import socket
import ssl
from pathlib import Path

import trustme

from tests.support import DEADLINE_S

PAST = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)


class Pki:
    """An authority that writes into one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = trustme.CA()
        self.ca = directory / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)

    def issue(self, file: str, *names: str, has_expired: bool = False, common_name: str | None = None) -> str:
        """Write key and certificate for `names` into one file, and return its path."""
        leaf = self.authority.issue_cert(*names, common_name=common_name, not_after=PAST if has_expired else None)
        path = self.directory / file
        leaf.private_key_and_cert_chain_pem.write_to_path(path)
        return str(path)

    def issue_apart(self, stem: str, *names: str) -> tuple[str, str]:
        """As `issue`, into two files: certificate and key."""
        leaf = self.authority.issue_cert(*names)
        cert, key = self.directory / f"{stem}.crt", self.directory / f"{stem}.key"
        leaf.cert_chain_pems[0].write_to_path(cert)
        leaf.private_key_pem.write_to_path(key)
        return str(cert), str(key)

    def client(self, certificate: str | None = None) -> ssl.SSLContext:
        """What a client uses that trusts the authority, and shows `certificate`."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if certificate is not None:
            context.load_cert_chain(certificate)
        return context


def connect(port: int, context: ssl.SSLContext, name: str = "localhost") -> ssl.SSLSocket:
    """A blocking TLS connection to ``127.0.0.1`` that expects a certificate for `name`."""
    sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
    try:
        return context.wrap_socket(sock, server_hostname=name)
    except BaseException:
        sock.close()
        raise


def serial(port: int, context: ssl.SSLContext, name: str = "localhost") -> str:
    """The serial number of the certificate that the server shows for `name`."""
    with connect(port, context, name) as client:
        told = client.getpeercert()
        assert told is not None
        return str(told["serialNumber"])
