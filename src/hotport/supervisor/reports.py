"""Collect the events of each restart into one report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Set
from datetime import UTC, datetime

from hotport.model.effects import Announce, News
from hotport.model.fates import Fate
from hotport.model.lifecycle import Event
from hotport.model.service import Restart
from hotport.options import format_duration
from hotport.wire.messages import PhaseTime, Report

__all__ = ["Reports", "RestartRecord", "accept_gap_s"]

_PHASES = {
    News.PREPARED: "prepared",
    News.READY: "ready",
    News.COMMITTED: "committed",
    News.QUIESCED: "quiesced",
    News.DRAINING: "draining",
    News.WATCHING: "watching",
}


def accept_gap_s(quiesced_at: Mapping[int, float], accepting_at: Mapping[int, float]) -> float:
    """Seconds without an acceptor, from the last old worker's stop to the first new worker's start; at least 0."""
    if not quiesced_at or not accepting_at:
        return 0.0
    return max(0.0, min(accepting_at.values()) - max(quiesced_at.values()))


class RestartRecord:
    """Collects the events of one restart, until the workers that leave have ended.

    Args:
        is_tracked: Whether workers count their connections; the end of one that has not reported their fates is counted
            as a loss.

    Attributes:
        failure: Why the generation could not be prepared.
    """

    def __init__(
        self,
        service: str,
        generation: int,
        previous: int,
        *,
        is_phased: bool,
        is_tracked: bool,
        dropped: Callable[[], int],
        strategy: str = "inherit",
    ) -> None:
        self.generation = generation
        self.is_over = False
        self._service = service
        self._previous = previous
        self._is_phased = is_phased
        self._is_tracked = is_tracked
        self._dropped = dropped
        self._start_cpu_s = 0.0
        self._began_s = time.monotonic()
        self._began_at = datetime.now(UTC)
        self._dropped_before = dropped()
        self._phases: list[PhaseTime] = []
        self._batch = 0
        self._outcome = ""
        self._why = ""
        self._culprit = 0
        self.failure = ""
        self._leaving: set[int] = set()
        self._back: set[int] = set()  # new workers that are taken back, or whose loss is the reason for it
        self._canary: set[int] = set()
        self._is_committed = False  # the current batch
        self._drained: set[int] = set()
        self._fates: Counter[str] = Counter()
        self._strategy = strategy
        self._rebound: tuple[float, int, int] | None = None
        self._fates_back: Counter[str] = Counter()
        self.accepting_at: dict[int, float] = {}
        self.quiesced_at: dict[int, float] = {}

    def elapsed_ms(self) -> float:
        """Milliseconds since the restart began."""
        return round((time.monotonic() - self._began_s) * 1000, 3)

    def drained(self, worker: int, fates: Mapping[str, int]) -> None:
        """Add the fates that a leaving worker has reported."""
        if worker in self._leaving | self._back:
            self._drained.add(worker)
            self._fates_of(worker).update(fates)

    @property
    def _was_back(self) -> bool:
        """Whether new workers have served and were taken back."""
        return self._outcome == "undone" or (self._outcome == "aborted" and bool(self._back))

    def _fates_of(self, worker: int) -> Counter[str]:
        return self._fates_back if worker in self._back else self._fates

    def taken_back(self, fates: Mapping[str, int]) -> None:
        """Add the fates of an old worker's connections before it accepted again."""
        self._fates.update(fates)

    def rebound(self, gap_s: float, refused: int, reset: int) -> None:
        """Note the costs of rebinding."""
        self._rebound = (gap_s, refused, reset)

    def lost(self, count: int) -> None:
        """Count connections accepted from a queue that no worker could take."""
        if self._rebound is not None:
            gap_s, refused, reset = self._rebound
            self._rebound = (gap_s, refused, reset + count)

    def hear(self, announcement: Announce) -> None:
        """Process an announcement."""
        match announcement.news:
            case News.WORKER_RETIRED if (worker := announcement.worker) in self._leaving | self._back:
                self._leaving.discard(worker)
                if worker not in self._drained and (self._outcome != "aborted" or worker in self._back):
                    self._fates_of(worker)[Fate.WORKERS_KILLED.value] += 1
            case _ if announcement.generation != self.generation:
                pass
            case News.ABORTED:
                self._outcome = "aborted"
                self._why = announcement.why
                self._culprit = announcement.worker
                self._leaving |= set(announcement.workers)
                # Workers that had not begun to serve have no connections.
                self._back |= self._leaving & (set(announcement.workers) if self._is_committed else self._canary)
                self._mark("aborted")
            case News.DONE:
                self._outcome = "done"
            case News.UNDONE:
                self._outcome = "undone"
                self._why = announcement.why
                self._leaving |= set(announcement.workers)
                self._mark("undone")
            case News.BAKING:
                self._canary = set(announcement.workers)
                self._mark("baking")
            case News.UNDOING:
                self._culprit = announcement.worker
                self._back |= set(announcement.workers)  # they leave when the old ones accept
                self._mark("undoing")
            case news if news in _PHASES:
                if news in (News.COMMITTED, News.DRAINING):
                    self._is_committed = news is News.COMMITTED
                self._leaving |= set(announcement.workers)
                self._mark("quiesce overdue" if news is News.QUIESCED and announcement.why else _PHASES[news])
        if self._outcome and not self._leaving and not self.is_over:
            self.is_over = True
            self._mark("retired")

    def _mark(self, name: str) -> None:
        self._batch += name == "ready"
        self._phases.append(PhaseTime(name=name, ms=self.elapsed_ms(), batch=max(1, self._batch)))

    def started(self, cpu_s: float) -> None:
        """See `Reports.started`."""
        self._start_cpu_s += cpu_s

    def report(self, *, serving: int, errors: Mapping[int, str]) -> Report:
        """Make the report as far as it is known.

        Args:
            errors: Why workers failed to start, by worker.
        """
        error = ""
        if self._outcome in ("aborted", "undone"):
            error = self.failure or errors.get(self._culprit) or self._why
        return Report(
            service=self._service,
            generation=self.generation,
            previous=self._previous,
            outcome=self._outcome,
            serving=serving,
            error=error,
            is_phased=self._is_phased,
            began_at=self._began_at.isoformat(timespec="milliseconds"),
            phases=tuple(self._phases),
            accept_gap_ms=round(accept_gap_s(self.quiesced_at, self.accepting_at) * 1000, 3),
            connections=dict(self._fates) if self._is_tracked else None,
            connections_back=dict(self._fates_back) if self._is_tracked and self._was_back else None,
            start_cpu_s=round(self._start_cpu_s, 3),
            dropped=self._dropped() - self._dropped_before,
            strategy=self._strategy,
            rebind_gap_us=round(self._rebound[0] * 1e6, 1) if self._rebound else None,
            refused=self._rebound[1] if self._rebound else None,
            reset=self._rebound[2] if self._rebound else None,
        )


class Reports:
    """The records of restarts that are not over, and the last report."""

    def __init__(self, service: str, *, dropped: Callable[[], int]) -> None:
        self.last: Report | None = None
        self._last_at_s = 0.0
        self._service = service
        self._dropped = dropped
        self._records: dict[int, RestartRecord] = {}

    def last_in_words(self) -> str:
        """Say how and when the last restart ended, as the end of a sentence; empty if there was none."""
        if self.last is None:
            return ""
        ago = format_duration(round(time.monotonic() - self._last_at_s))
        return f"; the last one, into generation {self.last.generation}, was {self.last.outcome} {ago} ago"

    @property
    def generations(self) -> Set[int]:
        """The generations whose restart is not over."""
        return self._records.keys()

    def elapsed_ms(self, generation: int) -> float:
        """Milliseconds since a restart began; 0 if it is over or unknown."""
        record = self._records.get(generation)
        return record.elapsed_ms() if record is not None else 0.0

    def begin(self, restart: Restart, previous: int, *, is_tracked: bool) -> None:
        """Open the record of a restart; see `RestartRecord`."""
        self._records[restart.generation] = RestartRecord(
            self._service,
            restart.generation,
            previous,
            is_phased=restart.is_phased,
            is_tracked=is_tracked,
            dropped=self._dropped,
            strategy=restart.strategy.value,
        )

    def hear(self, announcement: Announce, *, serving: int, errors: Mapping[int, str]) -> list[Report]:
        """Process an announcement; return the reports of the restarts that it ends."""
        ended = []
        for record in list(self._records.values()):
            record.hear(announcement)
            if record.is_over:
                del self._records[record.generation]
                self.last = record.report(serving=serving, errors=errors)
                self._last_at_s = time.monotonic()
                ended.append(self.last)
        return ended

    def started(self, generation: int, cpu_s: float) -> None:
        """Add the processor time that a new worker, or the template of all of them, has used for its start."""
        if generation in self._records:
            self._records[generation].started(cpu_s)

    def fail(self, generation: int, why: str) -> bool:
        """Note why a generation could not be prepared; False if no restart into it is in progress."""
        if generation not in self._records:
            return False
        self._records[generation].failure = why
        return True

    def drained(self, worker: int, fates: Mapping[str, int]) -> None:
        """Add the fates that a leaving worker has reported."""
        for record in self._records.values():
            record.drained(worker, fates)

    def rebound(self, generation: int, *, gap_s: float, refused: int, reset: int) -> None:
        """Note the costs of a restart's rebinding."""
        if generation in self._records:
            self._records[generation].rebound(gap_s, refused, reset)

    def lost(self, count: int) -> None:
        """Count connections accepted from a queue that no worker could take."""
        for record in self._records.values():
            record.lost(count)

    def taken_back(self, restart: Restart | None, worker: int, fates: Mapping[str, int]) -> None:
        """Add the fates that an old worker has reported before it accepted again."""
        record = self._records.get(restart.generation) if restart is not None else None
        if restart is not None and record is not None and worker in restart.old:
            record.taken_back(fates)

    def note(self, restart: Restart | None, worker: int, event: Event, at_s: float) -> None:
        """Note when a worker started or stopped accepting, if that belongs to the restart in progress."""
        record = self._records.get(restart.generation) if restart is not None else None
        if restart is None or record is None:
            return
        if event is Event.ACCEPTING and worker in restart.new:
            record.accepting_at.setdefault(worker, at_s)
        elif event is Event.QUIESCED and worker in restart.old:
            record.quiesced_at[worker] = at_s
