"""``hotport status --watch``: a service in a terminal, as it changes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hotport.cli._bars import bars
from hotport.cli.output import status_parts
from hotport.errors import ControlError
from hotport.wire.messages import Status
from hotport.wire.recording import Recording, Span, current_step, phase_spans

__all__ = ["Top", "watch"]

#: Seconds between two questions, and how many answers are drawn.
INTERVAL_S: Final = 1.0
POINTS_MAX: Final = 600

#: Restarts and mishaps that are shown; the newest restart with its workers, of which so many.
RESTARTS_SHOWN: Final = 4
MISHAPS_SHOWN: Final = 4
LANES_SHOWN: Final = 8

#: Columns of charts and lanes at most, and what stands to their left and right.
COLUMNS_MAX: Final = 100
MARGIN: Final = 16

#: Of what a worker does, and of steps by turns.
STYLES: Final = {
    "starting": "bright_black",
    "opening": "yellow",
    "accepting": "green",
    "draining": "dark_orange3",
    "moving": "bright_blue",
    "ending": "grey50",
    "lost": "red",
}
STEP_STYLES: Final = ("cyan", "magenta")


class Point(msgspec.Struct, frozen=True):
    """Figures at one time: connections, and requests per second since the last one."""

    connections: int
    requests: float


class Top:
    """Draws a service from what was heard of it."""

    def __init__(self) -> None:
        self._status: Status | None = None
        self._recordings: Sequence[Recording] = ()
        self._points: deque[Point] = deque(maxlen=POINTS_MAX)
        self._requests: dict[int, int] = {}
        self._at_s = 0.0
        self.silence = ""

    def hear(self, status: Status, recordings: Sequence[Recording], now_s: float) -> None:
        """Take an answer, and the restarts that are recorded."""
        requests = {each.pid: each.requests for each in status.workers if each.requests is not None}
        # Of workers that are new since the last answer, everything is new.
        new = sum(max(0, count - self._requests.get(pid, 0)) for pid, count in requests.items())
        rate = new / max(now_s - self._at_s, 0.001) if self._status is not None else 0.0
        self._points.append(Point(sum(each.connections or 0 for each in status.workers), rate))
        self._requests |= requests
        for pid in self._requests.keys() - {each.pid for each in status.workers}:
            del self._requests[pid]
        self._status, self._recordings, self._at_s, self.silence = status, recordings, now_s, ""

    def line(self) -> str:
        """Render the state in one line."""
        status = self._status
        if status is None or self.silence:
            return self.silence
        lags = [each.lag_s for each in status.workers if each.lag_s is not None]
        point = self._points[-1]
        restarting = f", restarting into {status.restarting}" if status.restarting else ""
        return (
            f"{status.service}: {status.stage}, generation {status.generation}{restarting}; "
            f"{point.connections:,} connections, {point.requests:,.0f} requests/s, "
            f"{sum(status.queues.values()):,} waiting, lag {max(lags, default=0.0) * 1000:.0f} ms"
        )

    def picture(self, width: int, now: float) -> RenderableType:
        """Render the state; `now` is on the clock on the wall."""
        parts: list[RenderableType] = []
        if self.silence:
            parts.append(Text(self.silence, style="bold yellow"))
        if self._status is None:
            return Group(*parts)
        columns = max(10, min(COLUMNS_MAX, width - MARGIN))
        parts += [*status_parts(self._status), Text(), *self._charts(columns)]
        if self._recordings:
            parts += [Text(), *self._restarts(columns, now)]
        if self._status.mishaps:
            parts.append(Text())
        for each in self._status.mishaps[-MISHAPS_SHOWN:]:
            at = time.strftime("%H:%M:%S", time.localtime(each.at))
            who = f"worker {each.worker}" if each.worker else f"generation {each.generation}"
            parts.append(Text.assemble((f"{at}  {each.event}", "red"), f"  {who}: {each.why}"))
        return Group(*parts)

    def _charts(self, columns: int) -> list[RenderableType]:
        points = list(self._points)[-columns:]
        waiting = sum(self._status.queues.values()) if self._status is not None else 0
        last = points[-1]
        said = Text.assemble(
            ("  connections ", "dim"), f"{last.connections:,}", ("   requests/s ", "dim"), f"{last.requests:,.0f}",
            ("   waiting in the accept queue ", "dim"), (f"{waiting:,}", "red" if waiting else ""),
        )  # fmt: skip
        charts = Table.grid(padding=(0, 1))
        for name, values in (
            ("connections", [float(each.connections) for each in points]),
            ("requests/s", [each.requests for each in points]),
        ):
            charts.add_row(Group(*bars([(value, "cyan") for value in values], rows=2)), Text(f"\n{name}", style="dim"))
        return [said, charts]

    def _restarts(self, columns: int, now: float) -> list[RenderableType]:
        rows: list[RenderableType] = []
        for number, each in enumerate(reversed(self._recordings[-RESTARTS_SHOWN:])):
            report = each.report
            is_going = not report.outcome and self._status is not None and self._status.restarting == report.generation
            steps = list(phase_spans(report))
            outcome = report.outcome or (current_step(report) if is_going else "not known: its supervisor was killed")
            style = {"done": "green"}.get(report.outcome, "yellow" if is_going else "red")
            counts = ", ".join(
                f"{many:,} {fate.replace('_', ' ')}" for fate, many in (report.connections or {}).items()
            )
            took = f"{each.lasted_s:.2f} s" if steps else ""
            at = report.began_at.partition("T")[2].partition(".")[0]
            rows.append(
                Text.assemble(
                    (f"  {at} UTC  {report.previous} to {report.generation}  ", ""),
                    (outcome, style),
                    f"  {took}  {counts}",
                )
            )
            if not number and steps:
                rows += _lanes(each, steps, columns)
        return rows


def _lanes(recording: Recording, steps: Sequence[Span], columns: int) -> list[RenderableType]:
    """Draw the steps of a restart, and what its workers do meanwhile, on one axis of time."""
    whole_ms = max(steps[-1].at_ms + steps[-1].ms, 0.001)

    def column(ms: float) -> int:
        return min(columns, max(0, round(ms / whole_ms * columns)))

    def drawn(spans: Sequence[tuple[Span, str]]) -> Text:
        cells = [" "] * columns
        styles = [""] * columns
        for span, style in spans:
            begin = min(column(span.at_ms), columns - 1)
            for at in range(begin, max(begin + 1, column(span.at_ms + span.ms))):
                cells[at], styles[at] = "█", style
        text = Text()
        for cell, style in zip(cells, styles, strict=True):
            text.append(cell, style=style)
        return text

    table = Table.grid(padding=(0, 1))
    table.add_row("    steps", drawn([(step, STEP_STYLES[at % 2]) for at, step in enumerate(steps)]))
    words = Text(", ".join(f"{step.name} {step.ms:.0f} ms" for step in steps), style="dim")
    table.add_row("", words)
    for lane in recording.lanes[:LANES_SHOWN]:
        ordered = sorted(lane.spans, key=lambda span: span.name == "moving")
        spans = [(span, STYLES.get(span.name, "")) for span in ordered]
        table.add_row(f"    {lane.generation}.{lane.worker}", drawn(spans))
    key = Text("    ").join(Text.assemble(("█ ", style), name) for name, style in STYLES.items() if name != "lost")
    return [table, Text.assemble("             ", key)]


def watch(
    ask: Callable[[], Status],
    read: Callable[[], Sequence[Recording]],
    out: Console,
    pause: Callable[[float], object] = time.sleep,
) -> None:
    """Show a service until interrupted: on a terminal a picture, elsewhere a line for each answer.

    Args:
        ask: Asks for its state; a ControlError is shown, and it is asked again.
        read: Reads its recordings.
    """
    top = Top()

    def hear() -> None:
        try:
            top.hear(ask(), read(), time.monotonic())
        except ControlError as error:  # its supervisor is being replaced, or was killed: another may come
            top.silence = f"{error.what}: {error.cause}; trying again"

    try:
        if not out.is_terminal:
            while True:
                hear()
                out.print(top.line(), markup=False)
                pause(INTERVAL_S)
        with Live(console=out, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
            while True:
                hear()
                live.update(top.picture(out.width, time.time()), refresh=True)
                pause(INTERVAL_S)
    except KeyboardInterrupt:
        if out.is_terminal:
            out.print(top.picture(out.width, time.time()))
