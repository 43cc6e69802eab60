"""What the fleet makes of the model's effects, without processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hotport.model.inputs import Clock, RecycleDue
from hotport.options import Options
from hotport.supervisor.fleet import Fleet
from hotport.supervisor.starter import Starter
from hotport.wire.messages import DrainOrder, ExpectOrder, HurryOrder, Inspection
from tests.model.world import World

pytestmark = pytest.mark.anyio


class Process:
    """A worker that has so many connections; remembers its orders."""

    def __init__(self, worker: int, connections: int | None = 0, *, is_talking: bool = True) -> None:
        self.worker = worker
        self.control_path = f"/run/worker-{worker}.sock"
        self.connections = connections
        self.is_talking = is_talking
        self.is_leaving = False
        self.expects: set[str] = set()
        self.done: list[Any] = []

    async def ask(self, *_: Any) -> Inspection | None:
        count = self.connections
        return count if count is None else Inspection(connections=count, accepted=0, requests=0, rss_bytes=0)

    def order(self, message: Any) -> None:
        self.done.append(message)

    def signal(self, number: int) -> None:
        self.done.append(number)

    def kill(self) -> None:
        self.done.append("kill")


def fleet_of(world: World, **options: Any) -> Any:
    """What of a fleet these methods use."""
    processes = {worker: Process(worker, 10 * worker) for worker in world.service.workers}
    return SimpleNamespace(
        _service=world.service,
        _options=Options(**options),
        processes=processes,
        _successors=lambda _: ("/run/next.sock",),
        starter=SimpleNamespace(call_off=lambda _: None),
    )


def leaving(fleet: Any, worker: int) -> list[int]:
    return sorted(process.worker for process in Fleet._leaving(fleet, worker))


def restarting(*, phased: bool = False, window: bool = False) -> World:
    world = World(2).run()
    world.restart(is_phased=phased, is_watched=window)
    world.take()
    return world


def test_generation_has_one_load_page_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a second one its workers would be two groups that do not see each other."""
    made = iter([7, 8])
    monkeypatch.setattr("hotport.supervisor.starter.make_load_page", lambda: next(made))
    warned: list[dict[str, Any]] = []
    log = SimpleNamespace(warning=lambda event, **fields: warned.append({"event": event, **fields}))
    siblings = {3}  # adopted, from a supervisor before
    starter: Any = SimpleNamespace(_pages={2: 6}, _has_workers=siblings.__contains__, _log=log)
    assert [Starter._page(starter, generation) for generation in (1, 1, 2, 3)] == [
        {"load": 7},
        {"load": 7},
        {"load": 6},
        {},
    ]
    assert [(each["event"], each["generation"]) for each in warned] == [("balance.off", 3)]
    assert starter._pages == {1: 7, 2: 6}


def test_workers_of_a_restart_keep_room_for_those_whom_they_replace() -> None:
    fleet = fleet_of(restarting())
    assert leaving(fleet, 3) == leaving(fleet, 4) == [1, 2]
    assert leaving(fleet_of(restarting(phased=True)), 3) == [1]


@pytest.mark.parametrize(
    "options", [{"handoff": "off"}, {"tls_cert": ("a.pem",)}, {"command": ("./server",)}], ids=["off", "tls", "foreign"]
)
def test_no_room_is_kept_for_what_cannot_move(options: dict[str, Any]) -> None:
    assert leaving(fleet_of(restarting(), **options), 3) == []


def test_old_workers_that_accept_again_keep_room_for_what_comes_back() -> None:
    world = restarting(window=True)
    world.run()
    world.elapse(Clock.SETTLE)
    world.run()
    world.undo()
    world.take()
    assert leaving(fleet_of(world), 1) == [3, 4]


def test_worker_that_replaces_one_that_has_expired_keeps_room_for_it() -> None:
    world = World(2).run()
    world.queue.append(RecycleDue(1))
    world.take()
    assert leaving(fleet_of(world), 3) == [1]


def test_worker_that_cannot_be_asked_is_none_of_them() -> None:
    fleet = fleet_of(restarting())
    fleet.processes[1].is_talking = False
    del fleet.processes[2]
    assert leaving(fleet, 3) == []


@pytest.mark.parametrize(("phased", "expected"), [(False, {"worker-1.sock": 6}), (True, {"worker-1.sock": 11})])
async def test_each_new_worker_is_told_of_its_share(phased: bool, expected: dict[str, int]) -> None:
    fleet = fleet_of(restarting(phased=phased))
    this, others = fleet.processes[3], [Process(1, 11), Process(2, None), Process(5, 0)]
    await Fleet._announce(fleet, this, others)  # type: ignore[arg-type]
    assert this.done == [ExpectOrder(connections=expected)]
    assert this.expects == expected.keys()
    await Fleet._announce(fleet, fleet.processes[1], [])
    assert fleet.processes[1].done == []


@pytest.mark.parametrize(
    ("is_talking", "is_leaving", "is_hurried", "expected"),
    [
        (True, False, False, DrainOrder(timeout_s=2.5, successors=("/run/next.sock",))),
        (True, True, False, HurryOrder()),
        (True, False, True, HurryOrder()),
        (False, False, False, 15),
        (False, True, True, "kill"),
    ],
)
def test_worker_is_told_to_go_by_a_word_if_it_can_be_told(
    is_talking: bool, is_leaving: bool, is_hurried: bool, expected: Any
) -> None:
    """A signal would count as one of somebody's who does not know of the order to drain."""
    fleet = fleet_of(World(1).run())
    process = fleet.processes[1]
    process.is_talking, process.is_leaving = is_talking, is_leaving
    Fleet.terminate(fleet, 1, is_hurried=is_hurried)
    Fleet.terminate(fleet, 7, is_hurried=is_hurried)  # it is gone
    assert process.done == [expected]


async def test_priority_is_restored_in_time_and_only_of_a_process_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside others that take all of the processor, a worker of lower priority would not be ready in time."""
    given: list[tuple[int, int]] = []
    monkeypatch.setattr("hotport.supervisor.starter.set_niceness", lambda *each: given.append(each))
    await Starter._restore_priority(SimpleNamespace(), 7, 0.0, lambda: True)  # type: ignore[arg-type]
    await Starter._restore_priority(SimpleNamespace(), 8, 0.0, lambda: False)  # type: ignore[arg-type]
    assert given == [(7, 0)]
