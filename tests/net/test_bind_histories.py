"""Whatever has happened on a port, the rule and the kernel agree about the next bind."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.netns import isolated
from hotport.model.bind import CHOICES, Can, judge
from hotport.model.port import Asker, ReuseOptions
from tests.net.cells import (
    ADDRESSES,
    UIDS,
    Where,
    acknowledge,
    acting_as,
    asked_for,
    kernel_says,
    look,
    new_port,
    opened,
)
from tests.support import RESTARTS

STEPS_MAX = 8


@dataclass(frozen=True)
class Bind:
    where: Where
    options: ReuseOptions
    uid: int
    does_listen: bool


@dataclass(frozen=True)
class Visit:
    """A client comes to the listener that is `index` places from the latest, and some of both ends are closed."""

    index: int
    is_accepted: bool
    closes: str


@dataclass(frozen=True)
class Close:
    """The bound socket that is `index` places from the latest."""

    index: int


options = st.sampled_from(list(CHOICES.values()))
where = st.sampled_from(ADDRESSES)
uid = st.sampled_from(UIDS)
index = st.integers(0, 2)
binds = st.builds(Bind, where, options, uid, st.sampled_from([True, True, False]))
visits = st.builds(Visit, index, st.just(True) | st.booleans(), st.sampled_from(["", "s", "c", "sc", "cs"]))
closes = st.builds(Close, index)
begins = st.builds(Bind, where, options, uid, st.just(True))
steps = st.lists(st.one_of(binds, visits, visits, closes), min_size=STEPS_MAX // 2, max_size=STEPS_MAX)


histories = st.builds(lambda first, rest: [first, *rest], begins, steps)


@dataclass
class World:
    """The sockets of one history."""

    port: int
    stack: ExitStack
    bound: list[tuple[Bind, socket.socket]] = field(default_factory=list)
    seen: set[ReuseOptions] = field(default_factory=set)

    def do(self, step: Bind | Visit | Close) -> None:
        match step:
            case Bind():
                self._bind(step)
            case Visit() if self.bound:
                self._visit(step, *self._nth(step.index))
            case Close() if self.bound:
                chosen = self._nth(step.index)
                self.bound.remove(chosen)
                chosen[1].close()

    def _nth(self, index: int) -> tuple[Bind, socket.socket]:
        return self.bound[-1 - index % len(self.bound)]

    def _bind(self, step: Bind) -> None:
        with suppress(OSError):
            sock = opened(step.where, self.port, step.options, uid=step.uid)
            self.stack.enter_context(sock)
            self.bound.append((step, sock))
            self.seen.add(step.options)
            if step.does_listen:
                sock.listen(64)

    def _visit(self, step: Visit, bind: Bind, listener: socket.socket) -> None:
        if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return
        host, v6only = bind.where
        via = {"0.0.0.0": "127.0.0.1", "::": "::1" if v6only else "127.0.0.2"}.get(host, host.removeprefix("::ffff:"))
        family = socket.AF_INET6 if ":" in via else socket.AF_INET
        with suppress(ConnectionRefusedError, BlockingIOError):  # another listener may get it
            client = self.stack.enter_context(socket.socket(family))
            client.connect((via.replace("0.0.0.0", "127.0.0.1"), self.port))
            if step.is_accepted:
                listener.setblocking(False)
                with acting_as(bind.uid):
                    accepted = self.stack.enter_context(listener.accept()[0])
                is_this_one = accepted.getpeername()[:2] == client.getsockname()[:2]  # or it has waited before
                for end in step.closes:
                    (accepted if end == "s" else client).close()
                if step.closes == "s" and is_this_one:
                    acknowledge(client)  # or its state would change while we look


def test_no_history_makes_the_rule_disagree_with_the_kernel() -> None:
    assert isolated(run)


def run() -> bool:
    counts = {Can.YES: 0, Can.NO: 0, Can.UNKNOWN: 0}

    @settings(max_examples=50 * RESTARTS, suppress_health_check=list(HealthCheck), database=None)
    @given(histories, where, options, uid)
    def check(history: list[Bind | Visit | Close], where: Where, options: ReuseOptions, uid: int) -> None:
        with ExitStack() as stack:
            world = World(new_port(), stack)
            for step in history:
                world.do(step)
            port = asked_for(look(world.port), where)
            answer = judge(port, Asker(uid, str(uid), may_bind_low=True), options)
            real = Can.YES if kernel_says(where, world.port, options, uid=uid) else Can.NO
            if answer.can not in (real, Can.UNKNOWN):  # a connection may have ended between the look and the bind
                port = asked_for(look(world.port), where)
                answer = judge(port, Asker(uid, str(uid), may_bind_low=True), options)
            counts[answer.can] += 1
            match answer.can:
                case Can.YES:
                    assert real == Can.YES, answer
                case Can.NO:
                    # The kernel remembers sockets that nobody can see any more; see hotport.model.bind.
                    is_remembered = options.reuse_port and len(world.seen) > 1
                    assert real == Can.NO or is_remembered, answer
                case Can.UNKNOWN:
                    assert not all(old.is_held for old in answer.blockers) or len(world.seen) > 1, answer

    for _ in range(4):  # few of one kind are chance, again and again they are not
        check()
        if min(counts[Can.YES], counts[Can.NO]) >= 30:
            break
    assert min(counts[Can.YES], counts[Can.NO]) >= 30, counts
    return True
