"""Recordings of restarts in the trace-event format, which Perfetto and chrome://tracing open.

Sources: "Trace Event Format" (Google), JSON Object Format: complete events (``ph`` X) and metadata (``ph`` M), times in
microseconds. Complete events of one thread nest, or follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from hotport.wire.recording import Lane, Recording, Span, phase_spans

__all__ = ["trace_of"]

#: The rows of a process in the trace; those for connections that move are one for each worker that takes some.
_PHASES, _IMPORTS, _MOVES = 1, 2, 3


def trace_of(recordings: Sequence[Recording]) -> dict[str, Any]:
    """Make the trace of these restarts, to be encoded as JSON; its times are those of the clock on the wall."""
    events: dict[str, dict[str, Any]] = {}
    for recording in recordings:
        for event in _events(recording):
            events.setdefault(repr(event), event)  # a process may be in several restarts, and is named once
    return {
        "traceEvents": list(events.values()),
        "displayTimeUnit": "ms",
        "otherData": {"service": recordings[-1].report.service if recordings else ""},
    }


def _events(recording: Recording) -> Iterator[dict[str, Any]]:
    report = recording.report
    began_us = datetime.fromisoformat(report.began_at).timestamp() * 1e6
    pid = recording.supervisor
    yield from _names(pid, "supervisor", {_PHASES: "restarts"}, order=0)
    spans = phase_spans(report)
    whole = Span(
        name=f"restart into generation {report.generation}",
        at_ms=0.0,
        ms=round(sum(span.ms for span in spans), 3),
        facts={
            "outcome": report.outcome or "unknown",
            "accept_gap_ms": report.accept_gap_ms,
            **{f"connections.{fate}": count for fate, count in (report.connections or {}).items()},
        },
    )
    for span in (whole, *spans):
        yield _event(span, "restart", pid, _PHASES, began_us)
    for lane in recording.lanes:
        yield from _lane_events(lane, began_us)


def _lane_events(lane: Lane, began_us: float) -> Iterator[dict[str, Any]]:
    moves = [span for span in lane.spans if span.name == "moving"]
    takers = {to: row for row, to in enumerate(sorted({str(span.facts["to"]) for span in moves}), _MOVES)}
    rows = {_PHASES: "phases", **{row: f"to {to}" for to, row in takers.items()}}
    if lane.imports:
        rows[_IMPORTS] = "slowest imports"
    yield from _names(lane.pid, f"worker {lane.generation}.{lane.worker}", rows, order=lane.worker)
    for span in lane.spans:
        row = takers[str(span.facts["to"])] if span in moves else _PHASES
        yield _event(span, "worker", lane.pid, row, began_us)
    for span in lane.imports:
        yield _event(span, "import", lane.pid, _IMPORTS, began_us)


def _names(pid: int, name: str, rows: Mapping[int, str], *, order: int) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": order}}
    for row, title in rows.items():
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": row, "args": {"name": title}}


def _event(span: Span, kind: str, pid: int, row: int, began_us: float) -> dict[str, Any]:
    at_us = round(began_us + span.at_ms * 1000)
    return {
        "ph": "X",
        "name": span.name,
        "cat": kind,
        "pid": pid,
        "tid": row,
        "ts": at_us,
        "dur": round(began_us + (span.at_ms + span.ms) * 1000) - at_us,  # so that neighbours do not overlap
        "args": dict(span.facts),
    }
