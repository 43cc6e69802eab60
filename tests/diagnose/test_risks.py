from __future__ import annotations

from ipaddress import ip_address

import pytest
from msgspec.structs import replace

from hotport.diagnose.risks import risks_of
from hotport.model.port import Local, Port, ReuseOptions, Sockets, State
from hotport.model.process import Process

HERE = Local(ip_address("127.0.0.1"))
EVERYWHERE = Local(ip_address("0.0.0.0"))
DUAL = Local(ip_address("::"), False)
A, P = ReuseOptions(reuse_address=True), ReuseOptions(reuse_port=True)
NGINX, SLEEP = Process(7, "nginx", "www"), Process(8, "sleep 1000", "www")
LISTEN = Sockets(State.LISTEN, HERE, uid=33, options=ReuseOptions(), holders=(NGINX,), user="www", backlog=128)


def risks(*sockets: Sockets, number: int = 8000, protocol: str = "tcp", overflows: int = 0) -> tuple[str, ...]:
    return risks_of(Port("", protocol, HERE, number, sockets=sockets, overflows=overflows))


def only(*sockets: Sockets, number: int = 8000, protocol: str = "tcp", overflows: int = 0) -> str:
    (found,) = risks(*sockets, number=number, protocol=protocol, overflows=overflows)
    return found


def test_quiet_port_has_no_risks() -> None:
    assert risks() == ()
    assert risks(LISTEN) == ()
    assert risks(replace(LISTEN, queue=100, waited_s=0.5)) == ()


def test_full_queue_is_told_with_what_the_machine_has_counted() -> None:
    full = replace(LISTEN, queue=129)
    assert "is full (129 of 128)" in only(full)
    assert "ListenOverflows" not in only(full)
    assert "counted 1,234 so far (ListenOverflows)" in only(full, overflows=1234)


def test_listener_that_was_leaked_into_a_child_makes_clients_hang() -> None:
    found = only(replace(LISTEN, holders=(SLEEP,), queue=3, waited_s=12))
    assert "no process accepts: pid 8 (sleep 1000, user www) is listening on 127.0.0.1:8000, 3 wait" in found
    assert "the first for at least 12 s" in found
    assert "leaked into a process that knows nothing of it" in found


def test_listener_that_several_programs_hold_stays_until_the_last_one_ends() -> None:
    found = only(replace(LISTEN, holders=(NGINX, SLEEP)))
    assert "pid 7 (nginx, user www) and pid 8 (sleep 1000, user www)" in found
    waiting = risks(replace(LISTEN, holders=(NGINX, SLEEP), queue=1, waited_s=2))
    assert "leaked" not in waiting[0]


def test_listener_that_hotport_hands_on_has_several_holders_and_no_gap() -> None:
    supervisor, worker = (
        Process(9, "python -m hotport serve app:app", "www"),
        Process(10, "-m hotport.worker app/1.1", ""),
    )
    ours = replace(LISTEN, holders=(supervisor, worker), options=A)
    assert risks(ours, number=40_000) == ()
    leaked = risks(replace(ours, holders=(supervisor, worker, SLEEP)))
    assert "pid 8 (sleep 1000, user www) and pid 9" in leaked[0]
    assert "take it in the gap" in leaked[1]


def test_sleeper_is_shown_that_netstat_hides() -> None:
    found = only(Sockets(State.BOUND, HERE, uid=1000, options=A, user="eve", holders=()))
    assert found.startswith("a sleeper: a process of user eve that we may not look at is bound to 127.0.0.1:8000")


def test_connections_that_a_program_forgets_to_close_are_a_leak() -> None:
    assert "a leak, if it lasts: pid 7" in only(Sockets(State.CLOSE_WAIT, HERE, count=3, uid=33, holders=(NGINX,)))


def test_members_of_a_reuseport_group_are_listed() -> None:
    one = replace(LISTEN, options=P)
    assert "every process of user www can join" in only(one)
    found = only(one, replace(one, holders=(SLEEP,)))
    assert "2 listeners share the port by SO_REUSEPORT (pids 7, 8)" in found
    assert "tcp_migrate_req" in found


def test_more_specific_listener_takes_connections_from_the_wildcard() -> None:
    wide = replace(LISTEN, local=EVERYWHERE)
    assert "127.0.0.1:8000 takes the connections to that address from the listener on 0.0.0.0" in only(wide, LISTEN)


def test_dual_stack_listener_takes_ipv4_as_well_unless_somebody_else_does() -> None:
    dual = replace(LISTEN, local=DUAL)
    assert "no other socket can be bound to 0.0.0.0:8000" in only(dual)
    found = risks(dual, replace(LISTEN, local=EVERYWHERE))
    assert "takes all IPv4 connections from the dual-stack one on [::]" in found[0]
    assert risks(replace(dual, local=Local(ip_address("::"), True))) == ()


def test_port_that_anybody_can_take_in_a_gap_is_told() -> None:
    shared = replace(LISTEN, options=A)
    assert "any user with SO_REUSEADDR can take it in the gap" in only(shared)
    assert risks(shared, number=80) == ()
    assert "ip_local_reserved_ports=40000" in risks(shared, number=40_000)[1]


def test_many_in_time_wait_make_the_next_bind_slow() -> None:
    left = Sockets(State.TIME_WAIT, HERE, count=60_000, is_held=False, is_timed=True, ends_in_s=9)
    assert "60,000 connections in TIME_WAIT" in only(left)
    assert "for about 3.0 ms" in only(left)
    assert risks(replace(left, count=10_000)) == ()


@pytest.mark.parametrize("local", [HERE, EVERYWHERE])
def test_datagram_socket_that_anybody_may_share_is_told(local: Local) -> None:
    found = only(Sockets(State.BOUND, local, uid=0, options=A, user="root", holders=(NGINX,)), protocol="udp")
    assert "the last to bind gets every datagram" in found


def test_datagram_sockets_of_others_and_more_specific_ones_are_told() -> None:
    wide = Sockets(State.BOUND, EVERYWHERE, uid=0, options=P, user="root")
    found = risks(wide, replace(wide, local=HERE, user="eve"), protocol="udp")
    assert found == (
        "sockets of several users are on the port: eve, root",
        "127.0.0.1:8000 takes the datagrams to that address from 0.0.0.0:8000",
    )
