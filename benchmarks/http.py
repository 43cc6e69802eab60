"""ASGI servers side by side.

One worker each, the same application on the same Python, all of its threads on one core; the load generator runs on
another. Each row starts its own servers and loads them in turns: of its rounds the first is dropped, and every other
one goes through the servers backwards. Ratios are made round by round. Beside each rate stands the one for a second
of the server's *processor* time, of all its processes and threads. Only these can be compared where the load
generator was the slower side (the server's core was idle) and on a machine that had something else to do, too (the
server's share of the core and the idle time do not make up the whole).

Without access log unless the row says so. hotport and uvicorn run on uvloop with httptools (and websockets' sans-I/O
core). granian speaks ASGI with its defaults: one runtime thread beside the one that runs Python, on uvloop. hypercorn
is left out because it wins no row: it has a fifth to three fifths of uvicorn's rates, and takes more memory.

Latency is that of an open loop: requests are sent at the same fixed rate to every server, half of the slowest one's
peak (or what the generator can do without lagging, if that is less), and timed from when they were due. Memory is
what all processes of a server grow by while connections are opened that make one request each and stay.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from benchmarks.clients import HELLO as REPLY
from benchmarks.clients import REQUEST, connected
from benchmarks.common import HELLO, Goal, Samples, arguments, cpu_s, hotport, pinned, save, show, wrk
from hotport.kernel.process import raise_descriptor_limit, rss_bytes
from tests.support import eventually, http_get

CONNECTIONS: Final = 64

#: Of the open loop.
PACED_CONNECTIONS: Final = 32

#: Requests a second that cost the open loop a quarter of its core, so that it does not lag; its lag is in the result.
PACED_RATE_MAX: Final = 20_000.0

IDLE_CONNECTIONS: Final = 5000

#: A server whose core was idle for more of the time than this was not loaded to its limit.
IDLE_MAX: Final = 0.1

#: A server that lost more of its core than this to others has no rate to speak of, except for its processor time.
LOST_MAX: Final = 0.1

COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {
    "hotport": (),
    "uvicorn": ("uvicorn", "--loop", "uvloop", "--http", "httptools", "--ws", "websockets-sansio"),
    "granian": ("granian", "--interface", "asgi"),
}

#: Nobody logs requests.
QUIET: Final[Mapping[str, tuple[str, ...]]] = {
    "hotport": ("--log-level", "warning"),
    "uvicorn": ("--no-access-log", "--log-level", "warning"),
    "granian": ("--no-access-log", "--log-level", "warning"),
}

#: Everybody logs every request, each in its usual format, to a file.
ACCESS_LOG: Final[Mapping[str, tuple[str, ...]]] = {
    "hotport": ("--access-log", "combined"),
    "uvicorn": ("--access-log",),
    "granian": ("--access-log",),
}

#: Idle connections stay. granian's backpressure counts connections, not requests.
PATIENT: Final[Mapping[str, tuple[str, ...]]] = {
    "hotport": (*QUIET["hotport"], "--keep-alive", "10m"),
    "uvicorn": (*QUIET["uvicorn"], "--timeout-keep-alive", "600"),
    "granian": (*QUIET["granian"], "--http1-header-read-timeout", "60000", "--backpressure", "8192"),
}

APPLICATIONS: Final = f'''\
{HELLO}
PIECE = bytes(65536)


async def body(scope, receive, send):
    """64 KiB in one piece."""
    if scope["type"] == "lifespan":
        return await hello(scope, receive, send)
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"65536")]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": PIECE}})


async def stream(scope, receive, send):
    """1 MiB in pieces of 64 KiB; its length is not said."""
    if scope["type"] == "lifespan":
        return await hello(scope, receive, send)
    headers = [(b"content-type", b"application/octet-stream")]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    for left in reversed(range(16)):
        await send({{"type": "http.response.body", "body": PIECE, "more_body": left > 0}})


async def upload(scope, receive, send):
    """Takes 1 MiB (or nothing, when it is asked whether it is there)."""
    if scope["type"] == "lifespan":
        return await hello(scope, receive, send)
    size = 0
    while True:
        event = await receive()
        size += len(event["body"])
        if not event["more_body"]:
            break
    status = 200 if size == (2**20 if scope["method"] == "POST" else 0) else 500
    await send({{"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]}})
    await send({{"type": "http.response.body", "body": b""}})


async def echo(scope, receive, send):
    """Sends every message back."""
    if scope["type"] != "websocket":
        return await hello(scope, receive, send)
    await receive()
    await send({{"type": "websocket.accept"}})
    while (event := await receive())["type"] == "websocket.receive":
        await send({{"type": "websocket.send", "bytes": event["bytes"]}})
'''

FASTAPI: Final = """\
from fastapi import FastAPI

app = FastAPI()


@app.get("/")
async def item() -> dict[str, int | str | list[str]]:
    return {"id": 1, "name": "hotport", "tags": ["asgi", "restart"], "price": 42}
"""

#: Where each request moves 1 MiB.
MIB: Final = ("MiB/s", "MiB/CPU s")

#: Sends 1 MiB with each request.
UPLOAD: Final = """\
wrk.method = "POST"
wrk.body = string.rep("x", 1048576)
"""


class Skipped(Exception):
    """Raised when a row cannot be measured; says why."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs.

    Attributes:
        pid: The first of its processes; the others are its descendants.
        directory: Where its code is.
    """

    name: str
    port: int
    pid: int
    directory: Path

    def pids(self) -> list[int]:
        """All of its processes."""
        return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]

    def cpu_s(self) -> float:
        """Processor seconds of all its threads until now."""
        return sum(map(cpu_s, self.pids()))

    def rss_bytes(self) -> int:
        """Resident memory of all its processes."""
        return sum(map(rss_bytes, self.pids()))


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured, how long, and how a server for it is started."""

    names: Sequence[str]
    rounds: int
    seconds: float
    start: Callable[[str], AbstractContextManager[Server]]
    idle: int = IDLE_CONNECTIONS

    def turns(self) -> Iterator[tuple[int, str]]:
        """The number of each round, and whose turn it is in it; number 0 warms up."""
        for number in range(self.rounds + 1):
            for name in self.names if number % 2 else reversed(self.names):
                yield number, name


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing to compare.

    Attributes:
        measure: Returns samples by name: a server's, and what was measured.
        compare: Of what ratios are made.
        goals: The ratio that hotport is to have to a server; "best" is the best of the others.
        is_cost: Less is better: the ratio is to be at most this, otherwise at least.
        options: More options for each server.
    """

    app: str
    measure: Callable[[Run], dict[str, Samples]]
    compare: Sequence[str] = ("requests/s", "requests/CPU s")
    goals: Mapping[str, float]
    is_cost: bool = False
    options: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: QUIET)


def rates(run: Run, load: Callable[[Server, float], tuple[float, int]], unit: str = "requests") -> dict[str, Samples]:
    """Load each server as much as it can take.

    Args:
        load: Takes a server and seconds; returns what was done each second, and what was done in all.
    """
    found: dict[str, Samples] = defaultdict(Samples)
    with ExitStack() as stack:
        servers = {name: stack.enter_context(run.start(name)) for name in run.names}
        for number, name in run.turns():
            server = servers[name]
            cpu, idle, began = server.cpu_s(), _core_idle_s(), time.perf_counter()
            rate, count = load(server, run.seconds)
            cpu, idle, elapsed = server.cpu_s() - cpu, _core_idle_s() - idle, time.perf_counter() - began
            if number:
                found[f"{name} {unit}/s"].append(rate)
                found[f"{name} {unit}/CPU s"].append(count / cpu)
                found[f"{name} core share"].append(cpu / elapsed)
                found[f"{name} core idle"].append(idle / elapsed)
    return found


def latencies(run: Run) -> dict[str, Samples]:
    """Time requests at a rate that every server can take; the warm-up finds the peaks."""
    found: dict[str, Samples] = defaultdict(Samples)
    rate = PACED_RATE_MAX
    with ExitStack() as stack:
        servers = {name: stack.enter_context(run.start(name)) for name in run.names}
        for number, name in run.turns():
            port = servers[name].port
            if number == 0:
                peak, _ = wrk(port, seconds=run.seconds, connections=CONNECTIONS)
                rate = min(rate, peak / 2)
                continue
            told = _client("paced", port=port, seconds=run.seconds, connections=PACED_CONNECTIONS, rate=rate)
            found[f"{name} requests/s"].append(rate)
            for key, value in told.items():
                found[f"{name} {key} ms"].append(value)
    return found


def memory(run: Run) -> dict[str, Samples]:
    """What an idle connection costs; a server that has had connections is no longer the same, so each starts anew."""
    if (limit := raise_descriptor_limit()) < run.idle + 100:
        raise Skipped(f"a process may open no more than {limit} descriptors")
    found: dict[str, Samples] = defaultdict(Samples)
    for number, name in run.turns():
        if number == 0:
            continue
        with run.start(name) as server, ExitStack() as stack:
            before = server.rss_bytes()
            socks = [stack.enter_context(connected(server.port, REQUEST, REPLY)[0]) for _ in range(run.idle)]
            found[f"{name} KiB"].append((server.rss_bytes() - before) / 1024 / run.idle)
            poll = select.poll()
            for sock in socks:
                poll.register(sock, select.POLLIN)
            assert not poll.poll(0), f"{name} closed idle connections"
    return found


def load_wrk(server: Server, seconds: float, *, close: bool = False, script: str = "") -> tuple[float, int]:
    path = server.directory / "wrk.lua"
    path.write_text(script)
    return wrk(server.port, seconds=seconds, connections=CONNECTIONS, close=close, script=path if script else None)


def _echo(server: Server, seconds: float) -> tuple[float, int]:
    told = _client("websocket", port=server.port, seconds=seconds, connections=CONNECTIONS)
    if "refused" in told:
        raise Skipped(f"{server.name} answers the upgrade with {told['refused']!r}")
    return told["rate"], told["count"]


def _client(name: str, **kwargs: float) -> Any:
    """What a client of our own measures, in a process of its own."""
    command = (sys.executable, "-P", str(Path(__file__).with_name("clients.py")), name, json.dumps(kwargs))
    with pinned(1):
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _core_idle_s() -> float:
    """Seconds for which the servers' core has had nothing to run.

    Sources: proc_stat(5).
    """
    core = min(os.sched_getaffinity(0))
    fields = re.search(rf"^cpu{core} (.+)", Path("/proc/stat").read_text(), re.MULTILINE)
    assert fields is not None
    return int(fields[1].split()[3]) / os.sysconf("SC_CLK_TCK")


ROWS: Final[Mapping[str, Row]] = {
    "keep-alive": Row(app="apps:hello", measure=partial(rates, load=load_wrk), goals={"granian": 1.2, "uvicorn": 1.4}),
    "connections": Row(
        app="apps:hello", measure=partial(rates, load=partial(load_wrk, close=True)), goals={"granian": 1.0}
    ),
    "fastapi": Row(app="api:app", measure=partial(rates, load=load_wrk), goals={"best": 1.0}),
    "body": Row(app="apps:body", measure=partial(rates, load=load_wrk), goals={"best": 1.0}),
    "stream": Row(
        app="apps:stream", measure=partial(rates, load=load_wrk, unit="MiB"), compare=MIB, goals={"best": 1.0}
    ),
    "upload": Row(
        app="apps:upload",
        measure=partial(rates, load=partial(load_wrk, script=UPLOAD), unit="MiB"),
        compare=MIB,
        goals={"best": 1.0},
    ),
    "websocket": Row(
        app="apps:echo",
        measure=partial(rates, load=_echo, unit="messages"),
        compare=("messages/s", "messages/CPU s"),
        goals={"best": 1.0},
    ),
    "access-log": Row(
        app="apps:hello", measure=partial(rates, load=load_wrk), goals={"uvicorn": 1.2}, options=ACCESS_LOG
    ),
    "latency": Row(app="apps:hello", measure=latencies, compare=("p99 ms",), goals={"best": 1.0}, is_cost=True),
    "memory": Row(
        app="apps:hello", measure=memory, compare=("KiB",), goals={"uvicorn": 1.0}, is_cost=True, options=PATIENT
    ),
}


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="http.json", rounds=5)
    parser.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        help="of each measurement [default: 4; with --rounds 2 --seconds 1 it is two minutes instead of twelve]",
    )
    parser.add_argument(
        "--idle", type=int, default=IDLE_CONNECTIONS, help="connections whose memory is measured [default: 5000]"
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument(
        "--servers", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="SERVER", help=", ".join(COMMANDS)
    )
    options = parser.parse_args()

    samples: dict[str, Samples] = {}
    goals: list[Goal] = []
    skipped: dict[str, str] = {}
    for name in options.only:
        row = ROWS[name]
        run = Run(options.servers, options.rounds, options.seconds, partial(started, row=row), options.idle)
        try:
            found = row.measure(run)
        except Skipped as error:
            skipped[name] = str(error)
            print(f"{name}: skipped, {error}\n", flush=True)
            continue
        goals += compared(name, row, found, options.servers)
        found = {f"{name}: {key}": values for key, values in found.items()}
        show(f"{options.rounds} rounds of {options.seconds:g} s", found)
        for server in options.servers:
            if idle := found.get(f"{name}: {server} core idle"):
                if idle.median > IDLE_MAX:
                    print(f"{server} was not loaded to its limit: its core was idle for {idle.median:.0%} of the time")
                lost = 1 - idle.median - found[f"{name}: {server} core share"].median
                if lost > LOST_MAX:
                    print(f"{server} lost {lost:.0%} of its core to somebody else")
        print(flush=True)
        samples |= found
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=goals,
        skipped=skipped,
        seconds=options.seconds,
    )
    return 0


def compared(name: str, row: Row, found: dict[str, Samples], names: Sequence[str]) -> list[Goal]:
    """Add hotport's ratios to what was found; the goals."""
    others = [other for other in names if other != "hotport"]
    if "hotport" not in names or not others:
        return []
    goals = []
    for key in row.compare:
        for other in others:
            found[f"hotport to {other}, {key}"] = found[f"hotport {key}"].to(found[f"{other} {key}"])
        by_median = sorted(others, key=lambda other: found[f"{other} {key}"].median, reverse=not row.is_cost)
        for other, wanted in row.goals.items():
            peer = by_median[0] if other == "best" else other
            if peer in others:
                ratio = f"hotport to {peer}, {key}"
                bound = {"at_most": wanted} if row.is_cost else {"at_least": wanted}
                goals.append(Goal(f"{name}: {ratio}", found[ratio].median, **bound))
    return goals


def started(name: str, row: Row) -> AbstractContextManager[Server]:
    """Start a server that serves a row's application."""
    more = row.options[name]
    command = (*COMMANDS[name], *more, "--port", "0", row.app)
    files = {"apps.py": APPLICATIONS, "api.py": FASTAPI}
    return launched(name, files, (row.app, *more) if name == "hotport" else command)


@contextmanager
def launched(
    name: str,
    files: Mapping[str, str],
    command: Sequence[str],
    *,
    src: Path | None = None,
    ask: Callable[[int], tuple[int, bytes]] = http_get,
) -> Iterator[Server]:
    """Start a server on its core, with a directory of its own, and wait for its first answer.

    Args:
        files: Modules in the directory, by their names.
        command: What follows ``python -m``; for hotport itself, what follows ``hotport serve``.
        src: Where hotport itself is, if it is another one.
        ask: Sends a request to a port, and returns the status first.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotport-bench-")))
        for file, text in files.items():
            (directory / file).write_text(text)
        with pinned(0):
            if name == "hotport" or src is not None:
                service = stack.enter_context(hotport(directory, name, *command, src=src))
                port, pid = service.port, service.process.pid
            else:
                port, pid = stack.enter_context(other(directory, command))
        assert ask(port)[0] == 200
        yield Server(name, port, pid, directory)


@contextmanager
def other(directory: Path, command: Sequence[str]) -> Iterator[tuple[int, int]]:
    """A server that binds the port that it likes: which one is seen from outside."""
    with (
        (directory / "log").open("w+") as log,
        subprocess.Popen([sys.executable, "-m", *command], cwd=directory, stdout=log, stderr=log) as process,
    ):
        ports: set[int] = set()

        def listens() -> bool:
            assert process.poll() is None, (directory / "log").read_text()
            first = psutil.Process(process.pid)
            for found in (first, *first.children()):
                ports.update(conn.laddr.port for conn in found.net_connections("tcp") if conn.status == "LISTEN")
            return bool(ports)

        try:
            eventually(listens, f"{command[0]} listens")
            yield ports.pop(), process.pid
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
