"""The PROXY protocol: the header by which a proxy names the client of a connection.

Version 1 is a line of text, version 2 is binary; both come before anything else, TLS included.
Source: HAProxy, ``doc/proxy-protocol.txt`` (sections 2.1, 2.2).
"""

from __future__ import annotations

import ipaddress
from typing import Final, NamedTuple

import msgspec

__all__ = ["HEADER_BYTES_MAX", "Endpoints", "ProxyHeader", "ProxyHeaderError", "parse_proxy_header"]

HEADER_BYTES_MAX: Final = 4096
"""The longest header that is read. Addresses need 232 bytes; the rest is for TLVs, of which a client's certificate
is the largest in use. Version 2 itself ends at 16 + 65535."""

_LINE_BYTES_MAX: Final = 107  # version 1, its CRLF included
_LINE_BEGIN: Final = b"PROXY "
_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED_BYTES: Final = 16
_TLV_FIXED_BYTES: Final = 3
_LOCAL, _PROXY = 0x20, 0x21

#: Family and transport: how many bytes their addresses take.
_ADDRESS_BYTES: Final = {
    **dict.fromkeys((0x00, 0x01, 0x02, 0x10, 0x20, 0x30), 0),  # one of the two is UNSPEC
    **dict.fromkeys((0x11, 0x12), 12),
    **dict.fromkeys((0x21, 0x22), 36),
    **dict.fromkeys((0x31, 0x32), 216),
}


class ProxyHeaderError(ValueError):
    """These bytes are not the beginning of a header; says why."""


class Endpoints(NamedTuple):
    """The connection that a proxy passes on: the client's address, and the proxy's own."""

    source: tuple[str, int]
    destination: tuple[str, int]


class ProxyHeader(msgspec.Struct, frozen=True):
    """A whole header.

    Attributes:
        size: Its bytes; what follows them is the connection's own.
        endpoints: None if the proxy speaks for itself (LOCAL: a health check), or for somebody whom it cannot
            name as a TCP client (UNKNOWN, UNSPEC, unix, datagrams). The real addresses count then.
    """

    size: int
    endpoints: Endpoints | None = None


def parse_proxy_header(data: bytes) -> ProxyHeader | None:
    """Parse the header at the beginning of `data`.

    Returns:
        None if there is more to come: all of `data` belongs to a header that is not whole.

    Raises:
        ProxyHeaderError: As soon as it can be known.
    """
    if data.startswith(_LINE_BEGIN):
        return _parse_line(data)
    if data.startswith(_SIGNATURE):
        return _parse_binary(data)
    if _LINE_BEGIN.startswith(data) or _SIGNATURE.startswith(data):
        return None
    raise ProxyHeaderError(f"it begins with {data[:12]!r}")


def _parse_line(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\r\n", 0, _LINE_BYTES_MAX)
    if end < 0:
        if len(data) >= _LINE_BYTES_MAX:
            raise ProxyHeaderError(f"its line does not end within {_LINE_BYTES_MAX} bytes")
        return None
    match data[len(_LINE_BEGIN) : end].split(b" "):
        case [b"UNKNOWN", *_]:  # "the receiver must ignore anything presented before the CRLF"
            return ProxyHeader(end + 2)
        case [b"TCP4" | b"TCP6" as family, source, destination, source_port, destination_port]:
            version = ipaddress.IPv4Address if family == b"TCP4" else ipaddress.IPv6Address
            return ProxyHeader(
                end + 2,
                Endpoints(
                    (_read_host(version, source), _read_port(source_port)),
                    (_read_host(version, destination), _read_port(destination_port)),
                ),
            )
    raise ProxyHeaderError(f"its line is {data[:end]!r}")


def _read_host(version: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address], text: bytes) -> str:
    try:
        if b"%" not in text:  # ipaddress knows zones
            return str(version(text.decode("ascii")))
    except ValueError:
        pass
    raise ProxyHeaderError(f"{text!r} is not an address of its family")


def _read_port(text: bytes) -> int:
    if text.isdigit() and len(text) <= 5 and (port := int(text)) <= 0xFFFF and (text[0] != 0x30 or text == b"0"):
        return port
    raise ProxyHeaderError(f"{text!r} is not a port")


def _parse_binary(data: bytes) -> ProxyHeader | None:
    head = data[12:_FIXED_BYTES]
    if head and head[0] not in (_LOCAL, _PROXY):
        raise ProxyHeaderError(f"version and command are 0x{head[0]:02x}")
    is_local = head[:1] == bytes([_LOCAL])  # "must discard the protocol block including the family"
    if len(head) > 1 and not is_local and head[1] not in _ADDRESS_BYTES:
        raise ProxyHeaderError(f"family and transport are 0x{head[1]:02x}")
    if len(head) < 4:
        return None
    size = _FIXED_BYTES + int.from_bytes(head[2:], "big")
    if size > HEADER_BYTES_MAX:
        raise ProxyHeaderError(f"it has {size} bytes, more than {HEADER_BYTES_MAX}")
    needed = 0 if is_local else _ADDRESS_BYTES[head[1]]
    if size < _FIXED_BYTES + needed:
        raise ProxyHeaderError(f"it has {size - _FIXED_BYTES} bytes for addresses that take {needed}")
    if len(data) < size:
        return None
    block = data[_FIXED_BYTES:size]
    if is_local:
        return ProxyHeader(size)
    _check_tlvs(block[needed:])
    match head[1]:
        case 0x11:
            return ProxyHeader(size, _endpoints(ipaddress.IPv4Address, block, 4))
        case 0x21:
            return ProxyHeader(size, _endpoints(ipaddress.IPv6Address, block, 16))
    return ProxyHeader(size)


def _endpoints(
    version: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address], block: bytes, width: int
) -> Endpoints:
    """Parse both addresses, then both ports."""
    source, destination = block[:width], block[width : 2 * width]
    ports = block[2 * width : 2 * width + 4]
    return Endpoints(
        (str(version(source)), int.from_bytes(ports[:2], "big")),
        (str(version(destination)), int.from_bytes(ports[2:], "big")),
    )


def _check_tlvs(rest: bytes) -> None:
    """Check that the TLVs add up; their content is not used."""
    at = 0
    while at < len(rest):
        end = at + _TLV_FIXED_BYTES + int.from_bytes(rest[at + 1 : at + _TLV_FIXED_BYTES], "big")
        if end > len(rest):
            raise ProxyHeaderError(f"a TLV ends {end - len(rest)} bytes behind it")
        at = end
