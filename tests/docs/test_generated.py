"""The reference pages follow from the source, and say so of all of it."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest

from benchmarks import report
from docs import picture
from docs.generate import OPTIONS_TAIL, PAGES, error_sites
from docs.logevents import log_events
from docs.picture import phases_picture
from hotport.model.fates import Fate
from hotport.model.lifecycle import TRANSITIONS, Event, Phase
from hotport.options.loading import ENVIRONMENT_OTHERS
from hotport.wire.messages import Report

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "src" / "hotport"

#: A call of a logger with the name of an event, as it is usually written.
EVENT = r'_?log\.(?:debug|info|warning|error|exception)\(\s*"([a-z_]+\.[a-z_.]+)"'


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_up_to_date(page: str) -> None:
    assert (ROOT / page).read_text() == PAGES[page](), "run: python -m docs.generate"


def test_page_of_options_explains_every_other_variable() -> None:
    assert set(re.findall(r"`(HOTPORT_[A-Z_]+)`", OPTIONS_TAIL)) == ENVIRONMENT_OTHERS


def test_every_error_code_of_the_source_is_found() -> None:
    written = {code for path in SOURCE.rglob("*.py") for code in re.findall(r'"(HP\d{3})"', path.read_text())}
    assert {site.code for site in error_sites()} == written


def test_an_error_code_ends_a_command_in_one_way_only() -> None:
    ways = defaultdict(set)
    for site in error_sites():
        ways[site.code].add((site.error, site.exit_code))
    assert {code: found for code, found in ways.items() if len(found) > 1} == {}


def test_the_report_page_names_every_field() -> None:
    page = (ROOT / "docs/reference/report.md").read_text()
    fields = {field.name for field in msgspec.structs.fields(Report)}
    assert {field for field in fields if f"| `{field}` |" not in page} == set()


def test_the_report_page_names_every_fate() -> None:
    page = (ROOT / "docs/reference/report.md").read_text()
    assert {fate for fate in Fate if f"`{fate}`" not in page} == set()


@pytest.mark.parametrize("path", report.PAGES, ids=lambda path: path.name)
def test_a_page_has_the_figures_of_the_results(path: Path) -> None:
    page = path.read_text()
    assert page == report.PAGES[path](page), "run: make bench-report"


def test_row_that_the_table_of_servers_would_leave_out_is_an_error() -> None:
    results = report.results_of("http")
    with pytest.raises(AssertionError, match="push"):
        report._servers({**results, "samples": {**results["samples"], "push: hotport requests/s": [1.0]}})


def test_the_architecture_page_names_modules_that_exist_and_every_room() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    places = (SOURCE, ROOT / "benchmarks", ROOT / "docs", ROOT / "tests")
    modules = {path.name for place in places for path in place.rglob("*.py")}
    assert {name for name in re.findall(r"`(?:\w+/)*(\w+\.py)`", page) if name not in modules} == set()
    rooms = {f"{path.name}/" for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert {room for room in rooms if f"| `{room}`" not in page} == set()


def test_every_log_event_is_listed_and_described_by_its_name() -> None:
    events = log_events()
    assert {"worker.lost", "service.starting", "log.dropped", "restart.committed", "*.failed"} <= events.keys()
    called = {name for path in SOURCE.rglob("*.py") for name in re.findall(EVENT, path.read_text())}
    assert called <= events.keys()
    assert "why" in events["worker.lost"].fields
    assert events["worker.lost"].levels == {"warning"}


def test_the_picture_of_a_workers_life_shows_every_phase_and_transition() -> None:
    drawing = phases_picture()
    assert {phase.value for phase in Phase if f">{phase.value}</text>" not in drawing} == set()
    events = {event.value for (before, event), after in TRANSITIONS.items() if before is not after}
    drawn = {word for text in re.findall(r">([^<>]+)</text>", drawing) for word in text.split(" / ")}
    assert events - drawn == set()


def test_a_table_that_the_picture_cannot_show_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {**TRANSITIONS}
    del changed[Phase.SERVING, Event.LEAVING]
    monkeypatch.setattr(picture, "TRANSITIONS", changed)
    with pytest.raises(ValueError, match="draining is reached in different ways"):
        phases_picture()
