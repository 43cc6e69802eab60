"""What the benchmarks share: pinned servers, wrk, statistics, and where a result was measured."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any, Final

from hotport.churn.machine import machine as machine_with
from hotport.kernel.process import cpu_s
from tests.support import Service

for variable in ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"):
    os.environ.pop(variable, None)  # what is timed must not be traced

__all__ = [
    "HELLO",
    "Goal",
    "Samples",
    "arguments",
    "client",
    "cpu_s",
    "hotport",
    "machine",
    "pinned",
    "save",
    "script",
    "show",
    "wrk",
]

RESULTS: Final = Path(__file__).parent / "results"

PARTS: Final = Path(__file__).parents[1] / "build" / "benchmarks"

PACKAGES: Final = (
    "hotport",
    "anyio",
    "click",
    "fastapi",
    "granian",
    "gunicorn",
    "h11",
    "httptools",
    "hypercorn",
    "msgspec",
    "pydantic",
    "rich",
    "starlette",
    "structlog",
    "uvicorn",
    "uvloop",
    "websockets",
)

#: The least that an ASGI application can do.
HELLO: Final = """\
async def hello(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"13")]})
    await send({"type": "http.response.body", "body": b"Hello, world!"})
"""


class Samples(list[float]):
    """Measurements of one thing, one for each round."""

    @property
    def median(self) -> float:
        return statistics.median(self)

    def to(self, others: Sequence[float]) -> Samples:
        """Ratios, round by round: what disturbs both alike is not in them."""
        return Samples(ours / theirs for ours, theirs in zip(self, others, strict=True))

    def __str__(self) -> str:
        decimals = 1 if self.median >= 10 else 3
        return f"{self.median:>10,.{decimals}f}   ({min(self):,.{decimals}f} to {max(self):,.{decimals}f})"


class Goal:
    """A ratio or a size that is to be reached, and whether it was."""

    def __init__(self, name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        self.name = name
        self.value = value
        self.wanted = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
        self.is_met = value >= at_least if at_least is not None else value <= (at_most or 0)

    def __str__(self) -> str:
        return f"  {'met   ' if self.is_met else 'MISSED'}  {self.name}: {self.value:.3f}, wanted {self.wanted}"

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "value": round(self.value, 4), "wanted": self.wanted, "met": self.is_met}


class _Parser(argparse.ArgumentParser):
    """Stores a part of the rows or servers elsewhere, so that it does not replace the results of all."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options = super().parse_args(args, namespace)
        if options.output is None:
            chosen = [(getattr(options, name, None), self.get_default(name)) for name in ("only", "servers")]
            is_part = any(set(some or ()) != set(every or ()) for some, every in chosen)
            options.output = (PARTS if is_part else RESULTS) / self.get_default("name")
        return options


def arguments(description: str | None, *, name: str, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has; `--only` and `--servers` choose a part, where there are such."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(name=name)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measured rounds [default: {rounds}]")
    where = f"benchmarks/results/{name}; a part goes to build/benchmarks/{name}"
    parser.add_argument("--output", type=Path, help=f"JSON [default: {where}]")
    return parser


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """What is started in this block runs on one core, if there are two; what already runs stays where it is.

    Sources: sched_setaffinity(2): children inherit it, also across exec; it is what taskset(1) does.
    """
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    if len(cores) < 2:
        yield
        return
    os.sched_setaffinity(0, {cores[core % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def hotport(directory: Path, name: str, *args: str, src: Path | None = None) -> Iterator[Service]:
    """One worker under a supervisor, in a directory of its own; its code is in `directory`.

    Args:
        src: Where hotport itself is, if it is another one.
    """
    own = directory / name
    own.mkdir()
    env = {"PYTHONPATH": str(src.resolve())} if src else {}
    with Service(own, "--app-dir", str(directory), *args, name=name, env=env) as service:
        yield service.wait_ready()


@contextmanager
def script(directory: Path, code: str, *args: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A server that prints its port and imports from `directory`; the port, and the process with what it says then."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, *args],
        env={**os.environ, "PYTHONPATH": str(directory)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            ready, _, _ = select.select([process.stdout.fileno()], [], [], 30.0)
            assert ready, "the server did not start"
            yield int(process.stdout.readline()), process
        finally:
            process.kill()


@contextmanager
def client(name: str, **args: Any) -> Iterator[subprocess.Popen[str]]:
    """One of `benchmarks.clients` on a core of its own; it prints JSON when its stdin has ended."""
    command = (sys.executable, "-P", str(Path(__file__).with_name("clients.py")), name, json.dumps(args))
    with (
        pinned(1),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def wrk(
    port: int,
    *,
    seconds: float,
    connections: int,
    close: bool = False,
    script: Path | None = None,
    scheme: str = "http",
) -> tuple[float, int]:
    """Load a server.

    Args:
        close: Each request has a connection of its own.
        script: Lua that says what is requested; without one it is ``GET /``.

    Returns:
        Requests a second, and how many that were.

    Raises:
        RuntimeError: A request failed: such a number would mean nothing.
    """
    url = f"{scheme}://127.0.0.1:{port}/"
    # wrk counts whole seconds, and tells what it has seen when it is interrupted.
    command = ["timeout", "--preserve-status", "--signal=INT", f"{seconds}s"]
    command += ["wrk", "-t1", f"-c{connections}", f"-d{ceil(seconds) + 1}s"]
    command += ["-H", "Connection: close"] if close else []
    command += ["-s", str(script)] if script else []
    with pinned(1):
        out = subprocess.run([*command, url], capture_output=True, text=True, check=True).stdout
    rate, count = re.search(r"Requests/sec:\s+([\d.]+)", out), re.search(r"(\d+) requests in", out)
    if rate is None or count is None or "Non-2xx" in out or "Socket errors" in out:
        raise RuntimeError(f"wrk {url} saw failures:\n{out}")
    return float(rate[1]), int(count[1])


def machine() -> dict[str, Any]:
    """Where this is measured, so that a number can be judged later."""
    return machine_with(PACKAGES)


def show(title: str, samples: Mapping[str, Samples]) -> None:
    """Print a table, one line for each name."""
    print(f"{'':52}    median   (range of {title})")
    for name, found in samples.items():
        print(f"{name:52}{found}")


def save(
    path: Path, *, method: str, samples: Mapping[str, Sequence[float]], goals: Sequence[Goal], **more: Any
) -> None:
    """Write a result with everything that it takes to judge it, and say which goals are met."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "method": method,
        "machine": machine(),
        "samples": {name: list(values) for name, values in samples.items()},
        "goals": [goal.as_json() for goal in goals],
        **more,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    print("goals")
    for goal in goals:
        print(goal)
    print(f"\nsamples, machine and versions: {path}")
