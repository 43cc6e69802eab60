"""The reference pages follow from the source, and say so of all of it."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest

from benchmarks.report import (
    BALANCE_PAGE,
    CHURN_PAGE,
    LIMITS_PAGE,
    PAGE,
    PEERS_PAGE,
    PICTURE,
    WHY_PAGE,
    drawn,
    rendered,
    rendered_balance_page,
    rendered_churn_page,
    rendered_limits_page,
    rendered_page,
    rendered_peers_page,
    rendered_why_page,
    results_of,
)
from docs.generate import PAGES, error_sites
from hotport.model.fates import Fate
from hotport.wire.messages import Report

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "src" / "hotport"


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_up_to_date(page: str) -> None:
    assert (ROOT / page).read_text() == PAGES[page](), "run: python -m docs.generate"


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


def test_the_measured_table_is_what_the_results_say() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme == rendered(readme), "run: make bench-report"


def test_the_page_on_time_wait_is_what_the_results_say() -> None:
    page = PAGE.read_text()
    assert page == rendered_page(page), "run: make bench-report"


def test_the_page_on_other_servers_is_what_the_results_say() -> None:
    page = PEERS_PAGE.read_text()
    assert page == rendered_peers_page(page), "run: make bench-report"


def test_the_page_on_load_tests_is_what_the_results_say() -> None:
    page = CHURN_PAGE.read_text()
    assert page == rendered_churn_page(page), "run: make bench-report"


def test_page_on_busy_ports_has_the_figures_of_the_results() -> None:
    page = WHY_PAGE.read_text()
    assert page == rendered_why_page(page), "run: make bench-report"


def test_page_on_limits_has_the_figures_of_the_results() -> None:
    page = LIMITS_PAGE.read_text()
    assert page == rendered_limits_page(page), "run: make bench-report"


def test_page_on_shared_load_has_the_figures_of_the_results() -> None:
    page = BALANCE_PAGE.read_text()
    assert page == rendered_balance_page(page), "run: make bench-report"


def test_the_picture_of_the_gaps_is_what_the_results_say() -> None:
    assert PICTURE.read_text() == drawn(results_of("rebind")), "run: make bench-report"
