"""Restarts as OpenTelemetry spans, with its real SDK."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("opentelemetry.sdk", reason="it is none of hotport's dependencies")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from hotport.supervisor.spans import send_spans
from tests.supervisor.test_recorder import begun, reports
from tests.wire.test_trace import RECORDING


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def lasted_ms(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e6


def test_spans_of_a_restart_add_up_to_its_report(exported: InMemorySpanExporter) -> None:
    send_spans(RECORDING)
    *children, root = exported.get_finished_spans()
    assert (root.name, root.status.status_code, lasted_ms(root)) == ("hotport.restart", StatusCode.UNSET, 500.0)
    assert root.attributes is not None
    assert root.attributes["hotport.connections.moved_http"] == 7
    assert all(child.parent == root.context for child in children)
    steps = [child for child in children if child.name.startswith("hotport.restart.")]
    assert sum(map(lasted_ms, steps)) == pytest.approx(500.0, abs=0.001)
    names = [child.name for child in children if child not in steps]
    assert names.count("hotport.worker.moving") == 2
    assert "hotport.import.django" in names


def test_restart_that_is_taken_back_is_an_error_without_the_words_of_the_application(
    exported: InMemorySpanExporter,
) -> None:
    report = msgspec.structs.replace(RECORDING.report, outcome="undone", error="password=hunter2")
    send_spans(msgspec.structs.replace(RECORDING, report=report))
    root = exported.get_finished_spans()[-1]
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "undone")
    assert not any("hunter2" in span.to_json() for span in exported.get_finished_spans())


def test_spans_are_sent_when_the_last_worker_has_left(exported: InMemorySpanExporter, tmp_path: Path) -> None:
    begun(tmp_path)
    assert not exported.get_finished_spans()
    reports(tmp_path).resume({4}, serving=2)
    assert exported.get_finished_spans()[-1].name == "hotport.restart"


def test_opentelemetry_is_not_imported_for_it() -> None:
    code = (
        "import sys; from hotport.supervisor.spans import send_spans; from tests.wire.test_trace import RECORDING; "
        "send_spans(RECORDING); print('opentelemetry.trace' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "False\n"
