"""Addresses to listen on, as text and as values: ``tcp://[::1]:8000``, ``unix:run/app.sock``, ``fd://3``.

Nothing here asks the system: host names stay names, files need not exist.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, TypeAlias

import msgspec

from hotport.errors import ConfigError, nearest

__all__ = [
    "Address",
    "FdAddress",
    "SystemdAddress",
    "TcpAddress",
    "UdpAddress",
    "UnixAddress",
    "listener_name",
    "parse_address",
    "parse_listener_name",
]

PORT_MAX: Final = 65535
UNIX_PATH_BYTES_MAX: Final = 107
"""``sun_path`` has 108 bytes and ends with a NUL (unix(7)); an abstract name begins with one instead."""

_SCHEMES: Final = ("tcp", "udp", "unix", "fd", "systemd")
_FORMS: Final = "write :8000, 127.0.0.1:8000, [::1]:8000, unix:run/app.sock, udp://:5353, fd://3 or systemd:NAME"
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_FD_NAME: Final = re.compile(r"[!-9;-~]{1,255}")  # sd_listen_fds_with_names(3): ASCII, no colon


class TcpAddress(msgspec.Struct, frozen=True):
    """A TCP port; `host` is a name, an IPv4 or (without brackets) an IPv6 address, port 0 is any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://{_host_port(self.host, self.port)}"


class UdpAddress(msgspec.Struct, frozen=True):
    """A UDP port; as `TcpAddress`."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"udp://{_host_port(self.host, self.port)}"


class UnixAddress(msgspec.Struct, frozen=True):
    """A socket file, absolute or relative to the working directory; ``@name`` is an abstract one."""

    path: str

    @property
    def is_abstract(self) -> bool:
        """Whether it has no file: the name belongs to the network namespace (unix(7))."""
        return self.path.startswith("@")

    def __str__(self) -> str:
        return f"unix:{self.path}"


class FdAddress(msgspec.Struct, frozen=True):
    """A socket that this process inherited as descriptor `fd`."""

    fd: int

    def __str__(self) -> str:
        return f"fd://{self.fd}"


class SystemdAddress(msgspec.Struct, frozen=True):
    """The sockets that the service manager passed under this ``FileDescriptorName=``."""

    name: str

    def __str__(self) -> str:
        return f"systemd:{self.name}"


Address: TypeAlias = TcpAddress | UdpAddress | UnixAddress | FdAddress | SystemdAddress


def parse_address(text: str) -> Address:
    """Read an address in any of its forms; ``str()`` of the result is the canonical one.

    Raises:
        ConfigError: If it is none (HP110 shape, HP111 scheme, HP112 port, HP113 host, HP114 unix path,
            HP115 IPv6 without brackets, HP116 descriptor, HP117 systemd name).
    """
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "unix":
        return UnixAddress(_parse_unix_path(text, rest.removeprefix("//")))
    if colon and scheme == "systemd":
        return SystemdAddress(_parse_fd_name(text, rest))
    if not rest.startswith("//"):
        if colon and scheme in _SCHEMES:
            raise _error("HP110", text, f"{scheme} needs two slashes", f"--bind {_prefix(scheme)}{rest}")
        return TcpAddress(*_parse_host_port(text, text))
    rest = rest.removeprefix("//")
    match scheme:
        case "tcp":
            return TcpAddress(*_parse_host_port(text, rest))
        case "udp":
            return UdpAddress(*_parse_host_port(text, rest))
        case "fd":
            return FdAddress(_parse_fd(text, rest))
    meant = "tcp" if scheme.lower() in {"http", "https"} else nearest(scheme.lower(), _SCHEMES)
    raise _unknown_scheme(text, scheme, f"--bind {_prefix(meant)}{rest.rstrip('/')}" if meant else "")


def listener_name(address: Address) -> str:
    """Encode an address for ``LISTEN_FDNAMES``, where a colon separates names."""
    return str(address).replace("%", "%25").replace(":", "%3A")


def parse_listener_name(name: str) -> Address:
    """Decode what `listener_name` has encoded.

    Raises:
        ConfigError: If the name was not made by `listener_name` (HP11x).
    """
    return parse_address(name.replace("%3A", ":").replace("%25", "%"))


def _error(code: str, text: str, cause: str, fix: str, note: str = "") -> ConfigError:
    if not fix or not text.isprintable():  # then a fix made of it is nothing to paste
        fix, note = "", _FORMS
    return ConfigError(code, f"{text!r} is not an address to listen on", cause=cause, fix=fix, note=note)


def _unknown_scheme(text: str, scheme: str, fix: str) -> ConfigError:
    return _error("HP111", text, f"{scheme!r} is not one of {', '.join(_SCHEMES)}", fix)


def _prefix(scheme: str) -> str:
    return f"{scheme}:" if scheme in {"unix", "systemd"} else f"{scheme}://"


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _host_port(host: str, port: int | str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse_host_port(text: str, rest: str) -> tuple[str, int]:
    """Split and check the part after ``tcp://``; `text` is the whole address, for the error."""
    is_bracketed = rest.startswith("[") and "]" in rest
    if is_bracketed:
        host, _, tail = rest[1:].partition("]")
        colon, port = tail[:1], tail[1:]
    else:
        host, colon, port = rest.rpartition(":")
        if ":" in host:
            meant = _host_port(host, port) if _is_ipv6(host) else f"[{rest if _is_ipv6(rest) else '::1'}]:8000"
            raise _error("HP115", text, "an IPv6 address stands in brackets", f"--bind {meant}")
    if colon != ":":
        raise _without_port(text, rest)
    if not _is_number(port):
        if rest == text and (scheme := nearest(host, _SCHEMES)):  # unx:app.sock
            raise _unknown_scheme(text, host, f"--bind {_prefix(scheme)}{port}")
        number = port.partition("/")[0]
        fix = f"--bind {_host_port(host, number)}" if _is_number(number) else ""
        raise _error("HP112", text, f"{port!r} is not a port number", fix)
    if len(port) > 5 or int(port) > PORT_MAX:
        cause = f"{port} is not a port number: they end at {PORT_MAX}"
        raise _error("HP112", text, cause, f"--bind {_host_port(host, 8000)}")
    return _parse_host(text, host, port, is_bracketed=is_bracketed), int(port)


def _without_port(text: str, rest: str) -> ConfigError:
    if not rest:
        return _error("HP110", text, "it names neither a host nor a port", "--bind :8000")
    if _is_number(rest):
        return _error("HP110", text, "a number alone could be a host as well", f"--bind :{rest}")
    if rest == text and ("/" in rest or rest.startswith("@")):
        return _error("HP110", text, "a path needs unix: before it", f"--bind unix:{rest}")
    host = rest.partition("/")[0]
    return _error("HP110", text, "it names no port", f"--bind {text.removesuffix(rest)}{host}:8000")


def _parse_host(text: str, host: str, port: str, *, is_bracketed: bool) -> str:
    """The canonical host: all interfaces for none, compressed IPv6, lower-case names."""
    if is_bracketed:
        if not _is_ipv6(host):
            raise _error("HP113", text, f"{host!r} is not an IPv6 address", f"--bind [::1]:{port}")
        return str(ipaddress.IPv6Address(host))
    if not host:
        return "0.0.0.0"
    if re.fullmatch(r"[0-9.]+", host):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise _error("HP113", text, f"{host} is not an IPv4 address", f"--bind 127.0.0.1:{port}") from None
    name = host.lower()
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        note = f"this binds all interfaces; for this machine only: --bind 127.0.0.1:{port}"
        raise _error("HP113", text, f"{host!r} is not a host name", f"--bind :{port}", note)
    return name


def _parse_unix_path(text: str, path: str) -> str:
    path = re.sub("^//+", "/", path)  # so that unix:///run/app.sock has one spelling
    try:
        size = len(path.removeprefix("@").encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        size = 0
    if not size or "\0" in path:
        raise _error("HP114", text, f"{path!r} is not a file name", "--bind unix:run/app.sock")
    if size > UNIX_PATH_BYTES_MAX:
        cause = f"the path has {size} bytes; Linux allows {UNIX_PATH_BYTES_MAX}"
        note = "a path relative to the working directory is shorter"
        raise _error("HP114", text, cause, "--bind unix:app.sock", note)
    return path


def _parse_fd(text: str, number: str) -> int:
    if not _is_number(number) or len(number) > 9:
        raise _error("HP116", text, f"{number!r} is not a descriptor number", "--bind fd://3")
    return int(number)


def _parse_fd_name(text: str, name: str) -> str:
    if not _FD_NAME.fullmatch(name):
        cause = "a descriptor name has 1 to 255 printable ASCII characters, no space and no colon"
        raise _error("HP117", text, cause, "--bind systemd:web", "where the socket unit says FileDescriptorName=web")
    return name
