"""Hostile clients, and a polite one beside them; each is a process of its own that prints JSON.

What a hostile client does is data, a `Foe`: bytes that it says first, bytes that it says over and over, how many of
them a second, and whether it reads. So all of them are one loop, which wakes every few milliseconds and lets each
connection send what it is due; that leaves a processor to the polite client.

Sources: RFC 6455 section 5.2, RFC 7692 section 7.2.1, RFC 9112 section 7.1.
"""

from __future__ import annotations

import json
import os
import select
import socket
import ssl
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["FOES", "Foe"]

TICK_S: Final = 0.005

#: What one hostile client sends a second at most, in bytes: a fast line, not a loopback interface.
RATE_MAX: Final = 16 << 20

PIECE: Final = 65536

#: A hostile client that was cut comes again after so many seconds.
AGAIN_S: Final = 0.25

#: Of a client that does not read, in bytes; the kernel doubles it.
UNREAD: Final = 4096

#: When the part of the time is over in which `Foe.then` and `Foe.again` are said, and `Foe.last` follows.
LAST: Final = 0.6

POLITE_CONNECTIONS: Final = 16

#: How long the polite client waits for the last answers, and for a connection.
TIMEOUT_S: Final = 2.0

HOST: Final = b"Host: a\r\n"
REQUEST: Final = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"
CHUNKED: Final = b"POST /sink HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"

#: How the answer to `REQUEST` ends.
HELLO: Final = b"Hello, world!"


def upgrade(path: str, *, deflates: bool = False) -> bytes:
    """A WebSocket handshake."""
    extension = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n" if deflates else ""
    return (
        f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{extension}\r\n"
    ).encode()


def frame(first: int, data: bytes = b"") -> bytes:
    """A client's frame, masked with zeros."""
    size = len(data)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    return bytes([first]) + length + bytes(4) + data


def deflated(*contents: bytes) -> bytes:
    """Compressed messages, each with what came before as its context."""
    deflater = zlib.compressobj(9, wbits=-12)
    return b"".join(
        frame(0xC2, (deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]) for data in contents
    )


def client_hello() -> bytes:
    """What a TLS client says first."""
    out = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        _tls().wrap_bio(ssl.MemoryBIO(), out).do_handshake()
    return out.read()


@dataclass(frozen=True, slots=True, kw_only=True)
class Foe:
    """One kind of hostile client. One that is cut comes again.

    Attributes:
        what: What one of them does.
        clients: How many there are.
        first: Makes the bytes that each connection says first.
        awaits: How the reply to that begins, if it waits for one.
        needs: Has to be in the head of that reply.
        then: Said once, after the reply.
        again: Makes the bytes that follow, over and over.
        rate: How many of them a second.
        piece: Bytes of one write, and so of a segment or a TLS record.
        last: Said when most of the time is over.
        reads: It takes what comes; otherwise its receive buffer is small, too.
        loops: It ends with a reset when it has another reply, and comes again at once.
        tls: To a server with TLS: ``"spoken"``, or ``"raw"``: these bytes are not to be encrypted.
        allowed: What hotport's options or the application itself allow one client beside the rest, in bytes.
    """

    what: str
    clients: int
    first: Callable[[], bytes] = bytes
    awaits: bytes = b""
    needs: bytes = b""
    then: bytes = b""
    again: Callable[[], bytes] = bytes
    rate: float = RATE_MAX
    piece: int = PIECE
    last: bytes = b""
    reads: bool = True
    loops: bool = False
    tls: str = ""
    allowed: int = 0


def _fields() -> bytes:
    line = b"GET /slow HTTP/1.1\r\n" + HOST
    return line + b"a:\r\n" * ((65_000 - len(line)) // 4) + b"\r\n"


def _websocket(what: str, path: str = "/sink", *, clients: int = 4, deflates: bool = False, **more: Any) -> Foe:
    return Foe(
        what=what,
        clients=clients,
        first=lambda: upgrade(path, deflates=deflates),
        awaits=b"HTTP/1.1 101",
        needs=b"permessage-deflate" if deflates else b"",
        **more,
    )


FOES: Final[dict[str, Foe]] = {
    "fields": Foe(
        what="heads of 64 KiB in fields of 4 bytes, for a slow application", clients=20, again=_fields, piece=50_000
    ),
    "pipelined": Foe(
        what="requests of 31 bytes without waiting, for a slow application",
        clients=20,
        again=lambda: b"GET /slow HTTP/1.1\r\n" + HOST + b"\r\n",
    ),
    "trickled": Foe(
        what="a head that comes 20 bytes a second",
        clients=200,
        first=lambda: b"GET / HTTP/1.1\r\n" + HOST,
        again=lambda: b"a" * 64,
        rate=20,
        piece=1,
    ),
    "bytes": Foe(what="requests in segments of a byte", clients=8, again=lambda: REQUEST, rate=2000, piece=1),
    "extensions": Foe(
        what="a chunk extension that does not end",
        clients=20,
        first=lambda: CHUNKED + b"5;",
        again=lambda: b"a" * PIECE,
    ),
    "trailers": Foe(
        what="trailers that do not end",
        clients=20,
        first=lambda: CHUNKED + b"0\r\n",
        again=lambda: b"a: b\r\n" * 10_000,
    ),
    "chunks": Foe(
        what="a body in chunks of a byte", clients=8, first=lambda: CHUNKED, again=lambda: b"1\r\nx\r\n" * 10_000
    ),
    "chunks, slow": Foe(
        what="likewise, for a slow application",
        clients=8,
        first=lambda: CHUNKED.replace(b"/sink", b"/slow"),
        again=lambda: b"1\r\nx\r\n" * 10_000,
    ),
    "head": Foe(what="HEAD without waiting", clients=4, again=lambda: b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "unread": Foe(what="GET without waiting, reads no answer", clients=20, again=lambda: REQUEST, reads=False),
    "upgrades": Foe(
        what="upgrades to an unknown protocol without waiting",
        clients=4,
        again=lambda: (
            b"POST / HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: x\r\nContent-Length: 1\r\n\r\nx"
        ),
    ),
    "big": Foe(
        what="asks for 10 MiB, which the application makes in one piece, and stops reading",
        clients=40,
        first=lambda: REQUEST.replace(b"/", b"/big", 1),
        reads=False,
        allowed=10 << 20,
    ),
    "big, pieces": Foe(
        what="likewise, in pieces of 64 KiB",
        clients=40,
        first=lambda: REQUEST.replace(b"/", b"/pieces", 1),
        reads=False,
    ),
    "body": Foe(
        what="a body that comes a byte a second",
        clients=200,
        first=lambda: b"POST /sink HTTP/1.1\r\n" + HOST + b"Content-Length: 1000000\r\n\r\n",
        again=lambda: b"a",
        rate=1,
        piece=1,
    ),
    "inflate, slow": _websocket(
        "WebSocket: 16 KiB that inflate to 16 MiB, for a slow application",
        "/slow",
        clients=1,
        deflates=True,
        again=lambda: deflated(bytes(16_000_000)),
        rate=3 << 20,
        allowed=16 << 20,
    ),
    "inflate": _websocket(
        "likewise at 413 KiB/s, for one that takes everything",
        clients=1,
        deflates=True,
        again=lambda: deflated(bytes(16_000_000)),
        rate=413 << 10,
        allowed=16 << 20,
    ),
    "context": _websocket(
        "compressed messages with context takeover, echoed",
        "/echo",
        clients=100,
        deflates=True,
        again=lambda: deflated(*[os.urandom(3000)] * 20),
        rate=5000,
    ),
    "echoes unread": _websocket(
        "asks for echoes of 64 KiB, reads none, says close",
        "/echo",
        clients=20,
        again=lambda: frame(0x82, bytes(PIECE)),
        last=frame(0x88, b"\x03\xe8"),
        reads=False,
    ),
    "pings unread": _websocket("pings, reads no pong", again=lambda: frame(0x89, bytes(125)) * 500, reads=False),
    "pings": _websocket("empty pings", again=lambda: frame(0x89) * 10_000),
    "pongs": _websocket("empty pongs", again=lambda: frame(0x8A) * 10_000),
    "continuations": _websocket("a message of empty fragments", then=frame(0x01), again=lambda: frame(0x00) * 10_000),
    "fragments": _websocket(
        "a message of fragments of a byte", then=frame(0x01), again=lambda: frame(0x00, b"a") * 10_000
    ),
    "texts": _websocket("texts of a byte", again=lambda: frame(0x81, b"a") * 10_000),
    "texts, slow": _websocket("likewise, for a slow application", "/slow", again=lambda: frame(0x81, b"a") * 10_000),
    "binaries": _websocket("empty binary messages", again=lambda: frame(0x82) * 10_000),
    "closes": _websocket("handshake, close, over and over", clients=16, then=frame(0x88, b"\x03\xe8"), loops=True),
    "reserved": _websocket("handshake, a reserved opcode, over and over", clients=16, then=frame(0x83), loops=True),
    "hellos": Foe(
        what="TLS: a ClientHello, takes the answer, over and over",
        clients=16,
        first=client_hello,
        loops=True,
        tls="raw",
    ),
    "half hellos": Foe(what="half a ClientHello", clients=200, first=lambda: client_hello()[:100], tls="raw"),
    "records": Foe(
        what="requests in records of a byte", clients=8, again=lambda: REQUEST, rate=1000, piece=1, tls="spoken"
    ),
}


class _Crowd:
    """All clients of one kind.

    Attributes:
        sent: Bytes.
        made: Connections.
        ended: Those that the server ended.
        unlike: The first line of a reply that was not what they need; they do nothing then.
    """

    def __init__(self, port: int, foe: Foe, seconds: float) -> None:
        self.port = port
        self.foe = foe
        self.seconds = seconds
        self.first, again = foe.first(), foe.again()
        self.again = again * max(1, foe.piece // len(again)) if again else b""  # so that writes are as long as they may
        self.poll = select.epoll()
        self.by_fd: dict[int, _Client] = {}
        self.clients = [_Client(self) for _ in range(foe.clients)]
        self.sent = self.made = self.ended = 0
        self.unlike = ""
        self.is_late = False

    def run(self) -> None:
        """Be hostile for so many seconds; connections stay open."""
        begin = due = time.monotonic()
        end, late = begin + self.seconds, begin + LAST * self.seconds
        while (now := time.monotonic()) < end:
            if now >= due:
                self.is_late = now >= late
                due = max(due + TICK_S, now)
                for client in self.clients:
                    client.tick(now)
            for fd, event in self.poll.poll(max(0.0, due - time.monotonic())):
                if client_ := self.by_fd.get(fd):
                    client_.on_event(event)


class _Client:
    """One hostile client; it has one connection at a time."""

    def __init__(self, crowd: _Crowd) -> None:
        self.crowd = crowd
        self.sock: socket.socket | None = None
        self.tls: ssl.SSLObject | None = None
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.again_at = 0.0

    def connect(self) -> None:
        crowd, foe = self.crowd, self.crowd.foe
        self.sock = sock = socket.socket()
        if not foe.reads:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if foe.loops:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", crowd.port))  # an error shows when it is used
        crowd.poll.register(sock, select.EPOLLIN if foe.reads or foe.awaits else select.EPOLLRDHUP)
        crowd.by_fd[sock.fileno()] = self
        crowd.made += 1
        self.begun = 0.0
        self.at = self.said = 0  # in `again`, and of it in all
        self.reply = b""
        self.is_waiting, self.is_unlike, self.has_said_last = bool(foe.awaits), False, False
        self.pending = crowd.first if foe.tls != "spoken" else b""  # as it goes over the wire
        if foe.tls == "spoken":
            self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self.tls = _tls().wrap_bio(self.incoming, self.outgoing)
            self.is_waiting = True
            self.shake_hands()

    def shake_hands(self) -> None:
        assert self.tls is not None
        with suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
            self.is_waiting = False
        self.pending += self.outgoing.read()

    def end(self, again_s: float) -> None:
        """Let go of the connection, and have another one after so many seconds."""
        if self.sock is not None:
            del self.crowd.by_fd[self.sock.fileno()]
            self.sock.close()
            self.sock = None
        self.again_at = time.monotonic() + again_s

    def tick(self, now: float) -> None:
        """Send what is due."""
        if self.sock is None:
            if now < self.again_at:
                return
            self.connect()
        try:
            self.send(now)
        except BlockingIOError:
            pass
        except OSError:
            self.crowd.ended += 1
            self.end(AGAIN_S)

    def send(self, now: float) -> None:
        crowd, foe, sock = self.crowd, self.crowd.foe, self.sock
        assert sock is not None
        while self.pending:
            self.pending = self.pending[sock.send(self.pending) :]
        if self.is_waiting or self.is_unlike:
            return
        if crowd.is_late and foe.last:
            if not self.has_said_last and self.at == 0:
                self.has_said_last = True
                self.pending = foe.last
            if self.has_said_last:
                return
        if not crowd.again:
            return
        self.begun = self.begun or now
        while (due := int(foe.rate * (now - self.begun)) - self.said) > 0:
            size = min(foe.piece, due, len(crowd.again) - self.at)
            data = crowd.again[self.at : self.at + size]
            if self.tls is not None:
                self.tls.write(data)
                self.pending = self.outgoing.read()
                self.note(size)
                while self.pending:
                    self.pending = self.pending[sock.send(self.pending) :]
            else:
                self.note(sock.send(data))

    def note(self, size: int) -> None:
        self.said += size
        self.crowd.sent += size
        self.at = (self.at + size) % len(self.crowd.again)

    def on_event(self, event: int) -> None:
        """Something has come, or the server has ended it."""
        assert self.sock is not None
        try:
            data = self.sock.recv(PIECE) if event & select.EPOLLIN else b""
        except BlockingIOError:
            return
        except OSError:
            data = b""
        foe = self.crowd.foe
        if not data:
            self.crowd.ended += 1
            self.end(0.0 if foe.loops else AGAIN_S)
        elif self.tls is not None:
            if self.is_waiting:
                self.incoming.write(data)
                self.shake_hands()
        elif self.is_waiting:
            self.reply += data
            if b"\r\n\r\n" in self.reply:
                self.on_reply()
        elif foe.loops:
            self.end(0.0)

    def on_reply(self) -> None:
        crowd, foe = self.crowd, self.crowd.foe
        head = self.reply.partition(b"\r\n\r\n")[0]
        self.is_waiting = False
        self.pending = foe.then
        if not head.startswith(foe.awaits) or foe.needs not in head:
            self.is_unlike = True
            crowd.unlike = head.partition(b"\r\n")[0].decode("latin-1")
        if not foe.reads:
            assert self.sock is not None
            crowd.poll.modify(self.sock, select.EPOLLRDHUP)


def hostile(port: int, name: str, seconds: float) -> dict[str, Any]:
    """Wait for a line, be hostile for so many seconds, and keep the connections until stdin ends.

    Returns:
        Before that: bytes that were sent, connections that were made, those that the server ended, and with what it
        replied if that was not what is needed.
    """
    os.nice(10)  # the polite client shares its core
    crowd = _Crowd(port, FOES[name], seconds)
    print("armed", flush=True)
    sys.stdin.readline()
    crowd.run()
    told = {"sent": crowd.sent, "made": crowd.made, "ended": crowd.ended, "unlike": crowd.unlike}
    print(json.dumps(told), flush=True)
    sys.stdin.read()
    return {}


def polite(port: int, rate: float, tls: bool) -> list[tuple[float, float, bool]]:
    """Send requests on kept connections when they are due, whatever became of the earlier ones, until stdin ends.

    Returns:
        Of each request: when it was due (CLOCK_MONOTONIC), how many seconds later its answer had come, or it was given
        up, and whether there was one.
    """
    if os.sched_getscheduler(0) == os.SCHED_FIFO:
        os.sched_setparam(0, os.sched_param(2))  # before the hostile clients, which share its core
    clock = time.monotonic
    poll = select.epoll()
    poll.register(0, select.EPOLLIN)
    socks: dict[int, socket.socket] = {}
    asked: dict[int, tuple[float, bytes]] = {}
    free: deque[int] = deque()
    missing = POLITE_CONNECTIONS
    found: list[tuple[float, float, bool]] = []

    def connect() -> None:
        sock = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock = _tls().wrap_socket(sock) if tls else sock
        sock.setblocking(False)
        socks[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
        free.append(sock.fileno())

    def lose(fd: int) -> None:
        nonlocal missing
        missing += 1
        socks.pop(fd).close()
        if fd in free:
            free.remove(fd)
        if fd in asked:
            due, _ = asked.pop(fd)
            found.append((due, clock() - due, False))

    while missing:
        connect()
        missing -= 1
    print("armed", flush=True)
    began, count, ended = clock(), 0, float("inf")
    while ended == float("inf") or (asked and clock() < ended + TIMEOUT_S):
        due = began + count / rate
        if ended == float("inf") and clock() >= due and (free or missing):
            if not free:
                try:
                    connect()
                except OSError:
                    found.append((due, clock() - due, False))
                    count += 1
                    continue
                missing -= 1
            fd = free.popleft()
            count += 1
            asked[fd] = due, b""
            try:
                socks[fd].send(REQUEST)
            except OSError:
                lose(fd)
            continue
        # select has microseconds where epoll_wait has milliseconds
        select.select([poll], [], [], max(0.0, due - clock()) if ended == float("inf") and free else 0.1)
        for fd, _ in poll.poll(0):
            if fd == 0:
                poll.unregister(0)
                ended = clock()
                continue
            try:
                data = socks[fd].recv(PIECE)
            except (BlockingIOError, ssl.SSLWantReadError):
                continue
            except OSError:
                data = b""
            if not data or fd not in asked:
                lose(fd)
                continue
            due, reply = asked[fd]
            asked[fd] = due, reply + data
            if (reply + data).endswith(HELLO):
                del asked[fd]
                found.append((due, clock() - due, True))
                free.append(fd)
    return found + [(due, clock() - due, False) for due, _ in asked.values()]


def _tls() -> ssl.SSLContext:
    """Trusts anything."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


CLIENTS: Final[dict[str, Callable[..., Any]]] = {"hostile": hostile, "polite": polite}


if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # hundreds of open connections need no farewell
