"""Print data to stdout, messages to stderr, colour only on terminals that want it."""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import IO, Any, Final

import msgspec
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hotport.cli import is_terminal
from hotport.errors import ConfigError, ExitCode, describe_errno, visible
from hotport.model.strategies import GUARANTEES, Strategy
from hotport.wire.messages import Report, Status, TlsReport, WorkerStatus

__all__ = [
    "console",
    "output_error",
    "print_json",
    "print_report",
    "print_status",
    "print_strategies",
    "print_tls_report",
    "status_parts",
    "swallow",
    "waiting",
    "write",
]

#: Columns for every table that is printed here.
WIDE: Final = 200

_TAKES_NO_MORE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


class _Console(Console):
    """A console that escapes control characters, and survives readers that leave.

    ``hotport restart | head -1`` has the restart's outcome all the same.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    def on_broken_pipe(self) -> None:
        swallow(self.file)


def swallow(stream: IO[str]) -> None:
    """Redirect a stream to /dev/null; its buffered rest would fail again at exit."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def console(*, stderr: bool = False) -> Console:
    """Make a rich console that respects ``NO_COLOR`` and whether it is a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if is_terminal(stream) else WIDE  # rich takes 80 where nobody says, and cuts tables
    plain = bool(os.environ.get("NO_COLOR"))
    return _Console(stderr=stderr, no_color=plain, highlight=False, soft_wrap=True, width=width)


def output_error(error: OSError) -> int:
    """Report that the output could not be printed (HP336), if that is the error; return the exit code.

    Raises:
        OSError: The same, if it is another.
    """
    if error.errno not in _TAKES_NO_MORE or error.filename is not None:
        raise error
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            swallow(stream)
    problem = ConfigError(
        "HP336",
        "cannot print the output",
        cause=f"stdout or stderr: {describe_errno(error.errno)}",
        fix="df -h",
        note="or send the output elsewhere",
    )
    with suppress(OSError):  # stderr may be what takes no more
        console(stderr=True).out(problem, highlight=False)
    return problem.exit_code


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """End the command when it is interrupted in the block; the supervisor continues what it waits for."""
    try:
        yield
    except KeyboardInterrupt:
        console(stderr=True).print(f"not waiting any longer; the {what} continues: hotport status")
        raise SystemExit(ExitCode.INTERRUPTED) from None


def write(text: str) -> None:
    """Write lines of data to stdout."""
    console().out(text, highlight=False)


def print_json(value: Any) -> None:
    """Print a message, or anything that msgspec encodes, as JSON on stdout."""
    write(msgspec.json.format(msgspec.json.encode(value)).decode())


def print_report(report: Report) -> None:
    """Print one restart, for people: the most important line last."""
    out = console()
    if report.error and report.outcome:
        out.print(report.error, markup=False)
        out.print()
    for batch, phases in groupby(report.phases, key=lambda phase: phase.batch):
        heading = "phases" if batch == 1 else ""
        times = "  ".join(f"{phase.name} {phase.ms:.0f} ms" for phase in phases)
        out.print(f"{heading:13}{times}", markup=False)
    out.print(f"accept gap   {report.accept_gap_ms:g} ms")
    out.print(f"connections  {_fates(report)}")
    if report.connections_back is not None:
        out.print(f"and back     {_counts(report.connections_back)}")
    out.print(f"queue        {f'was full: {report.dropped} dropped' if report.dropped else 'no overflow'}")
    out.print(f"processor    {report.start_cpu_s:.1f} s to start")
    if report.rebind_gap_us is not None:
        out.print(
            f"{report.strategy:13}not listening for {report.rebind_gap_us:g} us; {report.refused} refused (counted "
            f"in the whole network namespace), {report.reset} reset"
        )
    elif report.strategy != "inherit":
        out.print(f"strategy     {report.strategy}")
    if not report.outcome:
        out.print(f"[red]not over[/]: generation {report.generation} of {report.service}, as far as is known")
    elif report.outcome == "done":
        out.print(f"[green]done[/]: generation {report.generation} of {report.service} serves")
    else:
        serves = f"generation {report.serving} of {report.service} serves on" if report.serving else "no worker serves"
        out.print(f"[red]{report.outcome}[/]: {serves}")


def _fates(report: Report) -> str:
    if report.outcome == "aborted":
        return "the old generation keeps them"
    if report.connections is None:
        return "not counted: the program keeps its own"
    return _counts(report.connections)


def _counts(fates: dict[str, int]) -> str:
    return ", ".join(f"{count} {fate.replace('_', ' ')}" for fate, count in sorted(fates.items())) or "none were open"


def print_status(status: Status) -> None:
    """Print a service and its workers, for people."""
    out = console()
    out.width = max(out.width, WIDE)  # a terminal that is narrower folds lines, where rich would cut words
    for part in status_parts(status):
        out.print(part)


def status_parts(status: Status) -> Iterator[Text | Table]:
    """Describe a service and its workers, in lines and a table."""
    return (Text(part) if isinstance(part, str) else part for part in _status_parts(status))


def _status_parts(status: Status) -> Iterator[str | Table]:
    restarting = f", restarting into generation {status.restarting}" if status.restarting else ""
    is_served = any(worker.phase == "serving" for worker in status.workers)
    serves = f"generation {status.generation} serves" if is_served else "NO WORKER serves"
    leaving = _leaving(status)
    yield f"{status.service}: {serves} {status.target} on {', '.join(status.addresses)}{restarting}{leaving}"
    if status.watch is not None:
        what = "its canary bakes" if status.watch.step == "baking" else "it is watched"
        yield (
            f"generation {status.watch.generation}: {what} for {status.watch.left_s:.0f} s more; "
            f"hotport undo {status.service} takes it back"
        )
    yield f"supervisor pid {status.pid}, {_mib(status.rss_bytes)}, up {_age(status.age_s)}, hotport {status.version}"
    if status.status_address:
        yield f"status port {status.status_address}"
    yield f"strategy {status.strategy} ({status.strategy_why})"
    for address, who in status.lost.items():
        yield f"LOST {address}: {who}; binding it again is being tried"
    for address, why in status.gone.items():
        yield f"GONE {address}: its socket file was removed or replaced; {why or 'see the log'}"
    serving = [each for each in status.workers if each.phase == "serving" and each.generation == status.generation]
    total = sum(each.connections or 0 for each in serving) if len(serving) > 1 else 0
    columns: tuple[tuple[str, JustifyMethod, Callable[[WorkerStatus], str | Text]], ...] = (
        ("generation", "right", lambda each: str(each.generation)),
        ("worker", "right", lambda each: str(each.worker)),
        ("pid", "right", lambda each: str(each.pid)),
        ("phase", "left", lambda each: each.phase),
        ("age", "right", lambda each: _age(each.age_s)),
        ("connections", "right", lambda each: _share(each.connections, total if each in serving else 0)),
        ("requests", "right", lambda each: _number(each.requests)),
        ("memory", "right", lambda each: _mib(each.rss_bytes or 0)),
        ("lag", "right", lambda each: _lag(each.lag_s)),
        ("status", "left", lambda each: Text(visible(_condition(each)))),
    )
    table = Table(box=None, pad_edge=False)
    for heading, justify, _ in columns:
        table.add_column(heading, justify=justify)
    for worker in status.workers:
        table.add_row(*(cell(worker) for _, _, cell in columns))
    yield table
    for who, lines in _log_dropped(status):
        yield f"{who} has dropped {lines:,} lines of its log: they are not read, or there is no room"
    for worker in status.workers:
        if worker.timeouts:
            yield f"worker {worker.worker} has cancelled {worker.timeouts:,} requests by request_timeout"
        for each in worker.lingering:
            yield f"worker {worker.worker} waits for {each.peer}: {each.kind}, {_age(each.age_s)} old, {each.why}"


def _log_dropped(status: Status) -> Iterator[tuple[str, int]]:
    if status.log_dropped:
        yield "the supervisor", status.log_dropped
    for worker in status.workers:
        if worker.log_dropped:
            yield f"worker {worker.worker}", worker.log_dropped


def _leaving(status: Status) -> str:
    if status.lame_duck_left_s is not None:
        return f"; lame duck, stops in {_age(status.lame_duck_left_s)}"
    return "; stopping" if status.stage == "stopping" else ""


def print_strategies(obstacles: Mapping[str, str], chosen: str) -> None:
    """Print what each strategy promises, and whether it can work here.

    Args:
        obstacles: Why a strategy cannot work, by its name; empty if it can.
        chosen: The one that a restart takes.
    """
    out = console()
    table = Table(box=None, pad_edge=False)
    for heading in ("strategy", "refused", "reset", "rebind gap", "here"):
        table.add_column(heading, overflow="fold")
    for name, obstacle in obstacles.items():
        promise = GUARANTEES[Strategy(name)]
        here = f"cannot: {obstacle}" if obstacle else "can; restarts take it" if name == chosen else "can"
        table.add_row(name, *(Text(text) for text in (promise.refused, promise.reset, promise.gap, here)))
    out.print(table)


def print_tls_report(report: TlsReport) -> None:
    """Print the outcome of reloading certificates, for people: the most important line last."""
    out = console()
    for worker in report.workers:
        if worker.error:
            out.print(f"worker {worker.worker} of generation {worker.generation}, pid {worker.pid}:", markup=False)
            out.print(worker.error, markup=False)
    counts = Counter(worker.outcome for worker in report.workers)
    words = {"reloaded": "have read them", "starting": "read them as they start", "kept": "keep what they had"}
    told = ", ".join(f"{counts[outcome]} {said}" for outcome, said in words.items() if counts[outcome])
    begin = "[red]not renewed everywhere[/]" if counts["kept"] else "[green]renewed[/]"
    out.print(f"{begin}: certificates of {report.service}; workers: {told or 'none'}")


def _share(connections: int | None, total: int) -> str:
    """How many of all that are open, and which part of them, if there are others that have some."""
    return f"{connections} ({connections / total:.0%})" if total and connections is not None else _number(connections)


def _condition(worker: WorkerStatus) -> str:
    """What a worker says of itself, unless it hangs, or is stopped."""
    if worker.is_stopped:
        return f"stopped by a signal or a debugger: kill -CONT {worker.pid}"
    if worker.hung_s is not None:
        return f"hung {_age(worker.hung_s)}" + (f" at {worker.hung_at}" if worker.hung_at else "")
    return worker.status


def _lag(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
