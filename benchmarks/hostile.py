"""What one hostile client can cost, by kind of client and server.

One worker each, the same application, each server on one core, its clients on another. For each row a server is
started anew. A polite client sends requests on kept connections at a fixed rate and times them from when they were due:
first undisturbed, then beside the hostile ones. Then these leave, all at once, and the server's memory is watched until
16 MiB at most are left of what it had grown by, or for 5 s; at last it has to answer a request on a new connection.

Memory is what all processes of a server have resident, at its peak less before, divided by the hostile clients. Each
of these is bounded: it sends at most 16 MiB a second; a server that takes more than `--memory-max` is killed.

Without access log, with the default limits of each. hotport and uvicorn run on uvloop with httptools (and websockets'
sans-I/O core), hypercorn on uvloop, granian with its own runtime. "n/a" is a server that does not know what the row
needs: it does not compress, for one.

With --first all of it runs before everything else (SCHED_FIFO), which a machine that is shared with others needs. But
there a server that is never idle stands still for 50 ms of each second, in which the kernel lets the others run.

Sources: sched(7).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from benchmarks.common import HELLO, Goal, Samples, arguments, hotport, pinned, save
from benchmarks.hostile_clients import FOES, Foe
from benchmarks.http import COMMANDS as HTTP_COMMANDS
from benchmarks.http import QUIET as HTTP_QUIET
from benchmarks.http import Server, other
from hotport.kernel.process import raise_descriptor_limit, rss_bytes
from tests.support import eventually, http_get

COMMANDS: Final = {**HTTP_COMMANDS, "hypercorn": ("hypercorn", "--worker-class", "uvloop")}
QUIET: Final = {**HTTP_QUIET, "hypercorn": ("--log-level", "WARNING")}

#: How each is told a certificate and its key.
TLS: Final = {
    "hotport": ("--tls-cert", "{cert}", "--tls-key", "{key}"),
    "uvicorn": ("--ssl-certfile", "{cert}", "--ssl-keyfile", "{key}"),
    "granian": ("--ssl-certificate", "{cert}", "--ssl-keyfile", "{key}"),
    "hypercorn": ("--certfile", "{cert}", "--keyfile", "{key}"),
}

#: Requests a second of the polite client.
POLITE_RATE: Final = 200.0

#: How often the memory is looked at, in seconds.
LOOK_S: Final = 0.02

#: When it has to be back, in seconds from when the hostile clients have left; and how much of it may be missing.
BACK_S: Final = 5.0
LEFT_MIB_MAX: Final = 16.0

#: What hotport's worker may grow by for each hostile client, beside what its options allow.
GROWN_MIB_MAX: Final = 1.0

P50_RATIO_MAX: Final = 2.0
P99_RATIO_MAX: Final = 5.0

ANSWER_S: Final = 5.0

MIB: Final = 1 << 20

APPLICATION: Final = f"""\
import asyncio
{HELLO}
PIECE = b"x" * 65536


async def app(scope, receive, send):
    if scope["type"] == "websocket":
        return await talk(scope["path"], receive, send)
    if scope["type"] == "lifespan" or scope["path"] == "/":
        return await hello(scope, receive, send)
    match scope["path"]:
        case "/slow":
            await asyncio.sleep(60)
        case "/sink":
            while (await receive()).get("more_body"):
                pass
        case "/big" | "/pieces":
            await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10485760")]}})
            pieces = [PIECE] * 160 if scope["path"] == "/pieces" else [b"x" * 10485760]
            for left in reversed(range(len(pieces))):
                await send({{"type": "http.response.body", "body": pieces[left], "more_body": left > 0}})
            return
    await hello(scope, receive, send)


async def talk(path, receive, send):
    await receive()
    await send({{"type": "websocket.accept"}})
    while (event := await receive())["type"] == "websocket.receive":
        if path == "/slow":
            await asyncio.sleep(60)
        elif path == "/echo":
            try:
                await send({{"type": "websocket.send", "bytes": event["bytes"]}})
            except Exception:
                return
"""


@dataclass(slots=True)
class Found:
    """What one server did in one row.

    Attributes:
        ending: Why there are no figures, or not all; empty if the server is there as before.
    """

    ending: str = ""
    grown_mib: float | None = None
    left_mib: float | None = None
    back_s: float | None = None
    before: tuple[float, float] | None = None
    meanwhile: tuple[float, float] | None = None
    lost: int = 0
    clients: dict[str, Any] | None = None


class Watch:
    """The memory of a server's processes, as they are now; it is killed beyond a size.

    Attributes:
        is_over: It was.
    """

    def __init__(self, server: Server, bytes_max: int) -> None:
        self.server = server
        self.processes = [psutil.Process(pid) for pid in server.pids()]
        self.bytes_max = bytes_max
        self.before = self.peak = self.now()
        self.is_over = False

    def now(self) -> int:
        """Bytes; 0 of a process that has ended."""
        total = 0
        for process in self.processes:
            with suppress(OSError):
                total += rss_bytes(process.pid)
        return total

    def look(self) -> int:
        """Bytes now, after a moment."""
        time.sleep(LOOK_S)
        size = self.now()
        self.peak = max(self.peak, size)
        if size > self.bytes_max and not self.is_over:
            self.is_over = True
            self.kill()
        return size

    @property
    def has_changed(self) -> bool:
        """A process has ended, or been replaced."""
        try:
            return set(self.server.pids()) != {process.pid for process in self.processes}
        except psutil.NoSuchProcess:
            return True

    def kill(self) -> None:
        """End every process, the first one first: it would replace the others."""
        with suppress(psutil.NoSuchProcess):
            self.processes += psutil.Process(self.server.pid).children(recursive=True)
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def measured(server: Server, name: str, *, quiet_s: float, seconds: float, bytes_max: int) -> Found:
    """One row of one server, which is killed at the end: some would wait for applications that run."""
    foe, found = FOES[name], Found()
    watch = Watch(server, bytes_max)
    with ExitStack() as stack:
        stack.callback(watch.kill)
        asks = stack.enter_context(_client("polite", port=server.port, rate=POLITE_RATE, tls=bool(foe.tls)))
        crowd = stack.enter_context(_client("hostile", port=server.port, name=name, seconds=seconds))
        assert asks.stdout is not None
        assert crowd.stdout is not None
        assert crowd.stdin is not None
        for process in (crowd, asks):
            assert process.stdout is not None
            assert process.stdout.readline() == "armed\n", f"{server.name} serves no polite client of the row {name!r}"
        watch.before = watch.peak = watch.now()
        quiet = _window(watch, quiet_s)
        crowd.stdin.write("\n")
        crowd.stdin.flush()
        attack = _window(watch, seconds)
        found.clients = json.loads(crowd.stdout.readline())
        crowd.kill()  # the kernel ends their connections
        crowd.wait()
        left_at = time.monotonic()
        while not watch.is_over:
            size, elapsed = watch.look(), time.monotonic() - left_at
            found.left_mib = max(0.0, (size - watch.before) / MIB)
            if found.left_mib <= LEFT_MIB_MAX:
                found.back_s = elapsed
                break
            if elapsed > BACK_S:
                break
        requests = json.loads(asks.communicate()[0])
        if not watch.is_over and not foe.tls and not _answers(server.port):
            found.ending = "answers no more"
        elif watch.has_changed:
            found.ending = "a process ended"
    found.grown_mib = (watch.peak - watch.before) / MIB / foe.clients
    found.before, found.meanwhile = _percentiles(requests, quiet), _percentiles(requests, attack)
    found.lost = sum(1 for due, _, is_answered in requests if not is_answered)
    if watch.is_over:
        found.ending = f"killed at {bytes_max / MIB:,.0f} MiB"
    elif found.clients["unlike"]:
        found = Found(ending="n/a", clients=found.clients)
    return found


def _window(watch: Watch, seconds: float) -> tuple[float, float]:
    """Look at the memory for so long; from when to when that was (CLOCK_MONOTONIC)."""
    begin = time.monotonic()
    while time.monotonic() < begin + seconds:
        watch.look()
    return begin, time.monotonic()


def _percentiles(requests: Sequence[tuple[float, float, bool]], window: tuple[float, float]) -> tuple[float, float]:
    """p50 and p99 of the latency in ms of what was due in a window; what was given up took at least so long."""
    latencies = sorted(latency for due, latency, _ in requests if window[0] <= due < window[1])
    assert latencies, "the polite client has sent nothing"
    return tuple(latencies[min(len(latencies) - 1, int(len(latencies) * q))] * 1000 for q in (0.5, 0.99))  # type: ignore[return-value]


def _answers(port: int) -> bool:
    try:
        return http_get(port, timeout_s=ANSWER_S)[0] == 200
    except (OSError, IndexError, ValueError):
        return False


@contextmanager
def _client(kind: str, **args: Any) -> Iterator[subprocess.Popen[str]]:
    command = (sys.executable, "-P", str(Path(__file__).with_name("hostile_clients.py")), kind, json.dumps(args))
    with (
        pinned(1),
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def started(name: str, foe: Foe) -> Iterator[Server]:
    """Start a server on its core, and wait until it listens."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotport-bench-")))
        (directory / "apps.py").write_text(APPLICATION)
        files = _certificate(directory) if foe.tls else {}
        more = [*QUIET[name], *(part.format(**files) for part in TLS[name] if foe.tls)]
        with pinned(0):
            if name == "hotport":
                service = stack.enter_context(hotport(directory, name, "apps:app", *more))
                port, pid = service.port, service.process.pid
            else:
                bind = ("--bind", "127.0.0.1:0") if name == "hypercorn" else ("--port", "0")
                port, pid = stack.enter_context(other(directory, (*COMMANDS[name], *more, *bind, "apps:app")))
        if not foe.tls:
            eventually(partial(_answers, port), f"{name} answers")
        yield Server(name, port, pid, directory)


def _certificate(directory: Path) -> dict[str, str]:
    """For loopback, from an authority that is not kept."""
    import trustme

    leaf = trustme.CA().issue_cert("localhost")
    files = {"cert": directory / "cert.pem", "key": directory / "key.pem"}
    files["cert"].write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    files["key"].write_bytes(_pkcs8(leaf.private_key_pem.bytes()))
    return {name: str(path) for name, path in files.items()}


def _pkcs8(pem: bytes) -> bytes:
    """A private key as granian wants it."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(pem, None)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="hostile.json", rounds=1)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each row, beside hostile clients [default: 1.5]")
    parser.add_argument("--only", nargs="+", choices=FOES, default=list(FOES), metavar="ROW", help=", ".join(FOES))
    parser.add_argument(
        "--servers", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="SERVER", help=", ".join(COMMANDS)
    )
    parser.add_argument("--memory-max", type=int, default=1536, metavar="MIB", help="of a server [default: 1536]")
    parser.add_argument("--first", action="store_true", help="run before everything else on this machine")
    options = parser.parse_args()
    raise_descriptor_limit()
    if options.first:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # what is started inherits it

    samples: dict[str, Samples] = defaultdict(Samples)
    rows: dict[str, Any] = {}
    for name in options.only:
        foe = FOES[name]
        endings: dict[str, list[str]] = {}
        for server_name in options.servers:
            for _ in range(options.rounds):
                found = Found()
                try:
                    with started(server_name, foe) as server:
                        found = measured(
                            server,
                            name,
                            quiet_s=options.seconds / 2,
                            seconds=options.seconds,
                            bytes_max=options.memory_max * MIB,
                        )
                except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as error:
                    print(f"{name}, {server_name}: {error!r}", flush=True)
                    found.ending = found.ending or "not measured"
                endings.setdefault(server_name, []).append(found.ending)
                for key, value in _figures(found):
                    samples[f"{name}: {server_name} {key}"].append(value)
                print(f"{name:16}{server_name:10}{_line(found)}", flush=True)
        rows[name] = {"what": foe.what, "clients": foe.clients, "allowed MiB": foe.allowed / MIB, "endings": endings}
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=_goals(rows, samples),
        rows=rows,
        seconds=options.seconds,
        first=options.first,
        servers=options.servers,
    )
    return 0


def _figures(found: Found) -> Iterator[tuple[str, float]]:
    if found.grown_mib is None:
        return
    yield "MiB a client", found.grown_mib
    if found.left_mib is not None:
        yield "MiB left", found.left_mib
    for what, pair in (("undisturbed", found.before), ("meanwhile", found.meanwhile)):
        if pair is not None:
            yield f"p50 ms {what}", pair[0]
            yield f"p99 ms {what}", pair[1]
    yield "polite requests lost", found.lost
    assert found.clients is not None
    yield "MiB sent", found.clients["sent"] / MIB
    yield "connections ended", found.clients["ended"]


def _line(found: Found) -> str:
    if found.grown_mib is None or found.before is None or found.meanwhile is None or found.clients is None:
        return found.ending
    back = "not back" if found.back_s is None else f"back in {found.back_s:.2f} s"
    return (
        f"{found.grown_mib:9.2f} MiB a client, {found.left_mib or 0:7.1f} left, {back:14} "
        f"p50 {found.before[0]:.2f} -> {found.meanwhile[0]:.2f} ms, p99 {found.before[1]:.2f} -> "
        f"{found.meanwhile[1]:.2f} ms, {found.lost} lost; {found.clients['sent'] / MIB:.1f} MiB sent, "
        f"{found.clients['ended']} of {found.clients['made']} ended  {found.ending}"
    )


def _goals(rows: dict[str, Any], samples: dict[str, Samples]) -> list[Goal]:
    """What hotport is to keep to in each row."""
    goals = []
    for name, row in rows.items():
        if "hotport" not in row["endings"]:
            continue
        own = partial("{}: hotport {}".format, name)
        goals.append(Goal(f"{name}: ended badly", len(list(filter(None, row["endings"]["hotport"]))), at_most=0))
        if not samples.get(own("MiB a client")):
            continue
        grown = GROWN_MIB_MAX + row["allowed MiB"]
        goals.append(Goal(f"{name}: MiB a client", samples[own("MiB a client")].median, at_most=grown))
        if left := samples.get(own("MiB left")):
            goals.append(Goal(f"{name}: MiB left", left.median, at_most=LEFT_MIB_MAX))
        for what, most in (("p50 ms", P50_RATIO_MAX), ("p99 ms", P99_RATIO_MAX)):
            ratio = samples[own(f"{what} meanwhile")].to(samples[own(f"{what} undisturbed")]).median
            goals.append(Goal(f"{name}: {what}, to undisturbed", ratio, at_most=most))
    return goals


if __name__ == "__main__":
    sys.exit(main())
