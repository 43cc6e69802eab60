"""A recording becomes a trace: what Perfetto and chrome://tracing need of it, and that its times are the report's."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import msgspec
import pytest

from hotport.wire.messages import PhaseTime, Report
from hotport.wire.recording import Lane, Recording, Span, current_step, phase_spans
from hotport.wire.trace import trace_of


def report(*phases: tuple[str, float]) -> Report:
    return Report(
        service="svc",
        generation=2,
        previous=1,
        outcome="done",
        serving=2,
        began_at="2026-12-01T12:00:00.000+00:00",
        phases=tuple(PhaseTime(name=name, ms=ms) for name, ms in phases),
        connections={"moved_http": 7},
    )


DONE = report(
    ("prepared", 10.5),
    ("ready", 210.25),
    ("committed", 214.0),
    ("quiesced", 215.0),
    ("draining", 465.1),
    ("retired", 500),
)


def move(at_ms: float, ms: float, to: str) -> Span:
    return Span(name="moving", at_ms=at_ms, ms=ms, facts={"connections": 3, "batches": 1, "to": to})


RECORDING = Recording(
    report=DONE,
    supervisor=100,
    began_s=50.0,
    is_over=True,
    lanes=(
        Lane(
            worker=1,
            generation=1,
            pid=101,
            spans=(
                Span(name="accepting", at_ms=0.0, ms=215.0),
                move(470, 5, "worker-2.3.sock"),
                move(471, 5, "worker-2.4.sock"),
                Span(name="draining", at_ms=215.0, ms=280.0),
            ),
        ),
        Lane(
            worker=3,
            generation=2,
            pid=103,
            spans=(Span(name="starting", at_ms=11.0, ms=199.0),),
            imports=(
                Span(name="app", at_ms=50.0, ms=100.0, facts={"own_ms": 1.0}),
                Span(name="django", at_ms=51.0, ms=90.0, facts={"own_ms": 90.0}),
            ),
        ),
    ),
)


def check(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Check a trace against the trace-event format, and return its complete events."""
    trace = msgspec.json.decode(msgspec.json.encode(trace))
    assert isinstance(trace["traceEvents"], list)
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["args"], dict)
        assert event["ph"] in ("X", "M")
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    named = {(event["pid"], event["tid"]) for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert named == {(event["pid"], event["tid"]) for event in spans}
    for event in spans:
        assert all(isinstance(event[key], int) and event[key] >= 0 for key in ("ts", "dur"))
    row = lambda event: (event["pid"], event["tid"])  # noqa: E731
    for _, events in groupby(sorted(spans, key=row), row):
        ends: list[int] = []  # of the events around the next one
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while ends and ends[-1] <= event["ts"]:
                ends.pop()
            end = event["ts"] + event["dur"]
            assert not ends or end <= ends[-1], f"{event} crosses the end of another event"
            ends.append(end)
    return spans


def test_trace_is_in_the_trace_event_format_and_its_steps_last_as_long_as_the_report_says() -> None:
    spans = check(trace_of([RECORDING]))
    whole, *steps = (event for event in spans if event["cat"] == "restart")
    assert whole["dur"] == sum(event["dur"] for event in steps) == 500_000
    assert whole["args"] == {"outcome": "done", "accept_gap_ms": 0.0, "connections.moved_http": 7}
    assert [event["name"] for event in steps] == [
        *("preparing", "starting", "opening", "quiescing", "settling", "draining")
    ]
    assert {event["args"]["to"] for event in spans if event["name"] == "moving"} == {
        "worker-2.3.sock",
        "worker-2.4.sock",
    }
    assert [event["name"] for event in spans if event["cat"] == "import"] == ["app", "django"]


def test_processes_of_several_restarts_are_named_once() -> None:
    later = msgspec.structs.replace(
        RECORDING, report=msgspec.structs.replace(DONE, began_at="2026-12-01T12:01:00+00:00")
    )
    trace = trace_of([RECORDING, later])
    names = [event["pid"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert sorted(names) == [100, 101, 103]
    assert len(check(trace)) == 2 * len(check(trace_of([RECORDING])))


def test_trace_of_no_restart_is_empty() -> None:
    assert check(trace_of([])) == []


@pytest.mark.parametrize(
    ("phases", "names"),
    [
        ([], []),
        ([("ready", 1.0), ("aborted", 2.0), ("retired", 3.0)], ["starting", "opening", "aborting"]),
        (
            [
                ("ready", 1),
                ("baking", 2),
                ("ready", 3),
                ("committed", 4),
                ("quiesced", 5),
                ("draining", 6),
                ("ready", 8),
            ],
            ["starting", "opening", "baking", "opening", "quiescing", "settling", "starting"],
        ),
        (
            [
                ("ready", 1),
                ("committed", 2),
                ("quiesced", 3),
                ("watching", 4),
                ("undoing", 5),
                ("undone", 6),
                ("retired", 7),
            ],
            ["starting", "opening", "quiescing", "settling", "watching", "undoing", "leaving"],
        ),
    ],
    ids=["began", "aborted", "canary", "undone"],
)
def test_steps_follow_each_other_until_the_last_phase(phases: list[tuple[str, float]], names: list[str]) -> None:
    spans = phase_spans(report(*phases))
    assert [span.name for span in spans] == names
    assert sum(span.ms for span in spans) == (phases[-1][1] if phases else 0)


def test_step_after_the_last_phase_is_under_way() -> None:
    assert current_step(report()) == "starting"
    assert current_step(report(("ready", 1.0), ("committed", 2.0))) == "quiescing"


def test_recording_lasts_until_its_last_phase() -> None:
    assert RECORDING.lasted_s == 0.5
    assert msgspec.structs.replace(RECORDING, report=report()).lasted_s == 0.0
