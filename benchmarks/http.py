"""ASGI servers side by side.

One worker each, the same application on the same Python, in turns, with all its threads on one core; the load
generator runs on another. Each row starts its own servers; of its rounds the first is dropped, and every other one
goes through the servers backwards. Ratios are made round by round. Beside each rate stands the one for a second of
the server's *processor* time (every process and thread of it): on a machine that has something else to do, too, and
where the generator is the slower side (see "busy": the share of the time for which the server had its core), only
these can be compared.

hotport and uvicorn run on uvloop with httptools. granian speaks ASGI with its defaults: one runtime thread beside the
one that runs Python, uvloop where it is installed. hypercorn is left out: it has a third of uvicorn's rates and wins
no row.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from benchmarks.common import HELLO, Goal, Samples, arguments, cpu_s, hotport, pinned, save, show, wrk
from hotport.kernel.process import raise_descriptor_limit
from tests.support import DEADLINE_S, eventually, http_get

CONNECTIONS: Final = 64

UVICORN: Final = ("uvicorn", "--loop", "uvloop", "--http", "httptools", "--ws", "websockets-sansio")
GRANIAN: Final = ("granian", "--interface", "asgi")

#: What each server is told so that it does not log requests.
QUIET: Final[Mapping[str, tuple[str, ...]]] = {
    "hotport": ("--log-level", "warning"),
    "uvicorn": ("--no-access-log", "--log-level", "warning"),
    "granian": ("--no-access-log", "--log-level", "warning"),
}


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs.

    Attributes:
        pid: The first of its processes; the others are its descendants.
    """

    port: int
    pid: int

    def pids(self) -> list[int]:
        """All of its processes."""
        return [self.pid, *(child.pid for child in psutil.Process(self.pid).children(recursive=True))]

    def cpu_s(self) -> float:
        """Processor seconds of all of its threads until now."""
        return sum(map(cpu_s, self.pids()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to load a server.

    Attributes:
        load: Takes the server and the seconds; returns what was done each second, and all that was done.
        unit: What `load` counts.
        goals: The least ratio of hotport to a server; "best" is the best of the others.
        options: More options for each server; without any they do not log requests.
    """

    app: str
    load: Callable[[Server, float], tuple[float, int]]
    unit: str = "requests"
    goals: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: QUIET)


def _wrk(server: Server, seconds: float, *, close: bool = False, script: Path | None = None) -> tuple[float, int]:
    return wrk(server.port, seconds=seconds, connections=CONNECTIONS, close=close, script=script)


ROWS: Final[Mapping[str, Row]] = {
    "keep-alive": Row(app="apps:hello", load=_wrk, goals={"granian": 1.2, "uvicorn": 1.4}),
    "connections": Row(app="apps:hello", load=partial(_wrk, close=True), unit="connections", goals={"granian": 1.0}),
}


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="http.json", rounds=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement [default: 4]")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument(
        "--servers", nargs="+", choices=QUIET, default=list(QUIET), metavar="SERVER", help=", ".join(QUIET)
    )
    options = parser.parse_args()
    raise_descriptor_limit()  # for everybody who is started here

    samples: dict[str, Samples] = {}
    goals: list[Goal] = []
    for name in options.only:
        row = ROWS[name]
        with tempfile.TemporaryDirectory(prefix="hotport-bench-") as directory, ExitStack() as stack:
            servers = {server: stack.enter_context(started(server, Path(directory), row)) for server in options.servers}
            found = measured(row, servers, options.rounds, options.seconds)
        goals += compared(row, name, found, options.servers)
        found = {f"{name}: {key}": values for key, values in found.items()}
        show(f"{options.rounds} rounds of {options.seconds:g} s", found)
        print(flush=True)
        samples |= found
    save(options.output, method=(__doc__ or "").strip(), samples=samples, goals=goals, seconds=options.seconds)
    return 0


def measured(row: Row, servers: Mapping[str, Server], rounds: int, seconds: float) -> dict[str, Samples]:
    """Load each server in each round."""
    found: dict[str, Samples] = {}
    for number in range(rounds + 1):
        for name in servers if number % 2 else reversed(servers):
            server = servers[name]
            before, began = server.cpu_s(), time.perf_counter()
            rate, count = row.load(server, seconds)
            cpu, elapsed = server.cpu_s() - before, time.perf_counter() - began
            if number:  # the first round warms up
                found.setdefault(f"{name} {row.unit}/s", Samples()).append(rate)
                found.setdefault(f"{name} {row.unit}/CPU s", Samples()).append(count / cpu)
                found.setdefault(f"{name} busy", Samples()).append(cpu / elapsed)
    return found


def compared(row: Row, name: str, found: dict[str, Samples], servers: Sequence[str]) -> list[Goal]:
    """Add the ratios to what was found; the goals."""
    others = [server for server in servers if server != "hotport"]
    goals = []
    for unit in (f"{row.unit}/s", f"{row.unit}/CPU s") if "hotport" in servers else ():
        for other in others:
            found[f"hotport to {other}, {unit}"] = found[f"hotport {unit}"].to(found[f"{other} {unit}"])
        for other, ratio in row.goals.items():
            if other == "best":
                other = max(others, key=lambda other: found[f"{other} {unit}"].median, default="")
            if other in others:
                key = f"hotport to {other}, {unit}"
                goals.append(Goal(f"{name}: {key}", found[key].median, at_least=ratio))
    return goals


@contextmanager
def started(name: str, directory: Path, row: Row) -> Iterator[Server]:
    """Start a server on one core, and wait for its first answer."""
    (directory / "apps.py").write_text(HELLO)
    more = row.options.get(name, ())
    with ExitStack() as stack:
        with pinned(0):
            if name == "hotport":
                service = stack.enter_context(hotport(directory, name, row.app, *more))
                yield Server(service.port, service.process.pid)
                return
            command = [sys.executable, "-m", *{"uvicorn": UVICORN, "granian": GRANIAN}[name], "--port", "0"]
            log = stack.enter_context((directory / f"{name}.log").open("wb"))
            process = stack.enter_context(
                subprocess.Popen([*command, *more, row.app], cwd=directory, stdout=log, stderr=log)
            )
        stack.callback(process.terminate)
        ports: list[int] = []

        def listens() -> bool:
            assert process.poll() is None, (directory / f"{name}.log").read_text()
            for found in (psutil.Process(process.pid), *psutil.Process(process.pid).children()):
                ports.extend(conn.laddr.port for conn in found.net_connections() if conn.status == "LISTEN")
            return bool(ports)

        eventually(listens, f"{name} listens")
        assert http_get(ports[0], timeout_s=DEADLINE_S)[0] == 200
        yield Server(ports[0], process.pid)


if __name__ == "__main__":
    sys.exit(main())
