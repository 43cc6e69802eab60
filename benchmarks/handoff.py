"""What it costs to hand connections to the next generation, and what it costs to be able to.

A service with one worker is restarted while clients hold idle keep-alive connections to it, each of which has had an
answer and gets another one after the restart, from the new generation. The application, loaded by every worker, notes
when its worker begins to drain, when the next one has taken the last connection, and how much processor time each of
them has used meanwhile. A connection has *moved* when the new generation serves it, and its descriptor is closed in
the old one; *both sides* are the processor time of both workers for that, start and end of the draining included.

The *floor* is what the kernel and uvloop need for as many descriptors in a process that does nothing else: send them
in batches of 253 over a socketpair and receive them (SCM_RIGHTS), make transports of them, close the old ones. Rounds
alternate between both.

*Waiting*: while all of them are held, another client sends requests at a fixed rate on kept connections (an open loop:
each when it is due, and its latency counts from then on), and restarts alternate with windows of the same length
without one. A difference is of two neighbours. "At the move" are requests that were due from 50 ms before the draining
to its end; of those in the window without a restart, the ones at the same distance from its beginning.

*Steadily*: requests/s of a server that is not restarted, with `--handoff off` and with `--handoff auto`, and, if
`--before` names the `src` directory of another checkout, of that one; one process each that serves, pinned to one
core, wrk on another, in alternating rounds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import HELLO, Goal, Samples, arguments, client, cpu_s, hotport, pinned, save, script, show, wrk
from hotport.wire.messages import Report, RestartRequest
from tests.support import Service, eventually

MOVED_MS: Final = 300.0
BOTH_US: Final = 15.0
WAIT_MS: Final = 50.0
STEADY: Final = 0.98

#: Connections that carry requests: of wrk, and of the client at a fixed rate.
CONNECTIONS: Final = 64

#: Requests from here before the draining to its end may have met it.
NEAR_S: Final = 0.05

#: Says its generation in as many bytes as others say hello, and writes down what its worker does for the others.
APPLICATION: Final = (
    HELLO.replace('b"Hello, world!"', 'b"%5d, world!" % scope["extensions"]["hotport"]["generation"]')
    + """

import json, time
from asyncio import sleep
from hotport.worker.server import ConnectionServer


def noted(name):
    step = getattr(ConnectionServer, name)

    async def noting(*args, **options):
        began, cpu = time.monotonic(), time.process_time()
        try:
            return await step(*args, **options)
        finally:
            ended = time.monotonic()
            await sleep(0)  # transports close their sockets in the next turn of the loop
            cpu = time.process_time() - cpu
            with open("moves", "a") as file:
                file.write(json.dumps({"step": name, "began": began, "ended": ended, "cpu": cpu}) + "\\n")

    setattr(ConnectionServer, name, noting)


noted("drain")
noted("take")
"""
)

FLOOR: Final = """\
import asyncio, json, os, socket, sys, time, uvloop
from hotport.kernel.scm import DESCRIPTORS_MAX, receive_descriptors, send_descriptors

async def main(count):
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()

    async def attached(socks):
        attaching = [loop.connect_accepted_socket(asyncio.Protocol, sock) for sock in socks]
        for each in attaching:
            each.send(None)
        await asyncio.sleep(0)  # connection_made is called
        return [finished(each) for each in attaching]

    def finished(attaching):
        try:
            attaching.send(None)
        except StopIteration as end:
            return end.value[0]

    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        print(listener.getsockname()[1], flush=True)
        socks = []
        for _ in range(count):
            sock, _ = listener.accept()
            sock.setblocking(False)
            socks.append(sock)
        transports = await attached(socks)

    for _ in sys.stdin:
        passing = 0.0
        began, cpu = time.monotonic(), time.process_time()
        moved = []
        while transports:
            batch, transports = transports[:DESCRIPTORS_MAX], transports[DESCRIPTORS_MAX:]
            fds = [transport.get_extra_info("socket").fileno() for transport in batch]
            before = time.process_time()
            send_descriptors(ours, b"x", fds)
            _, fds, _ = receive_descriptors(theirs, 1)
            passing += time.process_time() - before
            for transport in batch:
                transport.abort()
            moved += await attached([socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fd) for fd in fds])
        transports = moved
        cpu = time.process_time() - cpu
        print(json.dumps({"passing": passing, "cpu": cpu, "wall": time.monotonic() - began}), flush=True)

asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main(int(sys.argv[1])))
os._exit(0)
"""


class Move(NamedTuple):
    """One restart's: the draining on CLOCK_MONOTONIC, and both workers' seconds of processor time."""

    began: float
    ended: float
    old_cpu: float
    new_cpu: float


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="handoff.json", rounds=9)
    parser.add_argument("--counts", nargs="+", type=int, default=[1000, 10_000], help="idle connections")
    parser.add_argument("--rate", type=float, default=2000.0, help="requests a second while restarting [default: 2000]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each wrk [default: 4]")
    parser.add_argument("--before", type=Path, help="`src` of another checkout, to be measured steadily as well")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    options = parser.parse_args()
    samples: dict[str, Samples] = {}
    goals: list[Goal] = []
    for name in options.only:
        found, reached = PARTS[name](options)
        show(f"{options.rounds} rounds", found)
        print(f"load average {os.getloadavg()[0]:.1f}\n", flush=True)
        samples |= found
        goals += reached
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=goals,
        counts=options.counts,
        rate=options.rate,
        seconds=options.seconds,
        connections=CONNECTIONS,
    )
    return 0


# -- what a move costs --------------------------------------------------------------------------------------


def moving(options: Any) -> tuple[dict[str, Samples], list[Goal]]:
    """Time and processor time of moves, beside the floor."""
    samples: dict[str, Samples] = {}
    goals = []
    for count in options.counts:
        with ExitStack() as stack:
            service = stack.enter_context(_service())
            asked = stack.enter_context(_held(service.port, count))
            floor = stack.enter_context(_floor(service.directory, count))
            asked()
            found: dict[str, Samples] = {}
            for number in range(options.rounds + 1):
                move = _moved(service, count)
                assert asked() == f"{number + 2:5d}, world!", "the old generation has answered"
                bare = floor()
                values = {
                    "moved ms": (move.ended - move.began) * 1e3,
                    "old worker us": move.old_cpu / count * 1e6,
                    "new worker us": move.new_cpu / count * 1e6,
                    "both sides us": (move.old_cpu + move.new_cpu) / count * 1e6,
                    "floor us": bare["cpu"] / count * 1e6,
                    "floor us, passing": bare["passing"] / count * 1e6,
                    "floor ms": bare["wall"] * 1e3,
                }
                for name, value in values.items() if number else ():  # the first round warms up
                    found.setdefault(name, Samples()).append(value)
        found["both sides to floor"] = found["both sides us"].to(found["floor us"])
        samples |= {f"{count} idle: {name}": values for name, values in found.items()}
        goals += [
            Goal(f"{count} idle connections: moved within, ms", found["moved ms"].median, at_most=MOVED_MS),
            Goal(f"{count}: us of processor time for each", found["both sides us"].median, at_most=BOTH_US),
        ]
    return samples, goals


@contextmanager
def _service() -> Iterator[Service]:
    quiet = ("--log-level", "warning", "--settle", "0", "--keep-alive", "1h", "--head-timeout", "0")
    with tempfile.TemporaryDirectory(prefix="hotport-bench-") as directory:
        Path(directory, "app.py").write_text(APPLICATION)
        with hotport(Path(directory), "moving", "app:hello", *quiet) as service:
            yield service


@contextmanager
def _held(port: int, count: int) -> Iterator[Callable[[], str]]:
    """So many open connections, held by another process; ask them all, and hear what all of them are answered."""
    with client("held", port=port, connections=count) as process:
        yield partial(_next, process)


def _next(process: subprocess.Popen[str]) -> Any:
    """What a process has to say to a line."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _moved(service: Service, count: int) -> Move:
    """Restart; how its connections moved, all of them."""
    notes = service.directory / "moves"
    notes.unlink(missing_ok=True)
    report = service.ask(RestartRequest())[-1]
    assert isinstance(report, Report), report
    assert report.connections == {"moved_http": count}, report
    eventually(lambda: notes.exists() and len(notes.read_text().splitlines()) == 2, "both workers write it down")
    steps = {step["step"]: step for step in map(json.loads, notes.read_text().splitlines())}
    old, new = steps["drain"], steps["take"]
    return Move(old["began"], max(old["ended"], new["ended"]), old["cpu"], new["cpu"])


@contextmanager
def _floor(directory: Path, count: int) -> Iterator[Callable[[], dict[str, float]]]:
    """The same number of descriptors, passed by a process that does nothing else, whenever it is called."""
    with script(directory, FLOOR, str(count)) as (port, process), _held(port, count):
        yield partial(_next, process)


# -- what clients wait for ----------------------------------------------------------------------------------


def waiting(options: Any) -> tuple[dict[str, Samples], list[Goal]]:
    """Latency with and without a restart, while so many idle connections move."""
    samples: dict[str, Samples] = {}
    goals = []
    for count in options.counts:
        with ExitStack() as stack:
            service = stack.enter_context(_service())
            asked = stack.enter_context(_held(service.port, count))
            asked()
            load = stack.enter_context(client("kept", port=service.port, connections=CONNECTIONS, rate=options.rate))
            _wait_for(service, count + CONNECTIONS)
            restarts: list[tuple[float, Move, float]] = []
            for _ in range(options.rounds + 1):
                time.sleep(0.2)
                began = time.monotonic()
                move = _moved(service, count + CONNECTIONS)
                ended = time.monotonic()
                restarts.append((began, move, ended))
                time.sleep(0.2 + ended - began)
            seen: list[tuple[float, float]] = json.loads(load.communicate("")[0])
            assert asked() == f"{options.rounds + 2:5d}, world!", "the old generation has answered"
        found = _waited(seen, restarts[1:])
        samples |= {f"{count} idle: {name}": values for name, values in found.items()}
        goals += [
            Goal(f"{count} idle: {name} with a restart", found[name].median, at_most=WAIT_MS)
            for name in ("longer, p99.9 ms", "longer at the move, max ms")
        ]
    return samples, goals


def _wait_for(service: Service, connections: int) -> None:
    eventually(lambda: service.status()["workers"][0]["connections"] == connections, "all clients are connected")


def _waited(seen: Sequence[tuple[float, float]], restarts: Sequence[tuple[float, Move, float]]) -> dict[str, Samples]:
    """Milliseconds, one value for each restart."""

    def latencies(began: float, ended: float) -> list[float]:
        return sorted(latency * 1e3 for due, latency in seen if began <= due < ended)

    found: dict[str, Samples] = {}
    for began, move, ended in restarts:
        later = ended - began + 0.1  # from a moment of the restart to that of the quiet window behind it
        near = (move.began - NEAR_S, move.ended)
        whole = [latencies(began + delay, ended + delay) for delay in (0.0, later)]
        at_move = [latencies(near[0] + delay, near[1] + delay) for delay in (0.0, later)]
        with_restart, without = (_rank(values, 0.999) for values in whole)
        worst, quiet = (values[-1] for values in at_move)
        values = {
            "p50 ms": statistics.median(whole[0]),
            "p99.9 ms": with_restart,
            "p99.9 ms without": without,
            "longer, p99.9 ms": with_restart - without,
            "max ms at the move": worst,
            "max ms without": quiet,
            "longer at the move, max ms": worst - quiet,
        }
        for name, value in values.items():
            found.setdefault(name, Samples()).append(value)
    return found


def _rank(values: Sequence[float], share: float) -> float:
    """A percentile of sorted values, by the nearest rank."""
    return values[min(len(values) - 1, int(len(values) * share))]


# -- what it costs when nothing moves -----------------------------------------------------------------------


def steadily(options: Any) -> tuple[dict[str, Samples], list[Goal]]:
    """Requests/s with and without the possibility to move."""
    variants = {"off": None, "auto": None, **({"before": options.before} if options.before else {})}
    samples: dict[str, Samples] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotport-bench-")))
        (directory / "app.py").write_text(HELLO)
        servers = []
        for name, src in variants.items():
            more = () if src else ("--handoff", name)
            with pinned(0):
                args = ("app:hello", "--log-level", "warning", *more)
                service = stack.enter_context(hotport(directory, name, *args, src=src))
            servers.append((name, service.port, service.worker_pids()[0]))
        for number in range(options.rounds + 1):
            for name, port, pid in servers[number % len(servers) :] + servers[: number % len(servers)]:
                before = cpu_s(pid)
                rate, requests = wrk(port, seconds=options.seconds, connections=CONNECTIONS)
                if number:  # the first round warms up
                    samples.setdefault(f"{name}: requests/s", Samples()).append(rate)
                    samples.setdefault(f"{name}: requests/CPU s", Samples()).append(requests / (cpu_s(pid) - before))
    goals = []
    for other in [name for name in variants if name != "auto"]:
        for unit in ("requests/s", "requests/CPU s"):
            ratio = samples[f"auto: {unit}"].to(samples[f"{other}: {unit}"])
            samples[f"auto to {other}, {unit}"] = ratio
            goals.append(Goal(f"{unit}, auto to {other}", ratio.median, at_least=STEADY))
    return samples, goals


PARTS: Final = {"moving": moving, "waiting": waiting, "steadily": steadily}


if __name__ == "__main__":
    sys.exit(main())
