from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.wire.proxyprotocol import HEADER_BYTES_MAX, Endpoints, ProxyHeader, ProxyHeaderError, parse_proxy_header

SIGNATURE = b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a"
PORTS = st.integers(0, 65535)
V4 = st.tuples(st.ip_addresses(v=4), PORTS)
V6 = st.tuples(st.ip_addresses(v=6), PORTS)
TLVS = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=5)
CONNECTIONS = st.one_of(st.tuples(V4, V4), st.tuples(V6, V6))


def line(source: tuple[object, int], destination: tuple[object, int]) -> bytes:
    family = "TCP4" if isinstance(source[0], ipaddress.IPv4Address) else "TCP6"
    return f"PROXY {family} {source[0]} {destination[0]} {source[1]} {destination[1]}\r\n".encode()


def binary(block: bytes, *, command: int = 0x21, family: int = 0x11, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack(">BBH", command, family, len(block) if length is None else length) + block


def addresses(source: tuple[object, int], destination: tuple[object, int]) -> bytes:
    packed = source[0].packed + destination[0].packed  # type: ignore[attr-defined]
    return bytes(packed) + struct.pack(">HH", source[1], destination[1])


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack(">BH", kind, len(value)) + value


V4_BLOCK = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack(">HH", 56324, 443)

#: Every form of header that is taken, and whom it names.
WHOLE = {
    "v1 tcp4": (
        b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n",
        Endpoints(("192.0.2.1", 56324), ("198.51.100.2", 443)),
    ),
    "v1 tcp6": (b"PROXY TCP6 2001:DB8::1 ::1 0 65535\r\n", Endpoints(("2001:db8::1", 0), ("::1", 65535))),
    "v1 tcp6, longest": (
        b"PROXY TCP6 " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2 + [b"65535"] * 2) + b"\r\n",
        Endpoints(("ffff:" * 7 + "ffff", 65535), ("ffff:" * 7 + "ffff", 65535)),
    ),
    "v1 unknown": (b"PROXY UNKNOWN\r\n", None),
    "v1 unknown, longest": (b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n", None),
    "v2 tcp4": (binary(V4_BLOCK), Endpoints(("192.0.2.1", 56324), ("198.51.100.2", 443))),
    "v2 tcp6": (
        binary(bytes(15) + b"\1" + bytes(16) + b"\0\1\0\2", family=0x21),
        Endpoints(("::1", 1), ("::", 2)),
    ),
    "v2 tlvs": (
        binary(V4_BLOCK + tlv(1, b"h2") + tlv(4, b"")),
        Endpoints(("192.0.2.1", 56324), ("198.51.100.2", 443)),
    ),
    "v2 largest": (
        binary(V4_BLOCK + tlv(0x20, bytes(HEADER_BYTES_MAX - 16 - 12 - 3))),
        Endpoints(("192.0.2.1", 56324), ("198.51.100.2", 443)),
    ),
    "v2 local": (binary(b"", command=0x20, family=0), None),
    "v2 local, block of no family": (binary(b"anything", command=0x20, family=0xFF), None),
    "v2 unspec": (binary(tlv(5, b"id"), family=0), None),
    "v2 udp4": (binary(V4_BLOCK, family=0x12), None),
    "v2 udp6": (binary(bytes(36), family=0x22), None),
    "v2 unix": (binary(bytes(216) + tlv(5, b"id"), family=0x31), None),
}


@pytest.mark.parametrize("name", WHOLE)
def test_each_form_says_who_is_behind_it_and_where_it_ends(name: str) -> None:
    header, endpoints = WHOLE[name]
    assert parse_proxy_header(header) == ProxyHeader(len(header), endpoints)
    assert parse_proxy_header(header + b"GET / HTTP/1.1\r\n") == ProxyHeader(len(header), endpoints)


@pytest.mark.parametrize("name", WHOLE)
def test_no_part_of_a_header_is_taken_for_one_or_refused(name: str) -> None:
    header, _ = WHOLE[name]
    for cut in range(len(header)):
        assert parse_proxy_header(header[:cut]) is None, header[:cut]


@given(CONNECTIONS)
def test_version_1_round_trip(connection: tuple[tuple[object, int], tuple[object, int]]) -> None:
    (source, sport), (destination, dport) = connection
    header = line(*connection)
    found = Endpoints((str(source), sport), (str(destination), dport))
    assert parse_proxy_header(header) == ProxyHeader(len(header), found)


@given(CONNECTIONS, TLVS, st.binary(max_size=20))
def test_version_2_round_trip(
    connection: tuple[tuple[object, int], tuple[object, int]], tlvs: list[tuple[int, bytes]], rest: bytes
) -> None:
    (source, sport), (destination, dport) = connection
    block = addresses(*connection) + b"".join(tlv(*each) for each in tlvs)
    header = binary(block, family=0x11 if isinstance(source, ipaddress.IPv4Address) else 0x21)
    found = Endpoints((str(source), sport), (str(destination), dport))
    assert parse_proxy_header(header + rest) == ProxyHeader(len(header), found)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1\r\n", "begins with b'GET"),
        (b"PUT", "begins with b'PUT"),
        (b"\r\nGET", "begins with"),
        (b"\x16\x03\x01", "begins with"),
        (b"PROXYTCP4", "begins with"),
        (b"proxy TCP4", "begins with"),
        (b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n", "does not end within 107"),
        (b"PROXY " + b"x" * 101, "does not end within 107"),
        (b"PROXY \r\n", "line is"),
        (b"PROXY TCP4\r\n", "line is"),
        (b"PROXY TCP5 192.0.2.1 192.0.2.2 1 2\r\n", "line is"),
        (b"PROXY UNKNOWNS\r\n", "line is"),
        (b"PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n", "line is"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n", "line is"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n", "line is"),
        (b"PROXY TCP4 192.0.2.1 ::1 1 2\r\n", "'::1' is not an address"),
        (b"PROXY TCP6 ::1 192.0.2.1 1 2\r\n", "'192.0.2.1' is not an address"),
        (b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", "'fe80::1%eth0' is not an address"),
        (b"PROXY TCP4 192.0.2.01 192.0.2.2 1 2\r\n", "'192.0.2.01' is not an address"),
        (b"PROXY TCP4 192.0.2.256 192.0.2.2 1 2\r\n", "is not an address"),
        (b"PROXY TCP4 \xb2.0.2.1 192.0.2.2 1 2\r\n", "is not an address"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 65536 2\r\n", "'65536' is not a port"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 000002\r\n", "'000002' is not a port"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n", "'01' is not a port"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 -1 2\r\n", "'-1' is not a port"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 \r\n", "'' is not a port"),
        (SIGNATURE[:-1] + b"\r", "begins with"),
        (SIGNATURE + b"\x11", "command are 0x11"),
        (SIGNATURE + b"\x22", "command are 0x22"),
        (SIGNATURE + b"\x21\x40", "transport are 0x40"),
        (SIGNATURE + b"\x21\x13", "transport are 0x13"),
        (binary(b"", length=HEADER_BYTES_MAX - 15), "4097 bytes, more than 4096"),
        (binary(b"", length=65535, command=0x20), "65551 bytes, more than"),
        (binary(b"", length=11), "11 bytes for addresses that take 12"),
        (binary(b"", length=35, family=0x22), "35 bytes for addresses that take 36"),
        (binary(b"", length=215, family=0x31), "215 bytes for addresses that take 216"),
        (binary(V4_BLOCK + b"\1"), "TLV ends 2 bytes behind"),
        (binary(V4_BLOCK + b"\1\0"), "TLV ends 1 bytes behind"),
        (binary(V4_BLOCK + tlv(1, b"h2") + b"\1\0\2x"), "TLV ends 1 bytes behind"),
        (binary(b"\1\0\1", family=0), "TLV ends 1 bytes behind"),
    ],
)
def test_what_no_proxy_writes_is_refused_with_a_reason(data: bytes, why: str) -> None:
    for rest in (b"", b"\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        with pytest.raises(ProxyHeaderError, match=why):
            parse_proxy_header(data + rest)


@given(st.binary(max_size=64), st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11"]))
def test_no_bytes_break_it_and_a_verdict_is_final(data: bytes, before: bytes) -> None:
    data = before + data
    verdicts: list[object] = []
    for cut in range(len(data) + 1):
        try:
            verdicts.append(parse_proxy_header(data[:cut]))
        except ProxyHeaderError:
            verdicts.append("refused")
    first = next((each for each in verdicts if each is not None), None)
    assert all(each in (None, first) for each in verdicts)
    assert None not in verdicts[verdicts.index(first) :] or first is None
