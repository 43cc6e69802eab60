"""Servers restarted under the same load, each in the way its own manual recommends, and what became of every client.

Each server gets the same clients of ``hotport churn``: requests on new connections, on kept ones, on connections that
say nothing at first, in two halves, for an answer that takes half a second, and with a body that does. All of a server
is on one core, its clients are on another. It is restarted three times, five seconds apart (granian nine, as it takes
seven). The application is the same, in ASGI or in WSGI, and takes a second to import, as real ones do. Each server has
two workers; where one serves a connection at a time there are 32, as the clients keep nearly as many busy at once.
HAProxy and nginx stand in front of two hotport workers that are *not* restarted: no application starts anew there.

"Cold" is what a service manager's restart does: SIGTERM, and a new start when the old process has ended.

Latency is that of requests on new connections, from the first restart's beginning to the end of the run. Every number
is of one machine and few restarts: a loss shows that there is a hole, none does not show that there is none.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec
import psutil

from benchmarks.common import Goal, Samples, arguments, hotport, pinned, save
from hotport.churn.fates import LOSSES
from hotport.churn.histogram import Histogram
from hotport.churn.plan import Plan
from hotport.churn.restarts import AskHotport, How, Restarts, RunCommand, SendSignal
from hotport.churn.result import Load, Result
from hotport.churn.run import Experiment, run
from hotport.churn.target import resolve
from hotport.churn.verdict import losses_by_restart, losses_of
from tests.support import DEADLINE_S, eventually, http_get

LOADS: Final = (
    Load("connect", rate=100),
    Load("keepalive", count=40, think_ms=200),
    Load("late", rate=20),
    Load("halfhead", rate=20),
    Load("slow", rate=10),
    Load("upload", rate=5),
)

#: How long clients are silent, halves are apart, and bodies and slow answers take.
SLOW_MS: Final = 500.0

AFTER_S: Final = 2.0
EVERY_S: Final = 5.0
TIMEOUT_S: Final = 5.0
TRIES: Final = 3

ASGI: Final = """\
import asyncio
import time

time.sleep(1)  # imports


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/slow":
        await asyncio.sleep(0.5)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"13")]})
    await send({"type": "http.response.body", "body": b"Hello, world!"})
"""

WSGI: Final = """\
import time

time.sleep(1)  # imports


def application(environ, start_response):
    left = int(environ.get("CONTENT_LENGTH") or 0)
    while left and (piece := environ["wsgi.input"].read(min(left, 65536))):
        left -= len(piece)
    if environ["PATH_INFO"] == "/slow":
        time.sleep(0.5)
    start_response("200 OK", [("Content-Length", "13")])
    return [b"Hello, world!"]
"""

HAPROXY: Final = """\
global
    stats socket {directory}/admin.sock mode 600 level admin expose-fd listeners
defaults
    mode http
    option idle-close-on-response
    timeout connect 5s
    timeout client 30s
    timeout server 30s
listen app
    bind 127.0.0.1:{port}
    server hotport 127.0.0.1:{behind}
"""

NGINX: Final = """\
daemon off;
worker_processes 2;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{}}
http {{
    access_log off;
    client_body_buffer_size 128k;  # its workers may not write to our directory
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    upstream app {{ server 127.0.0.1:{behind}; keepalive 32; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{ proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; }}
    }}
}}
"""

#: Starts it again whenever it has ended, like a service manager.
AGAIN: Final = 'while [ ! -e over ]; do "$@" & echo $! >pid; wait $!; done'


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A server, and how it is restarted.

    Attributes:
        command: With ``{port}``, ``{behind}`` and ``{directory}`` to be filled in; empty for hotport itself.
        restart: What the manual calls it.
        signum: Sent to the first process; or
        shell: a command that restarts it.
        every_s: From one restart to the next.
        children: As many processes are waited for before the load begins.
        is_cold: It is started again when it has ended.
        config: Its configuration file, ``config`` in its directory.
        is_proxy: It stands in front of hotport.
    """

    command: str
    restart: str
    signum: signal.Signals | None = None
    shell: str = ""
    every_s: float = EVERY_S
    children: int = 1
    is_cold: bool = False
    config: str = ""
    is_proxy: bool = False


_UVICORN: Final = "python -m uvicorn --workers 2 --port {port} --no-access-log --log-level warning apps:app"
_GUNICORN: Final = "python -m gunicorn --bind 127.0.0.1:{port} --log-level warning"

PEERS: Final = {
    "hotport": Peer(command="", restart="`hotport restart`"),
    "uvicorn": Peer(command=_UVICORN, restart="SIGHUP", signum=signal.SIGHUP),
    "uvicorn, cold": Peer(command=_UVICORN, restart="stop, start", signum=signal.SIGTERM, is_cold=True),
    "gunicorn, asgi": Peer(
        command=f"{_GUNICORN} --workers 2 --worker-class asgi apps:app", restart="SIGHUP", signum=signal.SIGHUP
    ),
    "gunicorn, sync": Peer(
        command=f"{_GUNICORN} --workers 32 --worker-class sync wsgi:application",
        restart="SIGHUP",
        signum=signal.SIGHUP,
        children=32,
    ),
    "granian": Peer(
        command="python -m granian --interface asgi --workers 2 --port {port} --no-access-log --log-level warning"
        " apps:app",
        restart="SIGHUP",
        signum=signal.SIGHUP,
        every_s=9.0,
    ),
    "hypercorn": Peer(
        command="python -m hypercorn --workers 2 --bind 127.0.0.1:{port} apps:app",
        restart="SIGHUP",
        signum=signal.SIGHUP,
    ),
    "uwsgi": Peer(
        command="uwsgi --http-socket 127.0.0.1:{port} --master --lazy-apps --processes 2 --threads 16"
        " --enable-threads --need-app --disable-logging --die-on-term --master-fifo fifo --wsgi-file wsgi.py",
        restart="chain reload",
        shell="echo c >fifo",
    ),
    "haproxy": Peer(
        command="haproxy -W -q -f config", restart="SIGUSR2", signum=signal.SIGUSR2, config=HAPROXY, is_proxy=True
    ),
    "nginx": Peer(
        command="nginx -e stderr -p {directory} -c config",
        restart="SIGHUP",
        signum=signal.SIGHUP,
        config=NGINX,
        is_proxy=True,
    ),
}


def main() -> int:
    """Measure and report; the exit code does not depend on what was lost."""
    parser = arguments(__doc__, name="peers.json", rounds=1)
    parser.add_argument("--times", type=int, default=3, help="restarts of each server in a round [default: 3]")
    parser.add_argument("--every", type=float, help="seconds between restarts [default: 5, or what the server needs]")
    parser.add_argument("--servers", nargs="+", choices=PEERS, default=list(PEERS), metavar="SERVER")
    options = parser.parse_args()

    samples: dict[str, Samples] = {}
    skipped: dict[str, str] = {}
    servers: dict[str, Any] = {}
    for name in options.servers:
        peer = PEERS[name]
        if missing := _missing(peer):
            skipped[name] = missing
            print(f"{name}: skipped, {missing}", flush=True)
            continue
        if options.every is not None:
            peer = replace(peer, every_s=options.every)
        found = [_valid(name, peer, options.times) for _ in range(options.rounds)]
        if invalid := [why for each in found for why in each["invalid"]]:
            skipped[name] = f"its run means nothing: {'; '.join(invalid)}"
            print(f"{name}: {skipped[name]}", flush=True)
            continue
        servers[name] = {
            "restart": peer.restart,
            "command": peer.command or "hotport serve --workers 2 apps:app",
            "version": _version(peer),
            "rounds": found,
        }
        for what in ("lost", "gap ms", "p99 ms"):
            samples[f"{name}: {what}"] = Samples(each[what] for each in found)
        for each in found:
            fates = ", ".join(f"{count} {fate}" for fate, count in each["losses"].items())
            print(
                f"{name:16}{each['attempts']:>6} attempts, lost: {fates or 'nothing'}; gap {each['gap ms']:.0f} ms,"
                f" p99 {each['p99 ms']:.0f} ms; replaced {each['replaced']}",
                flush=True,
            )
    goals = [Goal("hotport loses nothing", sum(samples["hotport: lost"]), at_most=0)] if "hotport" in servers else []
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=goals,
        skipped=skipped,
        loads=msgspec.to_builtins(LOADS),
        restarts=options.times,
        servers=servers,
    )
    return 0


def _valid(name: str, peer: Peer, times: int) -> dict[str, Any]:
    """A run that means something, if one of a few does: somebody else may need the processor now and then."""
    for tries in range(1, TRIES + 1):
        found = {**measured(name, peer, times), "tries": tries}
        if not found["invalid"]:
            break
    return found


def measured(name: str, peer: Peer, times: int) -> dict[str, Any]:
    """Start it, load it, restart it meanwhile, end it."""
    with tempfile.TemporaryDirectory(prefix="hotport-bench-") as text:
        directory = Path(text)
        (directory / "apps.py").write_text(ASGI)
        (directory / "wsgi.py").write_text(WSGI)
        with pinned(0), _started(directory, peer) as (pid, port, how):
            eventually(lambda: _answers(port), f"{name} answers")
            eventually(lambda: len(psutil.Process(pid).children()) >= peer.children, f"{name} has all its workers")
            plan = Plan(
                target=resolve(f"http://127.0.0.1:{port}", timeout_s=TIMEOUT_S),
                loads=list(LOADS),
                seed=1,
                begin_ns=0,
                duration_ms=(AFTER_S + times * peer.every_s) * 1000,
                timeout_ms=TIMEOUT_S * 1000,
                late_ms=1000,
                slow_ms=SLOW_MS,
                upload_bytes=65536,
            )
            before = {child.pid for child in psutil.Process(pid).children()}
            with pinned(1):
                result = asyncio.run(run(Experiment(plan, 1, Restarts(how, times, AFTER_S, peer.every_s))))
            replaced = before - {child.pid for child in psutil.Process(pid).children()}
    if not replaced:
        result.verdict.why_invalid.append("none of its processes was replaced")
    return {**_told(result), "replaced": f"{len(replaced)} of {len(before)} processes"}


def _told(result: Result) -> dict[str, Any]:
    """What of a result is kept: everything but its buckets and the machine, and a list of losses that has an end."""
    began_ms = result.restarts[0].began_ms
    latency = Histogram()
    for bucket in result.buckets:
        if bucket.at_ms + result.bucket_ms > began_ms:
            latency.merge(bucket.latency.get("connect", {}))
    losses = losses_of(result.totals)
    gaps = [gap for gap in result.accept_gap_ms if gap is not None]
    return {
        "lost": sum(losses.values()),
        "losses": losses,
        "attempts": sum(
            count
            for fates in result.totals.values()
            for fate, count in fates.items()
            if fate in {"answered", "late", *(loss.value for loss in LOSSES)}
        ),
        "gap ms": max(gaps, default=0.0),
        "p99 ms": latency.percentile(0.99) / 1000,
        "accept gaps ms": result.accept_gap_ms,
        "totals": result.totals,
        "losses by restart": losses_by_restart(result),
        "restarts": msgspec.to_builtins(result.restarts),
        "first losses": msgspec.to_builtins([found for found in result.incidents if found.fate != "late"][:20]),
        "lag us": msgspec.to_builtins(result.lag),
        "invalid": result.verdict.why_invalid,
    }


@contextmanager
def _started(directory: Path, peer: Peer) -> Iterator[tuple[int, int, How]]:
    """A server: its first process, its port, and how it is restarted."""
    if not peer.command or peer.is_proxy:
        with hotport(directory, "app", "--workers", "2", "--log-level", "warning", "apps:app") as service:
            if not peer.is_proxy:
                yield service.process.pid, service.port, AskHotport("app", service.runtime / "control.sock")
                return
            with _other(directory, peer, service.port) as started:
                yield started
        return
    with _other(directory, peer, 0) as started:
        yield started


@contextmanager
def _other(directory: Path, peer: Peer, behind: int) -> Iterator[tuple[int, int, How]]:
    """A server that is told its port: one that is started again needs the same, and granian's workers bind each."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    places = {"port": port, "behind": behind, "directory": directory}
    (directory / "config").write_text(peer.config.format(**places))
    first, *rest = shlex.split(peer.command.format(**places))
    command = [sys.executable if first == "python" else _program(first) or first, *rest]
    if peer.is_cold:
        command = ["sh", "-c", AGAIN, "sh", *command]
    with (
        (directory / "log").open("w+") as log,
        subprocess.Popen(command, cwd=directory, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        pid_file = directory / "pid"
        how: How
        if peer.shell:
            how = RunCommand(f"cd {shlex.quote(str(directory))} && {peer.shell}")
        elif peer.is_cold:
            how = SendSignal(signal.SIGTERM, pid_file=pid_file)
        else:
            assert peer.signum is not None
            how = SendSignal(peer.signum, pid=process.pid)
        try:
            yield process.pid, port, how
        except BaseException:
            print((directory / "log").read_text(), file=sys.stderr)
            raise
        finally:
            (directory / "over").touch()
            os.kill(int(pid_file.read_text()) if peer.is_cold else process.pid, signal.SIGTERM)
            try:
                process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _answers(port: int) -> bool:
    try:
        return http_get(port, timeout_s=1.0)[0] == 200
    except (OSError, IndexError):
        return False


def _program(name: str) -> str | None:
    """Beside this Python, or where Debian has it."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin")


def _missing(peer: Peer) -> str:
    words = shlex.split(peer.command) or ["python", "-m", "hotport"]
    if words[0] != "python":
        return "" if _program(words[0]) else f"{words[0]} is not installed"
    try:
        importlib.metadata.version(words[2])
    except importlib.metadata.PackageNotFoundError:
        return f"{words[2]} is not installed"
    return ""


def _version(peer: Peer) -> str:
    words = shlex.split(peer.command) or ["python", "-m", "hotport"]
    if words[0] == "python":
        return importlib.metadata.version(words[2])
    said = subprocess.run(
        [_program(words[0]) or "", "--version" if words[0] == "uwsgi" else "-v"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"\d+(\.\d+)+", said.stdout + said.stderr)
    return found[0] if found else ""


if __name__ == "__main__":
    sys.exit(main())
