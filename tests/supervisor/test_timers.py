"""Timers, on a clock that jumps."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from trio.testing import MockClock

from hotport.model.inputs import Clock, Timer
from hotport.supervisor.timers import Timers

pytestmark = pytest.mark.anyio

READY, DRAIN = Timer(Clock.READY, 1), Timer(Clock.DRAIN, 1)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


async def ends_of(*steps: tuple[str, Timer, float]) -> list[tuple[Timer, float]]:
    """Start, extend and stop timers at once; which ones ended, and when."""
    ended: list[tuple[Timer, float]] = []
    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        timers = Timers(tasks, lambda timer: ended.append((timer, anyio.current_time() - began)))
        for verb, timer, seconds in steps:
            if verb == "stop":
                timers.stop(timer)
            else:
                getattr(timers, verb)(timer, seconds)
    return ended


async def test_timers_end_in_their_own_time() -> None:
    assert await ends_of(("start", READY, 3600), ("start", DRAIN, 5)) == [(DRAIN, 5), (READY, 3600)]


async def test_starting_again_replaces() -> None:
    assert await ends_of(("start", READY, 5), ("start", READY, 2)) == [(READY, 2)]


async def test_a_stopped_timer_never_ends() -> None:
    assert await ends_of(("start", READY, 5), ("stop", READY, 0), ("stop", DRAIN, 0)) == []


@pytest.mark.parametrize(("asked", "ends"), [(9, 9), (1, 5)])
async def test_an_extension_makes_a_timer_longer_never_shorter(asked: float, ends: float) -> None:
    assert await ends_of(("start", READY, 5), ("extend", READY, asked)) == [(READY, ends)]


async def test_a_timer_that_does_not_run_is_not_extended() -> None:
    assert await ends_of(("extend", READY, 5)) == []


async def test_a_timer_says_how_long_it_will_run() -> None:
    async with anyio.create_task_group() as tasks:
        timers = Timers(tasks, lambda timer: None)
        timers.start(READY, 5)
        await anyio.sleep(2)
        assert timers.left_s(READY) == 3
        assert timers.left_s(DRAIN) is None
        timers.stop(READY)
        assert timers.left_s(READY) is None
