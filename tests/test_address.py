from __future__ import annotations

import ipaddress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hotport.address import (
    Address,
    FdAddress,
    SystemdAddress,
    TcpAddress,
    UdpAddress,
    UnixAddress,
    listener_name,
    parse_address,
    parse_listener_name,
)
from hotport.errors import ConfigError
from tests.support import assert_three_lines

labels = st.from_regex(r"[a-z_]([a-z0-9_-]{0,8}[a-z0-9_])?", fullmatch=True)
hosts = st.one_of(
    st.lists(labels, min_size=1, max_size=4).map(".".join),
    st.ip_addresses().map(str),
    st.ip_addresses(v=6).map(lambda address: f"{address}%eth0"),
)
ports = st.integers(0, 65535)
names = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=":"), min_size=1, max_size=255)
paths = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=26).filter(
    lambda path: path != "@" and not path.startswith("//")
)
addresses: st.SearchStrategy[Address] = st.one_of(
    st.builds(TcpAddress, hosts, ports),
    st.builds(UdpAddress, hosts, ports),
    st.builds(UnixAddress, paths),
    st.builds(FdAddress, st.integers(0, 10**9 - 1)),
    st.builds(SystemdAddress, names),
)


@pytest.mark.parametrize(
    ("text", "address", "canonical"),
    [
        ("tcp://example.org:80", TcpAddress("example.org", 80), "tcp://example.org:80"),
        ("tcp://[::1]:8000", TcpAddress("::1", 8000), "tcp://[::1]:8000"),
        ("tcp://[2001:DB8:0:0::1]:8000", TcpAddress("2001:db8::1", 8000), "tcp://[2001:db8::1]:8000"),
        ("[fe80::1%eth0]:80", TcpAddress("fe80::1%eth0", 80), "tcp://[fe80::1%eth0]:80"),
        (":8000", TcpAddress("0.0.0.0", 8000), "tcp://0.0.0.0:8000"),
        ("tcp://:0", TcpAddress("0.0.0.0", 0), "tcp://0.0.0.0:0"),
        ("127.0.0.1:8000", TcpAddress("127.0.0.1", 8000), "tcp://127.0.0.1:8000"),
        ("[::1]:8000", TcpAddress("::1", 8000), "tcp://[::1]:8000"),
        ("LocalHost:8000", TcpAddress("localhost", 8000), "tcp://localhost:8000"),
        ("my_app.web-1:65535", TcpAddress("my_app.web-1", 65535), "tcp://my_app.web-1:65535"),
        ("unix:run/app.sock", UnixAddress("run/app.sock"), "unix:run/app.sock"),
        ("unix:/run/app.sock", UnixAddress("/run/app.sock"), "unix:/run/app.sock"),
        ("unix:///run/app.sock", UnixAddress("/run/app.sock"), "unix:/run/app.sock"),
        ("unix:8000", UnixAddress("8000"), "unix:8000"),
        ("unix:a://b", UnixAddress("a://b"), "unix:a://b"),
        ("unix:@app", UnixAddress("@app"), "unix:@app"),
        ("udp://:5353", UdpAddress("0.0.0.0", 5353), "udp://0.0.0.0:5353"),
        ("fd://3", FdAddress(3), "fd://3"),
        ("systemd:web.socket", SystemdAddress("web.socket"), "systemd:web.socket"),
    ],
)
def test_every_form_has_one_canonical_spelling(text: str, address: Address, canonical: str) -> None:
    assert parse_address(text) == address
    assert str(address) == canonical
    assert parse_address(canonical) == address


@pytest.mark.parametrize(
    ("text", "code", "cause", "fix"),
    [
        ("", "HP110", "neither a host nor a port", "--bind :8000"),
        ("tcp://", "HP110", "neither a host nor a port", "--bind :8000"),
        ("8000", "HP110", "could be a host", "--bind :8000"),
        ("tcp://8000", "HP110", "could be a host", "--bind :8000"),
        ("localhost", "HP110", "names no port", "--bind localhost:8000"),
        ("[::1]", "HP110", "names no port", "--bind [::1]:8000"),
        ("udp://example.org/path", "HP110", "names no port", "--bind udp://example.org:8000"),
        ("run/app.sock", "HP110", "needs unix:", "--bind unix:run/app.sock"),
        ("@app", "HP110", "needs unix:", "--bind unix:@app"),
        ("fd:3", "HP110", "two slashes", "--bind fd://3"),
        ("tcp:localhost:80", "HP110", "two slashes", "--bind tcp://localhost:80"),
        ("http://localhost:8000/", "HP111", "'http' is not one of tcp, udp", "--bind tcp://localhost:8000"),
        ("tpc://:8000", "HP111", "'tpc' is not one of", "--bind tcp://:8000"),
        ("unx://app.sock", "HP111", "'unx' is not one of", "--bind unix:app.sock"),
        ("systmd:web", "HP111", "'systmd' is not one of", "--bind systemd:web"),
        ("gopher://x:70", "HP111", "'gopher' is not one of", "write :8000, 127.0.0.1:8000, "),
        (":70000", "HP112", "70000 is not a port number: they end at 65535", "--bind :8000"),
        ("tcp://[::1]:70000", "HP112", "they end at 65535", "--bind [::1]:8000"),
        (":" + "9" * 5000, "HP112", "they end at 65535", "--bind :8000"),
        ("localhost:", "HP112", "'' is not a port number", "write :8000, 127.0.0.1:8000, "),
        ("localhost:web", "HP112", "'web' is not a port number", "write :8000, 127.0.0.1:8000, "),
        ("tcp://localhost:80/x", "HP112", "'80/x' is not a port number", "--bind localhost:80"),
        (":-1", "HP112", "'-1' is not a port number", "write :8000, "),
        (":\u0663", "HP112", "is not a port number", "write :8000, "),
        ("256.0.0.1:80", "HP113", "256.0.0.1 is not an IPv4 address", "--bind 127.0.0.1:80"),
        ("127.1:80", "HP113", "127.1 is not an IPv4 address", "--bind 127.0.0.1:80"),
        ("[localhost]:80", "HP113", "'localhost' is not an IPv6 address", "--bind [::1]:80"),
        ("*:80", "HP113", "'*' is not a host name", "--bind :80"),
        ("-a.example:80", "HP113", "'-a.example' is not a host name", "--bind :80"),
        ("a..b:80", "HP113", "'a..b' is not a host name", "--bind :80"),
        ("a" * 64 + ":80", "HP113", "is not a host name", "--bind :80"),
        ("a." * 126 + "aa:80", "HP113", "is not a host name", "--bind :80"),
        ("unix:", "HP114", "'' is not a file name", "--bind unix:run/app.sock"),
        ("unix:@", "HP114", "'@' is not a file name", "--bind unix:run/app.sock"),
        ("unix:a\0b", "HP114", "is not a file name", "write :8000, "),
        ("unix:\ud800", "HP114", "is not a file name", "write :8000, "),
        ("unix:" + "é" * 54, "HP114", "has 108 bytes; Linux allows 107", "--bind unix:app.sock"),
        ("unix:@" + "a" * 108, "HP114", "has 108 bytes; Linux allows 107", "--bind unix:app.sock"),
        ("::1:8000", "HP115", "stands in brackets", "--bind [::1]:8000"),
        ("tcp://2001:db8::1:443", "HP115", "stands in brackets", "--bind [2001:db8::1]:443"),
        ("::1", "HP115", "stands in brackets", "--bind [::1]:8000"),
        ("a:b:80", "HP115", "stands in brackets", "--bind [::1]:8000"),
        ("fd://", "HP116", "'' is not a descriptor number", "--bind fd://3"),
        ("fd://stdin", "HP116", "'stdin' is not a descriptor number", "--bind fd://3"),
        ("fd://1000000000", "HP116", "is not a descriptor number", "--bind fd://3"),
        ("systemd:", "HP117", "1 to 255 printable ASCII", "--bind systemd:web"),
        ("systemd:a:b", "HP117", "no colon", "--bind systemd:web"),
    ],
)
def test_bad_address_says_what_is_wrong_and_what_to_type(text: str, code: str, cause: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    error = caught.value
    assert error.code == code
    assert cause in error.cause
    assert error.note.startswith(fix) if fix.startswith("write ") else error.fix == fix
    assert_three_lines(str(error), code)


def test_longest_path_is_107_bytes_without_the_nul() -> None:
    assert parse_address("unix:" + "a" * 107) == UnixAddress("a" * 107)
    assert parse_address("unix:@" + "a" * 107) == UnixAddress("@" + "a" * 107)


def test_abstract_socket_is_told_from_a_file() -> None:
    assert UnixAddress("@app").is_abstract
    assert not UnixAddress("./@app").is_abstract


@given(addresses)
@example(UnixAddress("a%3Ab%25:c"))
def test_addresses_survive_text_and_listener_names(address: Address) -> None:
    assert parse_address(str(address)) == address
    assert ":" not in listener_name(address)
    assert parse_listener_name(listener_name(address)) == address


@given(st.text(max_size=60) | st.text("tcpudnixfsymb:/[]@%.0189-", max_size=30))
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    try:
        address = parse_address(text)
    except ConfigError as error:
        assert_three_lines(str(error), error.code)
    else:
        assert parse_address(str(address)) == address


@given(st.ip_addresses(v=6), ports)
def test_ipv6_without_brackets_is_refused_whatever_it_is(host: ipaddress.IPv6Address, port: int) -> None:
    with pytest.raises(ConfigError, match="HP115"):
        parse_address(f"{host}:{port}")


def test_listener_name_escapes_what_separates_names() -> None:
    assert listener_name(TcpAddress("::1", 80)) == "tcp%3A//[%3A%3A1]%3A80"
