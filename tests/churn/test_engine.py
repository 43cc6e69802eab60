"""Every fate that a target can give is counted exactly: real clients against a server that follows a script."""

from __future__ import annotations

import itertools
import random
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotport.churn.engine import Engine
from hotport.churn.histogram import Histogram
from hotport.churn.plan import Armed, Plan, Said, Summary, Tick
from hotport.churn.result import Bucket, Load, Target
from hotport.churn.schedule import arrivals, gap_ns
from hotport.errors import ConfigError
from tests.churn.scripted import (
    Scripted,
    forever,
    plan,
    read_head,
    reset,
    run,
    send_and_end,
    target,
)
from tests.support import assert_three_lines

_HEAD = b"HTTP/1.1 200 OK\r\nX-Generation: g1\r\n"
_OK = _HEAD + b"Content-Length: 2\r\n\r\nok"
_TOLD = _HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nok"


def _truncate_and_reset(sock: socket.socket) -> None:
    sock.sendall(_OK[:-1])
    reset(sock)


#: What the server does after it has read the request, and what that is to the client.
_ONCE: dict[str, tuple[Callable[[socket.socket], object], str]] = {
    "answer": (lambda sock: sock.sendall(_TOLD), "answered"),
    "to the end": (lambda sock: sock.sendall(_HEAD + b"\r\nok"), "answered"),
    "chunks": (
        lambda sock: sock.sendall(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
        "answered",
    ),
    "interim": (lambda sock: sock.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n" + _OK), "answered"),
    "error": (lambda sock: sock.sendall(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"), "wrong status"),
    "garbage": (lambda sock: sock.sendall(b"what?\n"), "wrong status"),
    "reset": (reset, "reset after send"),
    "close": (lambda sock: None, "closed unanswered"),
    "close after interim": (lambda sock: sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n"), "closed unanswered"),
    "truncate": (lambda sock: sock.sendall(_OK[:-1]), "truncated"),
    "truncate head": (lambda sock: sock.sendall(_OK[:10]), "truncated"),
    "truncate and reset": (_truncate_and_reset, "truncated"),
}


def _one_shot_server(script: list[str], expected: Counter[str]) -> Callable[[socket.socket], None]:
    commands = forever(script)

    def serve(sock: socket.socket) -> None:
        read_head(sock)
        act, fate = _ONCE[next(commands)]
        expected[fate] += 1
        act(sock)

    return serve


@given(st.lists(st.sampled_from(sorted(_ONCE)), min_size=1, max_size=20))
@settings(max_examples=10, deadline=None)
def test_every_fate_of_a_request_is_counted_exactly(script: list[str]) -> None:
    expected: Counter[str] = Counter()
    with Scripted(_one_shot_server(script, expected)) as server:
        seen = run(plan(target(server.port), Load("connect", rate=1000)))
    assert seen.fates == expected
    assert expected.total() > 100
    assert seen.answered_by == Counter(g1=expected["answered"])
    losses = Counter(incident.fate for incident in seen.incidents)
    assert losses == Counter({fate: count for fate, count in expected.items() if fate != "answered"})
    assert seen.ticks[-1].bucket.in_flight == seen.ticks[-1].bucket.connections == 0
    assert bool(seen.summary.connect_answers_ms) == bool(expected["answered"])
    lag = Histogram()
    for tick in seen.ticks:
        lag.merge(tick.bucket.lag)
    assert lag.counts == seen.summary.lag
    assert len(lag) == expected.total()


@pytest.mark.parametrize("kind", ["halfhead", "late", "slow", "upload"])
def test_every_kind_that_asks_is_answered(kind: str) -> None:
    def serve(sock: socket.socket) -> None:
        head, _, body = read_head(sock).partition(b"\r\n\r\n")
        heads.append(head)
        while kind == "upload" and len(body) < 1000:
            body += sock.recv(65536)
        sock.sendall(_OK)

    heads: list[bytes] = []
    with Scripted(serve) as server:
        seen = run(plan(target(server.port), Load(kind, rate=100), slow_ms=20, upload_bytes=1000, slow_path="/s"))
    assert seen.fates == Counter(answered=len(heads))
    assert heads
    method = {"slow": b"GET /s ", "upload": b"POST / "}.get(kind, b"GET / ")
    assert all(head.startswith(method) for head in heads)


@pytest.mark.parametrize("end", [reset, lambda sock: None], ids=["reset", "close"])
@pytest.mark.parametrize(("kind", "fate"), [("late", "reset before send"), ("halfhead", "after")])
def test_end_before_the_request_was_sent_says_how_far_it_was(
    kind: str, fate: str, end: Callable[[socket.socket], object]
) -> None:
    count = 0

    def serve(sock: socket.socket) -> None:
        nonlocal count
        count += 1
        if kind == "halfhead":
            assert sock.recv(10_000)
        end(sock)

    with Scripted(serve) as server:
        seen = run(plan(target(server.port), Load(kind, rate=1000), slow_ms=60_000))
    if fate == "after":
        fate = "reset after send" if end is reset else "closed unanswered"
    assert seen.fates == Counter({fate: count})
    assert count > 100


def test_unread_request_is_reset_after_send() -> None:
    def serve(sock: socket.socket) -> None:
        select.select([sock], [], [], 30)  # closed with something unread: the kernel answers with a reset

    with Scripted(serve) as server:
        seen = run(plan(target(server.port), Load("connect", rate=1000)))
    assert set(seen.fates) == {"reset after send"}


def test_nobody_listens_is_refused() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        seen = run(plan(target(sock.getsockname()[1]), Load("connect", rate=1000), incidents_max=10))
    assert set(seen.fates) == {"refused"}
    assert len(seen.incidents) == 10
    assert seen.incidents[0].detail == "ECONNREFUSED"
    assert sum(tick.incidents_dropped for tick in seen.ticks) == seen.fates["refused"] - 10 > 0


def test_silence_is_timed_out() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as server:
        loads = [Load("connect", rate=500), Load("keepalive", rate=500), Load("stream", count=5, think_ms=20)]
        seen = run(plan(target(server.getsockname()[1]), *loads, timeout_ms=100))
    assert set(seen.fates) == {"timed out", "reconnected"}
    assert seen.fates["timed out"] > 100
    assert seen.ticks[-1].bucket.in_flight == 0


def test_late_answers_are_answers_and_told_one_by_one() -> None:
    with Scripted(_one_shot_server(["answer"], Counter())) as server:
        seen = run(plan(target(server.port), Load("connect", rate=200), late_ms=0.001))
    assert set(seen.fates) == {"late"}
    assert len(seen.incidents) == seen.fates["late"]
    assert sum(sum(counts.values()) for tick in seen.ticks for counts in tick.bucket.latency.values()) == len(
        seen.incidents
    )


#: On a kept connection, after the request: what it is to the client. The end is in the segment of the answer, so that
#: the client cannot ask in between.
_KEPT: dict[str, tuple[Callable[[socket.socket], object], list[str]]] = {
    "answer": (lambda sock: sock.sendall(_OK), ["answered"]),
    "answer and close": (lambda sock: send_and_end(sock, _OK), ["answered", "idle close", "reconnected"]),
    "tell and close": (lambda sock: send_and_end(sock, _TOLD), ["answered", "told to close", "reconnected"]),
    "close": (lambda sock: sock.shutdown(socket.SHUT_WR), ["closed unanswered", "reconnected"]),
    "reset": (reset, ["reset after send", "reconnected"]),
    "truncate": (lambda sock: send_and_end(sock, _OK[:-1]), ["truncated", "reconnected"]),
    "wrong": (
        lambda sock: sock.sendall(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"),
        ["wrong status", "reconnected"],
    ),
}


@given(st.lists(st.sampled_from(sorted(_KEPT)), max_size=40))
@settings(max_examples=15, deadline=None)
def test_kept_connection_is_kept_and_made_again_and_nothing_is_repeated(script: list[str]) -> None:
    commands = iter([*script, "answer"])
    expected: Counter[str] = Counter()
    engines: list[Engine] = []

    def serve(sock: socket.socket) -> None:
        while True:
            if not read_head(sock):
                return
            command = next(commands, None)
            if command is None:
                engines[0].stop()  # every attempt before this one has its fate
                continue
            act, seen = _KEPT[command]
            expected.update(seen)
            act(sock)
            if command != "answer":
                return

    with Scripted(serve) as server:
        what = plan(target(server.port), Load("keepalive", count=1, think_ms=1), duration_ms=60_000)
        seen = run(what, engines.append)
    assert seen.fates == expected
    assert seen.connections == 1 + expected["reconnected"]
    assert not seen.summary.connect_answers_ms  # where nobody tries to connect there is no accept gap


def test_pool_keeps_rate_and_waits_for_a_free_connection_without_lag_of_its_own() -> None:
    asked = 0

    def serve(sock: socket.socket) -> None:
        nonlocal asked
        while read_head(sock):
            asked += 1
            sock.sendall(_OK)

    with Scripted(serve) as server:  # which serves only one connection at a time
        seen = run(plan(target(server.port), Load("keepalive", rate=2000, count=1)))
    assert seen.fates == Counter(answered=asked)
    assert asked > 300
    assert sum(seen.summary.lag.values()) == asked
    assert max(tick.bucket.connections for tick in seen.ticks) == 1


@pytest.mark.parametrize("family", ["ipv6", "unix", "abstract"])
def test_every_family_of_sockets_is_spoken(family: str, tmp_path: Path) -> None:
    where: Any = {"ipv6": ("::1", 0), "unix": str(tmp_path / "s"), "abstract": f"\0{tmp_path}"}[family]
    expected: Counter[str] = Counter()
    af = socket.AF_INET6 if family == "ipv6" else socket.AF_UNIX
    with Scripted(_one_shot_server(["answer", "close"], expected), af, where) as server:
        if family == "ipv6":
            to = target(server.port, host="::1")
        else:
            to = target(0, path=where.replace("\0", "@"))
        seen = run(plan(to, Load("connect", rate=1000)))
    assert seen.fates == expected


def test_unix_socket_whose_backlog_is_full_is_tried_again(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        seen = run(plan(target(0, path=str(tmp_path / "s")), Load("connect", rate=200), timeout_ms=100))
        (tmp_path / "s").unlink()
    assert set(seen.fates) == {"timed out"}
    assert {incident.detail for incident in seen.incidents} == {"sent", "connecting"}
    missing = run(plan(target(0, path=str(tmp_path / "none")), Load("connect", rate=200)))
    assert set(missing.fates) == {"refused"}


def _lines(sock: socket.socket) -> Any:
    rest = b""
    while data := sock.recv(65536):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


@given(st.lists(st.sampled_from(["echo", "echo", "double", "swap", "end", "garble"]), max_size=100))
@settings(max_examples=15, deadline=None)
def test_every_fate_of_a_message_is_counted_exactly(script: list[str]) -> None:
    commands = iter([*script, "end"])
    expected: Counter[str] = Counter({"reconnected": -1})
    engines: list[Engine] = []

    def serve(sock: socket.socket) -> None:
        held: list[bytes] = []
        expected["reconnected"] += 1
        for line in (lines := _lines(sock)):
            command = next(commands, None)
            if command is None:
                engines[0].stop()  # every message on an earlier connection has its fate
                continue
            if command in ("end", "garble"):
                # The oldest message under way gets the blame for what answers none.
                expected["wrong status"] += command == "garble"
                send_and_end(sock, b"what?\n" if command == "garble" else b"")
                lost_meanwhile = sum(1 for _ in lines)
                lost = len(held) + (command == "end") + lost_meanwhile
                expected["lost message"] += lost
                expected["idle close"] += not lost
                return
            if command == "swap" and not held:
                held.append(line)
                continue
            sock.sendall((line + b"\n") * (2 if command == "double" else 1))
            expected["answered"] += 1
            expected["duplicated message"] += command == "double"
            if held:
                sock.sendall(held.pop() + b"\n")
                expected["out-of-order message"] += 1

    with Scripted(serve) as server:
        what = plan(target(server.port, http=False), Load("stream", rate=1000, count=1), duration_ms=60_000)
        seen = run(what, engines.append)
    assert seen.fates == +expected


def test_datagrams_come_back_twice_or_never() -> None:
    expected: Counter[str] = Counter()

    def serve(sock: socket.socket) -> None:
        for number in itertools.count():
            data, client = sock.recvfrom(100)
            if not data:
                return
            if number % 3 == 0:
                expected["lost message"] += 1
                continue
            sock.sendto(data, client)
            expected["answered"] += 1
            if number % 3 == 1:
                sock.sendto(data, client)
                expected["duplicated message"] += 1

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=serve, args=(sock,))
        thread.start()
        seen = run(
            plan(target(sock.getsockname()[1], http=False), Load("datagram", rate=500, count=3), timeout_ms=2000)
        )
        sock.sendto(b"", sock.getsockname())
        thread.join()
    assert seen.fates == expected
    assert expected.total() > 50


def test_plan_travels_unharmed() -> None:
    what = plan(target(1, path="/x"), Load("connect", rate=1.5), Load("stream", count=3, think_ms=2), late_ms=5)
    assert msgspec.json.decode(msgspec.json.encode(what), type=Plan) == what
    for said in (Armed(), Tick(Bucket(100, {"connect": {"answered": 1}}, {"connect": {7: 1}})), Summary({3: 4})):
        assert msgspec.json.decode(msgspec.json.encode(said), type=Said) == said


@pytest.mark.parametrize("how", ["even", "poisson"])
def test_schedule_is_the_same_for_the_same_seed(how: str) -> None:
    first, again, other = (list(arrivals(500, 7, 10**9 + 7, how, random.Random(seed))) for seed in (1, 1, 2))
    assert first == again != other
    assert first == sorted(first)
    assert 7 <= first[0] <= first[-1] < 10**9 + 7
    assert abs(len(first) - 500) < (2 if how == "even" else 150)
    rng = random.Random(1)
    gaps = [gap_ns(20, rng) for _ in range(5000)]
    assert abs(sum(gaps) / len(gaps) / 20e6 - 1) < 0.1
    assert min(gaps) >= 1_000_000


@pytest.mark.parametrize(
    ("load", "to"),
    [
        (Load("nonsense", rate=1), target(1)),
        (Load("connect"), target(1)),
        (Load("upload", rate=1), target(1, http=False)),
        (Load("tls", rate=1), target(1)),
        (Load("datagram", rate=1), target(1, path="/x")),
    ],
    ids=["kind", "nothing", "http", "tls", "udp"],
)
def test_impossible_load_is_said_before_anything_begins(load: Load, to: Target) -> None:
    with pytest.raises(ConfigError, match="HP782") as caught:
        Engine(plan(to, load), lambda _: None)
    assert_three_lines(str(caught.value), "HP782")


def test_unknown_host_is_said_before_anything_begins() -> None:
    with pytest.raises(ConfigError, match="HP784") as caught:
        Engine(plan(target(1, host="nobody.invalid"), Load("connect", rate=1)), lambda _: None)
    assert_three_lines(str(caught.value), "HP784")
