"""How long it takes to explain a port, beside ss, lsof and psutil on the same port, and whether clients notice.

In a network namespace of its own: a port on which somebody listens and nothing else is; then the same with so many
connections established (held by several processes) and in TIME_WAIT. The commands run one after the other in each
round, from the shell's point of view: a process is started, and its output read to its end; psutil's is a Python that
prints the rows of `net_connections` for that port, and `python -c pass` is what every Python costs. Kept is also the
processor time, which other work on the machine disturbs less, and what each of them told: how many lines, and whether
it named the process, showed TIME_WAIT, said whether a bind would work, and until when not.

Clients: connect, accept and reset, one after the other, on the crowded port; a round of that while nothing else runs,
and one while `hotport why` runs over and over, on another core.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Samples, arguments, pinned, save, show
from benchmarks.generation import bound
from benchmarks.netns import fill, is_permitted, isolated, timewaits
from benchmarks.timewait import connect_us

PORT: Final = 9_900
HELD_BY_ONE: Final = 9_000  # of connections; each is two descriptors, and a process may have 20,000 here
CONNECTS: Final = 3_000

IP_BIND_ADDRESS_NO_PORT: Final = 24

PSUTIL: Final = f"""
import psutil
for row in psutil.net_connections("tcp"):
    if row.laddr.port == {PORT}:
        print(row)
"""

TOOLS: Final = {
    "hotport why": [f"{sys.prefix}/bin/hotport", "why", str(PORT)],
    "ss -tanp": ["ss", "-tanp", f"sport = :{PORT}"],
    "lsof -i": ["lsof", "-nP", f"-iTCP:{PORT}"],
    "psutil": [sys.executable, "-c", PSUTIL],
    "python -c pass": [sys.executable, "-c", "pass"],
}


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="why.json", rounds=7)
    parser.add_argument("--established", type=int, default=50_000, help="connections held on the port [default: 50000]")
    parser.add_argument("--timewait", type=int, default=50_000, help="connections in TIME_WAIT on it [default: 50000]")
    options = parser.parse_args()
    if not is_permitted():
        print("no network namespaces here: measuring on the loopback interface that everybody has")

    quiet = isolated(listening, options.rounds)
    crowd = isolated(crowded, options.rounds, options.established, options.timewait)
    samples = {f"a listener: {name}": Samples(values) for name, values in quiet["ms"].items()}
    samples |= {f"crowded: {name}": Samples(values) for name, values in crowd["ms"].items()}
    samples |= {f"connect p99 us, {name}": Samples(values) for name, values in crowd["connect p99 us"].items()}
    show(f"{options.rounds} rounds", samples)
    print("on the crowded port:", crowd["on the port"])
    for name, told in crowd["told"].items():
        print(f"{name:16}", told)
    print()
    alone, beside = (samples[f"connect p99 us, {name}"] for name in ("alone", "beside hotport why"))
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=[
            Goal("ms, a listener", samples["a listener: hotport why, ms"].median, at_most=150),
            Goal("ms, crowded", samples["crowded: hotport why, ms"].median, at_most=500),
            Goal("connect p99 beside hotport why to alone", beside.to(alone).median, at_most=2),
        ],
        told={"a listener": quiet["told"], "crowded": crowd["told"]},
        on_the_port=crowd["on the port"],
        load_average=os.getloadavg()[0],
    )
    return 0


def listening(rounds: int) -> dict[str, Any]:
    """Only a listener."""
    with bound(PORT, socket.SO_REUSEADDR):
        return timed(rounds)


def crowded(rounds: int, established: int, timewait: int) -> dict[str, Any]:
    """Many connections; those in TIME_WAIT last for a minute, so they are made last, and made again."""
    with bound(PORT, socket.SO_REUSEADDR) as listener, holding(listener, established) as held:
        fill(listener, timewait)
        found = timed(min(rounds, 3))
        found["on the port"] = {"established": held, "TIME_WAIT at the end": timewaits()}
        fill(listener, timewait)
        latencies: dict[str, list[float]] = {"alone": [], "beside hotport why": []}
        for _ in range(rounds):
            latencies["alone"].append(connect_p99_us(listener))
            with asking_all_the_time():
                latencies["beside hotport why"].append(connect_p99_us(listener))
        found["connect p99 us"] = latencies
        return found


def timed(rounds: int) -> dict[str, Any]:
    """Milliseconds of each tool, in turn, and what it told."""
    took: dict[str, list[float]] = {name: [] for name in TOOLS}
    cpu: dict[str, list[float]] = {name: [] for name in TOOLS}
    told = {}
    for _ in range(rounds):
        for name, command in TOOLS.items():
            if shutil.which(command[0]) is None:
                continue
            used, began = _children_cpu_s(), time.perf_counter()
            out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            took[name].append(round((time.perf_counter() - began) * 1e3, 1))
            cpu[name].append(round((_children_cpu_s() - used) * 1e3, 1))
            told[name] = {
                "lines": out.count("\n"),
                "names the process": str(os.getpid()) in out,
                "has TIME_WAIT": bool(re.search("TIME.?WAIT", out)),
                "says whether a bind would work": "bind and listen" in out,
                "says until when": "until" in out,
            }
    found = {f"{name}, ms": values for name, values in took.items() if values}
    found |= {f"{name}, ms of processor time": values for name, values in cpu.items() if values}
    return {"ms": found, "told": told}


def _children_cpu_s() -> float:
    """What children that have ended have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def holding(listener: socket.socket, count: int) -> Iterator[int]:
    """So many established connections, client and server, held by as many processes as it takes."""
    holders = []
    rest = count
    while rest > 0:
        share = min(rest, HELD_BY_ONE)
        rest -= share
        (read, ready), (stay, leave) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(leave)
            _hold(listener, share, f"127.0.2.{len(holders) + 1}", ready, stay)
        os.close(ready)
        os.close(stay)
        holders.append((pid, leave))
        assert os.read(read, 1), "a holder has failed"
        os.close(read)
    try:
        yield count
    finally:
        for _, leave in holders:
            os.close(leave)
        for pid, _ in holders:  # a later one has the pipes of those before it, too
            os.waitpid(pid, 0)


def _hold(listener: socket.socket, count: int, host: str, ready: int, stay: int) -> None:
    """A holder's whole life."""
    try:
        ends = []
        for _ in range(count):
            client = socket.socket()
            client.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            client.bind((host, 0))
            client.connect(("127.0.0.1", PORT))
            ends += [client, listener.accept()[0]]
        os.write(ready, b"r")
        os.read(stay, 1)
    finally:
        os._exit(0)


@contextmanager
def asking_all_the_time() -> Iterator[None]:
    """`hotport why`, over and over."""
    loop = ["sh", "-c", 'while :; do "$@" >/dev/null; done', "sh", *TOOLS["hotport why"]]
    with pinned(0), subprocess.Popen(loop, start_new_session=True) as process:
        try:
            yield
        finally:
            os.killpg(process.pid, 9)


def connect_p99_us(listener: socket.socket) -> float:
    """Of new connections, one after the other."""
    with pinned(1):
        took = [connect_us(listener) for _ in range(CONNECTS)]
    return round(statistics.quantiles(took, n=100)[98], 1)


if __name__ == "__main__":
    sys.exit(main())
