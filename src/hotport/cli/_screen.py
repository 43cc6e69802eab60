"""The output of `hotport churn` and `hotport demo`: a chart on a terminal, lines elsewhere, tables at the end."""

from __future__ import annotations

import asyncio
import math
import signal
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

import msgspec
import uvloop
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hotport.churn.certainty import bounds, percent
from hotport.churn.fates import ConnectionEvent, Fate
from hotport.churn.histogram import Histogram
from hotport.churn.result import Bucket, RestartMark, Result
from hotport.churn.run import Experiment, Observer, run
from hotport.churn.verdict import (
    LAG_P99_US_MAX,
    MOMENT_MS,
    PERCENTILES,
    answered_by,
    attempts_of,
    count_of,
    counts_of,
    latency_by_phase,
    losses_by_restart,
    losses_of,
    milliseconds,
    named,
    named_connections,
    sentences,
    service_us,
)
from hotport.cli._bars import bars
from hotport.cli.output import write

__all__ = ["Screen", "perform", "print_result", "write_json"]

TICK_S: Final = 0.2
CHART_COLUMNS_MAX: Final = 74

#: Of who answers, by turns.
COLOURS: Final = ("cyan", "magenta", "yellow", "green", "blue")

#: Where there is no picture, a line tells how it goes this often.
LINE_MS: Final = 5000

#: Restarts that are told on the screen, and who answered in the tables; the page has all of them.
RESTARTS_SHOWN: Final = 3
ANSWERED_SHOWN: Final = 12
ANSWERING_SHOWN: Final = 3

#: With fewer columns there are fewer percentiles.
NARROW: Final = 72

_FATES: Final = tuple(what.value for what in (*Fate, *ConnectionEvent))


def perform(
    experiment: Experiment,
    words: Console,
    heading: str = "",
    on_restart: Callable[[RestartMark], None] = lambda mark: None,
) -> Result:
    """Run an experiment and show how it goes; SIGINT and SIGTERM end it early.

    Args:
        heading: Printed when signals can be sent.
        on_restart: Told each mark when it begins, before anything is restarted, and again when it has an outcome.
    """

    async def main() -> Result:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, stop.set)
        if heading:
            words.print(heading, markup=False)
        plan, restarts, settle_s = experiment.plan, experiment.restarts, experiment.settle_s
        expected_s = restarts.needs_s + settle_s if restarts and settle_s is not None else plan.duration_ms / 1000
        screen = Screen(words, expected_s=expected_s, bucket_ms=plan.bucket_ms)

        def tell(mark: RestartMark) -> None:
            on_restart(mark)
            screen.restart(mark)

        drawing = asyncio.create_task(screen.draw())
        try:
            return await run(experiment, Observer(screen.bucket, tell), stop)
        finally:
            drawing.cancel()
            await asyncio.wait([drawing])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


class Screen:
    """Draws the run until its `draw` is cancelled.

    Args:
        words: Where to; without a terminal there are lines instead of a picture.
        expected_s: How long the run lasts if no restart takes longer than it should.
        bucket_ms: How long each bucket is.
    """

    def __init__(self, words: Console, *, expected_s: float, bucket_ms: int) -> None:
        self._words = words
        self._expected_s = expected_s
        self._bucket_ms = bucket_ms
        self._totals: dict[str, dict[str, int]] = {}
        self._columns: list[tuple[int, str]] = []
        self._answerers: dict[str, str] = {}
        self._second: deque[Bucket] = deque(maxlen=max(1, 1000 // bucket_ms))
        self._marks: dict[int, RestartMark] = {}
        self._line_ms = LINE_MS

    async def draw(self) -> None:
        """Keep the chart up to date; on a terminal it stays when this is cancelled."""
        if not self._words.is_terminal:
            return
        try:
            with Live(console=self._words, auto_refresh=False, transient=True) as live:
                while True:
                    live.update(self.picture(), refresh=True)
                    await asyncio.sleep(TICK_S)
        finally:
            self._words.print(Group(*self._chart()))

    def bucket(self, bucket: Bucket) -> None:
        """Take a finished slice of the run."""
        for kind, found in bucket.fates.items():
            into = self._totals.setdefault(kind, {})
            for name, count in found.items():
                into[name] = into.get(name, 0) + count
        style = "red" if losses_of(bucket.fates) else self._style(bucket.answered_by)
        self._columns.append((attempts_of(bucket.fates), style))
        self._second.append(bucket)
        if not self._words.is_terminal and bucket.at_ms + self._bucket_ms >= self._line_ms:
            self._line_ms += LINE_MS
            self._words.print(self._line(), markup=False)

    def restart(self, mark: RestartMark) -> None:
        """Take a restart that has begun, or has an outcome."""
        self._marks[mark.number] = mark
        if not self._words.is_terminal:
            at_ms = mark.ended_ms if mark.ended_ms is not None else mark.began_ms
            self._words.print(
                f"{at_ms / 1000:6.1f} s  restart {mark.number}: {mark.how}; {_outcome(mark)}", markup=False
            )

    def picture(self) -> RenderableType:
        """Render the current state."""
        losses = losses_of(self._totals)
        facts = _facts_table()
        facts.add_row("attempts", f"{attempts_of(self._totals):,}", f"{self._rate():,.0f}/s, {self._time()}")
        facts.add_row("lost", Text(f"{sum(losses.values()):,}", style="red" if losses else "green"), "")
        for name, count in losses.items():
            kinds = ", ".join(f"{found[name]:,} {kind}" for kind, found in self._totals.items() if found.get(name))
            facts.add_row("", Text(f"{count:,}", style="red"), Text(f"{name}: {kinds}"))
        if late := counts_of(self._totals)[Fate.LATE.value]:
            facts.add_row("late", Text(f"{late:,}", style="yellow"), "")
        now = self._second[-1] if self._second else Bucket(0)
        facts.add_row("in flight", f"{now.in_flight:,}", f"{count_of(now.connections, 'connection')} open")
        if answering := self._answering():
            facts.add_row("answering", answering, "")
        latency = self._latency()
        p50, p99 = (milliseconds(latency.percentile(share)) if len(latency) else "-" for share in (0.5, 0.99))
        facts.add_row("p99", p99, f"p50 {p50}, of the last second")
        if len(lag := self._lag()):
            p99_us = lag.percentile(0.99)
            is_late = p99_us > LAG_P99_US_MAX
            warning = "p99; these clients are late themselves: less load, or more engines" if is_late else "p99"
            facts.add_row("own lag", Text(milliseconds(p99_us), style="bold red" if is_late else ""), warning)
        marks = [self._marks[number] for number in sorted(self._marks)]
        for mark in marks[-RESTARTS_SHOWN:]:
            facts.add_row("restart", str(mark.number), Text(_outcome(mark), style="red" if _is_bad(mark) else ""))
        return Group(*self._chart(), facts)

    def _chart(self) -> list[Text]:
        width = max(10, min(CHART_COLUMNS_MAX, self._words.width - 4))
        size = max(1, math.ceil(len(self._columns) / width))
        groups = [self._columns[start : start + size] for start in range(0, len(self._columns), size)]
        styled = [
            (
                sum(count for count, _ in group) / len(group),
                "red" if any(style == "red" for _, style in group) else group[-1][1],
            )
            for group in groups
        ]
        by_whom = ", coloured by who answered" if self._answerers else ""
        words = Text(f"  attempts that ended{by_whom}, red where some were lost", style="dim")
        return [Text(), *bars(styled), words, Text()]

    def _style(self, answered_by: dict[str, int]) -> str:
        """Return the style of the generation that answered most: each has a colour, in the order of appearance."""
        for name in answered_by:
            self._answerers.setdefault(name, COLOURS[len(self._answerers) % len(COLOURS)])
        return self._answerers[max(answered_by, key=lambda name: answered_by[name])] if answered_by else COLOURS[0]

    def _answering(self) -> Text:
        """List the generations that answered in the last second, the most frequent first."""
        counts: Counter[str] = Counter()
        for bucket in self._second:
            counts.update(bucket.answered_by)
        some = [Text(name, style=f"bold {self._answerers[name]}") for name, _ in counts.most_common(ANSWERING_SHOWN)]
        return Text("\n").join(some)

    def _line(self) -> str:
        losses, latency = losses_of(self._totals), self._latency()
        said = [
            f"{attempts_of(self._totals):,} attempts, {self._rate():,.0f}/s",
            f"lost {sum(losses.values()):,}" + (f" ({_lost(losses)})" if losses else ""),
            f"{self._second[-1].in_flight:,} in flight, {count_of(self._second[-1].connections, 'connection')}",
            f"p50 {milliseconds(latency.percentile(0.5))}, p99 {milliseconds(latency.percentile(0.99))}",
        ]
        if (p99_us := self._lag().percentile(0.99)) > LAG_P99_US_MAX:
            said.append(f"OWN LAG {milliseconds(p99_us)} at p99")
        return f"{(self._second[-1].at_ms + self._bucket_ms) / 1000:6.1f} s  {'; '.join(said)}"

    def _rate(self) -> float:
        attempts = sum(attempts_of(bucket.fates) for bucket in self._second)
        return attempts / (len(self._second) * self._bucket_ms / 1000) if self._second else 0.0

    def _time(self) -> str:
        done_s = (self._second[-1].at_ms + self._bucket_ms) / 1000 if self._second else 0.0
        return f"{done_s:.0f} of {self._expected_s:.0f} s" + (
            ", until restarts are over" if done_s > self._expected_s else ""
        )

    def _latency(self) -> Histogram:
        latency = Histogram()
        for bucket in self._second:
            for counts in bucket.latency.values():
                latency.merge(counts)
        return latency

    def _lag(self) -> Histogram:
        lag = Histogram()
        for bucket in self._second:
            lag.merge(bucket.lag)
        return lag


def _facts_table() -> Table:
    """Rows of a name, a number and words about it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=11)
    table.add_column(justify="right", style="bold", min_width=8, no_wrap=True)
    table.add_column()
    table.pad_edge = True
    return table


def print_result(result: Result, out: Console) -> None:
    """Print the result for people; the verdict comes last."""
    for table in (_fates(result, out.width), _latency(result, out.width), _facts(result)):
        out.print(table)
        out.print()
    first, *more = sentences(result)
    for line in more:
        out.print(f"{line}.", markup=False)
    verdict = result.verdict
    style = "bold yellow" if not verdict.is_valid else "bold green" if verdict.is_clean else "bold red"
    out.print(f"{first}.", markup=False, style=style)


def write_json(result: Result) -> None:
    """Write the result for programs to stdout."""
    write(msgspec.json.encode(result).decode())


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="right" if at else "left", no_wrap=True)
    return table


def _fates(result: Result, width: int) -> Table:
    """Fates and events as rows, kinds of client as columns; in words where there is no room for columns."""
    counts, losses = counts_of(result.totals), losses_of(result.totals)
    names = [name for name in _FATES if counts[name]]
    headings = ["attempts", "all", "95 %", *result.totals]
    is_wide = max(map(len, _FATES)) + sum(max(8, len(heading)) + 2 for heading in headings[1:]) <= width
    table = _table(*(headings if is_wide else headings[:3]))
    if not is_wide:
        table.add_column("", ratio=1)
    attempts = attempts_of(result.totals)
    for name in names:
        found = {kind: of_kind.get(name, 0) for kind, of_kind in result.totals.items()}
        style = "red" if name in losses else ""
        row = [Text(name, style=style), Text(f"{counts[name]:,}", style=f"bold {style}")]
        row.append(Text(_bounds(counts[name], attempts) if name in losses else "", style=style))
        if is_wide:
            row += [Text(f"{count:,}", style=style if count else "dim") for count in found.values()]
        else:
            row += [Text(", ".join(f"{count:,} {kind}" for kind, count in found.items() if count), style=style)]
        table.add_row(*row)
    if attempts:
        table.add_row("each other loss" if losses else "each loss", "0", _bounds(0, attempts), style="dim")
    return table


def _bounds(lost: int, attempts: int) -> str:
    low, high = bounds(lost, attempts)
    return f"{percent(low)} - {percent(high)}" if lost else f"< {percent(high)}"


def _latency(result: Result, width: int) -> Table:
    shares = PERCENTILES if width >= NARROW else {name: PERCENTILES[name] for name in ("p50", "p99")}
    table = _table("latency", "answers", *shares, "max")
    for name, histogram in latency_by_phase(result).items():
        if len(histogram):
            values = [milliseconds(histogram.percentile(share)) for share in shares.values()]
            table.add_row(name, f"{len(histogram):,}", *values, milliseconds(histogram.maximum))
    notes = [f"during: until {MOMENT_MS / 1000:g} s after the end of a restart"] if result.restarts else []
    if taken_off := service_us(result):
        notes.append(f"slow: without the {milliseconds(taken_off)} that its answers take by themselves")
    table.caption, table.caption_justify = "\n".join(notes) or None, "left"
    return table


def _facts(result: Result) -> Table:
    """List restarts and the losses after each, the generations that answered, and the engines' own lag."""
    facts = _facts_table()
    before, *lost = losses_by_restart(result)
    if result.restarts and before:
        facts.add_row("", "before", Text(f"lost {_lost(before)}", style="red"))
    for mark, gap, losses in zip(result.restarts, result.accept_gap_ms, lost, strict=True):
        words = Text(f"at {mark.began_ms / 1000:.1f} s, ")
        words.append(_outcome(mark), style="red" if _is_bad(mark) else "")
        if gap is not None:
            words.append(f", accept gap {gap:,.0f} ms")
        if losses:
            words.append(f", lost {_lost(losses)}", style="red")
        if told := named_connections(mark):
            words.append(f"; connections: {told}", style="dim")
        facts.add_row("restart", f"{mark.number}", words)
    if result.usual_gap_ms is not None and any(gap is not None for gap in result.accept_gap_ms):
        quiet = "" if result.quiet_gap_ms is None else f"{result.quiet_gap_ms:,.0f} ms"
        words = Text(f"accept gap without a restart; by chance {result.usual_gap_ms:,.0f} ms are to be expected")
        words.append(" at this rate of connections", style="dim")
        facts.add_row("undisturbed", quiet, words)
    found = list(answered_by(result.buckets).items())
    half = ANSWERED_SHOWN // 2
    for name, count in found if len(found) <= ANSWERED_SHOWN else found[:half]:
        facts.add_row("answered by", f"{count:,}", Text(name))
    if len(found) > ANSWERED_SHOWN:
        facts.add_row("", "...", f"and {len(found) - 2 * half:,} more in between")
        for name, count in found[-half:]:
            facts.add_row("answered by", f"{count:,}", Text(name))
    lag = result.lag
    facts.add_row(
        "own lag", milliseconds(lag.p99), f"p99; p50 {milliseconds(lag.p50)}, max {milliseconds(lag.maximum)}"
    )
    for name, count in result.own_limits.items():
        facts.add_row("own limit", f"{count:,}", Text(f"{name}: attempts that this machine did not let begin"))
    return facts


def _lost(losses: dict[str, int]) -> str:
    return ", ".join(named(count, name) for name, count in losses.items())


def _is_bad(mark: RestartMark) -> bool:
    return mark.outcome not in ("", "done", "sent")


def _outcome(mark: RestartMark) -> str:
    if not mark.outcome:
        return "under way"
    took = f" in {mark.ended_ms - mark.began_ms:,.0f} ms" if mark.ended_ms is not None else ""
    detail = mark.detail.rpartition("\n")[2] if mark.outcome == "done" else mark.detail  # all of a mishap is told
    return f"{mark.outcome}{took}" + (f": {detail}" if detail else "")
