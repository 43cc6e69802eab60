"""The ASGI TLS extension: what an application learns about TLS.

Sources: asgi.readthedocs.io: specs/tls 0.2; RFC 4514 (distinguished names as text), RFC 4519 (their short names).
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from typing import Any, Final

from hotport.kernel.tls import ServerContext

__all__ = ["tls_extension"]

VERSIONS: Final = {"TLSv1.2": 0x0303, "TLSv1.3": 0x0304}

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
    if connection is None:
        return None
    context = connection.context  # the context of the certificate that was chosen by name
    is_ours = isinstance(context, ServerContext)
    chain = _client_chain(connection)
    return {
        "server_cert": context.certificate if is_ours else None,
        "client_cert_chain": chain,
        "client_cert_name": _distinguished_name(connection.getpeercert()["subject"]) if chain else None,
        "client_cert_error": None,
        "tls_version": VERSIONS.get(connection.version()),
        "cipher_suite": context.suites.get(connection.cipher()[0]) if is_ours else None,
    }


def _client_chain(connection: ssl.SSLObject) -> list[str]:
    """Return the client's certificate chain, its own first; only that one before Python 3.13."""
    chain: list[bytes] = []
    if sys.version_info >= (3, 13):
        chain = connection.get_unverified_chain()
    if not chain:  # also for a resumed session, which does not keep it
        certificate = connection.getpeercert(binary_form=True)
        chain = [] if certificate is None else [certificate]
    return [ssl.DER_cert_to_PEM_cert(certificate) for certificate in chain]


def _distinguished_name(subject: tuple[tuple[tuple[str, str], ...], ...]) -> str:
    """Render a distinguished name, the last part first (RFC 4514)."""
    parts = ("+".join(f"{SHORT_NAMES.get(name, name)}={_escaped(text)}" for name, text in part) for part in subject)
    return ",".join(reversed(list(parts)))


def _escaped(text: str) -> str:
    text = text.translate(ESCAPED)
    if text.startswith((" ", "#")):
        text = f"\\{text}"
    return f"{text[:-1]}\\ " if text.endswith(" ") and text != "\\ " else text
