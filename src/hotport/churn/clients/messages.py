"""Clients that send numbered messages and expect each one back: over a stream, or as datagrams."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable
from typing import Any, Final

from hotport.churn.classify import OWN_LIMITS, Happening, Stage, happening_of
from hotport.churn.clients.connection import Connection
from hotport.churn.clients.crowd import POOL, Attempt, Crowd, OwnLimit, Site
from hotport.churn.fates import ConnectionEvent, Fate, Kind
from hotport.churn.result import Load
from hotport.churn.schedule import gap_ns

__all__ = ["DatagramCrowd", "Messages", "Streamer", "Talker", "TalkerCrowd"]

_LINE_BYTES_MAX: Final = 65536


class Messages:
    """Numbers in progress; tells which answers are duplicates or out of order.

    Args:
        is_ordered: Whether an answer after that to a later message is out of order; datagrams promise none.
    """

    __slots__ = ("_crowd", "_first", "_given_up", "_highest", "_is_ordered", "_next", "under_way")

    def __init__(self, crowd: Crowd, *, is_ordered: bool) -> None:
        self._crowd = crowd
        self._is_ordered = is_ordered
        self.under_way: dict[int, Attempt] = {}
        self._next = 1
        self.renew()

    def renew(self) -> None:
        """Continue with the next number on a new connection, on which nothing has been answered."""
        self._first = min(self.under_way, default=self._next)
        self._highest = 0
        self._given_up: set[int] = set()

    def add(self, attempt: Attempt) -> int:
        """Number a new message."""
        attempt.number = self._next
        self._next += 1
        self.under_way[attempt.number] = attempt
        return attempt.number

    def give_up(self, attempt: Attempt) -> None:
        """Give up a message; a later answer is then no duplicate."""
        del self.under_way[attempt.number]
        self._given_up.add(attempt.number)

    def answered(self, text: str | bytes, who: str) -> None:
        """Record an answer."""
        number = int(text) if len(text) < 20 and text.isdigit() else 0
        attempt = self.under_way.pop(number, None)
        crowd = self._crowd
        if attempt is not None:
            is_late = self._is_ordered and number < self._highest
            self._highest = max(self._highest, number)
            if is_late:
                crowd.end(attempt, Fate.OUT_OF_ORDER, f"message {number} after {self._highest}")
            else:
                crowd.answered(attempt, who)
        elif number in self._given_up:
            self._given_up.remove(number)
        elif self._first <= number < self._next:
            crowd.extra(Fate.DUPLICATED, f"message {number}")
        elif self.under_way:
            attempt = self.under_way.pop(next(iter(self.under_way)))
            crowd.end(attempt, Fate.WRONG_STATUS, f"instead of message {attempt.number}: {text[:40]!r}")
        else:
            crowd.extra(Fate.WRONG_STATUS, f"{text[:40]!r}")


class Talker(Connection):
    """One kept connection with any number of messages in progress."""

    __slots__ = ("_is_ready", "_sent_up_to", "messages", "who")

    def __init__(self, crowd: Crowd) -> None:
        super().__init__(crowd)
        self.messages = Messages(crowd, is_ordered=True)
        self.who = ""
        self._is_ready = False
        self._sent_up_to = 0

    def say(self, attempt: Attempt) -> None:
        """Send the next message, on the open connection if there is one."""
        if self._is_ready:
            self.look()
        attempt.client = self
        number = self.messages.add(attempt)
        if self._is_ready:
            self._sent_up_to = number
            self.send(self.encode(number))
        elif len(self.messages.under_way) == 1 and self.sock is None:
            self.messages.renew()
            self.who = ""
            self.connect()

    def give_up(self, attempt: Attempt) -> None:
        stage = self._stage(attempt)
        self.messages.give_up(attempt)
        self.crowd.happen(attempt, stage, Happening.OVERDUE, self._describe(attempt, ""))
        if not self._is_ready and not self.messages.under_way:
            self._drop()  # a connection that was not made in time

    def open(self) -> None:
        """Send the messages that waited for the connection."""
        self._is_ready = True
        waiting = list(self.messages.under_way)
        if waiting:
            self._sent_up_to = waiting[-1]
            self.send(b"".join(self.encode(number) for number in waiting))

    def failed(self, happening: Happening, detail: str) -> None:
        self._lose(happening, detail, is_told=False)
        self._drop()

    def leave(self, detail: str, *, is_told: bool) -> None:
        """Leave a connection whose peer has announced its end and will not answer any more."""
        self._lose(Happening.ENDED, detail, is_told=is_told)
        self._drop(politely=True)

    def limited(self, limit: OwnLimit) -> None:
        for attempt in self.messages.under_way.values():
            self.crowd.drop(attempt, limit)
        self.messages.under_way.clear()

    def _lose(self, happening: Happening, detail: str, *, is_told: bool) -> None:
        if is_told:
            self.crowd.event(ConnectionEvent.TOLD_TO_CLOSE)
        elif not self.messages.under_way and self._is_ready:
            self.crowd.event(ConnectionEvent.IDLE_CLOSE)
        for attempt in self.messages.under_way.values():
            self.crowd.happen(attempt, self._stage(attempt), happening, self._describe(attempt, detail))
        self.messages.under_way.clear()

    def _drop(self, *, politely: bool = False) -> None:
        self._is_ready = False
        self.close(politely=politely)

    def _stage(self, attempt: Attempt) -> Stage:
        if self._is_ready:
            return Stage.MESSAGE if attempt.number <= self._sent_up_to else Stage.CONNECTED
        return self.opening_stage() if self.is_made else Stage.CONNECTING

    def _describe(self, attempt: Attempt, detail: str) -> str:
        return f"message {attempt.number}{': ' if detail else ''}{detail}"

    # Hooks

    def opening_stage(self) -> Stage:
        """Return the stage of a connection that is established, but cannot carry messages yet."""
        return Stage.CONNECTED

    def encode(self, number: int) -> bytes:
        """Encode a message."""
        raise NotImplementedError


class Streamer(Talker):
    """Sends lines."""

    __slots__ = ("_line",)

    def made(self) -> None:
        self._line = b""
        self.open()

    def encode(self, number: int) -> bytes:
        return b"%d\n" % number

    def fed(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self.messages.answered(line, self.who)
        if len(self._line) > _LINE_BYTES_MAX:
            self.failed(Happening.WRONG, "a line without end")


class _MessageCrowd(Crowd):
    """Messages by rate, in turn on each of its clients; or each client by its own clock, whatever is answered."""

    def __init__(
        self, site: Site, kind: Kind, load: Load, rng: random.Random, new_client: Callable[[Crowd], Any], *, pool: int
    ) -> None:
        super().__init__(site, kind, load, rng, keeps=True)
        self._clients = [new_client(self) for _ in range(load.count or pool)]
        self._starts = self.arrivals() if load.rate > 0 else iter(())
        self._turn = 0

    def start(self) -> None:
        if self.load.rate > 0:
            self._arrive_at(next(self._starts, None))
        else:
            for intended_ns, client in zip(self.ramp(self.load.count), self._clients, strict=True):
                self._say_at(intended_ns, client)

    def _arrive_at(self, intended_ns: int | None) -> None:
        if intended_ns is not None and intended_ns < self.site.end_ns:
            self.site.loop.call_at(intended_ns, self._arrive, intended_ns)

    def _arrive(self, intended_ns: int) -> None:
        self._arrive_at(next(self._starts, None))
        client = self._clients[self._turn]
        self._turn = (self._turn + 1) % len(self._clients)
        client.say(self.new_attempt(intended_ns))

    def _say_at(self, intended_ns: int, client: Any) -> None:
        if intended_ns < self.site.end_ns:
            self.site.loop.call_at(intended_ns, self._say, (intended_ns, client))

    def _say(self, intended: tuple[int, Any]) -> None:
        intended_ns, client = intended
        self._say_at(intended_ns + gap_ns(self.load.think_ms, self.rng), client)
        client.say(self.new_attempt(intended_ns))


class TalkerCrowd(_MessageCrowd):
    """Connections that are kept."""

    def __init__(
        self, site: Site, kind: Kind, load: Load, rng: random.Random, new_talker: Callable[[Crowd], Talker]
    ) -> None:
        super().__init__(site, kind, load, rng, new_talker, pool=POOL)


class _Sender:
    """One UDP socket. Not connected: else the kernel would report an ICMP error for one datagram on the next."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._messages = Messages(crowd, is_ordered=False)
        self._sock: socket.socket | None = None

    def say(self, attempt: Attempt) -> None:
        attempt.client = self
        site = self._crowd.site
        try:
            if self._sock is None:
                self._sock = socket.socket(site.address.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
                site.clients.add(self)
                site.loop.watch(self._sock.fileno(), self._on_event)
            self._sock.sendto(b"%d\n" % self._messages.add(attempt), site.address.where)
        except OSError as error:
            number = error.errno or 0
            name = errno.errorcode.get(number, str(number))
            self._messages.under_way.pop(attempt.number, None)
            if number in OWN_LIMITS:
                self._crowd.drop(attempt, OwnLimit(name))
            else:
                self._crowd.happen(attempt, Stage.DATAGRAM, happening_of(number), name)

    def give_up(self, attempt: Attempt) -> None:
        self._messages.give_up(attempt)
        self._crowd.happen(attempt, Stage.DATAGRAM, Happening.OVERDUE, f"message {attempt.number}")

    def close(self) -> None:
        assert self._sock is not None
        self._crowd.site.clients.discard(self)
        self._crowd.site.loop.close(self._sock)

    def _on_event(self, _: int) -> None:
        assert self._sock is not None
        while True:
            try:
                data = self._sock.recv(65536)
            except OSError:
                return
            self._messages.answered(data.rstrip(b"\n"), "")


class DatagramCrowd(_MessageCrowd):
    """Sockets that send datagrams."""

    def __init__(self, site: Site, kind: Kind, load: Load, rng: random.Random) -> None:
        super().__init__(site, kind, load, rng, _Sender, pool=1)
