"""Clients that wrk is not: WebSocket messages, requests and connections at a fixed rate.

Each is a process of its own that prints JSON, and small enough not to be what is measured: raw sockets, one epoll
instance, requests and frames that were built before, replies whose size is known.

`hotport churn` has none of these: its engine keeps to a schedule where `websocket` goes as fast as the server, sleeps
where `paced` does not, and counts in buckets where `churn` has the microsecond of each connection.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

__all__ = ["CLIENTS", "connected"]

TIMEOUT_S: Final = 30.0

#: A connection that has no answer by then is lost.
CHURN_TIMEOUT_S: Final = 5.0

REQUEST: Final = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

#: How the reply to `REQUEST` ends.
HELLO: Final = b"\r\n\r\nHello, world!"

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

    All connections take turns. A request for which none is free waits for one.

    Returns:
        Of each request: when it was due (CLOCK_MONOTONIC), and how many seconds later its answer had come.
    """
    clock = time.monotonic
    poll = select.epoll()
    socks: dict[int, socket.socket] = {}
    for _ in range(connections):
        sock, reply = connected(port, REQUEST, b"world!")
        socks[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    poll.register(0, select.EPOLLIN)
    size = len(reply)
    free = deque(socks)
    received = dict.fromkeys(socks, 0)
    dues: dict[int, float] = {}
    latencies: list[tuple[float, float]] = []
    began, count, is_over = clock(), 0, False
    while dues or not is_over:
        due = began + count / rate
        if free and not is_over and clock() >= due:
            fd = free.popleft()
            socks[fd].send(REQUEST)
            dues[fd] = due
            count += 1
            continue
        # select has microseconds where epoll_wait has milliseconds
        select.select([poll], [], [], max(0.0, due - clock()) if free and not is_over else TIMEOUT_S)
        for fd, _ in poll.poll(0):
            if fd == 0:
                poll.unregister(0)
                is_over = True
                continue
            data = socks[fd].recv(65536)
            assert data, "the server closed a connection"
            received[fd] += len(data)
            if received[fd] == size:
                received[fd] = 0
                due = dues.pop(fd)
                latencies.append((due, clock() - due))
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
}


if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # hundreds of open connections need no farewell
