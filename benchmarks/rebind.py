"""What clients notice when a listening port passes from one process to the next.

Clients connect at a fixed rate (an open loop: each when it is due, whatever became of the others), the server says one
byte, and restart follows restart. Every way and every number of connections in TIME_WAIT on the port has a network
namespace of its own. Each generation is a process that imports asyncio and uvloop; each listens on every IPv4 address.

- inherit: the successor gets the listening socket itself (SCM_RIGHTS), and accepts before the old one stops.
- overlap: SO_REUSEPORT; the successor binds beside the old one, which then closes its socket at once (closed), after
  emptying its queue (drained), after emptying it while the kernel sends all newcomers to the successor
  (steered: SO_ATTACH_REUSEPORT_CBPF), or at once with net.ipv4.tcp_migrate_req=1 (migrated).
- rebind warm: SO_REUSEADDR; the successor has started and imported, the old one closes (drained: after emptying its
  queue), and only then can the successor bind.
- rebind cold: the successor is started when the old one has ended.
- plain: neither option. Bind fails while anything is in TIME_WAIT; `--patient` waits until it does not.

For each restart: the *gap* from the old generation's last accept to the successor's first one (not above zero if they
overlap; without a restart, accepts are 1/rate apart); the *hole* in which nobody listens, from before close to after
listen; the *floor*, what the same system calls take in one process that does nothing else (close, socket, setsockopt,
bind, listen), again and again, so that its caches are warm; and the clients that were refused, reset, or lost (neither
answered nor told within 5 s), by when they were due. The servers have one core, the clients another.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Samples, arguments, client, pinned, save, show
from benchmarks.generation import OPTIONS, bound, rebound
from benchmarks.netns import fill, is_permitted, isolated, sysctl, timers, timewaits
from tests.support import eventually

WAYS: Final = (
    "inherit",
    "overlap closed",
    "overlap drained",
    "overlap steered",
    "overlap migrated",
    "rebind warm",
    "rebind warm drained",
    "rebind cold",
)

#: What a client may meet that is not an answer.
LOSSES: Final = ("refused", "reset", "lost")

#: These must not lose anybody.
LOSSLESS: Final = ("inherit", "overlap steered")

PATIENCE_S: Final = 90.0


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="rebind.json", rounds=30)
    parser.add_argument("--quick", action="store_true", help="8 rounds: a minute and a half; 30 take four")
    parser.add_argument("--only", nargs="+", choices=[*WAYS, "plain"], default=[*WAYS, "plain"], metavar="WAY")
    parser.add_argument("--entries", nargs="+", type=int, default=[0, 10_000, 100_000], help="in TIME_WAIT on the port")
    parser.add_argument("--rate", type=float, default=2000.0, help="connections a second [default: 2000]")
    parser.add_argument("--seconds", type=float, default=0.1, help="between two restarts [default: 0.1]")
    parser.add_argument("--patient", action="store_true", help="wait for the end of TIME_WAIT once: a minute more")
    options = parser.parse_args()
    rounds = 8 if options.quick else options.rounds
    if not is_permitted():
        print("no network namespaces: measuring on the loopback interface that everybody has, without tcp_migrate_req")

    samples: dict[str, Samples] = {}
    control: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for entries in options.entries:
        for way in options.only:
            cell = f"{way}, {entries}"
            if way == "plain":
                patience_s = PATIENCE_S if options.patient and entries == options.entries[-1] else 2.0
                plain[str(entries)] = isolated(refused_bind, entries, patience_s)
                print(f"{cell}: {plain[str(entries)]}", flush=True)
            elif found := isolated(restarts, way, entries, rounds, options.rate, options.seconds):
                control[cell] = found.pop("control")
                series = {f"{cell}: {name}": Samples(values) for name, values in found.items()}
                show(f"{rounds} rounds", {name: values for name, values in series.items() if any(values)})
                samples |= series

    goals = [
        Goal(
            f"{way}: clients refused, reset or lost, at any count",
            sum(sum(samples[f"{way}, {entries}: {loss}"]) for entries in options.entries for loss in LOSSES),
            at_most=0,
        )
        for way in LOSSLESS
        if way in options.only
    ]
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=goals,
        control=control,
        plain=plain,
        has_namespaces=is_permitted(),
        entries=options.entries,
        rate=options.rate,
        seconds=options.seconds,
    )
    return 0


def restarts(way: str, entries: int, rounds: int, rate: float, seconds: float) -> dict[str, Any] | None:
    """Restart so many times, one way; nothing where the kernel does not have it."""
    if way == "overlap migrated" and not (is_permitted() and sysctl("net.ipv4.tcp_migrate_req", "1")):
        return None
    option = OPTIONS[way.split()[0]]
    listener = bound(0, option)
    port = listener.getsockname()[1]
    fill(listener, entries)
    floor = []
    for _ in range(rounds):
        began = time.monotonic()
        listener = rebound(listener, port, option)
        floor.append(time.monotonic() - began)

    before = timewaits()
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="hotport-bench-"))
        processes = [_generation(way, port, directory, 0, listener)]
        listener.close()
        _wait_for(f"{directory}/0")
        clients = stack.enter_context(client("churn", port=port, rate=rate))
        heard: list[dict[str, float]] = []
        starts: list[float] = []
        time.sleep(3 * seconds)
        for number in range(1, rounds + 1):
            starts.append(time.monotonic())
            if way == "rebind cold":
                heard.append(_end(processes[-1], f"{directory}/{number - 1}"))
            processes.append(_generation(way, port, directory, number))
            if way != "rebind cold":
                heard.append(_said(processes[-2]))
            _wait_for(f"{directory}/{number}")
            time.sleep(seconds)
        starts.append(time.monotonic())
        fates = json.loads(clients.communicate("")[0])
        after = timewaits()
        heard.append(_end(processes[-1], f"{directory}/{rounds}"))

    found = _per_restart(way, heard, starts, fates)
    found["floor us"] = [round(took * 1e6, 1) for took in floor]
    quiet = [(late, fate) for due, late, fate in fates if due < starts[0]]
    control = {
        "TIME_WAIT before": before,
        "TIME_WAIT after": after,
        "connections": len(fates),
        "losses before the first restart": sum(fate != "answered" for _, fate in quiet),
        "latest answer before the first restart, ms": round(max(late for late, _ in quiet) * 1e3, 3),
    }
    return {**found, "control": control}


def _per_restart(
    way: str, heard: Sequence[dict[str, float]], starts: Sequence[float], fates: Sequence[tuple[float, float, str]]
) -> dict[str, list[float]]:
    """One value for each restart.

    Args:
        heard: What each generation said.
        starts: When each restart began, and when the last one was over.
        fates: What became of the clients.
    """
    found = {"gap ms": [round((new["first"] - old["last"]) * 1e3, 4) for old, new in pairwise(heard)]}
    if way.startswith("rebind"):
        found["hole us"] = [round((new["listening"] - old["closed"]) * 1e6, 1) for old, new in pairwise(heard)]
    windows = [[(late, fate) for due, late, fate in fates if began <= due < ended] for began, ended in pairwise(starts)]
    for loss in LOSSES:
        found[loss] = [sum(fate == loss for _, fate in window) for window in windows]
    found["latest answer ms"] = [
        round(max((late for late, fate in window if fate == "answered"), default=0.0) * 1e3, 3) for window in windows
    ]
    return found


def refused_bind(entries: int, patience_s: float) -> dict[str, Any]:
    """Close a listener that had no option, and try to bind again; when that worked, and what was left until then."""
    listener = bound(0, 0)
    port = listener.getsockname()[1]
    fill(listener, entries)
    listener.close()
    closed = time.monotonic()
    attempts, error, worked = 0, None, None
    while worked is None and time.monotonic() < closed + patience_s:
        attempts += 1
        try:
            bound(port, 0).close()
            worked = round(time.monotonic() - closed, 4)
        except OSError as failure:
            error = failure.errno
            time.sleep(0.05)
    left = timers(port)
    return {
        "attempts": attempts,
        "errno": error,
        "worked after s": worked,
        "tried for s": round(time.monotonic() - closed, 1),
        "left in TIME_WAIT": len(left),
        "the last of them for s": round(max(left, default=0.0), 1),
    }


def _generation(
    way: str, port: int, directory: str, number: int, listener: socket.socket | None = None
) -> subprocess.Popen[str]:
    fd = None if listener is None else listener.fileno()
    settings = {"way": way, "port": port, "directory": directory, "number": number, "fd": fd}
    command = [sys.executable, "-P", str(Path(__file__).with_name("generation.py")), json.dumps(settings)]
    with pinned(0):
        return subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[] if fd is None else [fd], text=True)


def _said(process: subprocess.Popen[str]) -> dict[str, float]:
    """What a generation says when it has passed the port on; it has ended then."""
    line = process.communicate(timeout=30)[0]
    assert process.returncode == 0, f"a generation failed: {line}"
    said: dict[str, float] = json.loads(line)
    return said


def _end(process: subprocess.Popen[str], door: str) -> dict[str, float]:
    """Be a successor that takes nothing."""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(door)
        link.send(b"ra")
        return _said(process)


def _wait_for(door: str) -> None:
    """Wait until a generation listens, without asking it."""
    eventually(lambda: os.path.exists(door), "the generation listens")


if __name__ == "__main__":
    sys.exit(main())
