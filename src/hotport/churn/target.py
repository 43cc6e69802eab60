"""The target of a run: a URL, resolved once, so that engines measure the target and not a resolver."""

from __future__ import annotations

import os
import re
import shlex
import socket
import ssl
from contextlib import closing
from typing import Final
from urllib.parse import SplitResult, urlsplit

from hotport.churn.fates import Kind
from hotport.churn.result import Target
from hotport.errors import ConfigError, describe_errno, nearest

__all__ = ["BY_RATE", "default_path", "fitting", "resolve"]

#: Kinds of client that are asked for by rate; the others hold connections.
BY_RATE: Final = frozenset(
    {Kind.CONNECT, Kind.LATE, Kind.HALFHEAD, Kind.SLOW, Kind.UPLOAD, Kind.DATAGRAM, Kind.TLS},
)

_PORTS: Final = {"http": 80, "ws": 80, "https": 443, "wss": 443, "tcp": None, "udp": None}
_SCHEMES: Final = (*_PORTS, "unix")
_EXAMPLE: Final = "hotport churn http://127.0.0.1:8000"
_FORMS: Final = "a target is a URL with http, https, ws, wss, tcp or udp, or unix:PATH"

_HTTP: Final = frozenset(
    {Kind.CONNECT, Kind.KEEPALIVE, Kind.LATE, Kind.HALFHEAD, Kind.SLOW, Kind.UPLOAD, Kind.WEBSOCKET}
)
_FITTING: Final = {
    "http": _HTTP,
    "ws": _HTTP,
    "https": _HTTP | {Kind.TLS},
    "wss": _HTTP | {Kind.TLS},
    "unix": _HTTP,
    "tcp": frozenset({Kind.STREAM}),
    "udp": frozenset({Kind.DATAGRAM}),
}


def fitting(url: str) -> frozenset[Kind]:
    """The kinds of client that a target with this scheme can have."""
    return _FITTING[_split(url).scheme]


def default_path(url: str) -> str:
    """Return path and query of a URL: ``/`` if there are none."""
    parts = _split(url)
    if parts.scheme == "unix":
        return "/"
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def resolve(url: str, *, timeout_s: float, verify_tls: bool = True) -> Target:
    """Resolve `url`, and check that a server listens there.

    A name that stands for several addresses is taken for the first that answers.

    Raises:
        ConfigError: It is no target (HP701), its name is unknown (HP702), no server answers (HP703), or the TLS
            handshake fails (HP713).

    Sources: getaddrinfo(3); connect(2).
    """
    parts = _split(url)
    is_tls = parts.scheme in {"https", "wss"}
    is_http = parts.scheme not in {"tcp", "udp"}
    if parts.scheme == "unix":
        is_abstract = parts.path.startswith("@")
        path = parts.path if is_abstract else os.path.abspath(parts.path)
        _connect(url, socket.AF_UNIX, socket.SOCK_STREAM, f"\0{path[1:]}" if is_abstract else path, timeout_s)
        return Target(url, "localhost", 0, is_http, is_tls, path)
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    assert port is not None
    kind = socket.SOCK_DGRAM if parts.scheme == "udp" else socket.SOCK_STREAM
    try:
        found = socket.getaddrinfo(host, port, type=kind)
    except (socket.gaierror, UnicodeError) as error:
        why = error.strerror if isinstance(error, socket.gaierror) else str(error)
        raise ConfigError(
            "HP702",
            f"cannot find {host}",
            cause=f"getaddrinfo: {why}",
            fix=f"getent hosts {shlex.quote(host)}",
            note="or name the server by its address",
        ) from None
    for last, (family, _, _, _, address) in enumerate(found, 1 - len(found)):
        try:
            _connect(url, family, kind, address, timeout_s)
        except ConfigError:
            if last == 0:
                raise
        else:
            if is_tls:
                _shake_hands(url, host, address, timeout_s, verify=verify_tls)
            return Target(url, host, port, is_http, is_tls, address=str(address[0]))
    raise AssertionError("getaddrinfo gives an address, or an error")


def _connect(url: str, family: int, kind: int, address: object, timeout_s: float) -> None:
    with closing(socket.socket(family, kind)) as sock:
        sock.settimeout(timeout_s)
        try:
            sock.connect(address)  # type: ignore[arg-type]  # getaddrinfo's, or a path
        except OSError as error:
            why = f"nothing within {timeout_s:g} s" if isinstance(error, TimeoutError) else _name(error)
            raise ConfigError(
                "HP703",
                f"cannot reach {url}",
                cause=f"connecting to {_shown(address)}: {why}",
                fix="ss -ltnpx",
                note="start the server first, or see what listens",
            ) from None


def _shake_hands(url: str, host: str, address: tuple[object, ...], timeout_s: float, *, verify: bool) -> None:
    tls = ssl.create_default_context()
    if not verify:
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((str(address[0]), int(str(address[1]))), timeout_s) as sock,
            tls.wrap_socket(sock, server_hostname=host),
        ):
            pass
    except OSError as error:  # ssl.SSLError is one
        why, fix, note = str(error), f"openssl s_client -connect {host}:{address[1]}", ""
        if isinstance(error, ssl.SSLCertVerificationError):
            why, fix = error.verify_message, "--insecure"
            note = "to verify it, name its authority's certificate: SSL_CERT_FILE=ca.pem"
        raise ConfigError("HP713", f"cannot speak TLS with {url}", cause=why, fix=fix, note=note) from None


def _name(error: OSError) -> str:
    return describe_errno(error.errno) if error.errno else str(error)


def _shown(address: object) -> str:
    return f"{address[0]} port {address[1]}" if isinstance(address, tuple) else str(address)


def _split(url: str) -> SplitResult:
    """Split a URL, and check that it is complete."""
    if url.startswith("unix:"):
        path = re.sub("^//+", "/", url.removeprefix("unix:"))
        if not path or len(os.fsencode(path)) > 107 or "\0" in path:
            raise _error(url, "a unix socket's path has 1 to 107 bytes", "hotport churn unix:run/app.sock")
        return SplitResult("unix", "", path, "", "")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _error(url, str(error), _EXAMPLE) from None
    if "://" not in url:
        raise _error(url, "it does not say what is spoken there", f"hotport churn http://{url.removeprefix('//')}")
    if parts.scheme not in _SCHEMES:
        near = nearest(parts.scheme, _SCHEMES)
        rest = url.partition("://")[2]
        raise _error(url, f"{parts.scheme!r} is not one of {', '.join(_SCHEMES)}", _again(near, rest))
    if not host:
        raise _error(url, "it names no host", _EXAMPLE)
    if not port and _PORTS[parts.scheme] is None:
        raise _error(url, "it names no port", f"hotport churn {parts.scheme}://{parts.netloc.rstrip(':')}:8000")
    if not url.isprintable() or " " in url:
        raise _error(url, "it holds a space or a control character", _EXAMPLE)
    return parts


def _again(scheme: str | None, rest: str) -> str:
    if scheme is None:
        return _EXAMPLE
    return f"hotport churn {scheme}:{rest}" if scheme == "unix" else f"hotport churn {scheme}://{rest}"


def _error(url: str, cause: str, fix: str) -> ConfigError:
    note = _FORMS if fix == _EXAMPLE else ""
    return ConfigError("HP701", f"{url!r} is not a target", cause=cause, fix=fix, note=note)
