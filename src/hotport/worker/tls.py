"""Choose a connection's certificate, and reload the certificates."""

from __future__ import annotations

import logging
import shlex
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from hotport.errors import StartError
from hotport.kernel.tls import Description, ServerContext, describe, load_certificate, verify_clients
from hotport.options import Options

__all__ = ["Tls"]

log = logging.getLogger("hotport.tls")


class Tls:
    """The TLS context of new connections, by the options.

    Args:
        alpn: Protocols to negotiate if the options name none (RFC 7301); empty leaves it to the client.

    Attributes:
        context: For new handshakes; handshakes under way keep theirs.

    Raises:
        StartError: A file cannot be used (HP507, HP513), or a certificate cannot be chosen by its name (HP514).
    """

    def __init__(self, options: Options, *, alpn: Sequence[str] = ()) -> None:
        self._options = options
        self._alpn = options.tls_alpn or tuple(alpn)
        self.context = self._read()

    def reload(self) -> None:
        """Read the files again; if they cannot be used, raise as at first, and keep the old context."""
        self.context = self._read()

    def _read(self) -> ServerContext:
        options = self._options
        files = options.tls_cert
        keys = options.tls_key or (None,) * len(files)
        contexts = [load_certificate(file, key) for file, key in zip(files, keys, strict=True)]
        by_name: dict[str, ServerContext] = {}
        for file, context in zip(files, contexts, strict=True):
            for name in _names(file, context, is_chosen=context is not contexts[0]):
                by_name.setdefault(name, context)
        for context in contexts:
            if self._alpn:
                context.set_alpn_protocols(list(self._alpn))
            if options.tls_client_ca is not None and options.tls_client_auth != "none":
                verify_clients(context, options.tls_client_ca, is_required=options.tls_client_auth != "optional")
        if len(contexts) > 1:
            contexts[0].sni_callback = _chooser(by_name)
        return contexts[0]


def _names(file: str, context: ServerContext, *, is_chosen: bool) -> tuple[str, ...]:
    """Return the names in a certificate; raise if it has none and must be chosen by name."""
    description: Description | None = None
    try:
        description = describe(context)
        cause = "it has no DNS name (subjectAltName)"
    except ssl.SSLError as error:
        cause = f"OpenSSL does not take it for a server's: {getattr(error, 'verify_message', None) or error.reason}"
    if description is not None and description.expires_at < time.time():
        log.warning("%s has expired at %s", file, datetime.fromtimestamp(description.expires_at, UTC).isoformat())
    if is_chosen and (description is None or not description.names):
        raise StartError(
            "HP514",
            f"cannot choose the certificate {file} by its names",
            cause=f"several certificates are given, and {cause}",
            fix=f"openssl x509 -in {shlex.quote(file)} -noout -subject -ext subjectAltName,extendedKeyUsage",
        )
    return description.names if description is not None else ()


def _chooser(
    by_name: Mapping[str, ServerContext],
) -> Callable[[ssl.SSLObject | ssl.SSLSocket, str | None, ssl.SSLContext], None]:
    """Make a callback that chooses the certificate by the client's server name (RFC 6066 section 3).

    A wildcard stands for exactly one label, the first (RFC 9525 section 6.3). Without a match the first certificate is
    used.
    """

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: ssl.SSLContext) -> None:
        name = (name or "").lower()
        found = by_name.get(name) or by_name.get(f"*.{name.partition('.')[2]}")
        if found is not None:
            connection.context = found

    return choose
