"""HTTP clients for `hotport demo`: they notice everything, repeat nothing and forgive nothing.

A request that gets no whole answer with status 200 is a failure of one of these kinds, whatever a browser or a
proxy would have made of it.
"""

from __future__ import annotations

import asyncio
import errno
import random
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, TypeAlias

__all__ = ["KINDS", "Crossing", "Load", "Seen"]

#: Every way in which a request can fail; there is no "other".
KINDS: Final = ("refused", "reset", "closed unanswered", "truncated", "timed out", "wrong status")

REQUEST_TIMEOUT_S: Final = 10.0

#: Between two requests of one keep-alive client: mostly short, now and then so long that a restart finds it idle.
PAUSE_S_MAX: Final = 0.02
LONG_PAUSE_S_MAX: Final = 1.5
LONG_PAUSES: Final = 0.01

#: Every fifth client opens a connection for each request.
NEW_CONNECTION_SHARE: Final = 5

#: What is on its way when a restart begins.
CROSSINGS: Final = {"late": 8, "half": 4, "slow": 2}

Manner: TypeAlias = Literal["late", "half", "slow"]


@dataclass(slots=True)
class Seen:
    """What the clients have seen so far.

    Attributes:
        failures: By kind, each of `KINDS`.
        answers: By (version, generation) that answered.
        latencies_ms: From the first step (connecting or sending) to the whole answer; requests that wait on
            purpose are left out.
        asked_to_reconnect: Answers on keep-alive connections that said ``Connection: close``.
        crossed: Answered requests that were under way during a restart, by manner.
    """

    requests: int = 0
    failures: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(KINDS, 0)))
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    latencies_ms: array[float] = field(default_factory=lambda: array("f"))
    asked_to_reconnect: int = 0
    crossed: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """How many requests failed, of any kind."""
        return self.failures.total()


class _Failed(Exception):
    """One request was not answered as it should have been; the argument is the kind."""


class _Connection(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Crossing(NamedTuple):
    """Connections that were made before a restart and are waiting to go on after it."""

    waiting: Sequence[tuple[Manner, _Connection]]


class Load:
    """Clients of one HTTP server on this machine.

    Args:
        connections: How many clients there are.
    """

    def __init__(self, port: int, *, connections: int) -> None:
        self.seen = Seen()
        self._port = port
        self._connections = connections
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Send requests until `stop`; each client finishes the one that it has begun."""
        async with asyncio.TaskGroup() as clients:
            for number in range(self._connections):
                one_by_one = number % NEW_CONNECTION_SHARE == NEW_CONNECTION_SHARE - 1
                clients.create_task(self._reconnect_always() if one_by_one else self._keep_alive())

    def stop(self) -> None:
        """Let `run` return."""
        self._stopping.set()

    # -- steady clients ------------------------------------------------------------------------------------

    async def _keep_alive(self) -> None:
        connection: _Connection | None = None
        while not self._stopping.is_set():
            began = time.perf_counter()
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    connection = connection or await self._connect()
                    self._send(connection, _request("/"))
                    is_last = await self._receive(connection, began)
            except (_Failed, OSError, TimeoutError) as error:
                self._count_failure(error)
                is_last = True
            else:
                self.seen.asked_to_reconnect += is_last
            if is_last and connection is not None:
                connection.writer.close()
                connection = None
            await self._pause()
        if connection is not None:
            connection.writer.close()

    async def _reconnect_always(self) -> None:
        while not self._stopping.is_set():
            began = time.perf_counter()
            connection: _Connection | None = None
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    connection = await self._connect()
                    self._send(connection, _request("/", "Connection: close\r\n"))
                    await self._receive(connection, began)
            except (_Failed, OSError, TimeoutError) as error:
                self._count_failure(error)
            finally:
                if connection is not None:
                    connection.writer.close()
            await self._pause()

    async def _pause(self) -> None:
        is_long = random.random() < LONG_PAUSES
        delay = random.uniform(0, LONG_PAUSE_S_MAX if is_long else PAUSE_S_MAX)
        if not is_long:  # as it is nearly always: a timer for `wait_for` costs more than the pause
            await asyncio.sleep(delay)
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), delay)

    # -- across a restart ----------------------------------------------------------------------------------

    async def place(self) -> Crossing:
        """Connect before a restart: some send nothing yet, some half a request head, some ask for a slow answer."""
        plan: list[Manner] = [manner for manner, count in CROSSINGS.items() for _ in range(count)]  # type: ignore[misc]
        placed = await asyncio.gather(*(self._place(manner) for manner in plan))
        return Crossing([each for each in placed if each is not None])

    async def finish(self, crossing: Crossing) -> None:
        """Send what is missing, and read the answers."""
        await asyncio.gather(*(self._finish(manner, connection) for manner, connection in crossing.waiting))

    async def _place(self, manner: Manner) -> tuple[Manner, _Connection] | None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                connection = await self._connect()
        except (OSError, TimeoutError) as error:
            self._count_failure(error)
            return None
        match manner:
            case "half":
                self._send(connection, _request("/")[:20])
            case "slow":
                self._send(connection, _request("/slow"))
        return manner, connection

    async def _finish(self, manner: Manner, connection: _Connection) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                match manner:
                    case "half":
                        self._send(connection, _request("/")[20:])
                    case "late":
                        self._send(connection, _request("/"))
                await self._receive(connection, None)
            self.seen.crossed[manner] += 1
        except (_Failed, OSError, TimeoutError) as error:
            self._count_failure(error)
        finally:
            connection.writer.close()

    # -- one request ---------------------------------------------------------------------------------------

    async def _connect(self) -> _Connection:
        return _Connection(*await asyncio.open_connection("127.0.0.1", self._port))

    @staticmethod
    def _send(connection: _Connection, data: bytes) -> None:
        connection.writer.write(data)  # small: it needs no flow control

    async def _receive(self, connection: _Connection, began: float | None) -> bool:
        """Read one answer and count it; True if it is the last on this connection."""
        try:
            head = await connection.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            raise _Failed("truncated" if error.partial else "closed unanswered") from None
        status, headers = _parse(head)
        try:
            await connection.reader.readexactly(int(headers.get("content-length", 0)))
        except asyncio.IncompleteReadError:
            raise _Failed("truncated") from None
        if status != "200":
            raise _Failed("wrong status")
        self.seen.requests += 1
        self.seen.answers[headers.get("x-version", "?"), int(headers.get("x-generation", 0))] += 1
        if began is not None:
            self.seen.latencies_ms.append((time.perf_counter() - began) * 1000)
        return headers.get("connection", "").lower() == "close"

    def _count_failure(self, error: Exception) -> None:
        self.seen.requests += 1
        self.seen.failures[_kind(error)] += 1


def _request(path: str, headers: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: demo\r\n{headers}\r\n".encode()


def _parse(head: bytes) -> tuple[str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return first[9:12], headers  # behind "HTTP/1.1 "


def _kind(error: Exception) -> str:
    match error:
        case _Failed():
            return str(error)
        case ConnectionRefusedError():
            return "refused"
        case TimeoutError():
            return "timed out"
        case ConnectionResetError() | BrokenPipeError() | ConnectionAbortedError():
            return "reset"
        case OSError(errno=number):  # this machine's own limits: no descriptors, no ports
            return errno.errorcode.get(number or 0, type(error).__name__)
    raise error
