"""A worker hands some of its connections to another one, while both serve: nobody notices, whatever comes between."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hotport.model.fates import Fate
from hotport.wire.envelope import Ack, Frame, encode_frame
from hotport.worker import handoff, server
from hotport.worker.share import Moves
from tests.adapters.asgi_support import Client, respond, turns, until
from tests.worker.handoff_support import DEADLINE_S, Generation, Service, Successor, service
from tests.worker.test_handoff_and_back import answer
from tests.worker.test_handoff_http import App, get
from tests.worker.test_handoff_websocket import Client as WebSocketClient
from tests.worker.test_handoff_websocket import Echo

pytestmark = pytest.mark.anyio


class Plan:
    """A share that says what the test has planned."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, int]] = []
        self.looks = 0

    def take_part(self, takes_part: bool, *, is_full: bool = False) -> None: ...

    def is_ahead(self) -> bool:
        return False

    def look(self) -> None:
        self.looks += 1

    def plan_moves(self, *, is_asked: bool = False) -> Moves | None:
        if not self.moves:
            return None
        path, count = self.moves.pop()
        return Moves([path], count, 10.0)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LOOK_S", 0.01)


@asynccontextmanager
async def two(
    tmp_path: Path, app: Any, clients: int, *, plan: Plan | None = None, **options: Any
) -> AsyncIterator[tuple[Service, Generation, Plan, list[Client]]]:
    """A worker with so many clients, and what it will do; another one is the test's."""
    plan = plan or Plan()
    async with service(tmp_path) as port, AsyncExitStack() as stack:
        old = await port.start(app, share=plan, **options)
        await old.server.accept()
        found = []
        for _ in range(clients):
            found.append(Client(stack.enter_context(await port.connect())))
            assert await answer(found[-1]) == b"1 /a "
        yield port, old, plan, found


async def test_some_connections_move_and_both_serve_on(tmp_path: Path) -> None:
    app = App()
    async with two(tmp_path, app, 10) as (port, old, plan, clients):
        new = await port.start(app)
        plan.moves.append((new.path, 4))
        await until(lambda: len(new.connections.open) == 4)
        await until(lambda: not old.connections.moving)
        assert sorted([await answer(client) for client in clients]) == [b"1 /a "] * 6 + [b"2 /a "] * 4
        assert len(old.connections.open) == 6
        assert new.connections.adopted == 4
        assert not old.connections.draining.is_set()
        late = Client(await port.connect())
        assert await answer(late) == b"1 /a "  # the other one does not accept here
        late.close()


async def test_connections_that_came_lately_stay(tmp_path: Path) -> None:
    app = App()
    async with two(tmp_path, app, 4) as (port, old, plan, clients):
        back = Plan()
        new = await port.start(app, share=back)
        plan.moves.append((new.path, 4))
        await until(lambda: len(new.connections.open) == 4)
        old.server.quiesce()
        await new.server.accept()
        own = Client(await port.connect())
        assert await answer(own) == b"2 /a "
        back.moves.append((old.path, 5))
        await until(lambda: len(old.connections.open) == 1)
        assert [await answer(client) for client in (*clients, own)] == [b"2 /a "] * 4 + [b"1 /a "]
        own.close()


async def test_websockets_move_too(tmp_path: Path) -> None:
    app = Echo()
    plan = Plan()
    async with service(tmp_path) as port:
        old = await port.start(app, share=plan, handoff="websocket")
        await old.server.accept()
        with await port.connect() as sock:
            client = WebSocketClient(sock)
            await client.open()
            new = await port.start(app, handoff="websocket")
            plan.moves.append((new.path, 1))
            await until(lambda: len(new.connections.open) == 1)
            await client.send("hello")
            assert "hello" in str(await client.receive())


async def test_busy_connection_moves_when_it_is_idle_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BALANCE_TIMEOUT_S", 0.05)
    gate = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await gate.wait()
        await respond(send, b"1 /a ")

    async with two(tmp_path, app, 1) as (port, old, plan, [client]):
        new = await port.start(app)
        await client.send(get("/slow"))
        await until(lambda: old.connections.requests == 2)
        plan.moves.append((new.path, 1))
        await until(lambda: old.connections.moving == 1)
        await until(lambda: not old.connections.moving)  # it was given up
        gate.set()
        assert not (await client.answer()).says_close
        assert await answer(client) == b"1 /a "
        assert list(map(len, (old.connections.open, new.connections.open))) == [1, 0]


@pytest.mark.parametrize("how", ["nobody listens", "it hangs up", "it never answers"])
async def test_worker_that_does_not_take_costs_nothing(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff, "ACK_TIMEOUT_S", 0.05)
    monkeypatch.setattr(server, "BALANCE_TIMEOUT_S", 0.3)
    async with two(tmp_path, App(), 3) as (_, old, plan, clients):
        other = None if how == "nobody listens" else Successor(tmp_path)
        plan.moves.append((str(tmp_path / "successor.sock"), 2))
        if other is not None:
            await other.welcome()
            if how == "it hangs up":
                other.channel.close()
        await until(lambda: not plan.moves)
        assert [await answer(client) for client in clients] == [b"1 /a "] * 3
        assert len(old.connections.open) == 3
        if other is not None:
            other.close()
            other.channel.close()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_drain_in_the_middle_moves_the_rest(tmp_path: Path, when: str) -> None:
    app = App()
    async with two(tmp_path, app, 20) as (port, old, plan, clients):
        light, new = await port.start(app), await port.start(app)
        await new.server.accept()
        plan.moves.append((light.path, 5))
        if when == "meanwhile":
            await until(lambda: not plan.moves)
        fates = await old.leave(new)
        assert fates.total() == fates[Fate.MOVED_HTTP]
        assert sum(len(each.connections.open) for each in (light, new)) == 20
        for client in clients:
            assert await answer(client) in {b"2 /a ", b"3 /a "}


async def test_it_goes_on_after_a_restart_that_was_taken_back(tmp_path: Path) -> None:
    app = App()
    async with two(tmp_path, app, 4) as (port, old, plan, clients):
        light = await port.start(app)
        old.server.quiesce()
        plan.moves.append((light.path, 2))
        assert old.server._balancing is None
        await old.server.accept()
        await until(lambda: len(light.connections.open) == 2)
        async with asyncio.timeout(DEADLINE_S):
            for client in clients:
                assert await answer(client) in {b"1 /a ", b"2 /a "}


async def test_it_says_how_many_have_moved_when_it_is_asked(tmp_path: Path) -> None:
    app = App()
    async with two(tmp_path, app, 6) as (port, old, plan, _):
        new = await port.start(app)
        assert await old.server.rebalance() == 0
        plan.moves.append((new.path, 3))
        assert await old.server.rebalance() in {0, 3}  # a look that nobody asked for may have been first
        await until(lambda: len(new.connections.open) == 3)
        asked = asyncio.create_task(old.server.rebalance())
        await asyncio.sleep(0)
        old.server.quiesce()
        assert await asked == 0
        assert await old.server.rebalance() == 0


class PlanWhenAsked(Plan):
    """Moves nothing before somebody asks for it."""

    def plan_moves(self, *, is_asked: bool = False) -> Moves | None:
        return super().plan_moves() if is_asked else None


async def test_who_asks_is_answered_if_a_move_is_stopped_before_it_begins(tmp_path: Path) -> None:
    """`hotport rebalance` said nothing for 20 s, if a restart came just then."""

    class Stopping(PlanWhenAsked):
        def plan_moves(self, *, is_asked: bool = False) -> Moves | None:
            if is_asked:
                asyncio.get_running_loop().call_soon(old.server.quiesce)
            return super().plan_moves(is_asked=is_asked)

    async with two(tmp_path, App(), 1, plan=Stopping()) as (port, old, plan, [client]):
        new = await port.start(App())
        plan.moves.append((new.path, 1))
        async with asyncio.timeout(DEADLINE_S):
            assert await old.server.rebalance() == 0
        assert not plan.moves
        assert await answer(client) == b"1 /a "


async def test_who_asks_is_answered_if_balancing_has_failed(tmp_path: Path) -> None:
    class Failing(PlanWhenAsked):
        def plan_moves(self, *, is_asked: bool = False) -> Moves | None:
            if is_asked:
                raise RuntimeError("no plan")
            return None

    async with two(tmp_path, App(), 1, plan=Failing()) as (_, old, _plan, [client]), asyncio.timeout(DEADLINE_S):
        for _ in range(2):
            assert await old.server.rebalance() == 0
            await turns()
        assert await answer(client) == b"1 /a "


async def test_what_is_under_way_arrives_though_balancing_is_stopped_twice(tmp_path: Path) -> None:
    """An order to quiesce, and then one to drain: the second left a batch to itself, and nobody was answered."""
    async with two(tmp_path, App(), 3, plan=PlanWhenAsked()) as (_, old, plan, _clients):
        other = Successor(tmp_path)
        plan.moves.append((other.path, 2))
        asked = asyncio.create_task(old.server.rebalance())
        await other.welcome()
        _, descriptors = await other.batch()
        for fd in descriptors:
            os.close(fd)
        for _ in range(2):
            old.server.quiesce()
            await turns()
        assert not asked.done()
        await other.channel.send(encode_frame(Frame.ACK, Ack([], 98)))
        async with asyncio.timeout(DEADLINE_S):
            assert await asked == len(descriptors) == 2
            await old.server.follow(())
        assert len(old.connections.open) == 1
        assert not old.connections.moving
        other.close()
        other.channel.close()


async def test_connections_that_cannot_move_are_not_tried_all_the_time(tmp_path: Path) -> None:
    async with two(tmp_path, App(), 3, handoff="auto") as (_, old, plan, clients):
        plan.moves += [(str(tmp_path / "nobody.sock"), 2)] * 3
        await until(lambda: len(plan.moves) == 2 and old.server._moving is not None and old.server._moving.done())
        looks = plan.looks
        await until(lambda: plan.looks == looks + 5)
        assert len(plan.moves) == 2
        assert await old.server.rebalance() == 0  # but whoever asks is not put off
        assert len(plan.moves) == 1
        assert [await answer(client) for client in clients] == [b"1 /a "] * 3


async def test_nothing_begins_to_move_after_a_second_order_to_accept_and_a_drain(tmp_path: Path) -> None:
    app = App()
    async with two(tmp_path, app, 3) as (port, old, plan, _):
        await old.server.accept()
        new = await port.start(app)
        old.server.quiesce()
        plan.moves.append((new.path, 3))
        assert old.server._balancing is None
        looks = plan.looks
        await turns()
        assert (plan.looks, plan.moves) == (looks, [(new.path, 3)])
