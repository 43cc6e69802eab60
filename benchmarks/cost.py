"""What workers cost: processor time and memory of a start, and what a restart takes from clients.

The application is FastAPI with SQLAlchemy and pandas, where these are installed. Each server starts with four workers:
the processor time of all its processes until the last worker has started its application, and then their memory (PSS,
which counts a page that n processes share as 1/n for each). Then with two workers, on both cores, under a fixed rate of
requests on new connections: the 99th percentile before a restart and while it lasts, until all workers are new, and the
time of the restart. Then one of hotport's workers is killed, ten seconds after the last end of a worker: how long until
another one is ready. At last one of its two workers hangs until it is replaced: the 99th percentile of requests that
come meanwhile, beside the one before.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from benchmarks.common import Goal, Samples, arguments, client, save, show
from tests.support import DEADLINE_S, eventually

MODULES: Final = [name for name in ("fastapi", "sqlalchemy", "pandas") if importlib.util.find_spec(name)]

#: Says by a file when a worker has started, which all servers do after the import.
APPLICATION: Final = f"""\
import os
import time
{"import " + ", ".join(MODULES) if MODULES else ""}
from contextlib import asynccontextmanager
from fastapi import FastAPI


@asynccontextmanager
async def lifespan(app):
    open(f"started.{{os.getpid()}}", "w").close()
    yield


app = FastAPI(lifespan=lifespan)


@app.get("/")
async def hello():
    return {{"hello": "world"}}


@app.get("/hang")
async def hang():
    time.sleep(600)
"""

_GUNICORN: Final = "python -m gunicorn --bind 127.0.0.1:{port} --log-level warning --worker-class asgi"

#: Commands with ``{port}``; ``--workers N app:app`` follows.
SERVERS: Final = {
    "hotport --preload": "python -m hotport serve --bind 127.0.0.1:{port} --log-level warning --settle 0 --preload",
    "hotport": "python -m hotport serve --bind 127.0.0.1:{port} --log-level warning --settle 0",
    "gunicorn --preload": f"{_GUNICORN} --preload",
    "gunicorn": _GUNICORN,
    "uvicorn": "python -m uvicorn --port {port} --no-access-log --log-level warning",
    "granian": "python -m granian --interface asgi --port {port} --no-access-log --log-level warning",
}

RATE: Final = 100.0
PAUSE_S: Final = 0.5

#: After that long without an end, a lost worker is replaced at once.
STABLE_S: Final = 10.5


#: A restart of `gunicorn --preload` loads no new code: its workers are forked from the process that has the old one.
RESTARTED: Final = [name for name in SERVERS if name != "gunicorn --preload"]


class Server(NamedTuple):
    """A server that runs in a directory of its own."""

    name: str
    port: int
    process: psutil.Process
    directory: Path

    def started(self) -> set[int]:
        """The workers that have ever started, by pid."""
        return {int(path.suffix[1:]) for path in self.directory.glob("started.*")}

    def tree(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def cpu_s(self) -> float:
        """Processor time of all processes, also of those that have ended."""
        found = 0.0
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                found += sum(process.cpu_times()[:4])
        return found

    def pss_mib(self) -> float:
        return sum(process.memory_full_info().pss for process in self.tree()) / (1 << 20)


@contextmanager
def running(name: str, workers: int, **variables: str) -> Iterator[Server]:
    """Start a server, with more variables of its environment, and wait until all workers have started."""
    with tempfile.TemporaryDirectory(prefix="hotport-bench-") as place:
        directory = Path(place)
        (directory / "app.py").write_text(APPLICATION)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = shlex.split(SERVERS[name].format(port=port))
        command[0] = sys.executable
        env = {**os.environ, "HOTPORT_RUNTIME_DIR": place, "HOTPORT_NAME": "cost", **variables}
        with psutil.Popen([*command, "--workers", str(workers), "app:app"], cwd=place, env=env) as process:
            server = Server(name, port, process, directory)
            try:
                eventually(lambda: len(server.started()) >= workers, f"{name} has all its workers")
                yield server
            finally:
                tree = server.tree()
                process.terminate()
                _, alive = psutil.wait_procs(tree, DEADLINE_S)
                for each in alive:
                    each.kill()


def start(name: str, _: float) -> dict[str, float]:
    """The costs of a start with four workers."""
    with running(name, 4) as server:
        cpu_s = server.cpu_s()
        time.sleep(PAUSE_S)
        return {"cpu s": cpu_s, "pss MiB": server.pss_mib()}


def restart(name: str, seconds: float) -> dict[str, float]:
    """What a restart with two workers costs clients, after so many seconds without one."""
    if name not in RESTARTED:
        return {}
    with running(name, 2) as server, client("anew", port=server.port, rate=RATE) as asking:
        time.sleep(PAUSE_S)
        old = server.started()
        begin = time.monotonic()
        time.sleep(seconds)
        restarted = time.monotonic()
        cpu_before_s = server.cpu_s()
        if name.startswith("hotport"):
            command = [sys.executable, "-m", "hotport", "restart", "cost"]
            env = {**os.environ, "HOTPORT_RUNTIME_DIR": str(server.directory)}
            subprocess.run(command, env=env, capture_output=True, check=True, timeout=DEADLINE_S)
        else:
            server.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(server.started() - old) >= 2, f"{name} has new workers")
        eventually(lambda: not any(psutil.pid_exists(pid) for pid in old), f"{name} has no old workers")
        ended = time.monotonic()
        cpu_s = server.cpu_s() - cpu_before_s
        time.sleep(PAUSE_S)
        seen = _answers(asking)
    before = _p99_ms(seen, begin, restarted)
    return {
        "restart s": ended - restarted,
        "restart cpu s": cpu_s,
        "p99 before ms": before,
        "p99 in restart ms": _p99_ms(seen, restarted, ended),
        "p99 ratio": _p99_ms(seen, restarted, ended) / before,
    }


def replace(name: str, _: float) -> dict[str, float]:
    """Milliseconds from the end of a worker of hotport to another one that has started."""
    if not name.startswith("hotport"):
        return {}
    with running(name, 2) as server:
        time.sleep(STABLE_S)
        old = server.started()
        killed = time.time_ns()
        os.kill(min(old), signal.SIGKILL)
        eventually(lambda: bool(server.started() - old), "another one has started")
        (new,) = server.started() - old
        return {"replaced ms": ((server.directory / f"started.{new}").stat().st_mtime_ns - killed) / 1e6}


def hang(name: str, seconds: float) -> dict[str, float]:
    """What the clients of the other worker notice while one of hotport's two hangs, until it is replaced."""
    if name != "hotport":
        return {}
    soon = {"HOTPORT_HANG_REPORT": "1s", "HOTPORT_DRAIN_TIMEOUT": "1s", "HOTPORT_KILL_TIMEOUT": "1s"}
    with (
        running(name, 2, **soon, HOTPORT_HANG_TIMEOUT=f"{seconds}s") as server,
        client("anew", port=server.port, rate=RATE) as asking,
    ):
        time.sleep(PAUSE_S)
        old = server.started()
        begin = time.monotonic()
        time.sleep(seconds)
        hung = time.monotonic()
        with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as held:
            held.sendall(b"GET /hang HTTP/1.1\r\nHost: cost\r\n\r\n")
            eventually(lambda: bool(server.started() - old), "the worker that hangs is replaced")
            replaced = time.monotonic()
            eventually(lambda: sum(psutil.pid_exists(pid) for pid in old) < 2, "the worker that hangs has ended")
        seen = _answers(asking)
    before, meanwhile = _p99_ms(seen, begin, hung), _p99_ms(seen, hung, replaced)
    return {
        "p99 before a hang ms": before,
        "p99 in a hang ms": meanwhile,
        "p99 ratio in a hang": meanwhile / before,
    }


def _answers(asking: Any) -> list[tuple[float, float]]:
    out, _ = asking.communicate(timeout=DEADLINE_S)
    return [(due, latency) for due, latency in json.loads(out)]


def _p99_ms(seen: list[tuple[float, float]], began: float, ended: float) -> float:
    latencies = sorted(latency for due, latency in seen if began <= due < ended)
    return latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))] * 1000


PARTS: Final[dict[str, Callable[[str, float], dict[str, float]]]] = {
    "start": start,
    "restart": restart,
    "replace": replace,
    "hang": hang,
}


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="cost.json", rounds=5)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), metavar="SERVER")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--seconds", type=float, default=3.0, help="of load before a restart [default: 3]")
    options = parser.parse_args()
    samples: dict[str, Samples] = {}
    for _ in range(options.rounds):
        for name in options.servers:
            for part in options.only:
                for what, value in PARTS[part](name, options.seconds).items():
                    samples.setdefault(f"{name}: {what}", Samples()).append(value)
    show(f"{options.rounds} rounds", samples)
    print()
    wanted = {"pss MiB": 140.0, "cpu s": 1.0, "replaced ms": 50.0, "p99 ratio": 1.5}
    goals = [
        Goal(name, samples[name].median, at_most=most)
        for what, most in wanted.items()
        if (name := f"hotport --preload: {what}") in samples
    ]
    if (name := "hotport: p99 ratio in a hang") in samples:
        goals.append(Goal(name, samples[name].median, at_most=1.5))
    save(options.output, method=(__doc__ or "").strip(), samples=samples, goals=goals, modules=MODULES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
