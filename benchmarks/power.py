"""What one engine of ``hotport churn`` can do before it would measure itself.

An engine process has one core, HAProxy with one thread, which answers by itself, has another. An engine is to be
believed while attempts begin less than 5 ms late at p99 through no fault of the target's. The processor time of an
attempt is measured as well, because others who use the machine change it less; it still grows when the other core,
which may be the other half of this one, is busy. With --first both run before everything else (SCHED_FIFO), which a
machine that is shared with others needs.

Sources: sched(7).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Samples, arguments, cpu_s, pinned, save, show
from hotport.churn.histogram import Histogram
from hotport.churn.plan import Begin, Plan, Said, Summary, Tick
from hotport.churn.result import Load, Target
from hotport.churn.run import ENGINE
from hotport.churn.verdict import LAG_P99_US_MAX, attempts_of, losses_of

PATH: Final = f"{os.environ['PATH']}:/usr/sbin"

HAPROXY: Final = """\
global
  maxconn 15000
  no strict-limits
  nbthread 1
defaults
  mode http
  timeout client 60s
  timeout http-keep-alive 60s
frontend static
  bind fd@{fd}
  http-request return status 200 content-type text/plain string "Hello, world!"
"""


class Case(NamedTuple):
    """A load, and what it has to come to."""

    load: Load
    unit: str
    at_least: float


CASES: Final = {
    "new connections": Case(Load("connect", rate=5100.0), "attempts/s", 5000.0),
    "keep-alive requests": Case(Load("keepalive", count=1000, think_ms=48.0), "attempts/s", 20_000.0),
    "held connections": Case(Load("keepalive", count=10_000, think_ms=10_000.0), "connections", 10_000.0),
}


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="power.json", rounds=5)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement [default: 12]")
    parser.add_argument("--first", action="store_true", help="run before everything else on this machine")
    options = parser.parse_args()
    if shutil.which("haproxy", path=PATH) is None:
        print("haproxy is not installed: make debian")
        return 1

    samples: dict[str, Samples] = {}
    for number in range(options.rounds):
        for name, case in CASES.items():
            with _target(first=options.first) as port:
                found = _measure(port, case.load, seconds=options.seconds, seed=number, first=options.first)
            for what, value in found.items():
                samples.setdefault(f"{name}: {what}", Samples()).append(value)
    show(f"{options.rounds} rounds of {options.seconds:g} s", samples)
    goals = []
    for name, case in CASES.items():
        lag = samples[f"{name}: lag p99 ms"]
        best = lag.index(min(lag))
        goals.append(Goal(f"{name}, {case.unit}", samples[f"{name}: {case.unit}"][best], at_least=case.at_least))
        goals.append(Goal(f"{name}, own lag p99 in ms then, the best round", lag[best], at_most=LAG_P99_US_MAX / 1000))
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=goals,
        seconds=options.seconds,
        first=options.first,
    )
    return 0


def _measure(port: int, load: Load, *, seconds: float, seed: int, first: bool) -> dict[str, float]:
    """One engine's run.

    Raises:
        RuntimeError: Something was lost, or this machine has no room: such a number would mean nothing.
    """
    url = f"http://127.0.0.1:{port}"
    plan = Plan(
        target=Target(url, "127.0.0.1", port, is_http=True, is_tls=False, address="127.0.0.1"),
        loads=[load],
        seed=seed,
        begin_ns=0,
        duration_ms=seconds * 1000,
    )
    decoder, ticks = msgspec.json.Decoder(Said), list[Tick]()
    with (
        _started(ENGINE, core=0, first=first, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine,
        pinned(1),
    ):
        assert engine.stdin is not None
        assert engine.stdout is not None
        engine.stdin.write(msgspec.json.encode(plan) + b"\n")
        engine.stdin.flush()
        engine.stdout.readline()  # it is armed
        before_s = cpu_s(engine.pid)
        engine.stdin.write(msgspec.json.encode(Begin(time.monotonic_ns() + 100_000_000)) + b"\n")
        engine.stdin.flush()
        while isinstance(said := decoder.decode(engine.stdout.readline()), Tick):
            ticks.append(said)
        used_s = cpu_s(engine.pid) - before_s
    assert isinstance(said, Summary)
    losses = [losses_of(tick.bucket.fates) for tick in ticks]
    if said.error or said.own_limits or any(losses):
        raise RuntimeError(f"{load.kind}: {said.error}, {said.own_limits}, {next(filter(None, losses), {})}")
    lag, latency = Histogram(said.lag), Histogram()
    for tick in ticks:
        latency.merge(tick.bucket.latency.get(load.kind, {}))
    counts = [attempts_of(tick.bucket.fates) for tick in ticks]
    half = [
        count for tick, count in zip(ticks, counts, strict=True) if seconds / 2 <= tick.bucket.at_ms / 1000 < seconds
    ]
    return {
        "attempts/s": sum(half) / len(half) / plan.bucket_ms * 1000,  # of the second half: every connection is made
        "connections": max(tick.bucket.connections for tick in ticks),
        "lag p50 ms": lag.percentile(0.5) / 1000,
        "lag p99 ms": lag.percentile(0.99) / 1000,
        "lag max ms": lag.maximum / 1000,
        "latency p50 ms": latency.percentile(0.5) / 1000,
        "latency p99 ms": latency.percentile(0.99) / 1000,
        "engine's CPU us/attempt": used_s / sum(counts) * 1e6,
        "load average": os.getloadavg()[0],
    }


@contextmanager
def _target(*, first: bool) -> Iterator[int]:
    """HAProxy; its port."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=4096) as listener,
        tempfile.NamedTemporaryFile("w", prefix="hotport-bench-", suffix=".cfg") as config,
    ):
        config.write(HAPROXY.format(fd=listener.fileno()))
        config.flush()
        haproxy = ("haproxy", "-q", "-f", config.name)
        environment = {**os.environ, "PATH": PATH}
        with _started(haproxy, core=1, first=first, pass_fds=[listener.fileno()], env=environment) as process:
            try:
                yield int(listener.getsockname()[1])
            finally:
                process.terminate()


@contextmanager
def _started(command: Sequence[str], *, core: int, first: bool, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process on one core, for as long as the block lasts."""
    with pinned(core):
        process = subprocess.Popen(command, **options)
    with process:
        try:
            if first:
                os.sched_setscheduler(process.pid, os.SCHED_FIFO, os.sched_param(1))
            yield process
        except BaseException:
            process.kill()
            raise


if __name__ == "__main__":
    sys.exit(main())
