"""What the supervisor does about signals, without one: a model in its place, and what was asked of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from hotport.errors import RestartError
from hotport.kernel.process import numbers
from hotport.model.effects import Drain, Effect, Kill, News, Terminate
from hotport.model.inputs import Clock, RequestStop
from hotport.model.rules import refusal, step
from hotport.model.service import Service
from hotport.model.signals import ALL, HELD, NOTES, SUPERVISOR, TERMINATING, WORKER, Does, Moment
from hotport.supervisor import signals
from hotport.supervisor.supervisor import Supervisor
from tests.model.world import World, news
from tests.support import DEADLINE_S

LAME_DUCK_S = 10.0


def service_at(at: Moment) -> Service:
    """A service of one worker."""
    world = World(1)
    if at is Moment.STARTING:
        world.take()
        return world.service
    world.run()
    if at in (Moment.RESTARTING, Moment.DRAINING):
        world.restart()
        world.take()
    if at is Moment.DRAINING:
        world.run(slow=(1,))
        world.elapse(Clock.QUIESCE)
        world.run(slow=(1,))
        world.elapse(Clock.SETTLE)
        world.run(slow=(1,))
    if at is Moment.STOPPING:
        world.stop()
        world.run(slow=(1,))
    return world.service


def moment(service: Service) -> Moment:
    """What a supervisor is doing."""
    if service.is_stopping:
        return Moment.STOPPING
    if service.generation == 0:
        return Moment.STARTING
    if service.restart is not None:
        return Moment.RESTARTING
    return Moment.DRAINING if service.draining_generations else Moment.SERVING


class Supervised:
    """Stands for a supervisor and its upgrade; `done` is what it was asked for and did, `refused` what it did not."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.effects: list[Effect] = []
        self.done: list[str] = []
        self.refused: list[str] = []
        self.asked = anyio.Event()
        self.has_departed = self.is_succeeded = self.is_departing = False
        self.owned = SimpleNamespace(lost=())
        self.fleet = SimpleNamespace(processes={})
        self.news = SimpleNamespace(manager=SimpleNamespace(refused=lambda why: None))

    def input(self, event: RequestStop) -> None:
        self.effects = self.step(event)
        self.asked.set()

    def step(self, event: RequestStop) -> list[Effect]:
        self.service, effects = step(self.service, event)
        return list(effects)

    def stop(self) -> None:
        self.input(RequestStop(lame_duck_s=LAME_DUCK_S))

    def request(self, what: str, why: object) -> None:
        (self.refused if why else self.done).append(what)
        self.asked.set()
        if why:
            raise RestartError("HP410", "refused", cause=str(why), fix="", serving=1)

    async def restart(self, _: Any) -> None:
        self.request("restart", refusal(self.service, is_restart=True))

    async def scale(self, _: Any, workers: int) -> None:
        self.request(f"scale {workers - self.service.wanted:+}", refusal(self.service, is_restart=False))

    async def begin(self, *_: Any) -> None:
        self.request("upgrade", Supervisor.why_busy.fget(self))  # type: ignore[attr-defined]


class Log:
    def __init__(self, supervised: Supervised) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._supervised = supervised

    def info(self, event: str, **values: Any) -> None:
        self.events.append((event, values))
        if event == "signal.ignored":
            self._supervised.asked.set()

    debug = warning = info


async def after(name: str, supervised: Any, log: Log) -> None:
    """Return when the handlers have dealt with a signal to this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "get_logger", lambda _: log)
        patch.setattr(signals, "restart", supervised.restart)
        patch.setattr(signals, "scale", supervised.scale)
        patch.setattr(signals, "ends_with_terminal", lambda: False)
        with anyio.fail_after(DEADLINE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(signals.handle_signals, supervised, supervised, tasks)
                await anyio.wait_all_tasks_blocked()
                os.kill(os.getpid(), signal.Signals[name])
                if SUPERVISOR[name][moment(supervised.service)] is Does.NOTHING:
                    await anyio.wait_all_tasks_blocked()
                else:
                    await supervised.asked.wait()
                tasks.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    """anyio restores defaults; a shell may have started the tests with some signals ignored."""
    before = {number: signal.getsignal(number) for number in numbers(SUPERVISOR.keys())}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


REQUESTS = {
    "SIGHUP": "restart",
    "SIGUSR2": "upgrade",
    "SIGTTIN": "scale +1",
    "SIGTTOU": "scale +0",  # the last one stays
}

CELLS = [(name, at, does) for name, row in SUPERVISOR.items() for at, does in row.items()]


@pytest.mark.parametrize(("name", "at", "does"), CELLS, ids=[f"{name}-{at.value}" for name, at, _ in CELLS])
def test_supervisor_does_what_the_table_says(name: str, at: Moment, does: Does) -> None:
    supervised = Supervised(service_at(at))
    assert moment(supervised.service) is at
    before = supervised.service
    log = Log(supervised)
    anyio.run(after, name, supervised, log)
    told, effects = news(supervised.effects), supervised.effects
    match does:
        case Does.NOTHING | Does.NOTE:
            assert (supervised.service, supervised.done, supervised.refused) == (before, [], [])
            noted = [values["why"] for event, values in log.events if event == "signal.ignored"]
            assert noted == ([NOTES[name]] if does is Does.NOTE else [])
        case Does.RESTART | Does.MORE | Does.FEWER | Does.UPGRADE:
            assert supervised.done == [REQUESTS[name]]
        case Does.REFUSE:
            assert supervised.refused == [REQUESTS[name]]
            assert "request.failed" in [event for event, _ in log.events]
        case Does.STOP_DUCK | Does.STOP_RESTART_DUCK:
            assert told == [News.LAME_DUCK]
            assert supervised.service.restart == before.restart
            effects = supervised.step(RequestStop())  # as when its time is over
            assert Drain(1, is_last=True) in effects or at is not Moment.SERVING
            assert (News.ABORTED in news(effects)) is (does is Does.STOP_RESTART_DUCK)
        case Does.STOP | Does.STOP_RESTART:
            assert News.LAME_DUCK not in told
            assert News.STOPPING in told
            assert (News.ABORTED in told) is (does is Does.STOP_RESTART)
            assert not any(isinstance(effect, Kill) for effect in effects)
        case Does.STOP_BOOT:
            assert [effect for effect in effects if isinstance(effect, Terminate | Drain | Kill)] == [Terminate(1)]
        case Does.HURRY | Does.HURRY_NOW if at is Moment.STARTING:
            assert Kill(1) in effects  # it has no connection
        case Does.HURRY | Does.HURRY_NOW:
            hurried = {effect.worker for effect in effects if isinstance(effect, Terminate) and effect.is_hurried}
            assert 1 in hurried
            assert Kill(1) in supervised.step(RequestStop())
        case _:
            pytest.fail(f"{does} is nothing that a supervisor does")


def test_every_signal_is_in_every_table() -> None:
    assert WORKER.keys() == SUPERVISOR.keys() == ALL.keys()
    assert all(row.keys() == set(Moment) for table in (WORKER, SUPERVISOR, ALL) for row in table.values())
    assert {name for name, row in SUPERVISOR.items() if {*row.values()} != {Does.NOTHING}} == HELD | TERMINATING
    noted = {name for table in (WORKER, SUPERVISOR) for name, row in table.items() if Does.NOTE in row.values()}
    assert NOTES.keys() == noted
