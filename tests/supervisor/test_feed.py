"""The events of the live page, without a service: who does not read is left, and nobody waits for it."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any, cast

import anyio
import anyio.abc
import msgspec
import pytest

from hotport.model.effects import Announce, News
from hotport.supervisor import history, statusport
from hotport.supervisor.feed import EVENTS_MAX, LANES_MAX, SPANS_MAX, Feed
from hotport.supervisor.history import MISHAPS_MAX, SPAN_S, STEP_S, History
from hotport.wire.messages import Inspection
from hotport.wire.recording import Lane, Span
from tests.wire.test_trace import RECORDING

pytestmark = pytest.mark.anyio


class Supervisor:
    """As much of one as a feed asks for."""

    def __init__(self, recordings: Any = ()) -> None:
        self.history = History({})
        self.news = SimpleNamespace(reports=SimpleNamespace(recordings=lambda last: list(recordings)[-last:]))


def feed(*recordings: Any) -> Feed:
    return Feed(cast("Any", Supervisor(recordings)), lambda status: status)


async def test_viewer_who_does_not_read_is_dropped_and_others_are_not() -> None:
    one = feed()
    with one.subscribed() as slow, one.subscribed() as fast:
        assert len(one) == 2
        await fast.receive()
        for number in range(EVENTS_MAX):
            one._send(b"%d" % number)
            assert await fast.receive() == b"%d" % number
        assert len(one) == 1
        assert [event async for event in slow][-1] == b"%d" % (EVENTS_MAX - 2)  # then it ends
    assert len(one) == 0


async def test_viewer_whose_kernel_takes_no_more_is_left_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statusport, "VIEWER_TIMEOUT_S", 0.01)
    one = feed()
    ours, theirs = socket.socketpair()
    with theirs:
        async with await anyio.abc.SocketStream.from_socket(ours) as stream, anyio.create_task_group() as tasks:

            async def flood() -> None:
                while not len(one):
                    await anyio.lowlevel.checkpoint()
                while len(one):
                    one._send(bytes(1 << 20))
                    await anyio.lowlevel.checkpoint()

            tasks.start_soon(flood)
            with anyio.fail_after(30):
                await statusport._show(stream, ours, one, anyio.Event())


async def test_words_of_the_application_are_not_in_restarts_and_long_ones_are_cut() -> None:
    spans = tuple(Span(name="moving", at_ms=0.0, ms=1.0) for _ in range(SPANS_MAX + 2))
    lanes = tuple(Lane(worker=number, generation=1, pid=number, spans=spans) for number in range(LANES_MAX + 3))
    report = msgspec.structs.replace(RECORDING.report, error="password=hunter2", outcome="aborted")
    one = feed(RECORDING, msgspec.structs.replace(RECORDING, report=report, lanes=lanes))
    with one.subscribed() as events:
        event = (await events.receive()).decode()
    retry, name, data = event.split("\n", 3)[0], event.split("\n")[2], event.split("\n")[3]
    assert (retry, name) == ("retry: 1000", "event: past")
    assert "hunter2" not in event
    whole, cut = msgspec.json.decode(data.removeprefix("data: "))["restarts"]
    assert [step["name"] for step in whole["steps"]][:2] == ["preparing", "starting"]
    assert (len(cut["lanes"]), cut["lanes_left_out"]) == (LANES_MAX, 3)
    assert (len(cut["lanes"][0]["spans"]), cut["lanes"][0]["left_out"]) == (SPANS_MAX, 2)


def worker(started_at: float, connections: int = 0, requests: int = 0, errors: int = 0) -> Any:
    told = Inspection(connections=connections, accepted=0, requests=requests, rss_bytes=1, errors=errors)
    return SimpleNamespace(started_at=started_at, inspection=told)


async def test_points_have_what_has_happened_since_the_last_one() -> None:
    processes = {1: worker(-1000.0, 4, 5000), 2: SimpleNamespace(inspection=None)}
    kept = History(cast("Any", processes))
    kept._at_s = 0.0
    kept.take(100.0, 2.0)
    processes[1] = worker(-1000.0, 5, 5100, errors=1)
    processes[3] = worker(3.0, 2, 50)  # new: what it has served, it has served since
    kept.take(102.0, 4.0)
    del processes[1]
    kept.take(104.0, 6.0)
    assert [(each.at, each.connections, each.requests, each.errors) for each in kept.points] == [
        *((100.0, 4, 0.0, 0.0), (102.0, 7, 75.0, 0.5), (104.0, 2, 0.0, 0.0))
    ]
    for number in range(1000):
        kept.take(200.0 + number, 10.0 + number)
    assert len(kept.points) == SPAN_S / STEP_S


async def test_points_are_taken_of_fresh_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = anyio.Event()

    async def ask(order: Any, kind: Any, timeout_s: float) -> None:
        asked.set()

    process = worker(0.0)
    process.ask = ask
    kept = History({1: process})
    monkeypatch.setattr(history, "STEP_S", 3600.0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(kept.keep)
        await asked.wait()
        while not kept.points:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


async def test_bad_news_is_kept_and_bounded() -> None:
    kept = History({})
    kept.hear(Announce(News.COMMITTED, 2))
    assert not kept.mishaps
    for number in range(MISHAPS_MAX + 5):
        kept.hear(Announce(News.WORKER_LOST, 2, worker=number, why="was killed by SIGKILL"))
    assert [each.worker for each in kept.mishaps] == [*range(5, MISHAPS_MAX + 5)]
    assert kept.mishaps[0].event == "worker.lost"
