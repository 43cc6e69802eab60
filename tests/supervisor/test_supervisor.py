"""What the supervisor makes of the model's effects, without processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog

from hotport.model.inputs import Clock, Expired, Timer
from hotport.options import Options
from hotport.supervisor import supervisor as module
from hotport.supervisor.supervisor import ANSWER_TIMEOUT_S, Supervisor
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
        return (
            count
            if count is None
            else Inspection(connections=count, accepted=0, requests=0, rss_bytes=0, descriptors=0)
        )

    def order(self, message: Any) -> None:
        self.done.append(message)

    def signal(self, number: int) -> None:
        self.done.append(number)

    def kill(self) -> None:
        self.done.append("kill")


def supervising(world: World, **options: Any) -> Any:
    """What of a supervisor these methods use."""
    processes = {worker: Process(worker, 10 * worker) for worker in world.service.workers}
    return SimpleNamespace(
        service=world.service,
        options=Options(**options),
        processes=processes,
        _successors=lambda _: ("/run/next.sock",),
    )


def leaving(supervisor: Any, worker: int) -> list[int]:
    return sorted(process.worker for process in Supervisor._leaving(supervisor, worker))


def restarting(*, phased: bool = False, window: bool = False) -> World:
    world = World(2).run()
    world.restart(is_phased=phased, is_watched=window)
    world.take()
    return world


def test_workers_of_a_restart_keep_room_for_those_whom_they_replace() -> None:
    supervisor = supervising(restarting())
    assert leaving(supervisor, 3) == leaving(supervisor, 4) == [1, 2]
    assert leaving(supervising(restarting(phased=True)), 3) == [1]


@pytest.mark.parametrize(
    "options", [{"handoff": "off"}, {"tls_cert": ("a.pem",)}, {"command": ("./server",)}], ids=["off", "tls", "foreign"]
)
def test_no_room_is_kept_for_what_cannot_move(options: dict[str, Any]) -> None:
    assert leaving(supervising(restarting(), **options), 3) == []


def test_old_workers_that_accept_again_keep_room_for_what_comes_back() -> None:
    world = restarting(window=True)
    world.run()
    world.elapse(Clock.SETTLE)
    world.run()
    world.undo()
    world.take()
    assert leaving(supervising(world), 1) == [3, 4]


def test_worker_that_replaces_one_that_has_expired_keeps_room_for_it() -> None:
    world = World(2).run()
    world.queue.append(Expired(1))
    world.take()
    assert leaving(supervising(world), 3) == [1]


def test_worker_that_cannot_be_asked_is_none_of_them() -> None:
    supervisor = supervising(restarting())
    supervisor.processes[1].is_talking = False
    del supervisor.processes[2]
    assert leaving(supervisor, 3) == []


@pytest.mark.parametrize(("phased", "expected"), [(False, {"worker-1.sock": 6}), (True, {"worker-1.sock": 11})])
async def test_each_new_worker_is_told_of_its_share(phased: bool, expected: dict[str, int]) -> None:
    supervisor = supervising(restarting(phased=phased))
    this, others = supervisor.processes[3], [Process(1, 11), Process(2, None), Process(5, 0)]
    await Supervisor._announce(supervisor, this, others)  # type: ignore[arg-type]
    assert this.done == [ExpectOrder(connections=expected)]
    assert this.expects == expected.keys()
    await Supervisor._announce(supervisor, supervisor.processes[1], [])
    assert supervisor.processes[1].done == []


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
    supervisor = supervising(World(1).run())
    process = supervisor.processes[1]
    process.is_talking, process.is_leaving = is_talking, is_leaving
    Supervisor._terminate(supervisor, 1, is_hurried)
    Supervisor._terminate(supervisor, 7, is_hurried)  # it is gone
    assert process.done == [expected]


def test_worker_that_is_stopped_has_the_time_of_an_answer_to_drain_and_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It had all of `drain_timeout`, in which it finishes nothing: each restart took 50 s."""
    supervisor = cast("Any", Supervisor.__new__(Supervisor))
    supervisor.options = Options(target="app:app", drain_timeout_s=60.0, kill_timeout_s=1.0)
    supervisor.processes = {3: SimpleNamespace(pid=4711), 4: SimpleNamespace(pid=4712)}
    supervisor._log = structlog.get_logger()
    monkeypatch.setattr(module, "is_stopped", lambda pid: pid == 4711)
    with structlog.testing.capture_logs() as logs:
        assert supervisor._duration(Timer(Clock.DRAIN, 3)) == ANSWER_TIMEOUT_S
    (line,) = logs
    assert (line["event"], line["worker"], line["fix"]) == ("worker.stopped", 3, "kill -CONT 4711")
    with structlog.testing.capture_logs() as logs:
        assert supervisor._duration(Timer(Clock.DRAIN, 4)) == 61.0 + ANSWER_TIMEOUT_S
        assert supervisor._duration(Timer(Clock.DRAIN, 5)) == 61.0 + ANSWER_TIMEOUT_S
    assert logs == []
