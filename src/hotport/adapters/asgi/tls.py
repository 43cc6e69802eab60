"""The ASGI TLS extension: what an application learns about TLS.

Sources: asgi.readthedocs.io: specs/tls 0.2; RFC 4514 (distinguished names as text), RFC 4519 (their short names).
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, Final

from hotport.kernel.tls import about
from hotport.wire.tlsrecords import VERSIONS, TlsAbout

__all__ = ["tls_extension"]

#: RFC 4514 section 3, by OpenSSL's names. Other attributes keep OpenSSL's name, or their number if it knows none.
SHORT_NAMES: Final = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "userId": "UID",
}

ESCAPED: Final = str.maketrans({**{letter: f"\\{letter}" for letter in '"+,;<>\\'}, "\0": "\\00"})


def tls_extension(transport: asyncio.BaseTransport) -> dict[str, Any] | None:
    """Make ``scope["extensions"]["tls"]`` of a connection whose handshake is done; None without TLS.

    ``client_cert_error`` is always None: the handshake fails if the client's certificate cannot be verified.
    """
    connection = transport.get_extra_info("ssl_object")
    found: TlsAbout | None = transport.get_extra_info("tls_about") if connection is None else about(connection)
    if found is None:
        return None
    chain = [ssl.DER_cert_to_PEM_cert(certificate) for certificate in found.chain]
    return {
        "server_cert": found.certificate or None,
        "client_cert_chain": chain,
        "client_cert_name": _distinguished_name(found.peercert["subject"]) if chain else None,
        "client_cert_error": None,
        "tls_version": VERSIONS.get(found.version or ""),
        "cipher_suite": found.suite,
    }


def _distinguished_name(subject: tuple[tuple[tuple[str, str], ...], ...]) -> str:
    """Render a distinguished name, the last part first (RFC 4514)."""
    parts = ("+".join(f"{SHORT_NAMES.get(name, name)}={_escaped(text)}" for name, text in part) for part in subject)
    return ",".join(reversed(list(parts)))


def _escaped(text: str) -> str:
    text = text.translate(ESCAPED)
    if text.startswith((" ", "#")):
        text = f"\\{text}"
    return f"{text[:-1]}\\ " if text.endswith(" ") and text != "\\ " else text
