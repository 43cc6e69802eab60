"""The rule, fact by fact; `tests/net` compares it with the kernel, cell by cell."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from msgspec.structs import replace

from hotport.model.bind import (
    CHOICES,
    Answer,
    Can,
    blame,
    judge,
    judge_name,
    narrate,
    overlaps,
    remedies,
    remedies_of_name,
    usual,
)
from hotport.model.port import Asker, Local, Port, Sockets, State, UnixName
from hotport.model.process import Process

NONE, A, P, AP = CHOICES.values()
HERE = Local(ip_address("127.0.0.1"))
EVERYWHERE = Local(ip_address("0.0.0.0"))
ROOT = Asker(0, "root", may_bind_low=True)
USER = Asker(1000, "user", may_bind_low=False)
NGINX = Process(7, "nginx", "root")
TIME_WAIT = Sockets(State.TIME_WAIT, HERE, is_held=False, is_timed=True, ends_in_s=42.0)
LISTEN = Sockets(State.LISTEN, HERE, uid=0, options=A, holders=(NGINX,), user="root", backlog=128)


def on(*sockets: Sockets, local: Local = HERE, protocol: str = "tcp") -> Port:
    return Port("tcp://127.0.0.1:8000", protocol, local, 8000, sockets=sockets)


def test_empty_port_takes_anybody() -> None:
    for options in CHOICES.values():
        answer = judge(on(), USER, options)
        assert (answer.can, answer.because) == (Can.YES, "nothing is on the port")
        assert list(remedies(on(), answer)) == []


def test_listener_of_another_program_is_named_with_the_rule() -> None:
    port = on(LISTEN)
    answer = judge(port, ROOT, A)
    assert (answer.can, answer.error, answer.ends_in_s) == (Can.NO, "EADDRINUSE", None)
    assert answer.because == (
        "pid 7 (nginx, user root) is listening on 127.0.0.1:8000; "
        "a listener shares its port only if both have set SO_REUSEPORT"
    )
    assert answer.until == "when pid 7 closes it, or ends"
    assert list(remedies(port, answer)) == ["kill 7"]
    assert "it has not set SO_REUSEPORT" in judge(port, ROOT, P).rule


def test_listener_with_reuseport_lets_in_its_own_user_only() -> None:
    port = on(replace(LISTEN, options=P))
    answer = judge(port, ROOT, P)
    assert answer.can == Can.YES
    assert "connections would be shared" in answer.rule
    answer = judge(port, USER, P)
    assert answer.can == Can.NO
    assert "one user only, and it is user root's" in answer.rule


def test_listener_that_cannot_be_looked_at_is_unknown_to_reuseport_and_certain_to_others() -> None:
    port = on(replace(LISTEN, options=None, holders=(), uid=1000, user="user", unit="web.service"))
    assert judge(port, USER, A).can == Can.NO
    answer = judge(port, USER, P)
    assert answer.can == Can.UNKNOWN
    assert answer.who.startswith("a process of user user in web.service that we may not look at")
    assert "sudo hotport why tcp://127.0.0.1:8000" in answer.rule
    todo = list(remedies(port, answer))
    assert todo == [
        "hotport why tcp://127.0.0.1:8000 --probe  # binds for a moment",
        "systemctl status web.service",
    ]
    nameless = on(replace(LISTEN, options=None, holders=(), user=""))
    answer = judge(nameless, USER, A)
    assert answer.who == "a process that we may not look at is listening on 127.0.0.1:8000"
    assert list(remedies(nameless, answer)) == ["sudo hotport why tcp://127.0.0.1:8000"]


def test_time_wait_refuses_for_so_many_seconds_whoever_sets_nothing() -> None:
    answer = judge(on(TIME_WAIT), USER, NONE)
    assert (answer.can, answer.ends_in_s) == (Can.NO, 42.0)
    assert answer.until == "by itself: the last one is gone in 42 s"
    assert "gets no port on which there is anything" in answer.rule


def test_time_wait_depends_on_what_the_old_server_had_set() -> None:
    port = on(replace(TIME_WAIT, count=3, peers=("192.0.2.1:9",)))
    answer = judge(port, USER, AP)
    assert answer.can == Can.UNKNOWN
    assert answer.who == "3 connections from 192.0.2.1:9 that this side has closed are in TIME_WAIT on 127.0.0.1:8000"
    assert "yes if the server that left it had set SO_REUSEADDR or SO_REUSEPORT, too" in answer.rule
    assert list(remedies(port, answer))[1:] == [
        "sleep 42",
        "ss -K state time-wait sport = :8000  # as root: at once",
        "set SO_REUSEADDR before bind, in the old server and in the new one",
    ]


def test_refusal_of_the_kernel_tells_what_the_old_server_had_not_set() -> None:
    answer = blame(on(TIME_WAIT), USER, A)
    assert (answer.can, answer.error) == (Can.NO, "EADDRINUSE")
    assert "the server that left it had not set SO_REUSEADDR, and both must have" in answer.rule
    assert blame(on(LISTEN), USER, A) == judge(on(LISTEN), USER, A)
    assert blame(on(), USER, A).can == Can.YES


def test_time_wait_with_reuseport_does_not_ask_for_the_user() -> None:
    assert judge(on(replace(TIME_WAIT, options=P)), USER, P).can == Can.YES
    dropped = replace(TIME_WAIT, state=State.FIN_WAIT2, options=P)
    assert judge(on(dropped), USER, P).can == Can.YES
    held = Sockets(State.FIN_WAIT2, HERE, uid=0, options=P, user="root")
    assert judge(on(held), USER, P).can == Can.NO


def test_leftovers_under_a_listener_with_reuseport_have_it_too() -> None:
    assert judge(on(replace(LISTEN, options=P), TIME_WAIT), ROOT, P).can == Can.YES
    assert judge(on(replace(LISTEN, options=AP), TIME_WAIT), ROOT, P).can == Can.YES
    wide = on(replace(LISTEN, options=AP), TIME_WAIT, local=EVERYWHERE)
    assert judge(wide, ROOT, P).can == Can.UNKNOWN  # it may be older, and have SO_REUSEADDR only


def test_old_socket_without_the_option_refuses_a_new_one_with_it() -> None:
    bound = Sockets(State.BOUND, HERE, uid=1000, options=NONE, holders=(NGINX,))
    answer = judge(on(bound), USER, A)
    assert answer.because == (
        "pid 7 (nginx, user root) is bound to 127.0.0.1:8000 without listening; "
        "it has set neither option, and both must have set SO_REUSEADDR"
    )
    assert judge(on(replace(bound, options=A)), USER, A).can == Can.YES


def test_socket_that_stays_longest_is_blamed_first() -> None:
    leak = Sockets(State.CLOSE_WAIT, HERE, count=3, uid=0, options=NONE, holders=(NGINX, Process(8, "x", "root")))
    orphan = Sockets(State.LAST_ACK, HERE, uid=0, is_held=False, backlog=100, peers=("192.0.2.1:9",))
    answer = judge(on(TIME_WAIT, orphan, leak), USER, NONE)
    assert [old.state for old in answer.blockers] == [State.CLOSE_WAIT, State.LAST_ACK, State.TIME_WAIT]
    assert answer.ends_in_s is None
    assert answer.until == "never by itself: each of pids 7, 8 has to close them, or end"
    assert answer.who.startswith("pid 7 (nginx, user root) with 1 more has not closed 3 connections")


def test_orphan_has_no_end_that_anybody_could_name() -> None:
    orphan = Sockets(State.FIN_WAIT1, HERE, uid=0, is_held=False, backlog=100, peers=("192.0.2.1:9",))
    answer = judge(on(orphan), USER, NONE)
    assert "without a process (orphan) is in FIN_WAIT1, 99 bytes unsent: 192.0.2.1:9 does not read" in answer.who
    assert answer.until.startswith("it is not known when")
    todo = list(remedies(on(orphan), answer))
    assert todo == ["ss -K state fin-wait-1 sport = :8000  # as root; what is unsent is lost"]
    sent = replace(orphan, backlog=1, count=2)
    assert narrate(sent, on()).endswith("2 connections on 127.0.0.1:8000 without a process (orphan) are in FIN_WAIT1")


def test_connection_that_waits_to_be_accepted_goes_with_its_listener() -> None:
    waiting = Sockets(State.ESTABLISHED, HERE, uid=0, is_held=False)
    answer = judge(on(waiting), USER, NONE)
    assert answer.who == "a connection on 127.0.0.1:8000 waits to be accepted"
    assert answer.until == "when its listener accepts and ends it, or closes"
    assert narrate(replace(waiting, count=2), on()) == "2 connections on 127.0.0.1:8000 wait to be accepted"


def test_outgoing_connection_is_told_from_others_and_kept_away() -> None:
    client = Sockets(
        State.ESTABLISHED, HERE, uid=0, options=NONE, holders=(NGINX,), peers=("a", "b", "c"), is_outgoing=True
    )
    answer = judge(on(client), USER, A)
    assert (
        answer.who == "pid 7 (nginx, user root) has an outgoing connection to a, b, ... on 127.0.0.1:8000 (ESTABLISHED)"
    )
    todo = list(remedies(on(client), answer))
    assert todo == [
        "sysctl -w net.ipv4.ip_local_reserved_ports=8000 && ss -K state established sport = :8000"
        "  # as root; its program connects again, from another port",
        "kill 7",
    ]
    perhaps = replace(client, is_outgoing=False, count=2)
    assert narrate(perhaps, on()) == "pid 7 (nginx, user root) has 2 connections on 127.0.0.1:8000 (ESTABLISHED)"
    high = replace(on(perhaps), number=40000)
    assert "ip_local_reserved_ports" in list(remedies(high, judge(high, USER, A)))[1]
    assert list(remedies(on(perhaps), judge(on(perhaps), USER, A))) == ["kill 7"]
    served = replace(on(replace(LISTEN, local=Local(ip_address("127.0.0.2"))), perhaps), number=40000)
    assert list(remedies(served, judge(served, USER, A))) == ["kill 7"]


def test_handshake_stands_in_nobodys_way() -> None:
    assert judge(on(Sockets(State.SYN_RECV, HERE)), USER, NONE).can == Can.YES


def test_other_addresses_do_not_matter() -> None:
    answer = judge(on(replace(LISTEN, local=Local(ip_address("127.0.0.2")))), USER, NONE)
    assert (answer.can, answer.rule) == (Can.YES, "what is on the port has other addresses")
    assert judge(on(replace(TIME_WAIT, options=A)), USER, A).rule.startswith(
        "the leftovers on the port have set the same"
    )


def test_low_port_and_foreign_address_are_refused_before_sockets_are_looked_at() -> None:
    low = replace(on(LISTEN), number=80)
    answer = judge(low, USER, A)
    assert (answer.error, answer.until, answer.blockers) == ("EACCES", "", ())
    assert "ip_unprivileged_port_start" in answer.because
    sysctl, capability = remedies(low, answer)
    assert "sysctl -w net.ipv4.ip_unprivileged_port_start=80" in sysctl
    assert "CAP_NET_BIND_SERVICE" in capability
    assert judge(low, ROOT, A).error == "EADDRINUSE"
    away = replace(low, is_local=False)
    answer = judge(away, USER, A)
    assert answer.error == "EADDRNOTAVAIL"
    assert list(remedies(away, answer)) == ["ip -brief address"]
    six = replace(away, local=Local(ip_address("2001:db8::1"), True))
    assert judge(six, USER, A).error == "EACCES"  # which IPv6 asks for first
    assert judge(six, ROOT, A).error == "EADDRNOTAVAIL"


@pytest.mark.parametrize(
    ("protocol", "host", "scope", "words", "todo"),
    [
        ("tcp", "fe80::1", 0, "its interface has to be named", "ip -brief address"),
        ("udp", "ff02::1", 0, "its interface has to be named", "ip -brief address"),
        ("tcp", "ff0e::1", 0, "TCP does not know multicast", "ip -brief address"),
        ("tcp", "::ffff:127.0.0.1", 0, "does not take 127.0.0.1 written", "hotport why tcp://127.0.0.1:8000"),
        ("tcp", "fe80::1", 2, "", ""),
        ("udp", "ff0e::1", 0, "", ""),
    ],
    ids=["link", "group on a link", "group", "IPv4", "interface", "datagrams"],
)
def test_ipv6_address_that_no_socket_could_have_is_invalid(
    protocol: str, host: str, scope: int, words: str, todo: str
) -> None:
    port = replace(on(local=Local(ip_address(host), True), protocol=protocol), scope=scope)
    answer = judge(port, ROOT, A)
    assert (answer.can, answer.error) == ((Can.NO, "EINVAL") if words else (Can.YES, ""))
    assert words in answer.rule
    assert list(remedies(port, answer)) == [todo] * bool(todo)


def test_reuseport_beside_both_kinds_is_unknown_because_the_kernel_remembers() -> None:
    mine = replace(LISTEN, options=AP)
    older = Sockets(State.CLOSE_WAIT, HERE, uid=0, options=A, holders=(NGINX,))
    answer = judge(on(mine, older), ROOT, P)
    assert answer.can == Can.UNKNOWN
    assert "another socket of this user shares the port by SO_REUSEPORT" in answer.rule


def test_datagram_sockets_share_by_reuseaddr_whoever_they_belong_to() -> None:
    bound = Sockets(State.BOUND, HERE, uid=0, options=A, holders=(NGINX,), user="root")
    port = on(bound, protocol="udp")
    assert usual(port) == NONE
    assert usual(on()) == A
    assert judge(port, USER, A).can == Can.YES
    answer = judge(port, USER, NONE)
    assert answer.who == "pid 7 (nginx, user root) is bound to 127.0.0.1:8000"
    both = on(bound, replace(bound, options=P), protocol="udp")
    assert judge(both, ROOT, P).can == Can.UNKNOWN


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ("0.0.0.0", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "::", True),
        ("127.0.0.1", "::/v6only", False),
        ("0.0.0.0", "::1/v6only", False),
        ("0.0.0.0", "::1", True),
        ("0.0.0.0", "::1/?", None),
        ("127.0.0.1", "::1/?", False),
        ("::ffff:0.0.0.0", "::1", False),
        ("::", "127.0.0.1", True),
        ("::/v6only", "127.0.0.1", False),
        ("::1", "0.0.0.0", False),
        ("::1", "::/v6only", True),
        ("::1", "::1", True),
        ("::/v6only", "::1", True),
        ("::1", "2001:db8::1", False),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
    ],
)
def test_addresses_overlap_as_in_the_kernel(new: str, old: str, expected: bool | None) -> None:
    def local(text: str) -> Local:
        host, _, v6only = text.partition("/")
        return Local(ip_address(host), {"": False, "v6only": True, "?": None}[v6only])

    assert overlaps(local(new), local(old)) is expected


def test_connection_over_ipv6_of_which_it_is_not_known_whether_it_blocks_ipv4_is_unknown() -> None:
    six = replace(TIME_WAIT, local=Local(ip_address("::1"), None))
    answer = judge(on(six, local=EVERYWHERE), USER, NONE)
    assert answer.can == Can.UNKNOWN
    assert "IPV6_V6ONLY" in answer.rule


NAME = UnixName("unix:run/a.sock", "run/a.sock", found="socket", holders=(NGINX,), is_held=True, is_listening=True)


@pytest.mark.parametrize(
    ("name", "error", "words", "todo"),
    [
        (UnixName("unix:a", "a"), "", "nothing has that name", []),
        (replace(NAME, found="nothing"), "", "its file was removed: pid 7 (nginx, user root) listens without it", []),
        (NAME, "EADDRINUSE", "pid 7 (nginx, user root) is listening on run/a.sock", ["kill 7"]),
        (replace(NAME, is_listening=False), "EADDRINUSE", "is bound to run/a.sock", ["kill 7"]),
        (replace(NAME, holders=(), user="root"), "EADDRINUSE", "of user root", ["sudo hotport why unix:run/a.sock"]),
        (replace(NAME, holders=()), "EADDRINUSE", "listening", ["grep -lF run/a.sock /proc/[0-9]*/net/unix"]),
        (replace(NAME, holders=(), is_held=False), "EADDRINUSE", "left from a server", ["rm run/a.sock"]),
        (
            UnixName("unix:run/a.sock", "run/a.sock", found="something else"),
            "EADDRINUSE",
            "no socket",
            ["ls -ld run run/a.sock"],
        ),
        (replace(NAME, found="nothing", obstacle="ENOENT"), "ENOENT", "there is no directory run", ["mkdir -p run"]),
        (UnixName("unix:a", "a", obstacle="EACCES"), "EACCES", "you may not make files in .", ["ls -ld . a"]),
        (UnixName("unix:/a", "/a", obstacle="EROFS"), "EROFS", "system of / is read-only", ["ls -ld / /a"]),
        (UnixName("unix:a/b", "a/b", obstacle="ENOTDIR"), "ENOTDIR", "nothing can be made", ["ls -ld a a/b"]),
        (UnixName("unix:-rf x", "-rf x", found="socket"), "EADDRINUSE", "left from a server", ["rm './-rf x'"]),
        (replace(NAME, address="unix:@a", path="@a"), "EADDRINUSE", "listening on @a", ["kill 7"]),
    ],
    ids=[
        *(
            "free",
            "removed",
            "listening",
            "bound",
            "another user's",
            "another network's",
            "stale",
            "file",
            "no directory",
        ),
        *("forbidden", "read-only", "no way", "quoted", "abstract"),
    ],
)
def test_unix_name_is_judged(name: UnixName, error: str, words: str, todo: list[str]) -> None:
    answer: Answer = judge_name(name)
    assert (answer.can == Can.YES, answer.error) == (not error, error)
    assert words in answer.because
    assert list(remedies_of_name(name, answer)) == todo
    assert "removed" not in answer.until or not name.is_abstract
