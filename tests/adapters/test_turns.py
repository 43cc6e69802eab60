"""Connections that have much to do take turns."""

from __future__ import annotations

import asyncio
import re

import pytest

from hotport.adapters import turns
from hotport.adapters.turns import Turns
from tests.adapters.asgi_support import until

pytestmark = pytest.mark.anyio


async def test_all_that_wait_share_one_turn_and_come_again_behind_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURN_S", 0.0)  # one a turn
    loop = asyncio.get_running_loop()
    queue, done = Turns(loop), list[str]()

    def work(name: str, times: int) -> None:
        done.append(name)
        if times > 1:
            queue.wait(lambda: work(name, times - 1))

    def note() -> None:
        done.append("-")
        if len(done) < 12:
            loop.call_soon(note)

    queue.wait(lambda: work("a", 3))
    queue.wait(lambda: work("b", 2))
    loop.call_soon(note)
    await until(lambda: len(done) >= 12)
    assert "".join(done).rstrip("-") == "a-b-a-b-a"


async def test_short_work_of_many_fits_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURN_S", 60.0)
    queue, done = Turns(asyncio.get_running_loop()), list[int]()
    for number in range(100):
        queue.wait(lambda number=number: done.append(number))  # type: ignore[misc]
    await asyncio.sleep(0)
    assert done == list(range(100))


async def test_one_that_fails_does_not_keep_others_waiting(caplog: pytest.LogCaptureFixture) -> None:
    queue, done = Turns(asyncio.get_running_loop()), list[int]()

    def fail() -> None:
        raise RuntimeError("mine")

    queue.wait(fail)
    queue.wait(lambda: done.append(1))
    await until(lambda: bool(done))
    assert "mine" in caplog.text


async def test_one_application_continues_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TURN_S", 60.0)
    loop = asyncio.get_running_loop()
    queue, done = Turns(loop), list[str]()

    async def send(name: str) -> None:
        for _ in range(2):
            await queue.turn()
            done.append(name)

    def note() -> None:
        done.append("-")
        if len(done) < 12:
            loop.call_soon(note)

    tasks = [asyncio.ensure_future(send(name)) for name in "abc"]
    await asyncio.sleep(0)
    tasks.pop().cancel()  # who has left needs no turn
    loop.call_soon(note)
    await asyncio.gather(*tasks)
    text = "".join(done)
    assert text.replace("-", "") == "abab"
    assert not re.search("[ab][ab]", text)
