"""What `hotport demo` shows: a live picture on a terminal, a line for each restart elsewhere, and a summary."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from hotport.cli._load import KINDS, Seen
from hotport.cli.output import console
from hotport.wire.messages import Progress, Report

__all__ = ["CHART_COLUMNS_MAX", "Screen", "bars", "describe_kinds", "facts_table", "print_summary"]

TICK_S: Final = 0.2
CHART_ROWS: Final = 4
CHART_COLUMNS_MAX: Final = 74
BLOCKS: Final = " ▁▂▃▄▅▆▇█"
COLOURS: Final = ("cyan", "magenta", "yellow", "green", "blue")

#: Lines of "answered by" in the summary; a long demo has more versions than anybody reads.
ANSWERED_BY_MAX: Final = 12

#: What has been reached, and what is going on then.
STEPS: Final = {
    "restart.began": ("", "starting workers"),
    "restart.ready": ("ready", "committing"),
    "restart.committed": ("commit", "settling"),
    "restart.draining": ("settled", "draining the old workers"),
}


class _Tick(NamedTuple):
    """What clients saw in `TICK_S` seconds."""

    requests: int
    version: str
    has_failed: bool


class Screen:
    """Draws what `seen` says until its `draw` is cancelled.

    Args:
        words: Where to; without a terminal there is no picture.
        restarts: How many there will be.
    """

    def __init__(self, words: Console, seen: Seen, *, restarts: int) -> None:
        self._words = words
        self._seen = seen
        self._restarts = restarts
        self._ticks: list[_Tick] = []
        self._requests = self._failed = 0
        self._answers: Counter[tuple[str, int]] = Counter()
        self._number = 0
        self._reached: list[str] = []
        self._doing = ""
        self._spinner = Spinner("dots")

    async def draw(self) -> None:
        """Keep the picture true; on a terminal the chart stays when this is cancelled."""
        if not self._words.is_terminal:
            return
        try:
            with Live(console=self._words, auto_refresh=False, transient=True) as live:
                while True:
                    await asyncio.sleep(TICK_S)
                    self._tick()
                    live.update(self._picture(), refresh=True)
        finally:
            self._words.print(Group(*self._chart()))

    def restart_began(self, number: int, version: str) -> None:
        """`version` is on disk now."""
        self._number = number
        self._reached, self._doing = [f"app.py is {version}"], "asking for a restart"

    def heard(self, progress: Progress) -> None:
        """The supervisor said what has become true."""
        if progress.event in STEPS:
            reached, self._doing = STEPS[progress.event]
            if reached:
                self._reached.append(f"{reached} {_milliseconds(progress.ms)}")

    def restart_ended(self, number: int, version: str, report: Report | None, failed: int) -> None:
        """One line that stays."""
        self._doing = ""
        line = Text(f"  restart {number:<3}")
        line.append(f"{version:<4} ", style=_colour(version))
        if report is not None:
            names = {"committed": "commit", "retired": "drained"}
            phases = [f"{names.get(p.name, p.name)} {_milliseconds(p.ms)}" for p in report.phases if p.name in SHOWN]
            line.append("  ".join(phases), style="dim")
        if report is None:
            line.append(" had no outcome", style="red")
        elif report.outcome != "done":
            line.append("; the old code serves on", style="red")
        line.append(f"  {failed:,} failed", style="bold red" if failed else "green")
        self._words.print(line)

    def _tick(self) -> None:
        seen = self._seen
        since = seen.answers - self._answers
        version = max(since, key=lambda key: since[key])[0] if since else ""
        self._ticks.append(_Tick(seen.requests - self._requests, version, seen.failed > self._failed))
        self._requests, self._failed, self._answers = seen.requests, seen.failed, seen.answers.copy()

    def _picture(self) -> RenderableType:
        seen = self._seen
        recent = self._ticks[-5:]
        rate = sum(tick.requests for tick in recent) / (len(recent) * TICK_S)
        facts = facts_table()
        facts.add_row("requests", f"{seen.requests:,}", f"{rate:,.0f}/s")
        failed = Text(f"{seen.failed:,}", style="red" if seen.failed else "green")
        facts.add_row("failures", failed, Text(describe_kinds(seen.failures), style="red"))
        versions = dict.fromkeys(tick.version for tick in self._ticks[-3:] if tick.version)
        answering = Text(" ").join(Text(version, style=f"bold {_colour(version)}") for version in versions)
        facts.add_row("answering", answering, Text(""))
        facts.add_row("restart", f"{self._number} of {self._restarts}", self._progress())
        return Group(*self._chart(), facts)

    def _progress(self) -> RenderableType:
        if not self._doing:
            return Text("steady load", style="dim")
        text = Text()
        for reached in self._reached:
            text.append("✓ ", style="green").append(f"{reached}  ")
        self._spinner.update(text=self._doing)
        line = Table.grid()
        line.add_row(text, self._spinner)
        return line

    def _chart(self) -> list[Text]:
        """The whole run: requests as columns, coloured by the version that answered; red where something failed."""
        columns = list(_columns(self._ticks, min(CHART_COLUMNS_MAX, self._words.width - 4)))
        styled = [(each.requests, "red" if each.has_failed else _colour(each.version)) for each in columns]
        words = Text("  requests answered, coloured by the version of the code that did", style="dim")
        return [Text(), *bars(styled), words, Text()]


def bars(columns: Sequence[tuple[float, str]], rows: int = CHART_ROWS) -> list[Text]:
    """Columns of a height and a colour, the highest one as high as there are rows."""
    top = max((height for height, _ in columns), default=0) or 1
    lines = []
    for row in reversed(range(rows)):
        line = Text("  ")
        for height, style in columns:
            level = round(height / top * rows * 8) - row * 8
            line.append(BLOCKS[min(8, max(0, level))], style=style)
        lines.append(line)
    return lines


def _columns(ticks: Sequence[_Tick], width: int) -> Iterator[_Tick]:
    """As many ticks in a column as it takes for all of them to find room; requests are their mean."""
    size = math.ceil(len(ticks) / width)
    for start in range(0, len(ticks), size or 1):
        some = ticks[start : start + size]
        mean = sum(tick.requests for tick in some) // len(some)
        yield _Tick(mean, some[-1].version, any(tick.has_failed for tick in some))


#: Of the phases in a report, those that fit on a line.
SHOWN: Final = frozenset({"ready", "committed", "retired", "aborted"})


def print_summary(result: Mapping[str, Any], error: str) -> None:
    """What clients saw, on stdout; the verdict comes last."""
    out = console()
    latency, crossed, failures = result["latency_ms"], result["crossed"], result["failures"]
    rate = result["requests"] / result["duration_s"] if result["duration_s"] else 0.0
    facts = facts_table()
    facts.add_row("requests", f"{result['requests']:,}", f"in {result['duration_s']:.1f} s, {rate:,.0f}/s")
    style = "red" if result["failed"] else "green"
    for index, kinds in enumerate((KINDS[:3], [*KINDS[3:], *(kind for kind in failures if kind not in KINDS)])):
        words = ", ".join(f"{failures.get(kind, 0):,} {kind}" for kind in kinds)
        facts.add_row("" if index else "failures", Text("" if index else f"{result['failed']:,}", style=style), words)
    facts.add_row(
        "slowest",
        f"{latency['slowest']:,.0f} ms",
        f"median {latency['median']:.1f} ms, p99 {latency['p99']:.1f} ms",
    )
    facts.add_row("reconnects", f"{result['asked_to_reconnect']:,}", "asked for in an answer, by Connection: close")
    facts.add_row("across", f"{crossed.get('late', 0):,}", "connected before a restart, sent a request after it")
    facts.add_row("", f"{crossed.get('half', 0):,}", "had sent half a request head")
    facts.add_row("", f"{crossed.get('slow', 0):,}", "were reading a two-second answer, and got all of it")
    answers: Sequence[Any] = result["answers"]
    for index, answer in enumerate(answers):
        if len(answers) > ANSWERED_BY_MAX and ANSWERED_BY_MAX // 2 <= index < len(answers) - ANSWERED_BY_MAX // 2:
            continue
        version = Text(answer["version"], style=_colour(answer["version"]))
        version.append(f", generation {answer['generation']}", style="dim")
        facts.add_row("" if index else "answered by", f"{answer['requests']:,}", version)
    if len(answers) > ANSWERED_BY_MAX:
        facts.add_row("", "...", f"and {len(answers) - ANSWERED_BY_MAX:,} more in between")
    out.print(facts)
    if error:
        out.print(f"\n{error}", markup=False, style="red")
    good = result["exit_code"] == 0
    out.print(f"\n{result['verdict']}", style="bold green" if good else "bold red", markup=False)


def describe_kinds(failures: Mapping[str, int]) -> str:
    """``3 reset, 1 timed out``; empty if there is none."""
    return ", ".join(f"{number:,} {kind}" for kind, number in failures.items() if number)


def facts_table() -> Table:
    """Rows of a name, a number and words about it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=11)
    table.add_column(justify="right", style="bold", min_width=8, no_wrap=True)
    table.add_column()
    table.pad_edge = True
    return table


def _milliseconds(ms: float) -> str:
    return f"{ms:,.0f} ms"


def _colour(version: str) -> str:
    number = version.removeprefix("v")
    return COLOURS[int(number) % len(COLOURS)] if number.isdigit() else "white"
