"""Compare two runs: what differs by more than chance. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Final

import msgspec

from hotport.churn.certainty import bounds, differs, percent, rank_bounds
from hotport.churn.fates import ConnectionEvent
from hotport.churn.histogram import Histogram
from hotport.churn.result import Result
from hotport.churn.verdict import attempts_of, counts_of, latency_by_phase, losses_of, milliseconds

__all__ = ["Comparison", "compare"]

_SHARES: Final = {"p50": 0.5, "p99": 0.99}


class Comparison(msgspec.Struct, frozen=True):
    """One line of a comparison.

    Attributes:
        one, other: The values of the two runs, with their 95 % bounds, as text.
        change: Below 0 the other run is significantly better, above 0 it is worse; 0: chance may have done it.
    """

    what: str
    one: str
    other: str
    change: int = 0


def compare(one: Result, other: Result) -> Iterator[Comparison]:
    """Compare the losses, gaps, reconnects and latencies of two runs."""
    attempts, others = attempts_of(one.totals), attempts_of(other.totals)
    losses, other_losses = losses_of(one.totals), losses_of(other.totals)
    yield Comparison("attempts", f"{attempts:,}", f"{others:,}")
    yield Comparison("restarts", f"{len(one.restarts)}", f"{len(other.restarts)}")
    rows = [("lost", sum(losses.values()), sum(other_losses.values()))]
    rows += [(name, losses.get(name, 0), other_losses.get(name, 0)) for name in dict.fromkeys([*losses, *other_losses])]
    for name, lost, other_lost in rows:
        is_other = differs(lost, attempts, other_lost, others)
        yield Comparison(
            name,
            _share(lost, attempts),
            _share(other_lost, others),
            _direction(lost * others, other_lost * attempts) if is_other else 0,
        )
    again = ConnectionEvent.RECONNECTED.value
    yield Comparison("reconnected", f"{counts_of(one.totals)[again]:,}", f"{counts_of(other.totals)[again]:,}")
    yield Comparison("accept gap, median", _gap(one), _gap(other))
    phases, other_phases = latency_by_phase(one), latency_by_phase(other)
    for phase, histogram in phases.items():
        for name, share in _SHARES.items():
            if len(histogram) and len(other_phases[phase]):
                yield _latency(f"{name} {phase}", histogram, other_phases[phase], share)


def _latency(what: str, one: Histogram, other: Histogram, share: float) -> Comparison:
    low, high = _around(one, share)
    other_low, other_high = _around(other, share)
    change = 1 if other_low > high else -1 if other_high < low else 0
    return Comparison(what, _spread(one, share), _spread(other, share), change)


def _around(histogram: Histogram, share: float) -> tuple[float, float]:
    low, high = rank_bounds(len(histogram), share)
    return histogram.percentile(low), histogram.percentile(high)


def _spread(histogram: Histogram, share: float) -> str:
    low, high = _around(histogram, share)
    return f"{milliseconds(histogram.percentile(share))} ({milliseconds(low)} to {milliseconds(high)})"


def _share(lost: int, attempts: int) -> str:
    low, high = bounds(lost, attempts)
    return f"{lost:,} ({percent(low)} to {percent(high)})"


def _gap(result: Result) -> str:
    gaps = [gap for gap in result.accept_gap_ms if gap is not None]
    quiet = "" if result.quiet_gap_ms is None else f" ({result.quiet_gap_ms:,.0f} ms without a restart)"
    return f"{median(gaps):,.0f} ms{quiet}" if gaps else "-"


def _direction(before: int, after: int) -> int:
    return (after > before) - (after < before)
