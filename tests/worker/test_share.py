"""Several workers take from one accept queue: each its share, and none waits for one that does not take."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from hotport.adapters.base import Connections, Context
from hotport.options import Options
from hotport.worker.server import ConnectionServer, make_server
from hotport.worker.share import Share
from tests.adapters.asgi_support import until
from tests.support import DEADLINE_S

pytestmark = pytest.mark.anyio


@dataclass(slots=True)
class Table:
    """The shared page, for servers of one process."""

    groups: list[int] = field(default_factory=list)
    gauges: list[list[int]] = field(default_factory=list)
    dead: set[int] = field(default_factory=set)

    def slot(self) -> Slot:
        self.groups.append(0)
        self.gauges.append([0])
        return Slot(self, len(self.groups) - 1)


class Slot:
    def __init__(self, table: Table, number: int) -> None:
        self._table, self.slot = table, number
        self.gauge: list[int] | memoryview = table.gauges[number]

    def join(self, group: int) -> None:
        self._table.groups[self.slot] = group

    def others(self) -> list[int]:
        groups = self._table.groups
        return [n for n, group in enumerate(groups) if group == groups[self.slot] and n != self.slot]

    def counts(self, slots: list[int]) -> Sequence[int]:
        return [self._table.gauges[slot][0] for slot in slots]

    def worker(self, slot: int) -> int:
        return slot + 1

    def forget_dead(self, slots: list[int]) -> None:
        for slot in self._table.dead.intersection(slots):
            self._table.groups[slot] = 0


async def hold(stream: Any) -> None:
    await stream.send(b"here")
    await stream.receive()


@asynccontextmanager
async def serving(
    table: Table, count: int, *, maximum: int = 0
) -> AsyncIterator[tuple[list[ConnectionServer], Callable[[int], Any]]]:
    """So many servers on one listener, and how clients connect: all at once, until each is served."""
    servers: list[ConnectionServer] = []
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        listener.setblocking(False)
        for _ in range(count):
            connections, slot = Connections(maximum=maximum), table.slot()
            connections.gauge = slot.gauge
            server = make_server(
                hold,
                Context(connections),
                Options(kind="stream"),
                [listener.dup()],
                share=Share(slot, 1, "/nonexistent"),
            )
            assert isinstance(server, ConnectionServer)
            await server.startup()
            await server.accept()
            servers.append(server)

        async def connect(clients: int) -> None:
            pairs = await asyncio.gather(*(asyncio.open_connection(*listener.getsockname()) for _ in range(clients)))
            for reader, writer in pairs:
                stack.callback(writer.close)
                assert await reader.readexactly(4) == b"here"

        try:
            async with asyncio.timeout(DEADLINE_S):
                yield servers, connect
        finally:
            for server in servers:
                await server.drain(0)
                await server.shutdown()


def shares(servers: list[ConnectionServer]) -> list[int]:
    return [len(server.connections.open) for server in servers]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All servers are in one loop here, and the others' work takes time from those to whom the queue is left."""
    monkeypatch.setattr("hotport.worker.acceptor.DEFER_S", 0.2)
    monkeypatch.setattr("hotport.worker.share.OTHERS_S", 0.0)


async def test_burst_is_shared_evenly(patient: None) -> None:
    async with serving(Table(), 4) as (servers, connect):
        await connect(100)
        assert sum(shares(servers)) == 100
        assert max(shares(servers)) <= 35, shares(servers)  # the kernel wakes the same one first, every time


async def test_worker_that_joins_gets_what_comes_until_it_has_as_many(patient: None) -> None:
    async with serving(Table(), 2) as (servers, connect):
        servers[1].quiesce()
        await connect(40)
        assert shares(servers) == [40, 0]
        await servers[1].accept()
        await connect(30)
        assert shares(servers)[0] <= 44


@pytest.mark.parametrize("is_dead", [True, False])
async def test_none_waits_long_for_a_worker_that_takes_nothing(is_dead: bool) -> None:
    table = Table()
    async with serving(table, 1) as (servers, connect):
        other = table.slot()
        other.join(1)
        if is_dead:
            table.dead.add(1)
        await connect(50)
        assert shares(servers) == [50]
        assert other.others() == ([] if is_dead else [0])


async def test_worker_that_quiesces_is_not_waited_for() -> None:
    table = Table()
    async with serving(table, 2) as (servers, connect):
        await connect(10)
        servers[0].quiesce()
        assert table.groups == [0, 1]
        before = shares(servers)
        await connect(10)
        assert shares(servers) == [before[0], before[1] + 10]
        await servers[0].accept()
        assert table.groups == [1, 1]


async def test_full_worker_is_not_waited_for_until_it_has_room() -> None:
    table = Table()
    async with serving(table, 1, maximum=2) as (servers, connect):
        await connect(2)
        assert table.groups == [0]
        servers[0].connections.cut()
        await until(lambda: table.groups == [1])
