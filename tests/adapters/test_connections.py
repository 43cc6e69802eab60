"""The registry of connections, with connections that only remember what they were told."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from hotport.adapters import base
from hotport.adapters.base import Connection, Connections, Ready

TOLD_AT_ONCE = 3


class Idle:
    """Always at a safe point, if the worker can use it; `said` is what it was told."""

    kind = "idle"
    endpoints = None

    def __init__(self) -> None:
        self.said: list[str] = []

    will_move = True

    def drain(self) -> None:
        self.said.append("drain")

    def stay(self) -> None:
        self.said.append("stay")

    def prepare_handoff(self, ready: Ready) -> bool:
        self.said.append("move")
        return True


def opened(monkeypatch: pytest.MonkeyPatch, count: int) -> tuple[Connections, list[Any]]:
    """A registry that tells three at once, and so many connections in it."""
    monkeypatch.setattr(base, "TOLD_AT_ONCE", TOLD_AT_ONCE)
    connections, idle = Connections(), [Idle() for _ in range(count)]
    for each in idle:
        connections.opened(cast(Connection, each))
    return connections, idle


def told(idle: list[Any]) -> int:
    return sum(bool(each.said) for each in idle)


async def turn() -> None:
    """One turn of the event loop."""
    await asyncio.sleep(0)


def test_loop_has_a_turn_between_some_connections_and_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """9,000 connections that were all told in one turn stopped the worker for 30 ms, for all of its clients."""

    async def main() -> None:
        connections, idle = opened(monkeypatch, 2 * TOLD_AT_ONCE + 1)
        connections.drain(1.0)
        for count in (TOLD_AT_ONCE, 2 * TOLD_AT_ONCE, len(idle), len(idle)):
            assert told(idle) == count
            await turn()
        assert all(each.said == ["drain"] for each in idle)

    asyncio.run(main())


def test_connection_that_ends_before_its_turn_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        connections, idle = opened(monkeypatch, TOLD_AT_ONCE + 1)
        connections.drain(1.0)
        connections.closed(idle[-1])
        await turn()
        assert told(idle) == TOLD_AT_ONCE

    asyncio.run(main())


def test_all_drain_if_successor_is_gone_before_all_were_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        connections, idle = opened(monkeypatch, 2 * TOLD_AT_ONCE)
        connections.lead(lambda connection: None)
        connections.drain(1.0)
        assert [each.said for each in idle] == [["move"]] * TOLD_AT_ONCE + [[]] * TOLD_AT_ONCE
        connections.lead(None)
        await turn()
        await turn()
        assert [each.said for each in idle] == [["move", "drain"]] * TOLD_AT_ONCE + [["drain"]] * TOLD_AT_ONCE

    asyncio.run(main())


def test_connection_that_comes_while_others_are_told_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        connections, _ = opened(monkeypatch, 2 * TOLD_AT_ONCE)
        connections.drain(1.0)
        late = Idle()
        connections.opened(cast(Connection, late))
        assert late.said == ["drain"]

    asyncio.run(main())


def test_worker_that_may_be_taken_back_moves_connections_early_and_keeps_those_that_nobody_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        connections, (one, *_) = opened(monkeypatch, 1)
        connections.lead(lambda connection: None)
        assert one.said == []  # it serves, or is about to drain
        connections.moves_early = True
        connections.lead(lambda connection: None)
        late = Idle()
        connections.opened(cast(Connection, late))
        assert one.said == late.said == ["move"]
        connections.lead(None)
        assert one.said == late.said == ["move", "stay"]
        assert not connections.is_leading
        connections.drain(1.0)
        assert one.said == late.said == ["move", "stay", "drain"]

    asyncio.run(main())
