"""Histories of workers that share load: clients come and go, workers come, hang, block, fill up and are killed.

The shares are the workers' own (`hotport.worker.share`); the page, the clock and the moves are simulated.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hotport.model.balance import (
    BATCH_MAX,
    DRIFT_MIN,
    DRIFT_RATIO,
    HUNG_S,
    LATE_HOLD_MAX_S,
    LATE_S,
    LOOK_S,
    MOVES_MAX,
    STAY_S,
)
from hotport.worker.server import NONE_MOVED_PAUSE_S
from hotport.worker.share import OTHERS_S, Share
from tests.support import RESTARTS

pytestmark = pytest.mark.unmeasured

#: Between two steps of the world; a batch is under way for as long.
STEP_S = LOOK_S / 5


@dataclass(eq=False, slots=True)
class Client:
    """A connection, wherever it is, and when it has moved last."""

    number: int
    moved_s: float = -1000.0

    def __hash__(self) -> int:
        """By its number: sets of them have the same order when a history is repeated."""
        return self.number


class Worker:
    """A worker with its share, and what it sees of the page."""

    def __init__(self, world: World, generation: int, maximum: int) -> None:
        self.world = world
        self.slot = len(world.workers)
        self.group = 0
        self.has_room = False
        self.promised_s = 0.0
        self.generation = generation
        self.maximum = maximum
        self.clients: set[Client] = set()
        self.is_alive = self.is_accepting = True
        self.is_hung = False
        self.block_s = 0.0  # how late its loop is in each look
        self.look_s = world.now_s + world.chance.uniform(0, LOOK_S)
        self.try_again_s = 0.0
        self.left = 0
        self.moves_to: list[Worker] = []
        self.moves_for_good = False  # none stays because it came lately
        self.moved = 0
        world.workers.append(self)
        self.share = Share(self, generation, "/run")
        self.see_room()

    # as `hotport.kernel.loadpage.LoadPage`

    @property
    def gauge(self) -> list[int]:
        return [len(self.clients)]

    def join(self, group: int, *, takes: bool = True) -> None:
        self.group, self.has_room = group, takes

    def others(self) -> list[int]:
        return [each.slot for each in self.world.workers if each.group == self.group != 0 and each is not self]

    def takes(self, slot: int) -> bool:
        return self.world.workers[slot].has_room

    def counts(self, slots: list[int]) -> Sequence[int]:
        return [len(self.world.workers[slot].clients) for slot in slots]

    def worker(self, slot: int) -> int:
        return slot

    def promise(self, due_s: float) -> None:
        self.promised_s = due_s

    def due_s(self, slot: int) -> float:
        return self.world.workers[slot].promised_s

    def forget_dead(self, slots: list[int]) -> None:
        for slot in slots:
            if not self.world.workers[slot].is_alive:
                self.world.workers[slot].group = 0

    # what it does

    @property
    def is_full(self) -> bool:
        return bool(self.maximum) and len(self.clients) >= self.maximum

    @property
    def runs(self) -> bool:
        return self.is_alive and not self.is_hung

    def see_room(self) -> None:
        if self.is_alive and self.is_accepting:
            self.share.take_part(True, is_full=self.is_full)

    def quiesce(self) -> None:
        self.is_accepting = False
        self.left = 0
        self.share.take_part(False)

    def look(self, *, is_asked: bool = False) -> None:
        """What `ConnectionServer._balance` does."""
        world = self.world
        self.share.look()
        if self.left or (world.now_s < self.try_again_s and not is_asked):
            return
        moves = self.share.plan_moves(is_asked=is_asked)
        if moves is None:
            return
        to = [world.workers[int(path.rpartition("worker-")[2].split(".")[1])] for path in moves.paths]
        assert self not in to
        assert all(each.generation == self.generation for each in to)
        assert 0 < moves.most <= (len(self.clients) if is_asked else MOVES_MAX)
        assert all(each.is_alive for each in to)
        self.left, self.moves_to, self.moved = moves.most, to, 0
        self.moves_for_good = moves.stay_s == 0

    def move(self) -> None:
        """A batch to each of those that take, as `Mover` does."""
        if not self.left:
            return
        now_s = self.world.now_s
        able = [each for each in self.clients if self.moves_for_good or each.moved_s < now_s - STAY_S]
        self.world.chance.shuffle(able)
        batches: Counter[Worker] = Counter()
        for client in able[: self.left]:
            takers = [each for each in self.moves_to if each.runs and not each.is_full and batches[each] < BATCH_MAX]
            if not takers or not self.is_accepting:
                break
            taker = min(takers, key=lambda each: len(each.clients))
            batches[taker] += 1
            self.world.carry(client, self, taker, for_good=self.moves_for_good)
            self.moved += 1
            self.left -= 1
        if not batches:  # nothing more that can move: `Mover.wait_through`, or its timeout
            self.left = 0
        if not self.left and not self.moved:
            self.try_again_s = now_s + NONE_MOVED_PAUSE_S


class World:
    """Workers on one accept queue, one generation after the other."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now_s = 1000.0
        self.workers: list[Worker] = []
        self.generation = 1
        self.arrived = 0
        self.moves: Counter[Client] = Counter()
        self.waited: Counter[int] = Counter()  # deferrals in vain, by the worker that deferred

    @property
    def serving(self) -> list[Worker]:
        return [each for each in self.workers if each.is_alive and each.is_accepting]

    def carry(self, client: Client, old: Worker, new: Worker, *, for_good: bool) -> None:
        """A client moves, once: not again before it has stayed for a while."""
        assert for_good or self.now_s - client.moved_s > STAY_S
        old.clients.remove(client)
        new.clients.add(client)
        client.moved_s = self.now_s
        self.moves[client] += 1
        old.see_room()
        new.see_room()

    def arrive(self) -> Worker | None:
        """A client comes: the kernel wakes one worker after the other, and each takes it or leaves it to the others."""
        awake = [each for each in self.serving if each.runs and not each.is_full]
        self.chance.shuffle(awake)
        deferring: list[Worker] = []
        taker = None
        for each in awake:
            if not each.share.is_ahead():
                taker = each
                break
            assert each.others(), "a worker alone never waits"
            deferring.append(each)
        for each in deferring:  # after `DEFER_S`
            each.share.deferred(was_taken=taker is not None)
            if taker is None:
                self.waited[each.slot] += 1
                taker = each
        if taker is not None:
            self.arrived += 1
            taker.clients.add(Client(self.arrived))
            taker.see_room()
        return taker

    def tick(self, seconds: float) -> None:
        """Let time pass, and all look whose event loop is not held up: otherwise they would be late."""
        self.now_s += seconds
        for each in self.workers:
            if each.runs and self.now_s >= each.look_s + each.block_s:
                each.look_s = self.now_s + LOOK_S
                if each.is_accepting:
                    each.look()

    def run(self, seconds: float) -> int:
        """Let time pass; how many connections have moved."""
        before = self.moves.total()
        for _ in range(round(seconds / STEP_S)):
            self.tick(STEP_S)
            for each in self.workers:
                if each.runs:
                    each.move()
        return self.moves.total() - before


class Balancing(RuleBasedStateMachine):
    """Whatever happens, moves are few, end, and leave the shares even."""

    @initialize(seed=st.integers(0, 1000), workers=st.integers(1, 5), maximum=st.sampled_from([0, 0, 40, 200]))
    def boot(self, seed: int, workers: int, maximum: int) -> None:
        self.world = World(seed)
        self.patches = [
            patch("hotport.worker.share.monotonic", lambda: self.world.now_s),
            patch("hotport.worker.share.run_delay_s", lambda: 0.0),
        ]
        for each in self.patches:
            each.start()
        self.maximum = maximum
        for _ in range(workers):
            Worker(self.world, 1, maximum)

    def teardown(self) -> None:
        for each in getattr(self, "patches", ()):
            each.stop()

    # clients

    @rule(count=st.integers(1, 300))
    def clients_come(self, count: int) -> None:
        for _ in range(count):
            self.world.arrive()
            self.world.tick(OTHERS_S / 10)

    @rule(data=st.data(), part=st.floats(0, 1))
    def clients_of_a_worker_leave(self, data: st.DataObject, part: float) -> None:
        worker = data.draw(st.sampled_from(self.world.workers))
        for client in list(worker.clients)[: round(part * len(worker.clients))]:
            worker.clients.remove(client)
        worker.see_room()

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        self.world.run(seconds)

    # workers

    @rule()
    def a_worker_joins(self) -> None:
        if len(self.world.serving) < 8:
            Worker(self.world, self.world.generation, self.maximum)

    @precondition(lambda self: len(self.world.serving) > 1)
    @rule(data=st.data())
    def a_worker_is_killed(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.world.serving))
        worker.is_alive = False  # its row stays as it was
        worker.clients.clear()
        worker.left = 0

    @precondition(lambda self: len(self.world.serving) > 1)
    @rule(data=st.data())
    def a_worker_leaves(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(self.world.serving)))

    @rule(count=st.integers(1, 4))
    def the_service_restarts(self, count: int) -> None:
        """In the middle of whatever moves: the old workers hand everything to the new ones."""
        old = self.world.serving
        self.world.generation += 1
        for _ in range(count):
            Worker(self.world, self.world.generation, self.maximum)
        for each in old:
            self.leave(each)

    def leave(self, worker: Worker) -> None:
        worker.is_hung = False
        worker.quiesce()
        for client in list(worker.clients):
            takers = [each for each in self.world.serving if each.runs and not each.is_full]
            if not takers:
                break
            self.world.carry(client, worker, min(takers, key=lambda each: len(each.clients)), for_good=True)
        worker.clients.clear()  # at the drain deadline
        worker.is_alive = False
        self.world.moves.clear()

    @precondition(lambda self: self.world.serving)
    @rule(data=st.data(), block_s=st.sampled_from([0.0, 0.0, 2 * LATE_S, 3 * LATE_S]))
    def a_worker_begins_to_block_or_ends(self, data: st.DataObject, block_s: float) -> None:
        data.draw(st.sampled_from(self.world.serving)).block_s = block_s

    @precondition(lambda self: self.world.serving)
    @rule(data=st.data(), is_hung=st.booleans())
    def a_worker_hangs_or_goes_on(self, data: st.DataObject, is_hung: bool) -> None:
        data.draw(st.sampled_from(self.world.serving)).is_hung = is_hung

    @precondition(lambda self: self.world.serving)
    @rule()
    def somebody_wants_even_shares(self) -> None:
        for each in self.world.serving:
            if each.runs:
                each.look(is_asked=True)
        self.world.run(1)

    # what holds

    @invariant()
    def no_worker_has_more_than_it_may(self) -> None:
        for each in getattr(self, "world", World(0)).workers:
            assert not each.maximum or len(each.clients) <= each.maximum

    @precondition(lambda self: any(each.runs for each in self.world.serving))
    @rule()
    def it_becomes_quiet(self) -> None:
        """Nobody comes or leaves, and nothing is held up any more: moves end, and what is left is even."""
        world = self.world
        for each in world.workers:
            each.block_s, each.is_hung = 0.0, False
        for _ in range(int(LATE_HOLD_MAX_S / 5) + 2):
            world.run(5)
            if all(each.promised_s for each in world.serving):
                break
        else:
            raise AssertionError("who was held up is trusted again")
        before = [len(each.clients) for each in world.serving]
        needed = sum(max(0.0, count - sum(before) / len(before)) for count in before)
        world.moves.clear()
        world.run(20)
        for _ in range(sum(len(each.clients) for each in world.workers) * 2 // MOVES_MAX):
            if world.run(20 * LOOK_S) == 0:
                break
        assert world.run(NONE_MOVED_PAUSE_S + 2) == 0
        counts = [len(each.clients) for each in world.serving]
        mean = sum(counts) / len(counts)
        assert max(counts) <= mean * (1 + DRIFT_RATIO) + DRIFT_MIN + 1
        assert world.moves.total() <= 2 * needed + DRIFT_MIN * len(world.serving), "few come and go"
        world.waited.clear()
        for _ in range(100):
            world.arrive()
        assert len(world.serving) > 1 or not world.waited
        assert world.waited.total() == 0, "those that were killed are forgotten"

    @precondition(lambda self: self.world.serving)
    @rule(data=st.data())
    def none_waits_for_one_that_hangs(self, data: st.DataObject) -> None:
        world = self.world
        data.draw(st.sampled_from(world.serving)).is_hung = True
        world.run(HUNG_S + 2 * LOOK_S)
        if any(each.runs and not each.is_full for each in world.serving):
            world.waited.clear()
            for _ in range(10):
                world.arrive()
                world.tick(2 * OTHERS_S)
            if all(each.promised_s for each in world.serving):
                assert world.waited.total() == 0


def test_worker_that_blocks_now_and_then_costs_few_moves() -> None:
    """It gave all its connections away each time, and got its share back 5 s later: a thousand moves a minute."""
    for every_s, most in ((6.0, 2), (60.0, 5), (340.0, 4)):
        world = World(1)
        with (
            patch("hotport.worker.share.monotonic", lambda world=world: world.now_s),
            patch("hotport.worker.share.run_delay_s", lambda: 0.0),
        ):
            for _ in range(4):
                Worker(world, 1, 0)
            for _ in range(200):
                world.arrive()
            blocking = world.workers[0]
            over_s = world.now_s + 1200
            while world.now_s < over_s:
                blocking.block_s = 3 * LATE_S
                world.run(1.5)
                blocking.block_s = 0.0
                world.run(every_s - 1.5)
        assert world.moves.total() <= most * 2 * 51, (every_s, world.moves.total())


def test_one_long_request_moves_nothing() -> None:
    world = World(1)
    with (
        patch("hotport.worker.share.monotonic", lambda: world.now_s),
        patch("hotport.worker.share.run_delay_s", lambda: 0.0),
    ):
        for _ in range(4):
            Worker(world, 1, 0)
        for _ in range(200):
            world.arrive()
        world.run(1)
        world.workers[0].block_s = 3 * LATE_S
        world.run(LOOK_S + 3 * LATE_S)
        world.workers[0].block_s = 0.0
        assert world.run(10) == 0


TestBalancing = Balancing.TestCase
TestBalancing.settings = settings(max_examples=30 * RESTARTS, stateful_step_count=25, deadline=None)
