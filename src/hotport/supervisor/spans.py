"""Restarts as OpenTelemetry spans, where that is set up in the supervisor's process.

Sources: OpenTelemetry specification, Trace API: times are nanoseconds since the epoch.
"""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING

from hotport.wire.recording import Recording, Span, phase_spans

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

__all__ = ["send_spans"]


def send_spans(recording: Recording) -> None:
    """Make spans of a restart that is over: one for all of it, with its steps and its workers below.

    Does nothing unless ``opentelemetry.trace`` is imported already, as ``opentelemetry-instrument`` does: without a
    provider it would be imported for nothing, which takes longer than most restarts may keep the supervisor busy.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return
    tracer: Tracer = trace.get_tracer("hotport")
    report = recording.report
    began_ns = int(datetime.fromisoformat(report.began_at).timestamp() * 1e9)
    root = tracer.start_span(
        "hotport.restart",
        start_time=began_ns,
        attributes={
            "hotport.service": report.service,
            "hotport.generation": report.generation,
            "hotport.previous": report.previous,
            "hotport.outcome": report.outcome,
            "hotport.strategy": report.strategy,
            "hotport.accept_gap_ms": report.accept_gap_ms,
            "hotport.dropped": report.dropped,
            **{f"hotport.connections.{fate}": count for fate, count in (report.connections or {}).items()},
        },
    )
    if report.outcome != "done":
        root.set_status(trace.StatusCode.ERROR, report.outcome)  # not the error: its words are the application's
    context = trace.set_span_in_context(root)

    def send(kind: str, span: Span, **attributes: int | float | str) -> None:
        at_ns = began_ns + int(span.at_ms * 1e6)
        facts = {f"hotport.{name}": value for name, value in (span.facts | attributes).items()}
        child = tracer.start_span(f"hotport.{kind}.{span.name}", context, start_time=at_ns, attributes=facts)
        child.end(at_ns + int(span.ms * 1e6))

    for span in phase_spans(report):
        send("restart", span)
    for lane in recording.lanes:
        for span in lane.spans:
            send("worker", span, worker=lane.worker, generation=lane.generation, pid=lane.pid)
        for span in lane.imports:
            send("import", span, worker=lane.worker, generation=lane.generation, pid=lane.pid)
    root.end(began_ns + int(recording.lasted_s * 1e9))
