"""Collect the events of each restart into one report."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import UTC, datetime
from typing import Protocol

from hotport.model.effects import Announce, News
from hotport.model.fates import Fate
from hotport.model.lifecycle import Event
from hotport.model.service import Restart
from hotport.options import format_duration
from hotport.supervisor.contain import Containing
from hotport.supervisor.recorder import Recorder
from hotport.supervisor.spans import send_spans
from hotport.supervisor.timeline import Timeline
from hotport.wire.messages import Import, Move, PhaseTime, Report
from hotport.wire.recording import Recording

__all__ = ["Reports", "RestartRecord", "accept_gap_s"]

_PHASES = {
    News.PREPARED: "prepared",
    News.READY: "ready",
    News.COMMITTED: "committed",
    News.QUIESCED: "quiesced",
    News.DRAINING: "draining",
    News.WATCHING: "watching",
}

#: What a worker has done when it is gone.
_ENDS = {News.WORKER_RETIRED: "ending", News.WORKER_LOST: "lost"}


class Who(Protocol):
    """A worker process."""

    worker: int
    generation: int
    pid: int


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
        self.began_s = time.monotonic()
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
        self._accept_gap_ms: float | None = None  # as an earlier supervisor has found it
        self._supervisor = os.getpid()
        self.timeline = Timeline(self.began_s)

    @classmethod
    def resumed(cls, recording: Recording, alive: Set[int], *, dropped: Callable[[], int]) -> RestartRecord:
        """Continue the record of a restart whose supervisor has been replaced while workers left.

        Args:
            alive: The workers that are there. What became of the connections of others is not known.
        """
        report = recording.report
        record = cls(
            report.service,
            report.generation,
            report.previous,
            is_phased=report.is_phased,
            is_tracked=report.connections is not None,
            dropped=lambda: dropped() + report.dropped,
            strategy=report.strategy,
        )
        record._dropped_before -= report.dropped
        record.began_s = recording.began_s
        record._began_at = datetime.fromisoformat(report.began_at)
        record._supervisor = recording.supervisor
        record.timeline = Timeline(recording.began_s, recording.lanes)
        record._phases = [*report.phases]
        record._batch = max((phase.batch for phase in report.phases), default=0)
        record._accept_gap_ms = report.accept_gap_ms
        record._start_cpu_s = report.start_cpu_s
        record._fates.update(report.connections or {})
        record._fates_back.update(report.connections_back or {})
        record._outcome, record._why = report.outcome, report.error
        if report.rebind_gap_us is not None:
            record._rebound = report.rebind_gap_us / 1e6, report.refused or 0, report.reset or 0
        record._back = set(recording.back)
        record._leaving = set(recording.leaving) & alive
        if gone := len(set(recording.leaving) - alive):
            lost = f"{gone} workers ended while no supervisor ran: what became of their connections is not known"
            record._why = f"{report.error}; {lost}" if report.error else lost
        record._end_if_over()
        return record

    def elapsed_ms(self) -> float:
        """Milliseconds since the restart began."""
        return round((time.monotonic() - self.began_s) * 1000, 3)

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
        if announcement.news in _ENDS:
            self.timeline.reach(announcement.worker, _ENDS[announcement.news], time.monotonic())
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
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self._outcome and not self._leaving and not self.is_over:
            self.is_over = True
            for worker in self.accepting_at:
                self.timeline.reach(worker, "accepting", time.monotonic())
            self._mark("retired")

    @property
    def state(self) -> object:
        """Equal to what it was before if nothing has changed that should be written down."""
        return len(self._phases), self._outcome, len(self._leaving), len(self._drained)

    def recording(self, report: Report, now_s: float | None = None) -> Recording:
        """Make the recording as far as it is known; at `now_s` with what workers are doing."""
        return Recording(
            report=report,
            supervisor=self._supervisor,
            began_s=self.began_s,
            is_over=self.is_over,
            leaving=tuple(sorted(self._leaving)),
            back=tuple(sorted(self._back)),
            lanes=self.timeline.lanes(now_s),
            lanes_left_out=self.timeline.workers_left_out,
        )

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
        error = self._why
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
            accept_gap_ms=(
                round(accept_gap_s(self.quiesced_at, self.accepting_at) * 1000, 3)
                if self._accept_gap_ms is None
                else self._accept_gap_ms
            ),
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
    """The records of restarts that are not over, and the last report.

    Args:
        recorder: Keeps the recordings; the supervisors after this one read them.
    """

    def __init__(self, service: str, recorder: Recorder, *, dropped: Callable[[], int]) -> None:
        self.recorder = recorder
        self.last: Report | None = None
        self._last_at_s = 0.0
        self._heard: tuple[int, Mapping[int, str]] = (0, {})  # the generation that serves, and workers' errors
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
            before = record.state
            record.hear(announcement)
            self._heard = serving, errors
            if record.state != before or announcement.news is News.RESTART_BEGAN:
                report = self._keep(record)
                if record.is_over:
                    ended.append(report)
        return ended

    def _keep(self, record: RestartRecord) -> Report:
        """Write a record down, and forget it if it is over; return its report."""
        serving, errors = self._heard
        report = record.report(serving=serving, errors=errors)
        with Containing("recorder"):
            self.recorder.keep(record.recording(report))
        if record.is_over:
            with Containing("spans"):
                send_spans(record.recording(report))
            self._records.pop(record.generation, None)
            self.last, self._last_at_s = report, time.monotonic()
        return report

    def recordings(self, last: int) -> list[Recording]:
        """The last restarts, oldest first, with what workers are doing in those that are not over."""
        now_s = time.monotonic()
        serving, errors = self._heard
        going = {
            (each.generation, each.began_s): each.recording(each.report(serving=serving, errors=errors), now_s)
            for each in self._records.values()
        }
        return [going.get((each.report.generation, each.began_s), each) for each in self.recorder.read()[-last:]]

    def resume(self, alive: Set[int], serving: int) -> None:
        """Continue the records of an earlier supervisor of these workers; take its last report.

        A restart that it could not end stays as it was left.
        """
        self._heard = serving, {}
        for recording in self.recorder.read():
            report = recording.report
            if recording.is_over:
                self.last, self._last_at_s = report, recording.began_s + recording.lasted_s
            elif report.outcome:
                record = RestartRecord.resumed(recording, alive, dropped=self._dropped)
                self._records[record.generation] = record
                self._keep(record)

    def started(self, generation: int, cpu_s: float, worker: int = 0) -> None:
        """Add the processor time that a new worker, or the template of all of them (0), has used for its start."""
        if generation in self._records:
            self._records[generation].started(cpu_s)
            self._records[generation].timeline.reach(worker, "starting", time.monotonic())

    def spawned(self, who: Who) -> None:
        """Note that a worker was started, if that belongs to a restart that is not over."""
        if who.generation in self._records:
            self._records[who.generation].timeline.begin(
                who.worker, who.generation, who.pid, time.monotonic(), "starting"
            )

    def imported(self, worker: int, imports: Sequence[Import]) -> None:
        """Note what has taken time in the import of a worker's application."""
        for record in self._records.values():
            record.timeline.imported(worker, imports)

    def fail(self, generation: int, why: str) -> bool:
        """Note why a generation could not be prepared; False if no restart into it is in progress."""
        if generation not in self._records:
            return False
        self._records[generation].failure = why
        return True

    def drained(self, worker: int, fates: Mapping[str, int], moves: Sequence[Move] = ()) -> None:
        """Add the fates that a leaving worker has reported, and when its connections moved."""
        for record in list(self._records.values()):
            before = record.state
            record.drained(worker, fates)
            record.timeline.moved(worker, moves)
            record.timeline.reach(worker, "draining", time.monotonic())
            if record.state != before:
                self._keep(record)

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

    def note(self, restart: Restart | None, who: Who, event: Event, at_s: float) -> None:
        """Note when a worker started or stopped accepting, if that belongs to the restart in progress."""
        worker = who.worker
        record = self._records.get(restart.generation) if restart is not None else None
        if restart is None or record is None:
            return
        if event is Event.ACCEPTING and worker in restart.new:
            record.accepting_at.setdefault(worker, at_s)
            record.timeline.reach(worker, "opening", at_s)
        elif event is Event.QUIESCED and worker in restart.old:
            record.quiesced_at[worker] = at_s
            record.timeline.begin(worker, who.generation, who.pid, record.began_s, "accepting")
            record.timeline.reach(worker, "accepting", at_s)
