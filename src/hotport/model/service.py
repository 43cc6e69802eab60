"""The state of a service for decisions: its workers, and the restart in progress. Values only."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

import msgspec

from hotport.model.lifecycle import CURRENT, Phase, Worker
from hotport.model.steps import STEPS, Step
from hotport.model.strategies import Strategy

__all__ = [
    "Restart",
    "Service",
    "Stage",
    "surviving",
]


class Restart(msgspec.Struct, frozen=True):
    """A restart in progress.

    Attributes:
        wanted: How many workers should serve when it is done.
        remaining: New workers still to be started after this batch.
        new: Workers of the current batch.
        old: Workers that the current batch replaces; filled in when it commits.
        canary: How many new workers start, and bake, before the others; 0 once they have, or if there are none.
        is_watched: The old workers of each batch stay for an undo window.
        why: Why it is being undone.
    """

    generation: int
    wanted: int
    remaining: int
    is_phased: bool = False
    step: Step = Step.STARTING
    new: frozenset[int] = frozenset()
    old: frozenset[int] = frozenset()
    strategy: Strategy = Strategy.INHERIT
    canary: int = 0
    is_watched: bool = False
    why: str = ""


class Stage(enum.Enum):
    """Whether load balancers should send clients, and why not; a restart makes no difference."""

    STARTING = "starting"
    READY = "ready"
    UNSERVED = "unserved"
    LAME_DUCK = "lame duck"
    STOPPING = "stopping"


class Service(msgspec.Struct, frozen=True):
    """The state that decisions are made from.

    Attributes:
        wanted: How many workers should serve.
        generation: The one that new workers are of, outside of a restart; 0 before the first worker serves.
        generations: How many generation numbers have been given out.
        failures: Times that workers were lost without a quiet spell between them.
        is_backing_off: No replacement is started before the back-off timer ends.
        preparing: The first generation while it is prepared: none of its workers has been started; else 0.
        is_lame_duck: It serves on for a while, and then stops: load balancers are to take it out until then.
        regains: Since another process has taken one of the addresses: attempts to bind it again; 0: none is lost.
    """

    wanted: int
    generation: int = 0
    generations: int = 0
    spawned: int = 0
    workers: Mapping[int, Worker] = msgspec.field(default_factory=lambda: MappingProxyType({}))
    restart: Restart | None = None
    is_stopping: bool = False
    failures: int = 0
    is_backing_off: bool = False
    preparing: int = 0
    is_lame_duck: bool = False
    regains: int = 0

    def ids(self, *phases: Phase) -> tuple[int, ...]:
        """Workers in one of `phases`, oldest first."""
        return tuple(w.id for w in self.workers.values() if w.phase in phases)

    @property
    def current(self) -> tuple[Worker, ...]:
        """Workers that serve or are on their way to it."""
        return tuple(w for w in self.workers.values() if w.phase in CURRENT)

    @property
    def draining_generations(self) -> int:
        """Count the generations of which all remaining workers are leaving."""
        current = {w.generation for w in self.current}
        return len({w.generation for w in self.workers.values()} - current)

    @property
    def favoured(self) -> int:
        """The generation that the next supervisor should keep if several serve completely."""
        restart = self.restart
        if restart is not None and STEPS[restart.step].is_committed and not restart.remaining:
            return restart.generation
        return self.generation

    @property
    def stage(self) -> Stage:
        """The stage to report to load balancers; it stays READY while workers are exchanged."""
        if self.is_stopping:
            return Stage.STOPPING
        if self.generation == 0:
            return Stage.STARTING
        if self.is_lame_duck:
            return Stage.LAME_DUCK
        return Stage.READY if self.ids(*_SERVED) else Stage.UNSERVED


#: Phases of workers that serve, or step aside for others that do.
_SERVED: Final = (Phase.OPENING, Phase.SERVING, Phase.QUIESCING, Phase.QUIESCED)


def surviving(workers: Iterable[Worker], wanted: int, favoured: int = 0) -> int:
    """Choose which generation to keep after the supervisor died: a complete one that serves, else the largest.

    A generation serves whole only after its commit, or before the next one's; of several the `favoured` one is kept, or
    the newest. 0 if none has begun to serve.
    """
    workers = tuple(workers)
    serving = Counter(w.generation for w in workers if w.phase is Phase.SERVING)
    if whole := [generation for generation, count in serving.items() if count >= wanted]:
        return favoured if favoured in whole else max(whole)
    left = Counter(w.generation for w in workers if w.phase in (Phase.SERVING, Phase.QUIESCED))
    return max(left, key=lambda generation: (left[generation], -generation), default=0)
