"""Judge a run: whether it is valid, whether anything was lost, and that in a sentence or two."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from hotport.churn.certainty import bounds, percent
from hotport.churn.fates import LOSSES, ConnectionEvent, Fate, Kind
from hotport.churn.histogram import Histogram
from hotport.churn.result import Bucket, Lag, RestartMark, Result, Verdict

__all__ = [
    "LAG_P99_US_MAX",
    "MOMENT_MS",
    "OPEN_END_MS",
    "PERCENTILES",
    "PHASES",
    "answered_by",
    "attempts_of",
    "count_of",
    "counts_of",
    "judge",
    "latency_by_phase",
    "losses_by_restart",
    "losses_of",
    "milliseconds",
    "named",
    "named_connections",
    "sentences",
    "service_us",
    "window",
]

#: Engines that begin attempts later than this measure themselves, not the target.
LAG_P99_US_MAX: Final = 5000.0

#: A restart is felt for a moment after its end: that much still counts as during it.
MOMENT_MS: Final = 1000.0

#: Counted as during a restart whose end is not known (a signal was sent), from its beginning.
OPEN_END_MS: Final = 5000.0

#: Latency is told apart by these, each with what it means.
PHASES: Final[Mapping[str, str]] = {
    "before": "before the first restart",
    "during": f"from a restart's beginning until {MOMENT_MS / 1000:g} s after its end"
    f" ({OPEN_END_MS / 1000:g} s after its beginning where its end is not known)",
    "after": "after a restart, until the next one",
}

PERCENTILES: Final[Mapping[str, float]] = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}

#: Named in a sentence, the most frequent first; the rest is in the table.
_FATES_MAX: Final = 4

_EVENTS: Final = frozenset(event.value for event in ConnectionEvent)
_LOSSES: Final = tuple(fate.value for fate in LOSSES)

#: Outcomes that need no mention.
_EXPECTED: Final = frozenset({"done", "sent"})

Totals = Mapping[str, Mapping[str, int]]


def judge(
    totals: Totals,
    *,
    lag: Lag,
    own_limits: Mapping[str, int],
    engine_errors: Sequence[str] = (),
    allowed: Mapping[str, int | None] | None = None,
    failed: Sequence[str] = (),
    lag_p99_us_max: float = LAG_P99_US_MAX,
) -> Verdict:
    """Judge whether a run is valid, and whether anything was lost in it.

    Args:
        totals: ``{kind: {fate or event: count}}``.
        engine_errors: What engines said in place of measuring on.
        allowed: How many of which fate are no matter, over all kinds of client; None: any number.
        failed: Limits that were not kept.
    """
    allowed = dict(allowed or {})
    why = list(engine_errors)
    why += [f"this machine did not let {count_of(n, 'attempt')} begin: {name}" for name, n in own_limits.items() if n]
    if lag.p99 > lag_p99_us_max:
        why.append(
            f"attempts began too late through no fault of the target's: {milliseconds(lag.p99)} at p99, "
            f"{milliseconds(lag_p99_us_max)} is the most"
        )
    if not why and not attempts_of(totals):
        why.append("no attempt was made")
    is_clean = not failed and not _not_allowed(losses_of(totals), allowed)
    return Verdict(
        is_valid=not why,
        is_clean=is_clean,
        exit_code=2 if why else 0 if is_clean else 1,
        why_invalid=why,
        allowed=allowed,
        failed=list(failed),
    )


def sentences(result: Result) -> list[str]:
    """Summarise a run in a few sentences, the fates of attempts first."""
    counts, losses = counts_of(result.totals), losses_of(result.totals)
    attempts = f"{attempts_of(result.totals):,}"
    restarts = count_of(len(result.restarts), "restart") if result.restarts else "no restart"
    unexpected = [f"{mark.number} {mark.outcome or 'without an outcome'}" for mark in result.restarts if _is_bad(mark)]
    if unexpected:
        restarts += f" ({', '.join(unexpected)})"
    lost = _lost(result, losses)
    if losses and not _not_allowed(losses, result.verdict.allowed):
        first = f"{restarts}, {attempts} attempts, nothing lost but what was allowed: {lost}"
    elif losses:
        first = f"LOST {sum(losses.values()):,} of {attempts}: {lost}"
    else:
        first = f"{restarts}, {attempts} attempts, nothing lost"
    events = _events(counts)
    if result.verdict.is_clean:
        first, events = "; ".join([first, *events]), []
    said = [first]
    if not result.verdict.is_valid:
        said = [f"THIS RUN MEANS NOTHING: {'; '.join(result.verdict.why_invalid)}", f"What was seen: {first}"]
    if not result.verdict.is_clean:
        said += ["; ".join([restarts, *events])]
    said += [f"NOT KEPT: {failure}" for failure in result.verdict.failed]
    said.append(_how_sure(result, losses))
    if late := counts[Fate.LATE.value]:
        said.append(f"{count_of(late, 'answer')} took longer than {result.late_ms:g} ms")
    if result.is_partial:
        said.append(f"The run was ended early, after {result.duration_ms / 1000:.1f} s")
    return said


def _how_sure(result: Result, losses: Mapping[str, int]) -> str:
    low, high = bounds(sum(losses.values()), attempts_of(result.totals))
    if not losses:
        return f"With 95 % confidence fewer than {percent(high)} of attempts are lost"
    return f"With 95 % confidence between {percent(low)} and {percent(high)} of attempts are lost"


def counts_of(totals: Totals) -> Counter[str]:
    """Count each fate and event over all kinds of client."""
    counts: Counter[str] = Counter()
    for found in totals.values():
        counts.update(found)
    return counts


def attempts_of(totals: Totals) -> int:
    """Count the attempts: each has one fate; events are not fates."""
    return sum(count for name, count in counts_of(totals).items() if name not in _EVENTS)


def losses_of(totals: Totals) -> dict[str, int]:
    """Count each loss that occurred, in their usual order."""
    counts = counts_of(totals)
    return {name: counts[name] for name in _LOSSES if counts[name]}


def losses_by_restart(result: Result) -> list[dict[str, int]]:
    """Count the losses before the first restart, after the first until the second, and so on."""
    groups: list[Counter[str]] = [Counter() for _ in range(len(result.restarts) + 1)]
    for bucket in result.buckets:
        groups[_restart_at(result, bucket)].update(losses_of(bucket.fates))
    return [{name: group[name] for name in _LOSSES if group[name]} for group in groups]


def window(mark: RestartMark) -> tuple[float, float]:
    """Return begin and end of a restart, in milliseconds since the run began (`PHASES`)."""
    if mark.ended_ms is None:
        return mark.began_ms, mark.began_ms + OPEN_END_MS
    return mark.began_ms, mark.ended_ms + MOMENT_MS


def latency_by_phase(result: Result) -> dict[str, Histogram]:
    """Collect the latencies of whole answers by phase; a bucket that touches a restart counts as during it.

    Without the time that a slow answer takes by itself (`service_us`).
    """
    histograms = {name: Histogram() for name in PHASES}
    for kind, phases in _latencies(result).items():
        service_us = service_us_of(kind, phases)
        for name, histogram in phases.items():
            histograms[name].merge((histogram.less(service_us) if service_us else histogram).counts)
    return histograms


def service_us_of(kind: str, phases: Mapping[str, Histogram]) -> float:
    """Return how long the answers of a kind of client take by themselves, in microseconds; 0 for all but ``slow``.

    It asks for something that takes its time. That is the target's service and no delay: the median without a restart.
    """
    if kind != Kind.SLOW.value:
        return 0.0
    undisturbed = Histogram(phases["before"].counts)
    undisturbed.merge(phases["after"].counts)
    return undisturbed.percentile(0.5)


def service_us(result: Result) -> float:
    """Return what `latency_by_phase` takes off the answers of ``slow``, in microseconds; 0 without any."""
    found = _latencies(result).get(Kind.SLOW.value)
    return service_us_of(Kind.SLOW.value, found) if found else 0.0


def _latencies(result: Result) -> dict[str, dict[str, Histogram]]:
    """Collect the latencies of whole answers by kind of client and by phase."""
    found: dict[str, dict[str, Histogram]] = {}
    windows = [window(mark) for mark in result.restarts]
    first = min((began for began, _ in windows), default=float("inf"))
    for bucket in result.buckets:
        end_ms = bucket.at_ms + result.bucket_ms
        if any(began < end_ms and bucket.at_ms < ended for began, ended in windows):
            phase = "during"
        else:
            phase = "before" if end_ms <= first else "after"
        for kind, counts in bucket.latency.items():
            found.setdefault(kind, {name: Histogram() for name in PHASES})[phase].merge(counts)
    return found


def answered_by(buckets: Iterable[Bucket]) -> dict[str, int]:
    """Count whole answers by the generation that gave them, in the order of appearance."""
    found: dict[str, int] = {}
    for bucket in buckets:
        for name, count in bucket.answered_by.items():
            found[name] = found.get(name, 0) + count
    return found


def count_of(number: int, what: str) -> str:
    """``1 restart``, ``2 restarts``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def named(number: int, what: str) -> str:
    """A count of a fate or an event: ``212 refused``, ``2 lost messages``."""
    plurals = {"message": "s", "status": "es"}
    return f"{number:,} {what}{plurals.get(what.rpartition(' ')[2], '') if number != 1 else ''}"


def named_connections(mark: RestartMark) -> str:
    """Show the fates that hotport reports of the old generation's connections: ``12 moved, 3 told to close``.

    The fates are hotport's; whatever names it has for them are told.
    """
    connections = (mark.report or {}).get("connections") or {}
    return ", ".join(f"{count:,} {fate.replace('_', ' ')}" for fate, count in sorted(connections.items()) if count)


def milliseconds(us: float) -> str:
    """Microseconds for people, with three digits that mean something: ``0.18 ms``, ``4.2 ms``, ``1,204 ms``."""
    ms = us / 1000
    return f"{ms:.2f} ms" if ms < 1 else f"{ms:.1f} ms" if ms < 100 else f"{ms:,.0f} ms"


def _is_bad(mark: RestartMark) -> bool:
    return mark.outcome not in _EXPECTED


def _not_allowed(losses: Mapping[str, int], allowed: Mapping[str, int | None]) -> bool:
    return any((budget := allowed.get(name, 0)) is not None and count > budget for name, count in losses.items())


def _restart_at(result: Result, bucket: Bucket) -> int:
    """Return the restart that had begun last when the bucket ended; 0 for none."""
    end_ms = bucket.at_ms + result.bucket_ms
    return sum(mark.began_ms < end_ms for mark in result.restarts)


def _lost(result: Result, losses: Mapping[str, int]) -> str:
    """``212 refused within 1.9 s after restart 1, 2 truncated``."""
    latest_ms: dict[str, float] = {}
    restarts: dict[str, list[int]] = {}
    early: Counter[str] = Counter()
    for bucket in result.buckets:
        number = _restart_at(result, bucket)
        for name, count in losses_of(bucket.fates).items():
            if not number:
                early[name] += count
                continue
            since_ms = bucket.at_ms + result.bucket_ms - result.restarts[number - 1].began_ms
            latest_ms[name] = max(latest_ms.get(name, 0.0), since_ms)
            if number not in (seen := restarts.setdefault(name, [])):
                seen.append(number)
    said = []
    few = _FATES_MAX if len(losses) <= _FATES_MAX else _FATES_MAX - 1
    told = sorted(losses, key=lambda name: -losses[name])[:few]
    for name in told:
        words = named(losses[name], name)
        if numbers := restarts.get(name):
            words += f" within {math.ceil(latest_ms[name] / 100) / 10:.1f} s after {_numbered(numbers)}"
        if result.restarts and early[name]:
            words += f" ({early[name]:,} of them before restart 1)" if numbers else " before restart 1"
        said.append(words)
    if others := [losses[name] for name in losses if name not in told]:
        said.append(f"{sum(others):,} of {len(others)} other kinds")
    return ", ".join(said)


def _numbered(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"restart {numbers[0]}"
    return f"restarts {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _events(counts: Mapping[str, int]) -> list[str]:
    told, again, idle = (
        counts[event.value]
        for event in (ConnectionEvent.TOLD_TO_CLOSE, ConnectionEvent.RECONNECTED, ConnectionEvent.IDLE_CLOSE)
    )
    said = []
    if told and told == again:
        said.append(f"{count_of(told, 'client')} {_were(told)} told to close and reconnected")
    else:
        if told:
            said.append(f"{count_of(told, 'client')} {_were(told)} told to close")
        if again:
            said.append(f"{count_of(again, 'client')} reconnected")
    if idle:
        said.append(f"{count_of(idle, 'idle connection')} {_were(idle)} closed")
    return said


def _were(number: int) -> str:
    return "was" if number == 1 else "were"
