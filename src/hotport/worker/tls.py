"""Choose a connection's certificate, and reload the certificates."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shlex
import ssl
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from hotport.errors import StartError
from hotport.kernel.process import forbid_core_files
from hotport.kernel.tls import Description, KeyLog, ServerContext, describe, load_certificate, verify_clients
from hotport.options import Options
from hotport.wire.tlsrecords import NotMovable, TlsState
from hotport.worker.tlsadopted import Adopted
from hotport.worker.tlssession import Session

__all__ = ["Tls"]

log = logging.getLogger("hotport.tls")


class Tls:
    """The TLS context of new connections, by the options.

    Args:
        alpn: Protocols to negotiate if the options name none (RFC 7301); empty leaves it to the client.

    Attributes:
        context: For new handshakes; handshakes under way keep theirs.
        expire_at: When each certificate of the option expires, in seconds since the epoch; 0 if that is unknown.

    Descriptors: has some if connections move (`tls_handoff`); `close` closes them.

    Raises:
        StartError: A file cannot be used (HP507, HP513), a certificate cannot be chosen by its name (HP514), or
            connections shall move and cannot (HP523).
    """

    def __init__(self, options: Options, *, alpn: Sequence[str] = ()) -> None:
        self._options = options
        self._alpn = options.tls_alpn or tuple(alpn)
        self._clients = ""
        self._log: KeyLog | None = None
        self._why_no_log = "tls_handoff is off"
        self.expire_at: tuple[float, ...] = ()
        self.context = self._read()
        if options.tls_handoff == "on":
            _check_for_ciphers()
            forbid_core_files()
            self._open_log()
            self._watch(self._contexts)

    def reload(self) -> None:
        """Read the files again; if they cannot be used, raise as at first, and keep the old context."""
        self.context = self._read()
        self._watch(self._contexts)

    def close(self) -> None:
        """Let connections that shake hands from now on stay here; what is open can still move."""
        if self._log is not None:
            self._log.close()
            self._log, self._why_no_log = None, "its worker leaves"

    def session(self) -> Session:
        """Make the TLS of a new connection."""
        return Session(self.context, self._log, why_no_log=self._why_no_log, clients=self._clients)

    def adopt(self, state: TlsState) -> Adopted:
        """Make the TLS of another worker's connection.

        Raises:
            NotMovable: It must not, or cannot, be served here.
        """
        if self._options.tls_handoff != "on":
            raise NotMovable("tls_handoff is off here")
        if state.about.clients != self._clients:
            raise NotMovable("tls_client_ca or tls_client_auth has changed, and its client was let in before")
        return Adopted(state)

    def _open_log(self) -> None:
        try:
            self._log = KeyLog()
        except OSError as error:
            self._give_log_up(error)

    def _watch(self, contexts: Sequence[ServerContext]) -> None:
        """Log the secrets of these contexts; if that fails, connections are served, and stay."""
        if self._log is not None:
            try:
                self._log.watch(contexts)
            except OSError as error:
                self._log.close()
                self._give_log_up(error)

    def _give_log_up(self, error: OSError) -> None:
        self._log, self._why_no_log = None, f"its keys cannot be logged ({error.strerror or error})"
        log.warning("connections over TLS will not move: their keys cannot be logged: %s", error)

    def _read(self) -> ServerContext:
        options = self._options
        files = options.tls_cert
        keys = options.tls_key or (None,) * len(files)
        contexts = [load_certificate(file, key) for file, key in zip(files, keys, strict=True)]
        found = [
            _describe(file, context, is_chosen=context is not contexts[0])
            for file, context in zip(files, contexts, strict=True)
        ]
        by_name: dict[str, ServerContext] = {}
        for context, description in zip(contexts, found, strict=True):
            for name in description.names:
                by_name.setdefault(name, context)
        for context in contexts:
            if self._alpn:
                context.set_alpn_protocols(list(self._alpn))
            if options.tls_client_ca is not None and options.tls_client_auth != "none":
                verify_clients(context, options.tls_client_ca, is_required=options.tls_client_auth != "optional")
        self._contexts, self._clients = contexts, _describe_clients(contexts[0], options.tls_client_ca)
        if len(contexts) > 1:
            contexts[0].sni_callback = _chooser(by_name)
        self.expire_at = tuple(description.expires_at for description in found)
        return contexts[0]


def _describe_clients(context: ServerContext, client_ca: str | None) -> str:
    """Describe which clients are let in, in a form that can be compared; empty for all of them."""
    if client_ca is None or context.verify_mode is ssl.CERT_NONE:
        return ""
    with open(client_ca, "rb") as file:
        return f"{context.verify_mode.name} {hashlib.sha256(file.read()).hexdigest()}"


def _check_for_ciphers() -> None:
    """Look whether the package that `hotport.wire.tlskeys` needs is there, without the cost of importing it.

    Raises:
        StartError: It is not (HP523).
    """
    if importlib.util.find_spec("cryptography") is None:
        raise StartError(
            "HP523",
            "cannot hand connections over TLS to other workers",
            cause=f"tls_handoff is on, and the package cryptography is not installed in {sys.executable}",
            fix=f"{sys.executable} -m pip install 'hotport[tls]'",
            note='or set tls_handoff = "off"',
        )


def _describe(file: str, context: ServerContext, *, is_chosen: bool) -> Description:
    """Describe a certificate, as far as OpenSSL can; raise if it has no name and must be chosen by name."""
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
    return description or Description((), 0.0)


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
