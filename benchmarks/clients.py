"""Clients that wrk is not: WebSocket messages, requests and connections at a fixed rate, counts of who answers.

Each is a process of its own that prints JSON, and small enough not to be what is measured: raw sockets, one epoll
instance, requests and frames that were built before, replies whose size is known.

`hotport churn` has none of these: its engine keeps to a schedule where `websocket` goes as fast as the server, sleeps
where `paced` does not, and counts in buckets where `churn` has the microsecond of each connection.
"""

from __future__ import annotations

import json
import math
import os
import random
import select
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

__all__ = ["CLIENTS", "connected"]

TIMEOUT_S: Final = 30.0

#: A connection that has no answer by then is lost.
CHURN_TIMEOUT_S: Final = 5.0

REQUEST: Final = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

#: Connections that `evenly` opens at a time.
BURST: Final = 128

#: How the reply to `REQUEST` ends.
HELLO: Final = b"\r\n\r\nHello, world!"

#: The same, for a connection that ends after the answer.
CLOSE: Final = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"

#: How an answer ends that names the process that made it: seven characters, then this.
NAMED: Final = b", world!"

UPGRADE: Final = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)

MESSAGE: Final = bytes(range(256)) * 4
MASK: Final = b"\x5a\xc3\x99\x17"


def connected(port: int, request: bytes, end: bytes) -> tuple[socket.socket, bytes]:
    """A new connection after its first reply, which ends with `end`; and the reply."""
    sock = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(request)
    reply = b""
    while not reply.endswith(end) and (data := sock.recv(65536)):
        reply += data
    return sock, reply


def websocket(port: int, seconds: float, connections: int) -> dict[str, Any]:
    """Echo messages of 1 KiB, one at a time on each connection.

    Returns:
        The rate and the count; or, if the server does not accept, its answer to the upgrade.

    Sources: RFC 6455 section 5.2.
    """
    length = b"\x7e" + len(MESSAGE).to_bytes(2, "big")  # 126: two bytes of length follow
    masked = bytes(byte ^ MASK[i % 4] for i, byte in enumerate(MESSAGE))
    frame = b"\x82" + bytes([length[0] | 0x80]) + length[1:] + MASK + masked
    expected = b"\x82" + length + MESSAGE

    poll = select.epoll()
    socks: dict[int, socket.socket] = {}
    received: dict[int, bytes] = {}  # what is not a whole reply yet
    for _ in range(connections):
        sock, reply = connected(port, UPGRADE, b"\r\n\r\n")
        if not reply.startswith(b"HTTP/1.1 101 "):
            return {"refused": reply.partition(b"\r\n")[0].decode()}
        sock.setblocking(False)
        socks[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    count = 0
    began = time.perf_counter()
    end = began + seconds
    for sock in socks.values():
        sock.send(frame)
    while (now := time.perf_counter()) < end:
        for fd, _ in poll.poll(end - now):
            data = socks[fd].recv(65536)
            if data != expected:
                assert data, "the server closed a connection"
                data = received.pop(fd, b"") + data
                if data != expected:
                    assert expected.startswith(data), "this is no echo"
                    received[fd] = data
                    continue
            count += 1
            socks[fd].send(frame)
    return {"rate": count / (time.perf_counter() - began), "count": count}


def paced(port: int, seconds: float, connections: int, rate: float) -> dict[str, Any]:
    """Send requests when they are due, whatever became of the earlier ones.

    It never sleeps: a timer would be late by more than what is measured. A request for which no connection is free
    waits for one, and its latency is counted from when it was due all the same.

    Returns:
        Milliseconds: percentiles of the latency, and by how much the requests were sent too late through no fault of
        the server's.
    """
    clock = time.perf_counter
    poll = select.epoll()
    socks: dict[int, socket.socket] = {}
    for _ in range(connections):
        sock, reply = connected(port, REQUEST, HELLO)
        assert reply.startswith(b"HTTP/1.1 200 "), reply
        sock.setblocking(False)
        socks[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    size = len(reply)  # every header that may change has a fixed width
    free = list(socks)
    received = dict.fromkeys(socks, 0)
    dues: dict[int, float] = {}
    latencies: list[float] = []
    lags: list[float] = []
    total, sent = round(rate * seconds), 0
    due = freed = clock()
    began, end = due, due + seconds + TIMEOUT_S
    while len(latencies) < total:
        now = clock()
        assert now < end, f"{total - len(latencies)} of {total} requests have no answer"
        while sent < total and due <= now and free:
            fd = free.pop()
            socks[fd].send(REQUEST)
            dues[fd] = due
            lags.append(now - max(due, freed))
            sent += 1
            due = began + sent / rate
            now = clock()
        for fd, _ in poll.poll(0):
            data = socks[fd].recv(65536)
            assert data, "the server closed a connection"
            received[fd] += len(data)
            if received[fd] == size:
                received[fd] = 0
                now = clock()
                latencies.append(now - dues[fd])
                if not free:
                    freed = now
                free.append(fd)
    return {
        "p50": _percentile(latencies, 0.5),
        "p99": _percentile(latencies, 0.99),
        "p99.9": _percentile(latencies, 0.999),
        "max": max(latencies) * 1000,
        "lag p99": _percentile(lags, 0.99),
    }


def held(port: int, connections: int) -> int:
    """Open connections, and whenever stdin has a line, ask once on each of them and print the body of the answers.

    Returns:
        How many there were, when stdin has ended.
    """
    socks = [socket.create_connection(("127.0.0.1", port), TIMEOUT_S) for _ in range(connections)]
    for _ in sys.stdin:
        for sock in socks:
            sock.sendall(REQUEST)
        bodies = {sock.recv(65536).partition(b"\r\n\r\n")[2].decode() for sock in socks}
        assert len(bodies) == 1, f"different answers: {bodies}"
        print(json.dumps(*bodies), flush=True)
    return len(socks)


def kept(port: int, connections: int, rate: float) -> list[tuple[float, float]]:
    """Send requests on kept connections when they are due, whatever became of the earlier ones, until stdin ends.

    All connections take turns. A request for which none is free waits for one. All that were due before stdin ended
    are sent, so that none is left out because the server kept every connection waiting.

    Returns:
        Of each request: when it was due (CLOCK_MONOTONIC), and how many seconds later its answer had come.
    """
    pairs = [connected(port, REQUEST, b"world!") for _ in range(connections)]
    return _asked([sock for sock, _ in pairs], len(pairs[0][1]), rate)


def _asked(
    connections: Sequence[socket.socket], size: int, rate: float, *, takes_any: bool = False
) -> list[tuple[float, float]]:
    """What `kept` does once it has its connections.

    Args:
        size: Of an answer, in bytes.
        takes_any: Choose connections at random. If they took turns, those of a server that stalls periodically would
            fall into step with its stalls.
    """
    chance = random.Random(1)
    clock = time.monotonic
    poll = select.epoll()
    socks = {sock.fileno(): sock for sock in connections}
    for fd in (*socks, 0):
        poll.register(fd, select.EPOLLIN)
    free = deque(socks)
    received = dict.fromkeys(socks, 0)
    dues: dict[int, float] = {}
    latencies: list[tuple[float, float]] = []
    began, count = clock(), 0
    due, ended = began, math.inf
    while dues or due < ended:
        may_send = free and due < ended
        if may_send and clock() >= due:
            if takes_any:
                free.rotate(chance.randrange(len(free)))
            fd = free.popleft()
            socks[fd].send(REQUEST)
            dues[fd] = due
            count += 1
            due = began + count / rate
            continue
        # select has microseconds where epoll_wait has milliseconds
        ready, _, _ = select.select([poll], [], [], max(0.0, due - clock()) if may_send else TIMEOUT_S)
        assert ready or may_send, f"{len(dues)} requests have no answer"
        for fd, _ in poll.poll(0):
            if fd == 0:
                poll.unregister(0)
                ended = clock()
                continue
            data = socks[fd].recv(65536)
            assert data, "the server closed a connection"
            received[fd] += len(data)
            if received[fd] == size:
                received[fd] = 0
                since = dues.pop(fd)
                latencies.append((since, clock() - since))
                free.append(fd)
    return latencies


def churn(port: int, rate: float) -> list[tuple[float, float, str]]:
    """Connect when it is due, whatever became of the others, until stdin ends; the server says one byte.

    Connections end with a reset, so that they leave nothing in TIME_WAIT.

    Returns:
        Of each connection: when it was due (CLOCK_MONOTONIC), how many seconds later its fate was known, and the fate.
    """
    clock = time.monotonic
    poll = select.epoll()
    poll.register(0, select.EPOLLIN)
    waiting: dict[int, tuple[socket.socket, float]] = {}
    fates: list[tuple[float, float, str]] = []
    began, count = clock(), 0
    ended: float | None = None
    while ended is None or (waiting and clock() < ended + CHURN_TIMEOUT_S):
        due = began + count / rate
        if ended is None and clock() >= due:
            sock = socket.socket()
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.connect_ex(("127.0.0.1", port))  # an error is there to be read, too
            waiting[sock.fileno()] = sock, due
            poll.register(sock, select.EPOLLIN)
            count += 1
            continue
        # select has microseconds where epoll_wait has milliseconds
        select.select([poll], [], [], max(0.0, due - clock()) if ended is None else CHURN_TIMEOUT_S)
        for fd, _ in poll.poll(0):
            if fd == 0:
                poll.unregister(0)
                ended = clock()
                continue
            sock, due = waiting.pop(fd)
            with sock:
                fates.append((due, clock() - due, _fate(sock)))
    return fates + [(due, CHURN_TIMEOUT_S, "lost") for _, due in waiting.values()]


def anew(port: int, rate: float) -> list[tuple[float, float]]:
    """Send requests on new connections when they are due, whatever became of the earlier ones, until stdin ends.

    Returns:
        Of each request: when it was due (CLOCK_MONOTONIC), and how many seconds later its connection had ended;
        `TIMEOUT_S` for one that was refused or reset.
    """
    clock = time.monotonic
    poll = select.epoll()
    poll.register(0, select.EPOLLIN)
    waiting: dict[int, tuple[socket.socket, float]] = {}
    latencies: list[tuple[float, float]] = []
    began, count = clock(), 0
    is_over = False
    while not is_over or waiting:
        due = began + count / rate
        if not is_over and clock() >= due:
            count += 1
            try:
                sock = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
                sock.sendall(CLOSE)
            except OSError:
                latencies.append((due, TIMEOUT_S))
                continue
            waiting[sock.fileno()] = sock, due
            poll.register(sock, select.EPOLLIN)
            continue
        # select has microseconds where epoll_wait has milliseconds
        select.select([poll], [], [], TIMEOUT_S if is_over else max(0.0, due - clock()))
        for fd, _ in poll.poll(0):
            if fd == 0:
                poll.unregister(0)
                is_over = True
                continue
            sock, due = waiting[fd]
            try:
                latency = None if sock.recv(65536) else clock() - due
            except OSError:
                latency = TIMEOUT_S
            if latency is not None:
                del waiting[fd]
                sock.close()
                latencies.append((due, latency))
    return latencies


# -- answers that name their process ---------------------------------------------------------------------------


def _answerer(reply: bytes) -> int:
    """The process that an answer names; 0 if the answer is not complete."""
    return int(reply[-7 - len(NAMED) : -len(NAMED)]) if reply.endswith(NAMED) else 0


def _connecting(port: int) -> socket.socket:
    """A socket that is connecting, or has failed to: reading it raises the error."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect_ex(("127.0.0.1", port))
    return sock


def arrivals(port: int, connections: int, rate: float) -> dict[str, Any]:
    """Connect when it is due, ask once, and stay connected.

    Returns:
        How many connections each process has answered. Milliseconds: percentiles of the first answer's latency,
        counted from when the connection was due, and by how much connections were opened too late.
    """
    clock = time.perf_counter
    poll = select.epoll()
    socks: dict[int, socket.socket] = {}
    dues: dict[int, float] = {}
    replies: dict[int, bytes] = {}
    answered: Counter[int] = Counter()
    latencies: list[float] = []
    lags: list[float] = []
    began = clock()
    end = began + connections / rate + TIMEOUT_S
    while len(latencies) < connections:
        now = clock()
        assert now < end, f"{connections - len(latencies)} of {connections} connections have no answer"
        due = began + len(socks) / rate
        if len(socks) < connections and due <= now:
            sock = _connecting(port)
            fd = sock.fileno()
            socks[fd], dues[fd], replies[fd] = sock, due, b""
            lags.append(now - due)
            poll.register(sock, select.EPOLLOUT)
            continue
        # select has microseconds where epoll_wait has milliseconds
        select.select([poll], [], [], min(due, end) - now if len(socks) < connections else end - now)
        for fd, event in poll.poll(0):
            if event == select.EPOLLOUT:
                socks[fd].send(REQUEST)
                poll.modify(fd, select.EPOLLIN)
                continue
            data = socks[fd].recv(65536)
            assert data, "the server closed a connection"
            replies[fd] += data
            if pid := _answerer(replies[fd]):
                latencies.append(clock() - dues[fd])
                answered[pid] += 1
    return {
        "answered": answered,
        "p50": _percentile(latencies, 0.5),
        "p99": _percentile(latencies, 0.99),
        "lag p99": _percentile(lags, 0.99),
    }


def together(port: int, connections: int, seconds: float) -> dict[str, Any]:
    """Connect all at once, and when each has had its first answer, ask on all as fast as answers come.

    Returns:
        How many connections each process has answered first, and how many requests then; percentiles in milliseconds.
    """
    clock = time.perf_counter
    poll = select.epoll()
    socks = {sock.fileno(): sock for sock in [_connecting(port) for _ in range(connections)]}
    for fd in socks:
        poll.register(fd, select.EPOLLOUT)
    replies = dict.fromkeys(socks, b"")
    sent: dict[int, float] = {}
    first: Counter[int] = Counter()
    answered: Counter[int] = Counter()
    latencies: list[float] = []
    end = clock() + TIMEOUT_S
    while (now := clock()) < end:
        for fd, event in poll.poll(end - now):
            if event == select.EPOLLOUT:
                socks[fd].send(REQUEST)
                poll.modify(fd, select.EPOLLIN)
                continue
            data = socks[fd].recv(65536)
            assert data, "the server closed a connection"
            replies[fd] += data
            if not (pid := _answerer(replies[fd])):
                continue
            replies[fd] = b""
            now = clock()
            if not latencies and first.total() < connections:
                first[pid] += 1
                if first.total() == connections:
                    end = now + seconds
                    for each, sock in socks.items():
                        sent[each] = clock()
                        sock.send(REQUEST)
                continue
            latencies.append(now - sent[fd])
            answered[pid] += 1
            sent[fd] = now
            socks[fd].send(REQUEST)
    assert latencies, f"{connections - first.total()} of {connections} connections have no answer"
    return {
        "first": first,
        "answered": answered,
        "p50": _percentile(latencies, 0.5),
        "p99": _percentile(latencies, 0.99),
    }


def once(port: int, connections: int, seconds: float) -> dict[str, Any]:
    """Connect for each request, so many at a time, as fast as servers close.

    The client ends after the server, with a reset, so that none of them keeps an entry in TIME_WAIT.

    Returns:
        How many connections each process has answered.
    """
    poll = select.epoll()
    socks: dict[int, socket.socket] = {}
    replies: dict[int, bytes] = {}
    answered: Counter[int] = Counter()

    def connect() -> None:
        sock = _connecting(port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socks[sock.fileno()] = sock
        replies[sock.fileno()] = b""
        poll.register(sock, select.EPOLLOUT)

    for _ in range(connections):
        connect()
    end = time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        for fd, event in poll.poll(end - now):
            if event == select.EPOLLOUT:
                socks[fd].send(CLOSE)
                poll.modify(fd, select.EPOLLIN)
            elif data := socks[fd].recv(65536):
                replies[fd] += data
            else:
                pid = _answerer(replies[fd])
                assert pid, "the server closed a connection"
                answered[pid] += 1
                socks.pop(fd).close()
                connect()
    return {"answered": answered}


def evenly(port: int, workers: int, each: int, rate: float) -> list[tuple[float, float]]:
    """Send requests as `kept` does, on randomly chosen connections of which every process has taken the same number.

    Connections are opened in bursts, and those beyond a process's number are closed. Prints a line when all are open.
    """
    taken: dict[int, list[socket.socket]] = {}
    end = time.monotonic() + TIMEOUT_S
    size = 0
    while len(taken) < workers or any(len(socks) < each for socks in taken.values()):
        assert time.monotonic() < end, f"connections come unevenly: {sorted(map(len, taken.values()))}"
        burst = [socket.create_connection(("127.0.0.1", port), TIMEOUT_S) for _ in range(BURST)]
        for sock in burst:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(REQUEST)
        for sock in burst:
            reply = b""
            while not (pid := _answerer(reply)):
                data = sock.recv(65536)
                assert data, "the server closed a connection"
                reply += data
            size = len(reply)
            if len(socks := taken.setdefault(pid, [])) < each:
                socks.append(sock)
            else:
                sock.close()
    print("armed", flush=True)
    return _asked([sock for socks in taken.values() for sock in socks], size, rate, takes_any=True)


def crowd(port: int, idle: int, websockets: int, rate: float) -> dict[str, int]:
    """Hold idle connections, and WebSockets that echo numbers in turn, until stdin ends; then use each once more.

    Prints a line when all are open.

    Returns:
        How many connections were closed, how many messages and last requests had no answer, how many had one.
    """
    poll = select.epoll()
    socks: dict[int, socket.socket] = {}
    for _ in range(idle):
        sock, _ = connected(port, REQUEST, NAMED)
        socks[sock.fileno()] = sock
    turns: deque[int] = deque()
    for _ in range(websockets):
        sock, reply = connected(port, UPGRADE, b"\r\n\r\n")
        assert reply.startswith(b"HTTP/1.1 101 "), reply
        socks[sock.fileno()] = sock
        turns.append(sock.fileno())
    talking = frozenset(turns)
    for fd in (*socks, 0):
        poll.register(fd, select.EPOLLIN)
    awaited: dict[int, bytes] = {}  # how the answer ends
    received: dict[int, bytes] = {}
    found = {"closed": 0, "lost": 0, "answered": 0}

    def gone(fd: int) -> None:
        poll.unregister(fd)
        socks.pop(fd).close()
        found["closed"] += 1
        if awaited.pop(fd, None) is not None:
            found["lost"] += 1

    def ask(fd: int, number: int) -> None:
        payload = number.to_bytes(8)
        awaited[fd], received[fd] = (b"\x82\x08" + payload if fd in talking else NAMED), b""
        try:
            socks[fd].send(b"\x82\x88\0\0\0\0" + payload if fd in talking else REQUEST)
        except OSError:
            gone(fd)

    print("armed", flush=True)
    began, count = time.monotonic(), 0
    end: float | None = None
    while end is None or (awaited and time.monotonic() < end):
        due = began + count / rate
        if end is None and time.monotonic() >= due:
            count += 1
            fd = turns[0]
            turns.rotate(-1)
            if fd in socks and fd not in awaited:
                ask(fd, count)
            continue
        # select has microseconds where epoll_wait has milliseconds
        select.select([poll], [], [], max(0.0, (due if end is None else end) - time.monotonic()))
        for fd, _ in poll.poll(0):
            if fd == 0:
                poll.unregister(0)
                end = time.monotonic() + CHURN_TIMEOUT_S
                for number, each in enumerate(socks.keys() - awaited.keys()):
                    ask(each, count + number)
                continue
            if fd not in socks:
                continue
            try:
                data = socks[fd].recv(65536)
            except OSError:
                data = b""
            if not data or fd not in awaited:  # nobody has asked: it is a farewell
                gone(fd)
                continue
            received[fd] += data
            if received[fd].endswith(awaited[fd]):
                del awaited[fd]
                found["answered"] += 1
    found["lost"] += len(awaited)
    return found


def _fate(sock: socket.socket) -> str:
    try:
        return "answered" if sock.recv(1) else "lost"
    except ConnectionRefusedError:
        return "refused"
    except ConnectionResetError:
        return "reset"


def _percentile(values: list[float], share: float) -> float:
    """In milliseconds, by the nearest rank."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1000


CLIENTS: Final[dict[str, Callable[..., Any]]] = {
    "websocket": websocket,
    "paced": paced,
    "held": held,
    "kept": kept,
    "churn": churn,
    "anew": anew,
    "arrivals": arrivals,
    "together": together,
    "once": once,
    "evenly": evenly,
    "crowd": crowd,
}


if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # hundreds of open connections need no farewell
