from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from hotport.model.effects import Announce, News
from hotport.model.inputs import Clock
from hotport.model.lifecycle import Event
from hotport.options import Options
from hotport.supervisor.news import Publisher
from hotport.supervisor.supervisor import Supervisor
from tests.model.world import World


def loss_while_booting(end: Clock | Event) -> tuple[World, Announce]:
    world = World(1)
    world.take()
    if end is not Clock.READY:
        world.say(1, Event.READY)
        world.take()
    world.elapse(end, 1) if isinstance(end, Clock) else world.say(1, end)
    return world, next(each for each in world.take() if isinstance(each, Announce) and each.news is News.WORKER_LOST)


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (Clock.READY, "worker 1 did not say READY=1 in time; ready_timeout is 1m"),
        (Clock.OPEN, "worker 1 did not say that it accepts in time; it had 5s"),
        (Event.LEAVING, "worker 1 left by itself; if it has written why, that is above"),
    ],
    ids=["ready", "accepting", "left"],
)
def test_start_that_failed_names_the_time_that_has_elapsed(end: Clock | Event, cause: str) -> None:
    """It was ready_timeout for every worker that had not ended, also for one that had been ready."""
    world, announcement = loss_while_booting(end)
    supervisor = cast("Any", Supervisor.__new__(Supervisor))
    supervisor.service, supervisor.options = world.service, Options(target="app:app")
    supervisor.owned = Mock()
    supervisor.fleet, supervisor._launches = SimpleNamespace(processes={1: None}), {}
    supervisor.news = Publisher("svc", Mock(), Mock(), int)
    supervisor._publish(announcement)
    assert supervisor.news.not_started().cause == cause
