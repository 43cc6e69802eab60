from __future__ import annotations

from ipaddress import ip_address

import pytest

from hotport.model.port import Ephemeral, Local, Process, ReuseOptions


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


def test_process_is_named_with_what_is_known_of_it() -> None:
    assert str(Process(7, "nginx", "www")) == "pid 7 (nginx, user www)"
    whole = Process(7, "python -m hotport.worker x", "www", "web.service", 3)
    assert str(whole) == "pid 7 (python -m hotport.worker x, user www, web.service, hotport generation 3)"


@pytest.mark.parametrize(
    ("process", "endings"),
    [
        (Process(7, "python -m hotport.worker web/1.1", "www", stop="hotport stop web"), ("hotport stop web",)),
        (Process(7, "hotport serve app:app", "www"), ("kill 7",)),
        (Process(7, "nginx: master", "www"), ("kill 7",)),
    ],
)
def test_service_of_ours_is_stopped_by_its_name_and_others_are_killed(
    process: Process, endings: tuple[str, ...]
) -> None:
    """``hotport stop`` alone is refused where several services run."""
    assert process.endings == endings


@pytest.mark.parametrize("stop", ["", "hotport stop web"])
def test_suspended_process_is_told_to_go_on_before_it_can_end(stop: str) -> None:
    """``kill`` alone does nothing to it."""
    process = Process(7, "nginx", "www", stop=stop, is_suspended=True)
    assert str(process) == "pid 7 (nginx, user www, suspended)"
    ending, going_on, at_once = process.endings
    assert ending.startswith("kill 7 && kill -CONT 7  #")
    assert going_on.startswith("kill -CONT 7  #")
    assert "fg" in going_on
    assert at_once.startswith("kill -KILL 7  #")


@pytest.mark.parametrize(
    ("process", "is_ours"),
    [
        (Process(7, "/opt/bin/hotport serve app:app", "www"), True),
        (Process(7, "python -m hotport.worker app", "www"), True),
        (Process(7, "python server.py", "www", stop="hotport stop web"), True),
        (Process(7, "nginx", "www"), False),
    ],
)
def test_process_of_a_service_is_ours(process: Process, is_ours: bool) -> None:
    assert process.is_ours == is_ours
