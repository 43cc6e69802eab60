"""Clients that send requests: on a new connection each time, or on one that they keep."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from hotport.churn.answers import AnswerError, AnswerReader, HttpReader, LineReader
from hotport.churn.classify import Happening, Stage
from hotport.churn.clients.connection import Connection
from hotport.churn.clients.crowd import POOL, Attempt, Crowd, OwnLimit, Site, host_of
from hotport.churn.fates import ConnectionEvent, Kind
from hotport.churn.plan import Plan
from hotport.churn.result import Load
from hotport.churn.schedule import gap_ns

__all__ = ["Asker", "AskerCrowd", "asker_crowd", "script_of"]

_UPLOAD_STEPS: Final = 20
_AFTER_FAILURE_NS: Final = 10_000_000

#: What is sent, each part so many nanoseconds after the one before.
Script = Sequence[tuple[int, bytes]]


class Asker(Connection):
    """One connection with one request at a time."""

    __slots__ = ("_attempt", "_crowd", "_part", "_reader", "_sent")

    def __init__(self, crowd: AskerCrowd) -> None:
        super().__init__(crowd)
        self._crowd = crowd
        self._reader = crowd.new_reader()
        self._attempt: Attempt | None = None
        self._sent = self._part = 0

    def begin(self, attempt: Attempt) -> None:
        """Send the request, on the open connection if there is one."""
        self.look()
        attempt.client = self
        self._attempt = attempt
        self._sent = self._part = 0
        if self._reader.has_begun:
            self._reader.start()
        if self.sock is None:
            self.connect()
        else:
            self._send_part(attempt)

    def give_up(self, attempt: Attempt) -> None:
        self.failed(Happening.OVERDUE, "")

    @property
    def _stage(self) -> Stage:
        if self._attempt is None:
            return Stage.IDLE
        if not self.is_made:
            return Stage.CONNECTING
        if self._reader.has_begun:
            return Stage.ANSWERING
        if not self._sent:
            return Stage.CONNECTED
        return Stage.SENT if self._is_all_sent else Stage.PARTLY_SENT

    @property
    def _is_all_sent(self) -> bool:
        return not self.rest and self._part == len(self._crowd.script)

    def made(self) -> None:
        if self._attempt is not None:
            self._crowd.call_in(self._crowd.script[0][0], self._send_part, self._attempt)

    def _send_part(self, attempt: Attempt) -> None:
        if self._attempt is not attempt:
            return
        script = self._crowd.script
        self._part += 1
        self.send(script[self._part - 1][1])
        if self._attempt is attempt and self._part < len(script):
            self._crowd.call_in(script[self._part][0], self._send_part, attempt)

    def sent(self, count: int) -> None:
        self._sent += count

    def fed(self, data: bytes) -> None:
        if self._attempt is None:
            self.failed(Happening.WRONG, "")
            return
        try:
            is_whole = self._reader.feed(data)
        except AnswerError as error:
            self.failed(Happening.WRONG, str(error))
            return
        if is_whole:
            self._finish()

    def is_whole_at_end(self) -> bool:
        if self._attempt is None or not self._reader.end():
            return False
        self._finish()
        return True

    def _finish(self) -> None:
        """Finish an attempt whose answer is whole."""
        crowd, reader, attempt = self._crowd, self._reader, self._attempt
        assert attempt is not None
        if not crowd.is_expected(reader.status):
            self.failed(Happening.WRONG, str(reader.status))
            return
        can_go_on = reader.keeps_open and self._is_all_sent
        self._attempt = None
        crowd.answered(attempt, reader.who)
        if crowd.keeps and not reader.keeps_open:
            crowd.event(ConnectionEvent.TOLD_TO_CLOSE)
        if not (crowd.keeps and can_go_on):
            self.close(politely=not reader.keeps_open)
        crowd.next(self, failed=False)

    def failed(self, happening: Happening, detail: str) -> None:
        stage = self._stage
        attempt, self._attempt = self._attempt, None
        self.close()
        if attempt is None:
            self._crowd.event(ConnectionEvent.IDLE_CLOSE)
        else:
            self._crowd.happen(attempt, stage, happening, detail or stage.value)
            self._crowd.next(self, failed=True)

    def limited(self, limit: OwnLimit) -> None:
        attempt, self._attempt = self._attempt, None
        assert attempt is not None
        self._crowd.drop(attempt, limit)
        self._crowd.next(self, failed=True)


class AskerCrowd(Crowd):
    """Clients that send requests.

    Args:
        script: Of each request.
        keeps: Whether connections are kept for the next request.
    """

    def __init__(self, site: Site, kind: Kind, load: Load, rng: random.Random, script: Script, *, keeps: bool) -> None:
        waits_ms = sum(delay for delay, _ in script) / 1e6
        super().__init__(site, kind, load, rng, keeps=keeps, waits_ms=waits_ms)
        self.script = script
        self._starts = self.arrivals() if load.rate > 0 else iter(())
        self._free: list[Asker] = []
        self._pool_left = load.count or POOL
        self._waiting: deque[Attempt] = deque()
        self._is_http = site.plan.target.is_http
        self._header = site.plan.generation_header.encode()

    def new_reader(self) -> AnswerReader:
        """Make the reader for one connection."""
        return HttpReader(self._header) if self._is_http else LineReader()

    def is_expected(self, status: int) -> bool:
        """Whether the answer is the expected one."""
        return not self._is_http or status == self.site.plan.expected_status

    def call_in(self, delay_ns: int, call: Callable[[Attempt], None], attempt: Attempt) -> None:
        """Continue an attempt later, if it is still in progress then."""
        if delay_ns:
            self.site.loop.call_at(time.monotonic_ns() + delay_ns, call, attempt)
        else:
            call(attempt)

    def start(self) -> None:
        if self.load.rate > 0:
            self._arrive_at(next(self._starts, None))
        else:
            for intended_ns in self.ramp(self.load.count):
                self._ask_at(intended_ns, Asker(self))

    def next(self, asker: Asker, *, failed: bool) -> None:
        """Schedule the next attempt of an asker that is free."""
        if self.load.rate > 0:
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
        if intended_ns is not None and intended_ns < self.site.end_ns:
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
    """Make the crowd for any kind that sends requests."""
    plan = site.plan
    keeps = kind is Kind.KEEPALIVE or (kind is Kind.TLS and load.count > 0)
    return AskerCrowd(site, kind, load, rng, script_of(plan, kind, keeps=keeps), keeps=keeps)


def script_of(plan: Plan, kind: Kind, *, keeps: bool) -> Script:
    """Return what a client of this kind sends in one attempt."""
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
