"""What a person sees while a run goes on, and at its end."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable

import msgspec
import pytest
from rich.console import Console

from hotport.churn.histogram import Histogram
from hotport.churn.result import RestartMark, Result
from hotport.churn.verdict import attempts_of, losses_of, sentences
from hotport.cli._screen import Screen, print_result, write_json
from tests.churn import results

EVERY = [results.clean, results.lossy, results.invalid, results.partial, results.quiet, results.hostile]


def terminal(width: int = 100, *, is_one: bool = True) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    words = Console(
        file=file, width=width, force_terminal=is_one, color_system=None, highlight=False, soft_wrap=not is_one
    )
    return words, file


def played(result: Result, words: Console) -> Screen:
    """A screen that has been told everything."""
    screen = Screen(words, expected_s=result.duration_ms / 1000, bucket_ms=result.bucket_ms)
    for mark in result.restarts:
        screen.restart(RestartMark(mark.number, mark.how, mark.began_ms))
    for bucket in result.buckets:
        screen.bucket(bucket)
    for mark in result.restarts:
        screen.restart(mark)
    return screen


@pytest.mark.parametrize("build", EVERY)
@pytest.mark.parametrize("width", [40, 80, 200])
def test_picture_and_tables_fit_every_terminal(build: Callable[[], Result], width: int) -> None:
    words, file = terminal(width)
    result = build()
    words.print(played(result, words).picture())
    print_result(result, words)
    assert max(map(len, file.getvalue().splitlines())) <= width


def test_picture_tells_losses_by_fate_and_kind_and_how_restarts_ended() -> None:
    words, file = terminal()
    result = results.lossy()
    words.print(played(result, words).picture())
    said = file.getvalue()
    assert f"{attempts_of(result.totals):,}" in said
    assert "refused: 3 keepalive, 212 connect" in said
    assert "aborted in 360 ms: HP403 not ready within 30 s" in said
    assert "own lag" not in said  # nobody told


@pytest.mark.parametrize(("lag_us", "warns"), [(900, False), (6000, True)])
def test_picture_warns_when_the_clients_are_late_themselves(lag_us: int, warns: bool) -> None:
    histogram = Histogram()
    histogram.add(lag_us)
    result = results.quiet()
    for bucket in result.buckets:
        bucket.lag = histogram.counts
    words, file = terminal()
    words.print(played(result, words).picture())
    assert "own lag" in file.getvalue()
    assert ("late themselves" in file.getvalue()) == warns


def test_of_what_a_successful_command_has_said_the_end_is_told() -> None:
    result = results.clean()
    result.restarts[0].detail = "many\nwords\ndone: generation 2 serves"
    result.restarts[1].detail, result.restarts[1].outcome = "cause\ntry", "failed"
    words, file = terminal(200)
    print_result(result, words)
    assert "done in 660 ms: done: generation 2 serves" in file.getvalue()
    assert "words" not in file.getvalue()
    assert "cause" in file.getvalue()


def test_whatever_hotport_says_of_connections_is_told() -> None:
    words, file = terminal(200)
    print_result(results.clean(), words)
    assert "connections: 1,200 moved, 1 of which nobody knows yet, 14 told to close" in file.getvalue()


def test_chart_has_a_colour_for_everybody_who_answers() -> None:
    result = results.quiet()
    for number, bucket in enumerate(result.buckets):
        bucket.answered_by = {f"generation {1 + number // 20}": 5}
    words = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    words.print(played(result, words).picture())
    said = words.file.getvalue()  # type: ignore[attr-defined]
    assert "generation 2" in said
    assert "\x1b[36m" in said  # cyan
    assert "\x1b[35m" in said  # magenta


def test_picture_of_nothing_yet_is_a_picture() -> None:
    words, file = terminal()
    words.print(Screen(words, expected_s=1.0, bucket_ms=100).picture())
    assert "0 of 1 s" in file.getvalue()


def test_lines_take_the_place_of_the_picture_without_a_terminal() -> None:
    words, file = terminal(200, is_one=False)
    screen = played(results.lossy(), words)
    asyncio.run(asyncio.wait_for(screen.draw(), 1))
    lines = file.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[0] == "   2.4 s  restart 1: hotport restart svc; under way"
    assert lines[2].startswith("   5.0 s  2,7")
    assert "; lost 235 (212 refused, " in lines[2]
    assert lines[5] == "   7.4 s  restart 2: hotport restart svc; aborted in 360 ms: HP403 not ready within 30 s"


def test_lines_warn_of_lag_as_well() -> None:
    result = results.build(duration_ms=5000, restarts=[], accept_gap_ms=[])
    for bucket in result.buckets:
        bucket.lag = {600: 1}
    words, file = terminal(200, is_one=False)
    played(result, words)
    assert "OWN LAG" in file.getvalue()


def test_chart_stays_when_the_picture_goes() -> None:
    words, file = terminal()
    screen = played(results.clean(), words)

    async def draw() -> None:
        drawing = asyncio.create_task(screen.draw())
        await asyncio.sleep(0)
        drawing.cancel()
        await asyncio.wait([drawing])

    asyncio.run(draw())
    assert file.getvalue().rstrip().endswith("attempts that ended, coloured by who answered, red where some were lost")


@pytest.mark.parametrize("build", EVERY)
def test_verdict_is_the_last_line(build: Callable[[], Result]) -> None:
    words, file = terminal(2000)
    result = build()
    print_result(result, words)
    assert file.getvalue().rstrip().endswith(f"{sentences(result)[0]}.")
    for name, count in losses_of(result.totals).items():
        assert any(
            line.split()[: len(name.split()) + 1] == [*name.split(), f"{count:,}"]
            for line in file.getvalue().splitlines()
        )


def test_long_runs_have_more_answerers_than_anybody_reads() -> None:
    result = results.quiet()
    for number, bucket in enumerate(result.buckets):
        bucket.answered_by = {f"generation {number}": 5}
    words, file = terminal()
    print_result(result, words)
    said = file.getvalue()
    assert "and 28 more in between" in said
    assert "generation 20" not in said
    assert "generation 39" in said


def test_json_is_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    result = results.lossy()
    write_json(result)
    assert msgspec.json.decode(capsys.readouterr().out, type=Result) == result
