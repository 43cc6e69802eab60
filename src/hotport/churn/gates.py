"""Limits that a run has to keep beside losing nothing. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

from hotport.churn.certainty import bounds, percent
from hotport.churn.fates import ConnectionEvent
from hotport.churn.histogram import Histogram
from hotport.churn.result import Result
from hotport.churn.verdict import attempts_of, counts_of, latency_by_phase, losses_of, milliseconds

__all__ = ["Gates", "Limit", "failures"]

_P99: Final = 0.99


class Limit(msgspec.Struct, frozen=True):
    """A limit: milliseconds, or so many times the value without a restart; one of them is 0."""

    ms: float = 0.0
    times: float = 0.0

    def resolved_ms(self, undisturbed_ms: float) -> float:
        """The limit in milliseconds."""
        return self.ms or self.times * undisturbed_ms

    def __str__(self) -> str:
        return f"{self.ms:g} ms" if self.ms else f"{self.times:g} times the undisturbed one"


class Gates(msgspec.Struct, frozen=True):
    """The limits of a run; None: no limit.

    Attributes:
        gap: Of the accept gap of each restart.
        p99: Of latency from a restart's beginning until it is no longer felt.
        reconnects: How many clients may have had to connect again.
        prove: The share (0 to 1) that has to be the upper 95 % bound of losses.
    """

    gap: Limit | None = None
    p99: Limit | None = None
    reconnects: int | None = None
    prove: float | None = None


def failures(gates: Gates, result: Result) -> tuple[list[str], list[str]]:
    """Compare a run with its limits.

    Returns:
        Why some limits cannot be judged, which makes a run invalid; and the limits that were not kept; a sentence each.
    """
    missing: list[str] = []
    failed: list[str] = []
    if gates.gap is not None:
        _gap(gates.gap, result, missing, failed)
    if gates.p99 is not None:
        _latency(gates.p99, result, missing, failed)
    again = counts_of(result.totals)[ConnectionEvent.RECONNECTED.value]
    if gates.reconnects is not None and again > gates.reconnects:
        failed.append(f"{again:,} clients had to connect again, and {gates.reconnects:,} may")
    if gates.prove is not None:
        lost, attempts = sum(losses_of(result.totals).values()), attempts_of(result.totals)
        reached = bounds(lost, attempts)[1]
        if reached > gates.prove:
            words = f"{attempts:,} attempts and {lost:,} lost prove fewer than {percent(reached)}"
            (failed if lost else missing).append(f"{words}, and {percent(gates.prove)} was to be proven")
    return missing, failed


def _gap(limit: Limit, result: Result, missing: list[str], failed: list[str]) -> None:
    gaps = {
        mark.number: gap for mark, gap in zip(result.restarts, result.accept_gap_ms, strict=True) if gap is not None
    }
    if not gaps or (limit.times and not result.quiet_gap_ms):
        missing.append("there is no accept gap to compare: it needs restarts, and clients that connect (--connect)")
        return
    most_ms = limit.resolved_ms(result.quiet_gap_ms or 0.0)
    if result.usual_gap_ms is not None and most_ms < result.usual_gap_ms:
        missing.append(
            f"an accept gap of {most_ms:,.0f} ms cannot be seen: by chance alone {result.usual_gap_ms:,.0f} ms "
            "without a connection are to be expected at this rate; use a higher --connect"
        )
    failed += [
        f"the accept gap of restart {number} was {gap:,.0f} ms, and {limit} is the most"
        for number, gap in gaps.items()
        if gap > most_ms
    ]


def _latency(limit: Limit, result: Result, missing: list[str], failed: list[str]) -> None:
    phases = latency_by_phase(result)
    undisturbed = Histogram(phases["before"].counts)
    undisturbed.merge(phases["after"].counts)
    if not len(phases["during"]) or (limit.times and not len(undisturbed)):
        missing.append("there is no latency to compare: nothing was answered during a restart, or without one")
        return
    found_us = phases["during"].percentile(_P99)
    most_us = limit.resolved_ms(undisturbed.percentile(_P99) / 1000) * 1000
    if found_us > most_us:
        failed.append(
            f"p99 during restarts was {milliseconds(found_us)}, and {limit} is the most"
            + (f" ({milliseconds(most_us)})" if limit.times else "")
        )
