"""A restart as the flight recorder keeps it: its report, and what each process did when."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

import msgspec

from hotport.wire.messages import PhaseTime, Report

__all__ = ["Lane", "Recording", "Span", "current_step", "phase_spans"]

#: What a restart does after it has reached a phase; at first it prepares or starts.
_AFTER: Final = {
    "prepared": "starting",
    "ready": "opening",
    "baking": "baking",
    "committed": "quiescing",
    "quiesced": "settling",
    "quiesce overdue": "settling",
    "watching": "watching",
    "draining": "draining",
    "undoing": "undoing",
    "undone": "leaving",
    "aborted": "aborting",
}


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """Something that took `ms` milliseconds, from `at_ms` after the restart's request; negative: before it.

    Attributes:
        facts: Numbers and names about it.
    """

    name: str
    at_ms: float
    ms: float
    facts: dict[str, int | float | str] = {}


class Lane(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker did during a restart.

    Attributes:
        imports: The slowest modules of one that was started, outer ones first.
        left_out: How many spans were not kept.
    """

    worker: int
    generation: int
    pid: int
    spans: tuple[Span, ...] = ()
    imports: tuple[Span, ...] = ()
    left_out: int = 0


class Recording(msgspec.Struct, frozen=True, kw_only=True):
    """One restart, whole, or as far as it was known when its supervisor wrote it last.

    Attributes:
        supervisor: The pid of the supervisor that began it.
        began_s: When it was requested (CLOCK_MONOTONIC, seconds).
        is_over: Whether all workers that leave have ended.
        leaving: Those that have not.
        back: New workers that were taken back.
        lanes: Of the workers that were started, and of those that left.
        lanes_left_out: How many more there were.
    """

    report: Report
    supervisor: int
    began_s: float
    is_over: bool = False
    leaving: tuple[int, ...] = ()
    back: tuple[int, ...] = ()
    lanes: tuple[Lane, ...] = ()
    lanes_left_out: int = 0

    @property
    def lasted_s(self) -> float:
        """Seconds from the request to the last phase that is known."""
        return self.report.phases[-1].ms / 1000 if self.report.phases else 0.0


def phase_spans(report: Report) -> tuple[Span, ...]:
    """The steps of a restart, one after the other; together they last until the report's last phase."""
    return tuple(_steps(report))


def current_step(report: Report) -> str:
    """What a restart does since its last phase, unless it is over."""
    last = report.phases[-1].name if report.phases else ""
    return _AFTER.get(last, "starting")


def _steps(report: Report) -> Iterator[Span]:
    is_prepared = any(phase.name == "prepared" for phase in report.phases)
    for before, after in pairwise((PhaseTime(name="", ms=0.0), *report.phases)):
        name = _AFTER.get(before.name, "preparing" if is_prepared else "starting")
        if after.name == "ready" and before.name != "baking":  # of the next batch
            name = "starting"
        yield Span(name=name, at_ms=before.ms, ms=round(after.ms - before.ms, 3), facts={"until": after.name})
