from __future__ import annotations

from ipaddress import ip_address

import pytest

from hotport.model.port import Ephemeral, Local, ReuseOptions


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (ReuseOptions(), "neither option"),
        (ReuseOptions(reuse_address=True), "SO_REUSEADDR"),
        (ReuseOptions(reuse_port=True), "SO_REUSEPORT"),
        (ReuseOptions(reuse_address=True, reuse_port=True), "SO_REUSEADDR and SO_REUSEPORT"),
    ],
)
def test_options_are_named_as_in_the_manual(options: ReuseOptions, text: str) -> None:
    assert str(options) == text


def test_ranges_of_reserved_ports_are_understood_and_none_is_lost_when_another_is_reserved() -> None:
    ports = Ephemeral(8000, 10_000, "8080,9148-9150")
    assert [port for port in (7999, 8000, 8080, 9148, 9149, 9150, 9151, 10_001) if ports.gives(port)] == [8000, 9151]
    assert ports.keeping(8000) == "sysctl -w net.ipv4.ip_local_reserved_ports=8080,9148-9150,8000"
    assert Ephemeral().keeping(40_000) == "sysctl -w net.ipv4.ip_local_reserved_ports=40000"
    assert not Ephemeral(0, 0).gives(8000)


def test_ipv4_address_in_ipv6_clothes_is_an_ipv4_address() -> None:
    mapped = Local(ip_address("::ffff:127.0.0.1"))
    assert mapped.plain == ip_address("127.0.0.1")
    assert str(mapped) == f"[{mapped.host}]"  # which Python 3.13 writes as ::ffff:127.0.0.1
    assert str(Local(ip_address("127.0.0.1"))) == "127.0.0.1"
