"""How evenly four workers share connections, and what latency their clients see.

*Servers side by side*: each has four workers on all cores and runs the same ASGI application, whose answers name the
process that made them; the client is one process on one core. Each round starts every server anew, and every other
round takes the servers in reverse order. After a warm-up the client opens

- 1,000 keep-alive connections, *one a millisecond*, and asks once on each; latency counts from when a connection was
  due;
- 64 connections *at once*, and when each has had an answer, sends requests on all of them as fast as answers come;
- one connection *for each request*, 64 at a time, as fast as the server closes them. The processor time of all the
  server's processes is measured beside it, because others who use the machine change it less.

A share is the largest count of a worker divided by the mean; for requests, divided by the smallest count (at least 1).

*scale*: hotport goes from two workers to four (`--handoff websocket`) while clients hold 1,000 idle keep-alive
connections and 1,000 WebSockets, each of which echoes a number every five seconds. `hotport status` is read 2 s after
the new workers serve. At the end every connection is used once more. Other clients send 500 requests a second on 32
kept connections; each request counts from when it was due. Their latency is given before the request to scale, from
then until all workers serve (new interpreters start on the same cores), and in the 2 s after that.

*stall*: 400 clients, 100 on each of four workers, send one request a second each. Then one worker begins to block its
event loop for 300 ms of each 500 ms. `hotport status` is read 2 s later. The clients' latency is that of requests that
were due after that moment; those of the first 2 s are given beside it. All of it with `--balance auto` and with
`--balance off`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from benchmarks.common import HELLO, Goal, Samples, arguments, client, hotport, save, show
from benchmarks.http import COMMANDS, PATIENT, Server, other
from hotport.kernel.process import raise_descriptor_limit
from hotport.wire.messages import ScaleRequest
from tests.support import Service, eventually, http_get

WORKERS: Final = 4

#: That are opened at once, and that are open at a time where each request has its own.
CONNECTIONS: Final = 64

#: Connections a second that are opened one after the other.
ARRIVAL_RATE: Final = 1000.0

WARM_UP_S: Final = 0.3

#: Time for servers to see that clients have left.
PAUSE_S: Final = 0.3

#: While workers are added: messages a second of all WebSockets, and requests of other clients on kept connections.
ECHO_RATE: Final = 200.0
OTHERS_RATE: Final = 500.0
OTHERS: Final = 32

#: Connections have to be where they belong by then.
MOVED_S: Final = 2.0

#: Requests a second of one client while a worker stalls.
STALL_RATE: Final = 1.0

#: How long a worker blocks its event loop, and how long it runs until the next time.
STALL_S: Final = 0.3
FREE_S: Final = 0.2

SHARE_MAX: Final = 1.1
TOGETHER_MAX: Final = 1.25
REQUESTS_MAX: Final = 1.5
CPU_MIN: Final = 0.98
OFF_MEAN_MAX: Final = 0.1
P99_MAX: Final = 1.5
STALLED_P99_MAX: Final = 0.5

OFF: Final = "hotport --balance off"

_BIND: Final = ("--bind", "127.0.0.1:{port}")

SERVERS: Final[Mapping[str, tuple[str, ...]]] = {
    "hotport": PATIENT["hotport"],
    OFF: (*PATIENT["hotport"], "--balance", "off"),
    "uvicorn": (*COMMANDS["uvicorn"], *PATIENT["uvicorn"], "--port", "{port}"),
    "gunicorn": (
        *("gunicorn", "--worker-class", "asgi", "--no-control-socket"),
        *("--keep-alive", "600", "--log-level", "warning", *_BIND),
    ),
    "granian": (*COMMANDS["granian"], *PATIENT["granian"], "--port", "{port}"),
    "hypercorn": ("hypercorn", "--worker-class", "uvloop", "--keep-alive", "600", "--log-level", "WARNING", *_BIND),
}

#: Each worker makes a file when it starts.
APPLICATION: Final = f"""\
import asyncio, os, time
from pathlib import Path

{HELLO.replace('b"Hello, world!"', 'b"%7d, world!" % os.getpid()').replace('b"13"', 'b"15"')}
stalling = []


async def stall():
    while True:
        time.sleep({STALL_S})
        await asyncio.sleep({FREE_S})


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        Path(__file__).with_name(f"worker-{{os.getpid()}}").touch()
    elif scope["type"] == "websocket":
        await receive()
        await send({{"type": "websocket.accept"}})
        while (event := await receive())["type"] == "websocket.receive":
            await send({{"type": "websocket.send", "bytes": event["bytes"]}})
        return
    elif scope["path"] == "/stall":
        stalling.append(asyncio.create_task(stall()))
    await hello(scope, receive, send)
"""


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="balance.json", rounds=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load and window [default: 2]")
    parser.add_argument(
        "--connections",
        type=int,
        default=1000,
        help="opened one after the other, and of each kind that moves [default: 1000]",
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), metavar="SERVER")
    options = parser.parse_args()
    raise_descriptor_limit()

    samples: dict[str, Samples] = {}
    goals: list[Goal] = []
    skipped: dict[str, str] = {}
    for name in options.only:
        try:
            found, reached = PARTS[name](options, skipped)
        except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as error:
            skipped[name] = repr(error)
            print(f"{name}: left out, {error!r}\n", flush=True)
            continue
        show(f"{options.rounds} rounds", found)
        print(f"load average {os.getloadavg()[0]:.1f}\n", flush=True)
        samples |= {f"{name}: {key}": values for key, values in found.items()}
        goals += reached
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=goals,
        skipped=skipped,
        servers=[name for name in options.servers if name not in skipped],
        connections=options.connections,
        seconds=options.seconds,
    )
    return 0


# -- servers side by side -----------------------------------------------------------------------------------


def side_by_side(options: Any, skipped: dict[str, str]) -> tuple[dict[str, Samples], list[Goal]]:
    """Measure every server's shares; leave out one that fails, and note why in `skipped`."""
    by_server: dict[str, dict[str, Samples]] = {name: defaultdict(Samples) for name in options.servers}
    for number in range(options.rounds):
        for name in options.servers if number % 2 == 0 else reversed(options.servers):
            if name in skipped:
                continue
            try:
                with _started(name) as server:
                    values = _shares(server, options.connections, options.seconds)
            except (AssertionError, OSError, ValueError, psutil.Error) as error:
                skipped[name] = repr(error)
                print(f"{name}: left out, {error!r}", flush=True)
                continue
            for key, value in values.items():
                by_server[name][key].append(value)
    found = {
        f"{name} {key}": samples
        for name, of_server in by_server.items()
        if name not in skipped
        for key, samples in of_server.items()
    }
    goals = []
    if "hotport one a ms, share" in found:
        for key, most in {
            "one a ms, share": SHARE_MAX,
            "at once, share": TOGETHER_MAX,
            "at once, requests' share": REQUESTS_MAX,
            "for each request, share": SHARE_MAX,
        }.items():
            goals.append(Goal(f"servers: {key}", found[f"hotport {key}"].median, at_most=most))
        key = "for each request, connections/CPU s"
        if (off := found.get(f"{OFF} {key}")) is not None:
            found[f"hotport to off, {key}"] = found[f"hotport {key}"].to(off)
            goals.append(Goal(f"servers: {key}, to off", found[f"hotport to off, {key}"].median, at_least=CPU_MIN))
    return found, goals


def _shares(server: Server, connections: int, seconds: float) -> dict[str, float]:
    """Measure one round of one server."""
    _told("together", port=server.port, connections=CONNECTIONS, seconds=WARM_UP_S)
    time.sleep(PAUSE_S)
    slowly = _told("arrivals", port=server.port, connections=connections, rate=ARRIVAL_RATE)
    time.sleep(PAUSE_S)
    at_once = _told("together", port=server.port, connections=CONNECTIONS, seconds=seconds)
    time.sleep(PAUSE_S)
    cpu = server.cpu_s()
    each = _told("once", port=server.port, connections=CONNECTIONS, seconds=seconds)
    cpu = server.cpu_s() - cpu
    requests = _counts(at_once["answered"])
    return {
        "one a ms, share": _to_mean(slowly["answered"]),
        "one a ms, p50 ms": slowly["p50"],
        "one a ms, p99 ms": slowly["p99"],
        "one a ms, client's lag p99 ms": slowly["lag p99"],
        "at once, share": _to_mean(at_once["first"]),
        "at once, requests' share": max(requests) / max(1, min(requests)),
        "at once, requests/s": sum(requests) / seconds,
        "at once, p50 ms": at_once["p50"],
        "at once, p99 ms": at_once["p99"],
        "for each request, share": _to_mean(each["answered"]),
        "for each request, connections/s": sum(each["answered"].values()) / seconds,
        "for each request, connections/CPU s": sum(each["answered"].values()) / cpu,
    }


def _told(name: str, **args: float) -> Any:
    """Run a client to its end; what it measured."""
    with client(name, **args) as process:
        return json.loads(process.communicate("")[0])


def _counts(by_process: Mapping[str, int]) -> list[int]:
    """Counts of all workers, with 0 for those that have not answered."""
    counts = list(by_process.values())
    assert len(counts) <= WORKERS, f"more processes than workers have answered: {by_process}"
    return [*counts, *[0] * (WORKERS - len(counts))]


def _to_mean(by_process: Mapping[str, int]) -> float:
    counts = _counts(by_process)
    return max(counts) * len(counts) / sum(counts)


@contextmanager
def _started(name: str) -> Iterator[Server]:
    """Start a server, and wait until all its workers have started."""
    with ExitStack() as stack:
        directory = _directory(stack)
        if name in ("hotport", OFF):
            service = stack.enter_context(
                hotport(directory, "hotport", "app:app", "--workers", str(WORKERS), *SERVERS[name])
            )
            yield Server(name, service.port, service.process.pid, directory)
            return
        with socket.create_server(("127.0.0.1", 0)) as probe:  # granian's workers bind one by one
            port = probe.getsockname()[1]
        command = [part.format(port=port) for part in SERVERS[name]]
        _, pid = stack.enter_context(other(directory, (*command, "--workers", str(WORKERS), "app:app")))
        stack.callback(_kill, pid)
        eventually(lambda: len(list(directory.glob("worker-*"))) >= WORKERS, f"{name} has all its workers")
        eventually(lambda: _answers(port), f"{name} answers")
        time.sleep(PAUSE_S)  # what workers do between starting the application and accepting
        yield Server(name, port, pid, directory)


def _directory(stack: ExitStack) -> Path:
    """A directory with the application."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotport-bench-")))
    (directory / "app.py").write_text(APPLICATION)
    return directory


def _kill(pid: int) -> None:
    """End every process of a server, the first one first: it would replace the others."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in (first, *first.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _answers(port: int) -> bool:
    try:
        return http_get(port, timeout_s=1.0)[0] == 200
    except (OSError, IndexError):
        return False


# -- hotport alone ------------------------------------------------------------------------------------------


def scale(options: Any, _: dict[str, str]) -> tuple[dict[str, Samples], list[Goal]]:
    """Measure going from two workers to four while connections are open."""
    found: dict[str, Samples] = defaultdict(Samples)
    for _number in range(options.rounds):
        for key, value in _scaled(options.connections, options.seconds).items():
            found[key].append(value)
    found["p99, to before"] = found["p99 ms, from the request on"].to(found["p99 ms, before"])
    found["p99, to before, once all serve"] = found["p99 ms, once all serve"].to(found["p99 ms, before"])
    goals = [
        Goal("scale: farthest from the mean", found["farthest from the mean"].median, at_most=OFF_MEAN_MAX),
        Goal("scale: connections closed", sum(found["connections closed"]), at_most=0),
        Goal("scale: messages lost", sum(found["messages lost"]), at_most=0),
        Goal("scale: p99, to before", found["p99, to before"].median, at_most=P99_MAX),
        Goal("scale: p99, to before, once all serve", found["p99, to before, once all serve"].median, at_most=P99_MAX),
    ]
    return found, goals


def _scaled(connections: int, seconds: float) -> dict[str, float]:
    with ExitStack() as stack:
        service = stack.enter_context(_service(stack, WORKERS // 2, "--handoff", "websocket"))
        held = stack.enter_context(
            client("crowd", port=service.port, idle=connections, websockets=connections, rate=ECHO_RATE)
        )
        _wait_armed(held)
        others = stack.enter_context(client("kept", port=service.port, connections=OTHERS, rate=OTHERS_RATE))
        total = 2 * connections + OTHERS
        eventually(lambda: sum(_connections(service).values()) == total, "all clients are connected")
        time.sleep(PAUSE_S)
        began = time.monotonic()
        time.sleep(seconds)
        requested = time.monotonic()
        service.ask(ScaleRequest(workers=WORKERS))
        serve = time.monotonic()
        time.sleep(MOVED_S)
        moved = time.monotonic()
        counts = list(_connections(service).values())
        seen = json.loads(others.communicate("")[0])
        told = json.loads(held.communicate("")[0])
    assert len(counts) == WORKERS
    mean = sum(counts) / WORKERS
    return {
        "farthest from the mean": max(abs(count - mean) for count in counts) / mean,
        "connections closed": told["closed"],
        "messages lost": told["lost"],
        "messages answered": told["answered"],
        "s until all serve": serve - requested,
        "p99 ms, before": _p99_ms(seen, began, requested),
        "p99 ms, from the request on": _p99_ms(seen, requested, moved),
        "p99 ms, until all serve": _p99_ms(seen, requested, serve),
        "p99 ms, once all serve": _p99_ms(seen, serve, moved),
    }


def stall(options: Any, _: dict[str, str]) -> tuple[dict[str, Samples], list[Goal]]:
    """Measure clients of four workers of which one blocks its event loop."""
    found: dict[str, Samples] = defaultdict(Samples)
    for number in range(options.rounds):
        for balance in ("auto", "off") if number % 2 == 0 else ("off", "auto"):
            for key, value in _stalled(balance, options.connections // 10, options.seconds).items():
                found[f"{balance}, {key}"].append(value)
    ratio = found["auto to off, p99"] = found["auto, p99 ms"].to(found["off, p99 ms"])
    goals = [
        Goal("stall: connections left after 2 s", max(found["auto, connections left"]), at_most=0),
        Goal("stall: p99, to off", ratio.median, at_most=STALLED_P99_MAX),
    ]
    return found, goals


def _stalled(balance: str, each: int, seconds: float) -> dict[str, float]:
    with ExitStack() as stack:
        service = stack.enter_context(_service(stack, WORKERS, "--balance", balance))
        rate = STALL_RATE * each * WORKERS
        clients = stack.enter_context(client("evenly", port=service.port, workers=WORKERS, each=each, rate=rate))
        _wait_armed(clients)
        eventually(lambda: sum(_connections(service).values()) == each * WORKERS, "all clients are connected")
        began = time.monotonic()
        time.sleep(seconds)
        before = _connections(service)
        stalls = time.monotonic()
        pid = int(http_get(service.port, "/stall")[1].split(b",")[0])
        time.sleep(max(0.0, stalls + MOVED_S - time.monotonic()))
        left = _connections(service)[pid]
        moved = time.monotonic()
        time.sleep(2 * seconds)
        ended = time.monotonic()
        seen = json.loads(clients.communicate("")[0])
    return {
        "connections before": before[pid],
        "connections left": left,
        "p99 ms, before": _p99_ms(seen, began, stalls),
        "p99 ms, in the first 2 s": _p99_ms(seen, stalls, moved),
        "p99 ms": _p99_ms(seen, moved, ended),
    }


@contextmanager
def _service(stack: ExitStack, workers: int, *args: str) -> Iterator[Service]:
    more = (*PATIENT["hotport"], "--head-timeout", "0", "--settle", "0", *args)
    with hotport(_directory(stack), "hotport", "app:app", "--workers", str(workers), *more) as service:
        yield service


def _connections(service: Service) -> dict[int, int]:
    """Connections of each worker, by its pid, as ``hotport status`` shows them."""
    while True:  # a worker that is held up may not have answered the supervisor in time
        workers = service.status()["workers"]
        if all(worker["connections"] is not None for worker in workers):
            return {worker["pid"]: worker["connections"] for worker in workers}


def _wait_armed(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "armed\n", "not all clients have connected"


def _p99_ms(seen: Sequence[tuple[float, float]], began: float, ended: float) -> float:
    """The latency of requests that were due in this window."""
    latencies = sorted(latency for due, latency in seen if began <= due < ended)
    assert latencies, "nothing was due"
    return latencies[min(len(latencies) - 1, int(len(latencies) * 0.99))] * 1000


PARTS: Final[Mapping[str, Callable[[Any, dict[str, str]], tuple[dict[str, Samples], list[Goal]]]]] = {
    "servers": side_by_side,
    "scale": scale,
    "stall": stall,
}


if __name__ == "__main__":
    sys.exit(main())
