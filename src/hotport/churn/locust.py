"""hotport's clients as Locust's users, so that ``locust --master`` and ``--worker`` spread them over machines.

A locustfile imports the users that it wants::

    from hotport.churn.locust import ConnectUser, KeepaliveUser

Each attempt is one request of Locust's: its type is the kind of client, its failure the name of a fate
(`hotport.churn.fates`). Locust's users wait for their answers, so a server that stands still also slows the load down;
``hotport churn`` does not.
"""

from __future__ import annotations

import errno
import socket
import ssl
import time
from contextlib import closing
from typing import ClassVar

from locust import User, constant_throughput, task

from hotport.churn.answers import AnswerError, HttpReader
from hotport.churn.classify import OWN_LIMITS, Happening, Stage, classify, happening_of
from hotport.churn.clients.requests import script_of
from hotport.churn.engine import resolve as address_of
from hotport.churn.fates import Fate, Kind
from hotport.churn.plan import Plan
from hotport.churn.target import resolve

__all__ = [
    "ChurnUser",
    "ConnectUser",
    "HalfheadUser",
    "KeepaliveUser",
    "LateUser",
    "Loss",
    "OwnLimit",
    "SlowUser",
    "UploadUser",
]

_READ = 65536


class Loss(Exception):
    """An attempt without a whole answer; Locust's tables show it by the name of its fate."""

    def __repr__(self) -> str:
        return str(self)


class OwnLimit(Loss):
    """This machine could not begin an attempt; this is not a fate of the server's."""


class ChurnUser(User):
    """One client that sends requests repeatedly.

    Attributes:
        kind: How it behaves.
        path: What it asks for.
        expected_status: Of every answer.
        slow_s: How long `late` waits before it asks, `halfhead` between its halves, and `upload` takes for its body.
        timeout_s: For one attempt, beside `slow_s`.
        upload_bytes: Sent by `upload`.
        verify_tls: Whether certificates must be good.
    """

    abstract = True
    wait_time = constant_throughput(1)
    kind: ClassVar[Kind]
    path = "/"
    expected_status = 200
    slow_s = 1.0
    timeout_s = 10.0
    upload_bytes = 256 * 1024
    verify_tls = True

    def on_start(self) -> None:
        plan = Plan(
            target=resolve(self.host or "", timeout_s=self.timeout_s),
            loads=[],
            seed=0,
            begin_ns=0,
            duration_ms=0.0,
            path=self.path,
            slow_path=self.path,
            upload_path=self.path,
            upload_bytes=self.upload_bytes,
            slow_ms=self.slow_s * 1000,
            verify_tls=self.verify_tls,
        )
        self._keeps = self.kind is Kind.KEEPALIVE
        self._address = address_of(plan)
        self._script = script_of(plan, self.kind, keeps=self._keeps)
        self._waits_s = sum(delay_ns for delay_ns, _ in self._script) / 1e9
        self._reader = HttpReader()
        self._sock: socket.socket | None = None
        self._stage = Stage.IDLE

    def on_stop(self) -> None:
        self._close()

    @task
    def ask(self) -> None:
        """Perform one attempt, from its beginning to its fate."""
        began_at, began_s = time.time(), time.perf_counter()
        loss: Loss | None = None
        try:
            fate = classify(*self._attempt(time.monotonic() + self._waits_s + self.timeout_s))
            if fate is not Fate.ANSWERED:
                loss = Loss(fate.value)
        except OwnLimit as limit:
            loss = limit
        keeps_open = self._keeps and self._reader.keeps_open
        if loss is not None or not keeps_open or self._stage is not Stage.ANSWERING:
            self._close()
        self.environment.events.request.fire(
            request_type=self.kind.value,
            name=self.path,
            response_time=max(0.0, time.perf_counter() - began_s - self._waits_s) * 1000,
            response_length=0,
            exception=loss,
            context={},
            start_time=began_at,
        )

    def _attempt(self, deadline_s: float) -> tuple[Stage, Happening]:
        """Perform one attempt; return how far it came, and what happened then."""
        self._reader.start()
        if self._sock is not None and self._has_ended():
            self._close()
        self._stage = Stage.CONNECTING
        try:
            sock = self._sock or self._connect(deadline_s)
            self._stage = Stage.CONNECTED
            for number, (delay_ns, part) in enumerate(self._script, 1):
                if delay_ns and (happened := self._listen(sock, delay_ns / 1e9)) is not None:
                    return self._stage, happened
                sock.settimeout(max(0.001, deadline_s - time.monotonic()))
                broken = _send(sock, part)
                self._stage = Stage.SENT if number == len(self._script) else Stage.PARTLY_SENT
                if broken is not None:  # perhaps an answer, which says why, is still to be read
                    return self._stage, self._listen(sock, 0.1) or _happening(broken)
            happened = self._listen(sock, deadline_s - time.monotonic())
        except OSError as error:
            return self._stage, _happening(error)
        return self._stage, happened or Happening.OVERDUE

    def _connect(self, deadline_s: float) -> socket.socket:
        address = self._address
        try:
            self._sock = sock = socket.socket(address.family)
            sock.settimeout(max(0.001, deadline_s - time.monotonic()))
            sock.connect(address.where)
        except OSError as error:
            if error.errno in OWN_LIMITS:
                raise OwnLimit(errno.errorcode[error.errno or 0]) from None
            raise
        if address.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.tls is not None:
            name = address.tls_name or None
            self._sock = sock = address.tls.wrap_socket(sock, server_hostname=name, suppress_ragged_eofs=False)
        return sock

    def _listen(self, sock: socket.socket, timeout_s: float) -> Happening | None:
        """Receive for a limited time; None if neither a whole answer nor the end has come."""
        end_s = time.monotonic() + timeout_s
        while (left_s := end_s - time.monotonic()) > 0:
            sock.settimeout(left_s)
            try:
                data = sock.recv(_READ)
            except TimeoutError:
                return None
            except OSError as error:
                return _happening(error)
            try:
                is_whole = self._reader.feed(data) if data else self._reader.end()
            except AnswerError:
                return Happening.WRONG
            if data:
                self._stage = Stage.ANSWERING
            if is_whole:
                return Happening.WHOLE if self._reader.status == self.expected_status else Happening.WRONG
            if not data:
                return Happening.ENDED
        return None

    def _has_ended(self) -> bool:
        """Whether the server closed the connection, or sent unrequested bytes, between two attempts."""
        assert self._sock is not None
        self._sock.settimeout(0.0)
        try:
            self._sock.recv(_READ)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            pass
        return True

    def _close(self) -> None:
        self._stage = Stage.IDLE
        if self._sock is not None:
            with closing(self._sock):
                self._sock = None


def _send(sock: socket.socket, data: bytes) -> OSError | None:
    try:
        sock.sendall(data)
    except TimeoutError:
        raise
    except OSError as error:
        return error
    return None


def _happening(error: OSError) -> Happening:
    if isinstance(error, TimeoutError) and error.errno is None:
        return Happening.OVERDUE
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return Happening.ENDED
    # The numbers of other TLS errors are OpenSSL's own.
    return Happening.RESET if isinstance(error, ssl.SSLError) else happening_of(error.errno or 0)


class ConnectUser(ChurnUser):
    """Sends each request on a new connection."""

    kind = Kind.CONNECT


class KeepaliveUser(ChurnUser):
    """Sends requests on a connection that it keeps as long as the server does."""

    kind = Kind.KEEPALIVE


class LateUser(ChurnUser):
    """Connects, sends nothing for a while, then a request."""

    kind = Kind.LATE


class HalfheadUser(ChurnUser):
    """Sends the head of its request in two halves."""

    kind = Kind.HALFHEAD


class SlowUser(ChurnUser):
    """Requests a slow path."""

    kind = Kind.SLOW
    path = "/slow"


class UploadUser(ChurnUser):
    """Sends a body slowly."""

    kind = Kind.UPLOAD
