"""Record fates and events in buckets of time, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hotport.churn.fates import ConnectionEvent, Fate
from hotport.churn.histogram import Histogram
from hotport.churn.plan import Plan, Summary, Tick
from hotport.churn.result import Bucket, Incident

__all__ = ["Recorder"]

#: An enum's `value` is looked up by Python code.
_ANSWERED: Final = Fate.ANSWERED.value
_LATE: Final = Fate.LATE.value


class Recorder:
    """Counts fates and events into the bucket in which they became known, and hands over each bucket when it is over.

    Kinds of client are told by their names.

    Args:
        tell: Takes each tick, in order, one for each bucket.
        load: Attempts under way and open connections, now.
    """

    def __init__(self, plan: Plan, *, tell: Callable[[Tick], None], load: Callable[[], tuple[int, int]]) -> None:
        self._plan = plan
        self._tell = tell
        self._load = load
        self._width_ns = plan.bucket_ms * 1_000_000
        self._late_us = plan.late_ms * 1000.0
        self._incidents_left = plan.incidents_max
        self._lag_before = Histogram()
        self._own_limits: dict[str, int] = {}
        self._connect_answers_ms: list[int] = []
        self._open(0)

    def _open(self, at_ms: int) -> None:
        self._at_ms = at_ms
        #: When the bucket is over.
        self.over_ns = self._plan.begin_ns + at_ms * 1_000_000 + self._width_ns
        self._fates: dict[str, dict[str, int]] = {}
        self._latency: dict[str, Histogram] = {}
        self._answered_by: dict[str, int] = {}
        self._incidents: list[Incident] = []
        self._dropped = 0
        self._lag = Histogram()

    def advance(self, now_ns: int) -> None:
        """Hand over every bucket that is over, also those in which nothing happened."""
        while now_ns >= self.over_ns:
            self.flush()
            self._open(self._at_ms + self._plan.bucket_ms)

    def flush(self) -> None:
        """Hand over the bucket as it is."""
        in_flight, connections = self._load()
        latency = {kind: histogram.counts for kind, histogram in self._latency.items()}
        lag = self._lag.counts
        self._lag_before.merge(lag)
        bucket = Bucket(self._at_ms, self._fates, latency, self._answered_by, in_flight, connections, lag)
        self._tell(Tick(bucket, self._incidents, self._dropped))

    def answered(self, kind: str, intended_ns: int, waited_ns: int, now_ns: int, who: str, *, is_new: bool) -> None:
        """Record a whole answer.

        Args:
            waited_ns: By the client on purpose; no part of the latency.
            who: Who gave it, if that is known.
            is_new: Its connection was made for it.
        """
        if now_ns >= self.over_ns:
            self.advance(now_ns)
        us = (now_ns - intended_ns - waited_ns) // 1000
        histogram = self._latency.get(kind)
        if histogram is None:
            histogram = self._latency[kind] = Histogram()
        histogram.add(us)
        if who:
            self._answered_by[who] = self._answered_by.get(who, 0) + 1
        if is_new:
            at_ms = (now_ns - self._plan.begin_ns) // 1_000_000
            if not self._connect_answers_ms or self._connect_answers_ms[-1] != at_ms:
                self._connect_answers_ms.append(at_ms)
        if self._late_us and us > self._late_us:
            self._count(kind, _LATE)
            self._incident(kind, _LATE, intended_ns, now_ns, f"{us / 1000:.1f} ms")
        else:
            self._count(kind, _ANSWERED)

    def lost(self, kind: str, fate: Fate, intended_ns: int, now_ns: int, detail: str) -> None:
        """Record an attempt without a whole answer."""
        self.advance(now_ns)
        self._count(kind, fate.value)
        self._incident(kind, fate.value, intended_ns, now_ns, detail)

    def event(self, kind: str, event: ConnectionEvent, now_ns: int) -> None:
        """Record an event of a connection."""
        self.advance(now_ns)
        self._count(kind, event.value)

    def lag(self, ns: int, now_ns: int) -> None:
        """Record how late an attempt began."""
        if now_ns >= self.over_ns:
            self.advance(now_ns)
        self._lag.add(ns // 1000)

    def own_limit(self, name: str) -> None:
        """Record an attempt that could not begin on this machine."""
        self._own_limits[name] = self._own_limits.get(name, 0) + 1

    def summary(self, error: str = "") -> Summary:
        """Return the summary."""
        return Summary(self._lag_before.counts, self._own_limits, self._connect_answers_ms, error)

    def _count(self, kind: str, what: str) -> None:
        counts = self._fates.get(kind)
        if counts is None:
            counts = self._fates[kind] = {}
        counts[what] = counts.get(what, 0) + 1

    def _incident(self, kind: str, fate: str, intended_ns: int, now_ns: int, detail: str) -> None:
        if not self._incidents_left:
            self._dropped += 1
            return
        self._incidents_left -= 1
        begin_ns = self._plan.begin_ns
        intended_ms, ended_ms = ((at - begin_ns) / 1e6 for at in (intended_ns, now_ns))
        self._incidents.append(Incident(kind, fate, round(intended_ms, 3), round(ended_ms, 3), detail))
