"""How many connections an acceptor takes in one turn of the event loop."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from hotport.adapters.base import Connections
from hotport.worker import acceptor
from hotport.worker.acceptor import BATCH_MAX, Acceptor

pytestmark = pytest.mark.anyio

COUNT = 40


class Taken:
    """Stands for an adapter, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def connection(self) -> asyncio.Protocol:
        self.count += 1
        return Sink()


class Sink(asyncio.Protocol):
    sock: socket.socket
    endpoints: Any

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """With `COUNT` connections in its queue."""
    with socket.create_server(("127.0.0.1", 0), backlog=COUNT) as listener, ExitStack() as stack:
        listener.setblocking(False)
        for _ in range(COUNT):
            stack.enter_context(socket.create_connection(listener.getsockname()))
        yield listener


@pytest.mark.parametrize(
    ("short_turn_s", "batches"),
    [(math.inf, [1, 2, 4, 8, BATCH_MAX]), (0.0, [1] * 5)],
    ids=["after-short-turns", "after-long-ones"],
)
async def test_batches_grow_while_turns_are_short(
    listener: socket.socket, short_turn_s: float, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty requests that took 5 ms each came in two turns, and held all others up for 100 ms."""
    monkeypatch.setattr(acceptor, "SHORT_TURN_S", short_turn_s)
    taken = Taken()
    accepting = Acceptor(listener, taken, Connections())  # type: ignore[arg-type]
    accepting._accepted_s = math.nan  # the first turn is no short one
    try:
        found = []
        for _ in batches:
            before = taken.count
            accepting._is_accepting = True
            accepting._accept()
            found.append(taken.count - before)
        assert found == batches
        await asyncio.sleep(0)
    finally:
        accepting._is_accepting = False
        accepting.close()
