"""Requests out of bytes, without a connection; what connections make of them is tested in test_asgi_http.py."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import pytest

from hotport.adapters.asgi import reader
from hotport.adapters.asgi.exchange import Exchange
from hotport.adapters.asgi.reader import PIECE_BYTES_MAX, PIECE_BYTES_MIN, Intake, Reader, Target
from hotport.adapters.asgi.shared import Shared
from hotport.adapters.base import Connections, Context
from hotport.options import Options
from tests.adapters.asgi_support import echo

pytestmark = pytest.mark.anyio

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
UPGRADE = b"POST /c HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: tea\r\nContent-Length: 4\r\n\r\n"


class Listener:
    """Notes what it is told."""

    def __init__(self, *, takes_over: bool = False) -> None:
        self.shared = Shared(echo, Context(Connections()), {}, Options())
        self.requests: deque[Exchange] = deque()
        self.reader = Reader(self, self.shared, self.requests)
        self.told: list[Any] = []
        self.takes_over = takes_over

    def on_request(
        self,
        method: str,
        is_http10: bool,
        target: Target,
        headers: list[tuple[bytes, bytes]],
        fields: dict[bytes, bytes],
        keeps_alive: bool,
    ) -> Exchange:
        scope = {"method": method, "http_version": "1.0" if is_http10 else "1.1", "path": target[0], "headers": headers}
        return Exchange(self, echo, scope, keeps_alive, is_http10)  # type: ignore[arg-type]

    def on_body_due(self) -> None:
        self.told.append("body due")

    def on_upgrade(self, exchange: Exchange, behind: bytes) -> bool:
        self.told.append(("upgrade", behind))
        return self.takes_over

    def refuse(self, status: int, why: str) -> None:
        self.told.append(status)
        self.reader.stop()

    def read(self, data: bytes, *, requests_max: int = 16) -> list[str]:
        """The paths of all requests that have been begun by now."""
        self.reader.rest += data
        self.reader.read(math.inf, 1 << 20, requests_max)
        return [request.scope["path"] for request in self.requests]


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    listener = Listener()
    yield listener
    listener.reader.close()


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_requests_are_found_wherever_the_bytes_are_cut(listener: Listener, size: int) -> None:
    data = GET + POST + b"body" + GET
    for start in range(0, len(data), size):
        found = listener.read(data[start : start + size])
    assert found == ["/a", "/b", "/a"]
    assert [bytes(request.body) for request in listener.requests] == [b"", b"body", b""]
    assert all(request.is_complete and request.held_bytes for request in listener.requests)
    assert (listener.reader.head, listener.reader.rest, listener.reader.arriving) == (b"", b"", None)


async def test_no_more_requests_are_begun_than_there_is_room_for(listener: Listener) -> None:
    assert listener.read(GET * 3, requests_max=2) == ["/a", "/a"]
    assert listener.reader.rest == GET


@pytest.mark.parametrize(("intake", "rest"), [(Intake.PARKED, GET), (Intake.CLOSED, b"")])
async def test_the_request_that_arrives_is_read_to_its_end_and_nothing_behind_it(
    listener: Listener, intake: Intake, rest: bytes
) -> None:
    listener.read(POST + b"bo")
    listener.reader.intake = intake
    assert listener.read(b"dy" + GET) == ["/b"]
    assert listener.requests[0].is_complete
    assert listener.reader.rest == rest
    assert listener.told == ["body due"]


async def test_what_is_refused_ends_reading(listener: Listener) -> None:
    assert listener.read(GET + b"GET /a HTTP/1.1\r\n\r\n" + GET) == ["/a"]
    assert listener.told == [400]
    assert listener.read(GET) == ["/a"]
    assert listener.reader.rest == b""


async def test_declined_upgrade_has_its_body(listener: Listener) -> None:
    assert listener.read(UPGRADE + b"body" + GET) == ["/c", "/a"]
    assert listener.told[0] == ("upgrade", b"")
    assert listener.requests[0].body == b"body"


async def test_what_follows_an_upgrade_is_kept_for_the_other_protocol() -> None:
    listener = Listener(takes_over=True)
    listener.read(UPGRADE + b"frames")
    assert (listener.reader.intake, listener.reader.rest) == (Intake.UPGRADED, b"frames")


@pytest.mark.parametrize(
    ("tick_s", "piece_bytes"), [(0.0, PIECE_BYTES_MAX), (1.0, PIECE_BYTES_MIN)], ids=["fast", "slow"]
)
async def test_pieces_of_a_chunked_body_are_as_long_as_they_are_parsed_fast(
    listener: Listener, tick_s: float, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 KiB of chunks of a byte each held others up for milliseconds."""
    ticks = itertools.count()
    monkeypatch.setattr(reader, "perf_counter", lambda: next(ticks) * tick_s)
    head = b"POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert listener.read(head + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n" + GET) == ["/b", "/a"]
    assert listener.requests[0].body == b"x" * 50_000
    assert listener.reader._piece_bytes == piece_bytes
