"""Several workers take from one accept queue: each its share, and none waits for one that does not take."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from hotport.adapters.base import Connections, Context
from hotport.model.balance import HUNG_S, LATE_HOLD_S, LOOK_S
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
    dues: dict[int, float] = field(default_factory=dict)
    full: set[int] = field(default_factory=set)

    def slot(self) -> Slot:
        self.groups.append(0)
        self.gauges.append([0])
        return Slot(self, len(self.groups) - 1)


class Slot:
    def __init__(self, table: Table, number: int) -> None:
        self._table, self.slot = table, number
        self.gauge: list[int] | memoryview = table.gauges[number]

    def join(self, group: int, *, takes: bool = True) -> None:
        self._table.groups[self.slot] = group
        self._table.full.discard(self.slot)
        if not takes:
            self._table.full.add(self.slot)

    def others(self) -> list[int]:
        groups = self._table.groups
        return [n for n, group in enumerate(groups) if group == groups[self.slot] != 0 and n != self.slot]

    def takes(self, slot: int) -> bool:
        return slot not in self._table.full

    def counts(self, slots: list[int]) -> Sequence[int]:
        return [self._table.gauges[slot][0] for slot in slots]

    def worker(self, slot: int) -> int:
        return slot + 1

    def promise(self, due_s: float) -> None:
        self._table.dues[self.slot] = due_s

    def due_s(self, slot: int) -> float:
        return self._table.dues.get(slot, math.inf)

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
        assert (table.groups, table.full) == ([1], {0})
        servers[0].connections.cut()
        await until(lambda: not table.full)
        servers[0].quiesce()
        await servers[0].accept()
        assert (table.groups, table.full) == ([1], set())


# -- event loops that are held up ---------------------------------------------------------------------------


@dataclass(slots=True)
class Clock:
    now_s: float = 1000.0
    delay_s: float = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("hotport.worker.share.monotonic", lambda: clock.now_s)
    monkeypatch.setattr("hotport.worker.share.run_delay_s", lambda: clock.delay_s)
    return clock


def three(sizes: list[int]) -> tuple[Table, list[Share]]:
    table = Table()
    shares = [Share(table.slot(), 1, "/run/svc") for _ in sizes]
    for share, gauge, size in zip(shares, table.gauges, sizes, strict=True):
        share.take_part(True)
        gauge[0] = size
    return table, shares


def look(clock: Clock, shares: list[Share], late: Share | None = None, late_s: float = 0.0) -> None:
    clock.now_s += LOOK_S
    for share in shares:
        if share is not late:
            share.look()
    if late is not None:
        clock.now_s += late_s
        late.look()


async def test_worker_that_is_late_hands_on_everything_and_takes_nothing_for_a_while(clock: Clock) -> None:
    _, shares = three([100, 100, 100])
    assert [share.plan_moves() for share in shares] == [None] * 3
    look(clock, shares, late=shares[0], late_s=0.3)
    assert shares[0].plan_moves() is None  # it may have been one long request
    look(clock, shares, late=shares[0], late_s=0.3)
    moves = shares[0].plan_moves()
    assert moves is not None
    assert (set(moves.paths), moves.most) == ({"/run/svc/worker-1.2.sock", "/run/svc/worker-1.3.sock"}, 100)
    assert moves.stay_s == 0
    assert [share.plan_moves() for share in shares[1:]] == [None] * 2
    assert shares[0].is_ahead()
    for _ in range(int(LATE_HOLD_S / LOOK_S) + 1):
        look(clock, shares)
    assert shares[0].plan_moves() is None
    assert not shares[0].is_ahead()


async def test_worker_without_a_processor_is_not_late(clock: Clock) -> None:
    _, shares = three([100, 100, 100])
    for _ in range(2):
        clock.delay_s += 0.25
        look(clock, shares, late=shares[0], late_s=0.3)
    assert shares[0].plan_moves() is None


async def test_full_worker_hands_some_to_those_with_room(clock: Clock) -> None:
    """It left the group when it had no room, and so saw nobody to hand connections to after `hotport scale`."""
    _, shares = three([200, 0, 200])
    shares[0].take_part(True, is_full=True)
    shares[2].take_part(False)
    moves = shares[0].plan_moves(is_asked=True)
    assert moves is not None
    assert (moves.paths, moves.most) == (["/run/svc/worker-1.2.sock"], 100)
    assert not shares[1].is_ahead()
    assert shares[2].plan_moves(is_asked=True) is None


async def test_worker_that_hangs_gets_nothing(clock: Clock) -> None:
    _, shares = three([0, 100, 500])
    for _ in range(8):
        look(clock, shares[1:])
    moves = shares[2].plan_moves()
    assert moves is not None
    assert moves.paths == ["/run/svc/worker-1.2.sock"]


async def test_workers_that_are_all_late_share_as_if_none_was(clock: Clock) -> None:
    _, shares = three([150, 0, 0])
    clock.now_s += 2 * HUNG_S
    for share in shares:
        share.look()
    moves = shares[0].plan_moves()
    assert moves is not None
    assert len(moves.paths) == 2
    assert shares[0].is_ahead()
    assert not shares[1].is_ahead()
