from __future__ import annotations

from ipaddress import ip_address

import pytest

from hotport.model.port import Ephemeral, Local, Options, Process


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (Options(), "neither option"),
        (Options(reuse_address=True), "SO_REUSEADDR"),
        (Options(reuse_port=True), "SO_REUSEPORT"),
        (Options(reuse_address=True, reuse_port=True), "SO_REUSEADDR and SO_REUSEPORT"),
    ],
)
def test_options_are_named_as_in_the_manual(options: Options, text: str) -> None:
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


def test_process_is_named_with_what_is_known_of_it() -> None:
    assert str(Process(7, "nginx", "www")) == "pid 7 (nginx, user www)"
    whole = Process(7, "python -m hotport.worker x", "www", "web.service", 3)
    assert str(whole) == "pid 7 (python -m hotport.worker x, user www, web.service, hotport generation 3)"


@pytest.mark.parametrize(
    ("command", "ending"),
    [
        ("/opt/bin/hotport serve app:app", "hotport stop"),
        ("python -m hotport.worker app", "hotport stop"),
        ("nginx: master", "kill 7"),
    ],
)
def test_service_of_ours_is_stopped_and_others_are_killed(command: str, ending: str) -> None:
    assert Process(7, command, "www").ending == ending
