from __future__ import annotations

from ipaddress import ip_address

from msgspec.structs import replace

from hotport.diagnose.diagnosis import Diagnosis
from hotport.diagnose.page import page
from hotport.model.bind import CHOICES, judge, judge_name, remedies
from hotport.model.port import Asker, Local, Port, ReuseOptions, Sockets, State, UnixName
from hotport.model.process import Process

HERE = Local(ip_address("127.0.0.1"))
ROOT = Asker(0, "root", may_bind_low=True)
HOLDERS = tuple(Process(number, "nginx", "www") for number in range(1, 6))


def diagnosed(*sockets: Sockets, unread: tuple[str, ...] = (), risks: tuple[str, ...] = ()) -> Diagnosis:
    port = Port("tcp://127.0.0.1:8000", "tcp", HERE, 8000, sockets=sockets, unread=unread)
    answers = {name: judge(port, ROOT, options) for name, options in CHOICES.items()}
    answer = answers["reuseaddr"]
    todo = tuple(remedies(port, answer))
    return Diagnosis(port.address, ROOT, answer.can, "reuseaddr", answers, todo, risks, port)


def test_free_port_is_a_short_page() -> None:
    assert page(diagnosed(), columns=100).splitlines() == [
        "tcp://127.0.0.1:8000 is free",
        "  because  nothing is on the port",
        "",
        "bind and listen by user root (judged, not tried)",
        "  any options                           yes      nothing is on the port",
        "",
        "on the port: nothing",
    ]


def test_busy_port_is_a_page_from_the_answer_to_the_details() -> None:
    listener = Sockets(
        State.LISTEN, HERE, uid=0, options=ReuseOptions(reuse_port=True), holders=HOLDERS, queue=3, backlog=128
    )
    left = Sockets(State.TIME_WAIT, HERE, count=1234, is_held=False, is_timed=True, ends_in_s=42, peers=("10.0.0.9:5",))
    hidden = Sockets(State.CLOSE_WAIT, HERE, uid=5, user="eve", unit="web.service")
    found = page(diagnosed(listener, left, hidden, unread=("half of it",), risks=("fire",)), columns=200)
    lines = found.splitlines()
    assert lines[0] == "tcp://127.0.0.1:8000 is not free: EADDRINUSE"
    assert any(line.startswith("  SO_REUSEADDR (as servers do)          no       a listener shares") for line in lines)
    assert "pid 3 (nginx, user www); 2 more; queue 3 of 128" in " ".join(found.split())
    assert any("1,234  127.0.0.1" in line and "the last one ends in 42 s; peers 10.0.0.9:5" in line for line in lines)
    assert any("user eve, web.service, pid not permitted" in line for line in lines)
    assert "  LISTEN 1 (3 to be accepted) -> ESTABLISHED 0 -+" in lines
    assert "   +- closed here first -> FIN_WAIT1 0 -> FIN_WAIT2 0 -> TIME_WAIT 1,234 -> gone" in lines
    assert "   +- by the peer first -> CLOSE_WAIT 1 -> LAST_ACK 0 -> gone" in lines
    assert lines[-5:] == ["risks", "  - fire", "", "not read", "  - half of it"]


def test_lines_are_folded_and_many_rows_are_cut() -> None:
    bound = [replace(Sockets(State.BOUND, HERE, uid=0, holders=HOLDERS)) for _ in range(50)]
    found = page(diagnosed(*bound), columns=70)
    assert max(map(len, found.splitlines()[:20])) <= 120
    assert "and 10 more such lines" in found


def test_page_fits_the_usual_terminal_and_what_is_to_be_pasted_is_in_one_piece() -> None:
    left = Sockets(State.TIME_WAIT, HERE, count=1234, is_held=False, is_timed=True, ends_in_s=42, peers=("10.0.0.9:5",))
    lines = page(diagnosed(left), columns=80).splitlines()
    assert max(map(len, lines)) <= 80
    todo = diagnosed(left).remedies
    assert f"  try      {todo[0]}" in page(diagnosed(left), columns=30).splitlines()


def test_verdicts_are_painted() -> None:
    found = page(diagnosed(), columns=100, paint=lambda text, colour: f"<{colour}>{text}</>")
    assert "<green>free</>" in found


def test_unix_socket_has_a_page_without_options() -> None:
    name = UnixName("unix:a.sock", "a.sock", found="socket", unread=("something",))
    answer = judge_name(name)
    found = page(Diagnosis("unix:a.sock", ROOT, answer.can, "none", {"none": answer}, ("rm",), (), name), columns=100)
    assert "left from a server that is gone" in found
    assert "bind and listen" not in found
    assert found.endswith("not read\n  - something")
