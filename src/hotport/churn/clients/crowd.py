"""What the clients of one load share: the target, the schedule and the recorder."""

from __future__ import annotations

import errno
import random
import socket
import ssl
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from hotport.churn.classify import OWN_LIMITS, Happening, Stage, classify
from hotport.churn.fates import ConnectionEvent, Fate, Kind
from hotport.churn.loop import Loop
from hotport.churn.plan import Plan
from hotport.churn.recorder import Recorder
from hotport.churn.result import Load, Target
from hotport.churn.schedule import arrivals

__all__ = ["POOL", "Address", "Attempt", "Client", "Crowd", "OwnLimit", "Site", "host_of"]

#: Held connections of a load that has a rate and no count.
POOL = 64

#: What IntEnums would have to work out for each socket.
_STREAM = int(socket.SOCK_STREAM) | int(socket.SOCK_NONBLOCK)

#: New held connections an engine makes in a second, at the beginning.
RAMP_RATE = 2000.0


@dataclass(frozen=True, slots=True)
class Address:
    """The address that sockets connect to."""

    family: socket.AddressFamily
    where: tuple[str, int] | tuple[str, int, int, int] | str
    tls: ssl.SSLContext | None = None
    tls_name: str = ""
    is_tcp: bool = True


@dataclass(slots=True)
class Site:
    """What all crowds of an engine share."""

    plan: Plan
    address: Address
    loop: Loop
    recorder: Recorder
    end_ns: int
    #: Those that have a socket.
    clients: set[Client] = field(default_factory=set)


class OwnLimit(Exception):
    """This machine could not open a connection."""


class Client(Protocol):
    """The owner of a socket."""

    def give_up(self, attempt: Attempt) -> None:
        """The attempt is overdue."""

    def close(self) -> None:
        """Close the socket."""


class Attempt:
    """A request or a numbered message, from its intended start to its one fate."""

    __slots__ = ("client", "deadline_ns", "intended_ns", "number")

    def __init__(self, intended_ns: int, deadline_ns: int) -> None:
        self.intended_ns = intended_ns
        self.deadline_ns = deadline_ns
        self.client: Client | None = None
        self.number = 0


class Crowd:
    """The clients of one load.

    Args:
        keeps: Whether connections are kept for the next attempt.
        waits_ms: How long its clients wait on purpose in each attempt.
    """

    def __init__(
        self, site: Site, kind: Kind, load: Load, rng: random.Random, *, keeps: bool, waits_ms: float = 0.0
    ) -> None:
        self.site = site
        self.name = kind.value
        self.load = load
        self.rng = rng
        self.keeps = keeps
        #: Attempts under way, the oldest first.
        self.under_way: OrderedDict[Attempt, None] = OrderedDict()
        self._waits_ns = int(waits_ms * 1e6)
        self._timeout_ns = int(site.plan.timeout_ms * 1e6) + self._waits_ns

    def start(self) -> None:
        """Schedule the first attempts."""
        raise NotImplementedError

    def is_over(self) -> bool:
        """Whether no attempt is in progress."""
        return not self.under_way

    def new_attempt(self, intended_ns: int) -> Attempt:
        """Begin an attempt, and record how late the engine began it."""
        now = time.monotonic_ns()
        self.site.recorder.lag(now - intended_ns, now)
        attempt = Attempt(intended_ns, now + self._timeout_ns)
        self.under_way[attempt] = None
        return attempt

    def give_up_overdue(self, seen_ns: int) -> None:
        """End the attempts that are overdue at `now_ns`."""
        while self.under_way:
            attempt = next(iter(self.under_way))
            if attempt.deadline_ns > seen_ns:
                break
            if attempt.client is None:
                self.end(attempt, Fate.TIMED_OUT, "waited for a connection")
            else:
                attempt.client.give_up(attempt)

    def due_ns(self, now_ns: int) -> int:
        """Return when the first attempt can be overdue, of those in progress and those to come."""
        return next(iter(self.under_way)).deadline_ns if self.under_way else now_ns + self._timeout_ns

    def answered(self, attempt: Attempt, who: str = "") -> None:
        """Record that the attempt has its whole answer."""
        del self.under_way[attempt]
        now = time.monotonic_ns()
        self.site.recorder.answered(self.name, attempt.intended_ns, self._waits_ns, now, who, is_new=not self.keeps)

    def end(self, attempt: Attempt, fate: Fate, detail: str) -> None:
        """Record another fate of the attempt."""
        del self.under_way[attempt]
        self.site.recorder.lost(self.name, fate, attempt.intended_ns, time.monotonic_ns(), detail)

    def extra(self, fate: Fate, detail: str) -> None:
        """Record an answer that no attempt was waiting for: one fate more than attempts."""
        now = time.monotonic_ns()
        self.site.recorder.lost(self.name, fate, now, now, detail)

    def happen(self, attempt: Attempt, stage: Stage, happening: Happening, detail: str) -> None:
        """End an attempt that did not get the right answer."""
        fate = classify(stage, happening)
        assert isinstance(fate, Fate)
        self.end(attempt, fate, detail)

    def drop(self, attempt: Attempt, limit: OwnLimit) -> None:
        """Drop an attempt that could not begin."""
        del self.under_way[attempt]
        self.site.recorder.own_limit(str(limit))

    def event(self, event: ConnectionEvent) -> None:
        """Record an event of a connection."""
        self.site.recorder.event(self.name, event, time.monotonic_ns())

    def arrivals(self) -> Iterator[int]:
        """Intended starts, by rate."""
        plan = self.site.plan
        return arrivals(self.load.rate, plan.begin_ns, self.site.end_ns, plan.arrivals, self.rng)

    def ramp(self, count: int) -> Iterator[int]:
        """First intended starts of so many held connections."""
        plan = self.site.plan
        step = min(1e9 / RAMP_RATE, plan.duration_ms * 1e6 / 2 / count)
        phase = self.rng.random()
        return (int(plan.begin_ns + (number + phase) * step) for number in range(count))

    def open(self) -> tuple[socket.socket, int]:
        """A socket on its way to the target, and connect's errno (0 and EINPROGRESS are well).

        Raises:
            OwnLimit: With the errno's name.
        """
        address = self.site.address
        try:
            sock = socket.socket(address.family, _STREAM)
        except OSError as error:
            raise OwnLimit(_name(error.errno)) from None
        if address.is_tcp:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number = sock.connect_ex(address.where)
        is_full = number == errno.EAGAIN and not address.is_tcp  # of the backlog: come again
        if number in OWN_LIMITS and not is_full:
            sock.close()
            raise OwnLimit(_name(number))
        return sock, number


def host_of(target: Target) -> str:
    """Return the value of the Host field."""
    if target.socket_path:
        return "localhost"
    host = f"[{target.host}]" if ":" in target.host else target.host
    return f"{host}:{target.port}"


def _name(number: int | None) -> str:
    return errno.errorcode.get(number or 0, str(number))
