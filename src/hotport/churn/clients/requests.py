"""Clients that ask and get one answer: on a new connection each time, or on one that they keep."""

from __future__ import annotations

import errno
import random
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from hotport.churn.answers import AnswerError, AnswerReader, HttpReader, LineReader
from hotport.churn.classify import Happening, Stage, happening_of
from hotport.churn.clients.crowd import Attempt, Crowd, OwnLimit, Site
from hotport.churn.fates import Event, Kind
from hotport.churn.plan import Plan
from hotport.churn.result import Load, Target
from hotport.churn.schedule import gap_ns

__all__ = ["Asker", "AskerCrowd", "asker_crowd", "host_of"]

_READ: Final = 65536
_GONE: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_POOL: Final = 64
_UPLOAD_STEPS: Final = 20
_AFTER_FAILURE_NS: Final = 10_000_000
_BACKLOG_NS: Final = 2_000_000
_FINE: Final = (0, errno.EINPROGRESS)

#: What is sent, each part so many nanoseconds after the one before.
Script = Sequence[tuple[int, bytes]]


class Asker:
    """One connection, on which one request at a time is under way."""

    __slots__ = (
        "_attempt",
        "_broken",
        "_crowd",
        "_has_been_open",
        "_is_open",
        "_is_used",
        "_part",
        "_reader",
        "_rest",
        "_sent",
        "_sock",
    )

    def __init__(self, crowd: AskerCrowd) -> None:
        self._crowd = crowd
        self._reader = crowd.new_reader()
        self._sock: socket.socket | None = None
        self._attempt: Attempt | None = None
        self._is_open = False
        self._has_been_open = False
        #: The connection has carried an answer.
        self._is_used = False
        self._broken: OSError | None = None

    def begin(self, attempt: Attempt) -> None:
        """Ask; on the connection that is there, if it is."""
        if self._sock is not None:
            self._receive(0)  # it may have ended a moment ago: who knows that does not send on it
        attempt.client = self
        self._attempt = attempt
        self._sent = self._part = 0
        self._rest = b""
        self._reader.start()
        if self._sock is None:
            self._connect(attempt)
        else:
            self._send_part(attempt)

    def give_up(self, attempt: Attempt) -> None:
        self._fail(Happening.OVERDUE, "")

    @property
    def _stage(self) -> Stage:
        if self._attempt is None:
            return Stage.IDLE
        if not self._is_open:
            return Stage.CONNECTING
        if self._reader.has_begun:
            return Stage.ANSWERING
        if not self._sent:
            return Stage.CONNECTED
        return Stage.PARTLY_SENT if self._rest or self._part < len(self._crowd.script) else Stage.SENT

    def _connect(self, attempt: Attempt) -> None:
        if self._attempt is not attempt:
            return
        self._is_used = False
        self._broken = None
        try:
            sock, number = self._crowd.open()
        except OwnLimit as limit:
            self._attempt = None
            self._crowd.drop(attempt, limit)
            self._crowd.next(self, failed=True)
            return
        if number == errno.EAGAIN:
            sock.close()
            self._crowd.call_in(_BACKLOG_NS, self._connect, attempt)
        elif number in _FINE:
            self._sock = sock
            self._crowd.site.connections += 1
            self._crowd.site.loop.watch(sock.fileno(), self._on_connecting)
        else:
            sock.close()
            self._fail(happening_of(number), errno.errorcode.get(number, ""))

    def _on_connecting(self, mask: int) -> None:
        assert self._sock is not None
        if mask & (select.EPOLLERR | select.EPOLLHUP):
            number = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                self._fail(happening_of(number), errno.errorcode.get(number, ""))
                return
        elif not mask & select.EPOLLOUT:
            return
        self._is_open = True
        fd = self._sock.fileno()
        tls = self._crowd.site.address.tls
        if tls is None:
            self._crowd.site.loop.rewatch(fd, self._on_event)
            self._ready(mask)
            return
        try:
            self._sock = tls.wrap_socket(
                self._sock,
                server_hostname=self._crowd.site.address.tls_name or None,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
            )
        except (OSError, ValueError) as error:  # it has been reset in this very moment
            self._fail(Happening.RESET, str(error))
            return
        self._crowd.site.loop.rewatch(fd, self._on_handshake)
        self._on_handshake(mask)

    def _on_handshake(self, mask: int) -> None:
        assert isinstance(self._sock, ssl.SSLSocket)
        try:
            self._sock.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            self._fail(Happening.ENDED, "in the TLS handshake")
            return
        except OSError as error:
            self._fail(_happening(error), f"in the TLS handshake: {_detail(error)}")
            return
        self._crowd.site.loop.rewatch(self._sock.fileno(), self._on_event)
        self._ready(mask)

    def _ready(self, mask: int) -> None:
        """The connection is made."""
        if self._has_been_open and self._crowd.keeps:
            self._crowd.event(Event.RECONNECTED)
        self._has_been_open = True
        if mask & _GONE:
            self._receive(mask)
        attempt = self._attempt
        if self._sock is not None and attempt is not None:
            self._crowd.call_in(self._crowd.script[0][0], self._send_part, attempt)

    def _send_part(self, attempt: Attempt) -> None:
        if self._attempt is not attempt:
            return
        self._rest += self._crowd.script[self._part][1]
        self._part += 1
        self._send()
        if self._attempt is attempt and self._part < len(self._crowd.script):
            self._crowd.call_in(self._crowd.script[self._part][0], self._send_part, attempt)

    def _send(self) -> None:
        assert self._sock is not None
        while self._rest:
            try:
                count = self._sock.send(self._rest)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError as error:
                # Why, and perhaps an answer, is still to be read.
                self._broken = error
                self._receive(select.EPOLLERR)
                return
            self._sent += count
            self._rest = self._rest[count:]

    def _on_event(self, mask: int) -> None:
        if mask & ~select.EPOLLOUT:
            self._receive(mask)
        if self._attempt is not None and self._rest and self._sock is not None:
            self._send()

    def _receive(self, mask: int) -> None:
        while self._sock is not None:
            try:
                data = self._sock.recv(_READ)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except ssl.SSLEOFError:
                self._end(is_clean=False)
                return
            except OSError as error:
                self._fail(_happening(error), _detail(error))
                return
            if not data:
                self._end(is_clean=True)
                return
            self._feed(data)
            if len(data) < _READ and not mask & _GONE and self._crowd.site.address.tls is None:
                return

    def _feed(self, data: bytes) -> None:
        if self._attempt is None:
            self._fail(Happening.WRONG, "")
            return
        try:
            is_whole = self._reader.feed(data)
        except AnswerError as error:
            self._fail(Happening.WRONG, str(error))
            return
        if is_whole:
            self._finish()

    def _end(self, *, is_clean: bool) -> None:
        if is_clean and self._attempt is not None and self._reader.has_begun and self._reader.end():
            self._finish()
        elif self._broken is not None:
            self._fail(_happening(self._broken), _detail(self._broken))
        else:
            self._fail(Happening.ENDED, "")

    def _finish(self) -> None:
        """The answer is whole."""
        crowd = self._crowd
        reader = self._reader
        if not crowd.is_expected(reader.status):
            self._fail(Happening.WRONG, str(reader.status))
            return
        attempt = self._attempt
        assert attempt is not None
        assert self._sock is not None
        is_all_sent = not self._rest and self._part == len(crowd.script)
        self._attempt = None
        crowd.answered(attempt, reader.who, is_new=not self._is_used)
        self._is_used = True
        if not reader.keeps_open or not crowd.keeps or not is_all_sent:
            if crowd.keeps and not reader.keeps_open:
                crowd.event(Event.TOLD_TO_CLOSE)
            self._close(politely=not reader.keeps_open)
        crowd.next(self, failed=False)

    def _fail(self, happening: Happening, detail: str) -> None:
        stage = self._stage
        attempt, self._attempt = self._attempt, None
        self._close()
        if attempt is None:
            self._crowd.event(Event.IDLE_CLOSE)
        else:
            self._crowd.happen(attempt, stage, happening, detail or stage.value)
            self._crowd.next(self, failed=True)

    def _close(self, *, politely: bool = False) -> None:
        if self._sock is not None:
            sock, self._sock = self._sock, None
            self._is_open = False
            self._crowd.site.connections -= 1
            loop = self._crowd.site.loop
            (loop.leave if politely else loop.close)(sock)


class AskerCrowd(Crowd):
    """Clients that ask.

    Args:
        script: Of each request.
        keeps: Whether connections are kept for the next request.
    """

    def __init__(self, site: Site, kind: Kind, load: Load, rng: random.Random, script: Script, *, keeps: bool) -> None:
        super().__init__(site, kind, load, rng, waits_ms=sum(delay for delay, _ in script) / 1e6)
        self.script = script
        self.keeps = keeps
        self._starts = self.arrivals() if load.rate else iter(())
        self._free: list[Asker] = []
        self._pool_left = load.count or _POOL
        self._waiting: deque[Attempt] = deque()
        target = site.plan.target
        self._is_http = target.is_http
        header = site.plan.generation_header.encode()
        self.new_reader: partial[AnswerReader] | type[LineReader] = (
            partial(HttpReader, header) if target.is_http else LineReader
        )

    def is_expected(self, status: int) -> bool:
        """Whether it is the right answer."""
        return not self._is_http or status == self.site.plan.expected_status

    def call_in(self, delay_ns: int, call: Callable[[Attempt], None], attempt: Attempt) -> None:
        """Go on with an attempt, if it is still under way then."""
        if delay_ns:
            self.site.loop.call_at(time.monotonic_ns() + delay_ns, call, attempt)
        else:
            call(attempt)

    def start(self) -> None:
        if self.load.rate:
            self._arrive_at(next(self._starts, None))
        else:
            for intended_ns in self.ramp(self.load.count):
                self._ask_at(intended_ns, Asker(self))

    def next(self, asker: Asker, *, failed: bool) -> None:
        """An asker has nothing to do any more."""
        if self.load.rate:
            if self.keeps:
                self._free.append(asker)
                if self._waiting:  # not from within: many could fail at once
                    self.site.loop.call_at(0, self._hand_out, None)
            return
        now = time.monotonic_ns()
        pause = gap_ns(self.load.think_ms, self.rng)
        self._ask_at(now + (max(pause, _AFTER_FAILURE_NS) if failed else pause), asker)

    def _ask_at(self, intended_ns: int, asker: Asker) -> None:
        if intended_ns < self.site.end_ns:
            self.site.loop.call_at(intended_ns, self._ask, (intended_ns, asker))

    def _ask(self, intended: tuple[int, Asker]) -> None:
        intended_ns, asker = intended
        asker.begin(self.new_attempt(intended_ns))

    def _arrive_at(self, intended_ns: int | None) -> None:
        if intended_ns is not None:
            self.site.loop.call_at(intended_ns, self._arrive, intended_ns)

    def _arrive(self, intended_ns: int) -> None:
        self._arrive_at(next(self._starts, None))
        attempt = self.new_attempt(intended_ns)
        if self.keeps:
            self._waiting.append(attempt)
            self._hand_out(None)
        else:
            Asker(self).begin(attempt)

    def _hand_out(self, _: None) -> None:
        """Give waiting attempts to free askers; the one that was used last first."""
        while self._waiting and (self._free or self._pool_left):
            attempt = self._waiting.popleft()
            if attempt not in self.under_way:
                continue  # it was overdue
            if self._free:
                asker = self._free.pop()
            else:
                self._pool_left -= 1
                asker = Asker(self)
            asker.begin(attempt)


def asker_crowd(site: Site, kind: Kind, load: Load, rng: random.Random) -> AskerCrowd:
    """The crowd for every kind that asks."""
    plan = site.plan
    keeps = kind is Kind.KEEPALIVE or (kind is Kind.TLS and load.count > 0)
    return AskerCrowd(site, kind, load, rng, _script(plan, kind, keeps=keeps), keeps=keeps)


def _script(plan: Plan, kind: Kind, *, keeps: bool) -> Script:
    slow_ns = int(plan.slow_ms * 1e6)
    path = {Kind.SLOW: plan.slow_path, Kind.UPLOAD: plan.upload_path}.get(kind, plan.path)
    fields = [("Host", host_of(plan.target)), ("User-Agent", "hotport-churn")]
    if not keeps:
        fields.append(("Connection", "close"))
    if kind is Kind.UPLOAD:
        fields.append(("Content-Length", str(plan.upload_bytes)))
    method = "POST" if kind is Kind.UPLOAD else "GET"
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields), "", ""]
    head = "\r\n".join(lines).encode() if plan.target.is_http else b"hello\n"
    if kind is Kind.LATE:
        return [(slow_ns, head)]
    if kind is Kind.HALFHEAD:
        middle = len(head) // 2
        return [(0, head[:middle]), (slow_ns, head[middle:])]
    if kind is Kind.UPLOAD:
        size = -(-plan.upload_bytes // _UPLOAD_STEPS)
        sizes = [min(size, plan.upload_bytes - at) for at in range(0, plan.upload_bytes, size)]
        body = bytes(size)
        return [(0, head), *((slow_ns // len(sizes), body[:part]) for part in sizes)]
    return [(0, head)]


def host_of(target: Target) -> str:
    """What goes into Host."""
    if target.socket_path:
        return "localhost"
    host = f"[{target.host}]" if ":" in target.host else target.host
    return f"{host}:{target.port}"


def _happening(error: OSError) -> Happening:
    # The numbers of TLS errors are OpenSSL's own.
    return Happening.RESET if isinstance(error, ssl.SSLError) else happening_of(error.errno or 0)


def _detail(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS"
    return errno.errorcode.get(error.errno or 0, str(error))
