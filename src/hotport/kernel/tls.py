"""TLS contexts of a server, from the files that hold its certificates.

Only public interfaces of `ssl` are used. It cannot parse a certificate, but it tells what the peer of a connection
has shown: so the names in a certificate are read by shaking hands with it in memory.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import ssl
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from hotport.errors import StartError
from hotport.kernel.fds import memory_file
from hotport.kernel.fork import withhold
from hotport.kernel.process import open_descriptors
from hotport.wire.tlsrecords import TlsAbout

__all__ = ["Description", "KeyLog", "ServerContext", "about", "describe", "load_certificate", "verify_clients"]

#: The most that one handshake step logs is five lines of less than 250 bytes.
LOG_BYTES_MAX: Final = 1 << 16

#: The first one in a file is the server's own, those behind it lead to the authority (RFC 8446 section 4.4.2).
CERTIFICATE: Final = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)

#: openssl/x509_vfy.h, X509_V_FLAG_NO_CHECK_TIME; the ssl module has no name for it.
NO_CHECK_TIME: Final = ssl.VerifyFlags(0x200000)

#: What OpenSSL says of a key that is not the certificate's; which one depends on the kinds of both.
MISMATCHES: Final = frozenset({"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"})


class ServerContext(ssl.SSLContext):
    """The TLS context of one of the server's certificates.

    Attributes:
        certificate: The certificate itself as PEM, without those behind it.
        suites: The numbers of cipher suites (IANA's registry "TLS Cipher Suites") by OpenSSL's names.
    """

    certificate: str
    suites: dict[str, int]


@dataclass(frozen=True, slots=True)
class Description:
    """The names and the end of a certificate.

    Attributes:
        names: Its DNS names in small letters; may begin with ``*.``.
        expires_at: Seconds since the epoch.
    """

    names: tuple[str, ...]
    expires_at: float


class _Encrypted(Exception):
    """Raised in place of asking for a passphrase."""


def load_certificate(file: str, key_file: str | None) -> ServerContext:
    """Make a context for TLS 1.2 and later from a certificate chain and its private key, both PEM.

    Args:
        key_file: None if the key is in the same file.

    Raises:
        StartError: They cannot be read, are not PEM, do not belong together, or the key is encrypted (HP507).
            A passphrase is never asked for.
    """
    key_file = file if key_file is None else key_file
    cert_name, key_name = shlex.quote(file), shlex.quote(key_file)
    look = f"openssl x509 -in {cert_name} -noout -subject -ext subjectAltName -enddate"
    found = CERTIFICATE.search(_read(file, file))
    if found is None:
        raise _unusable(file, cause="it holds no certificate in PEM form", fix=look)
    if "PRIVATE KEY-----" not in _read(key_file, file):
        cause = f"there is no private key in PEM form in {key_file}"
        raise _unusable(file, cause=cause, fix=f"openssl pkey -in {key_name} -noout")
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(file, key_file, password=_refuse_to_ask)
    except _Encrypted:
        cause = f"its private key in {key_file} is encrypted, and a worker cannot ask for its passphrase"
        fix = f"(umask 077; openssl pkey -in {key_name} -out {shlex.quote(f'{key_file}.plain')})"
        raise _unusable(file, cause=cause, fix=fix) from None
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", None)
        if reason in MISMATCHES:
            cause = f"the private key in {key_file} belongs to another certificate"
            look = f"openssl x509 -in {cert_name} -noout -pubkey; openssl pkey -in {key_name} -pubout"
        else:
            cause = f"OpenSSL cannot use it with the key in {key_file}: {reason or error}"
        raise _unusable(file, cause=cause, fix=look) from None
    context.certificate = found[0]
    context.suites = {suite["name"]: suite["id"] & 0xFFFF for suite in context.get_ciphers()}
    return context


def verify_clients(context: ServerContext, file: str, *, is_required: bool) -> None:
    """Ask clients for a certificate that one of the authorities in `file` has signed.

    Args:
        is_required: Refuse clients without one; clients with a wrong one are refused in any case.

    Raises:
        StartError: The file cannot be read or holds no certificate (HP513).
    """
    try:
        context.load_verify_locations(cafile=file)
    except OSError as error:  # ssl.SSLError is one
        is_read = isinstance(error, ssl.SSLError)
        raise StartError(
            "HP513",
            f"cannot use the client authorities in {file}",
            cause="it holds no certificate in PEM form" if is_read else f"{error.strerror or error}".lower(),
            fix=f"openssl x509 -in {shlex.quote(file)} -noout -subject -enddate",
        ) from None
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an intermediate authority will do
    context.verify_mode = ssl.CERT_REQUIRED if is_required else ssl.CERT_OPTIONAL


class KeyLog:
    """The secrets of handshakes, through a file in memory that has no name and is emptied whenever it is read.

    Descriptors: owns one, and each watched context another; `close` closes all of them. A forked child has none.

    Raises:
        OSError: There is no descriptor or memory left for it.

    Sources: memfd_create(2); proc_pid_fd(5): opening a link there opens the file; `ssl.SSLContext.keylog_filename`.
    """

    def __init__(self) -> None:
        self._fd = memory_file("hotport-keylog")
        self._contexts: list[ssl.SSLContext] = []
        self._copies: tuple[int, ...] = ()
        withhold(self)

    def descriptors(self) -> tuple[int, ...]:
        """What a forked child must not have."""
        return tuple(fd for fd in (self._fd, *self._copies) if self._is_ours(fd))

    def watch(self, contexts: Iterable[ssl.SSLContext]) -> None:
        """Log the handshakes of these contexts, and no longer those of the contexts before.

        Raises:
            OSError: /proc is not there, or there is no descriptor left; nothing is watched then.
        """
        self._ignore()
        try:
            for context in contexts:
                context.keylog_filename = f"/proc/self/fd/{self._fd}"
                self._contexts.append(context)
        except OSError:
            self._ignore()
            raise
        self._copies = tuple(fd for fd in open_descriptors() if fd != self._fd and self._is_ours(fd))
        for fd in self._copies:  # which OpenSSL has opened to stay open over exec
            fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
        os.ftruncate(self._fd, 0)  # each context begins with a comment

    def read(self) -> bytes:
        """Return what was logged since the last call.

        To be called right after each ``do_handshake``: that is synchronous, so the lines are of that connection. They
        cannot be told apart later: the client random in them is the client's choice.
        """
        if logged := os.pread(self._fd, LOG_BYTES_MAX, 0):
            os.ftruncate(self._fd, 0)
        return logged

    def close(self) -> None:
        """Log nothing any more. Contexts can live long, since one and its callback refer to each other."""
        self._ignore()
        if self._fd != -1:
            os.close(self._fd)
            self._fd = -1

    def _ignore(self) -> None:
        for context in self._contexts:
            context.keylog_filename = None  # type: ignore[assignment]  # typeshed forgets None
        self._contexts, self._copies = [], ()

    def _is_ours(self, fd: int) -> bool:
        try:
            return os.path.sameopenfile(fd, self._fd)
        except OSError:
            return False


def about(connection: ssl.SSLObject, server_name: str | None = None, clients: str = "") -> TlsAbout:
    """Look up the results of a handshake that is done.

    Args:
        server_name: The name that the client has asked for.
        clients: See `TlsAbout.clients`.
    """
    cipher, context = connection.cipher(), connection.context  # that of the certificate that was chosen by name
    assert cipher is not None
    ours = context if isinstance(context, ServerContext) else None
    return TlsAbout(
        cipher=cipher,
        alpn=connection.selected_alpn_protocol(),
        server_name=server_name,
        chain=_client_chain(connection),
        peercert=connection.getpeercert(),
        certificate="" if ours is None else ours.certificate,
        suite=None if ours is None else ours.suites.get(cipher[0]),
        clients=clients,
        version=connection.version(),
    )


def _client_chain(connection: ssl.SSLObject) -> list[bytes]:
    """Return the client's certificates as DER, its own first; only that one before Python 3.13."""
    chain: list[bytes] = []
    if sys.version_info >= (3, 13):
        chain = connection.get_unverified_chain()
    if not chain:  # also for a resumed session, which does not keep it
        certificate = connection.getpeercert(binary_form=True)
        chain = [] if certificate is None else [certificate]
    return chain


def describe(context: ServerContext) -> Description:
    """Describe the certificate of a context, expired or not; call before `verify_clients`.

    Raises:
        ssl.SSLError: OpenSSL does not take it for a server's certificate.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME
    client.load_verify_locations(cadata=context.certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = context.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server)
    for end in (theirs, ours) * 3:
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    told = theirs.getpeercert()
    assert told is not None
    pairs = told.get("subjectAltName", ())
    names = tuple(str(pair[1]).lower() for pair in pairs if pair[0] == "DNS")
    return Description(names, ssl.cert_time_to_seconds(str(told["notAfter"])))


def _read(path: str, certificate: str) -> str:
    try:
        with open(path, encoding="latin-1") as file:  # there may be words of any encoding around PEM
            return file.read()
    except OSError as error:
        cause = f"{path}: {(error.strerror or str(error)).lower()}"
        raise _unusable(certificate, cause=cause, fix=f"ls -l {shlex.quote(path)}") from None


def _unusable(file: str, *, cause: str, fix: str) -> StartError:
    return StartError("HP507", f"cannot use the certificate {file}", cause=cause, fix=fix)


def _refuse_to_ask() -> str:
    raise _Encrypted
