"""The page of a run: complete, harmless whatever is in it, and the same in a browser as in the result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import msgspec
import pytest

from hotport.churn.fates import Fate
from hotport.churn.html import COLUMNS_MAX, render
from hotport.churn.result import Result
from hotport.churn.verdict import attempts_of, counts_of, losses_of, sentences
from tests.churn import results
from tests.churn.chromium import Page, browsing

EVERY = [results.clean, results.lossy, results.invalid, results.partial, results.quiet, results.hostile]


class Elements(HTMLParser):
    """What a page consists of, and the texts of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = data


@pytest.mark.parametrize("build", EVERY)
def test_page_holds_the_whole_result(build: Callable[[], Result]) -> None:
    result = build()
    raw = Elements(render(result)).scripts["raw"]
    assert msgspec.json.decode(raw, type=Result) == result


@pytest.mark.parametrize("build", EVERY)
def test_page_asks_for_nothing(build: Callable[[], Result]) -> None:
    result = msgspec.structs.replace(build(), target=results.clean().target)
    page = render(result)
    for tag, attributes in Elements(page).tags:
        for name in ("src", "href", "action", "srcset", "data"):
            assert attributes.get(name) in (None, "data:,"), (tag, attributes)
    assert set(re.findall(r"https?://[^\"<\s]*", page)) == {"http://127.0.0.1:8000/"}
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket\(", page)


def test_nothing_in_a_result_becomes_markup() -> None:
    page = render(results.hostile())
    elements = Elements(page)
    assert [attributes.get("id") for tag, attributes in elements.tags if tag == "script"] == ["view", "raw", None]
    assert not [tag for tag, _ in elements.tags if tag == "img"]
    assert page.count("</script>") == 3
    assert "\u2028" not in elements.scripts["raw"]


def test_text_that_looks_like_a_place_in_the_template_stays_text() -> None:
    result = results.quiet()
    result.machine["@@RAW@@"] = "@@VERDICT@@"
    assert "@@VERDICT@@" in render(result)


def test_long_runs_are_drawn_in_as_many_columns_as_there_is_room_for() -> None:
    result = results.build(duration_ms=65_000, restarts=[], accept_gap_ms=[])
    view = json.loads(Elements(render(result)).scripts["view"])
    assert COLUMNS_MAX / 2 < len(view["columns"]) <= COLUMNS_MAX
    assert sum(column["answered"] for column in view["columns"]) == counts_of(result.totals)[Fate.ANSWERED.value]


def test_curves_rise_to_the_last_answer() -> None:
    view = json.loads(Elements(render(results.clean())).scripts["view"])
    assert [curve["name"] for curve in view["curves"]] == ["before", "during", "after"]
    for curve in view["curves"]:
        assert curve["points"] == sorted(curve["points"])
        assert curve["points"][0][0] == 0


def test_run_without_any_attempt_is_a_page_as_well() -> None:
    result = msgspec.structs.replace(results.quiet(), buckets=[], totals={}, duration_ms=0.0)
    assert "no restart, 0 attempts" in render(result)


def test_whatever_hotport_says_of_connections_is_on_the_page() -> None:
    page = render(results.clean())
    assert "its connections: 1,200 moved, 1 of which nobody knows yet, 14 told to close" in page


# -- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browsing(tmp_path) as page:
        yield page
    assert page.complaints == []
    assert [url for url in page.requested if not url.startswith(("file:", "data:", "blob:"))] == []


def shown(page: Page, result: Result, tmp_path: Path, *, scheme: str = "light", width: int = 1180) -> None:
    """A result in the browser."""
    path = tmp_path / "churn.html"
    path.write_text(render(result), encoding="utf-8")
    page.open(path, scheme=scheme, width=width)
    assert page.ask("document.documentElement.dataset.drawn") == "yes"


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.ask(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText.trim())")
    return found


@pytest.mark.parametrize("width", [380, 1180])
def test_page_is_drawn_without_a_complaint(page: Page, tmp_path: Path, width: int) -> None:
    for build, (scheme, background) in product(EVERY, {"light": "255, 255, 255", "dark": "18, 21, 24"}.items()):
        result = build()
        shown(page, result, tmp_path, scheme=scheme, width=width)
        assert page.ask("document.querySelectorAll('svg').length") == 4
        assert "NaN" not in page.ask("document.querySelector('main').outerHTML")
        assert page.ask("document.documentElement.scrollWidth") <= width
        assert page.ask("document.title").endswith(result.target.url)
        assert page.ask("getComputedStyle(document.body).backgroundColor") == f"rgb({background})"


def test_numbers_on_the_page_are_those_of_the_result(page: Page, tmp_path: Path) -> None:
    result = results.lossy()
    shown(page, result, tmp_path)
    losses = losses_of(result.totals)
    assert texts(page, "#verdict") == [sentences(result)[0]]
    assert texts(page, "#figure-attempts dd")[0].startswith(f"{attempts_of(result.totals):,}")
    assert texts(page, "#figure-lost dd")[0].startswith(f"{sum(losses.values()):,}")
    assert texts(page, "#losses td:nth-child(1) b") == list(losses)
    assert texts(page, "#losses td:nth-child(2)") == [str(count) for count in losses.values()]
    columns = [name.replace("\n", " ") for name in texts(page, "#fates th")]
    for row in range(1, len(result.totals) + 1):
        kind, *counts = texts(page, f"#fates tr:nth-child({row}) td")
        found = {name: int(count.replace(",", "")) for name, count in zip(columns[1:], counts, strict=True)}
        assert {name: count for name, count in found.items() if count} == result.totals[kind]
    assert texts(page, "#restarts td:nth-child(1)") == ["1", "2"]
    assert texts(page, "#restarts td:nth-child(6)") == ["310 ms", "not measured"]


def test_incidents_can_be_searched(page: Page, tmp_path: Path) -> None:
    result = results.lossy()
    shown(page, result, tmp_path)
    assert texts(page, "#shown") == [f"the first 200 of {len(result.incidents)}"]
    page.ask("$('filter').value = 'Refused keepalive'; $('filter').dispatchEvent(new Event('input'))")
    assert texts(page, "#shown") == ["3"]
    assert texts(page, "#incidents td:nth-child(5)") == ["refused"] * 3


def test_pointer_on_the_time_line_tells_the_numbers_of_that_moment(page: Page, tmp_path: Path) -> None:
    result = results.lossy()
    shown(page, result, tmp_path)
    x, y = page.ask(
        "(() => { const box = $('chart-fates').getBoundingClientRect();"
        "return [box.left + SPACE.left + 2450 / view.end * (box.width - SPACE.left - SPACE.right), box.top + 100]; })()"
    )
    page.move(x, y)
    (bucket,) = [bucket for bucket in result.buckets if bucket.at_ms == 2400]
    counts = counts_of(bucket.fates)
    assert texts(page, "#chart-fates .tip b") == ["at 2.4 s, restart 1"]
    rows = [row.split("\n") for row in texts(page, "#chart-fates .tip > span")]
    assert rows == [
        ["answered", str(counts["answered"])],
        ["late", "0"],
        ["lost", "125"],
        ["· refused", "120"],
        ["· reset after send", "5"],
    ]


def test_saved_document_is_the_result(page: Page, tmp_path: Path) -> None:
    result = results.hostile()
    shown(page, result, tmp_path)
    page.ask("window.saved = null; URL.createObjectURL = blob => { saved = blob; return 'data:,'; };")
    page.ask("HTMLAnchorElement.prototype.click = function () { saved.name_ = this.download; }")
    page.ask("$('download').click()")
    assert page.ask("saved.name_") == "churn.json"
    assert msgspec.json.decode(page.ask("saved.text()"), type=Result) == result
