"""A server that does to each connection, request or message what a script says, and an engine in this process."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hotport.churn.engine import Engine
from hotport.churn.plan import Plan, Summary, Tick
from hotport.churn.result import Incident, Load, Target
from tests.support import DEADLINE_S


class Scripted:
    """Serves one connection after the other in a thread.

    Args:
        serve: Does something with a connection, which is closed afterwards.
    """

    def __init__(self, serve: Callable[[socket.socket], None], family: int = socket.AF_INET, where: Any = None) -> None:
        self._serve = serve
        self._listener = socket.socket(family)
        self._listener.bind(where or ("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        self._listener.listen(4096)
        self.address = self._listener.getsockname()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE_S)
        self._listener.close()
        if isinstance(self.address, str):
            Path(self.address).unlink()
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    @property
    def port(self) -> int:
        return int(self.address[1])

    def _run(self) -> None:
        try:
            while True:
                try:
                    sock, _ = self._listener.accept()
                except OSError:
                    return
                with sock, contextlib.suppress(ConnectionError):  # an engine that was stopped leaves without a word
                    sock.settimeout(DEADLINE_S)
                    self._serve(sock)
        except BaseException as error:
            self.error = error


class Seen:
    """What an engine has said."""

    def __init__(self) -> None:
        self.ticks: list[Tick] = []
        self.summary = Summary({})

    @property
    def fates(self) -> Counter[str]:
        """By name, over all kinds; connections that were made are not among them."""
        counts: Counter[str] = Counter()
        for tick in self.ticks:
            for of_kind in tick.bucket.fates.values():
                counts.update(of_kind)
        del counts["connected"]
        return counts

    @property
    def connections(self) -> int:
        """How many were made by clients that keep theirs."""
        return sum(kind.get("connected", 0) for tick in self.ticks for kind in tick.bucket.fates.values())

    @property
    def incidents(self) -> list[Incident]:
        return [incident for tick in self.ticks for incident in tick.incidents]

    @property
    def answered_by(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for tick in self.ticks:
            counts.update(tick.bucket.answered_by)
        return counts


def target(port: int, *, host: str = "127.0.0.1", http: bool = True, tls: bool = False, path: str = "") -> Target:
    return Target(f"test://{host}:{port}", host, port, http, tls, path)


def plan(where: Target, *loads: Load, duration_ms: float = 200.0, **options: Any) -> Plan:
    options = {"timeout_ms": DEADLINE_S * 1000, "bucket_ms": 20, "seed": 1, **options}
    return Plan(target=where, loads=list(loads), begin_ns=time.monotonic_ns(), duration_ms=duration_ms, **options)


def run(what: Plan, started: Callable[[Engine], None] = lambda _: None) -> Seen:
    """Run a plan to its end."""
    seen = Seen()
    engine = Engine(what, seen.ticks.append)
    started(engine)
    seen.summary = engine.run()
    engine.close()
    return seen


def read_head(sock: socket.socket) -> bytes:
    """A request without a body; empty at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            return b""
        data += more
    return data


def reset(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def send_and_end(sock: socket.socket, data: bytes) -> None:
    """Send data and the end of the connection in one segment."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def forever(script: list[str]) -> Iterator[str]:
    while True:
        yield from script
