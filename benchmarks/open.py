"""What a restart does to open WebSockets, and a blocked event loop to its worker, with several servers.

Each server runs the same ASGI application with two workers. Twenty WebSockets are opened and echo a message; the server
is restarted as its manual recommends, and each client waits until it is closed, or until every worker is new and it
has echoed once more. Then the server is started anew, and one request blocks the event loop of one worker for ever: how
long until the server has started another worker in its place, with its own default options. After a limit that is given
up. hotport hands WebSockets of applications that do not agree themselves only with ``--handoff websocket``.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

sys.path.pop(0)  # there is an http.py in this directory
sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from benchmarks.common import Goal, Samples, arguments, hotport, save
from benchmarks.peers import PEERS, _answers, _missing, _started, _version
from hotport.churn.restarts import AskHotport, How, SendSignal
from tests.support import HOTPORT, eventually

#: Of peers.py: those that serve WebSockets of an ASGI application.
SERVERS: Final = ("hotport", "uvicorn", "gunicorn, asgi", "granian", "hypercorn")

SOCKETS: Final = 20
LIMIT_S: Final = 100.0

APP: Final = """\
import os, time

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            await send({"type": (await receive())["type"] + ".complete"})
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})
        return
    if scope["path"] == "/block":
        with open("blocked", "w") as file:
            file.write(str(os.getpid()))
        time.sleep(10000)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})
"""


@contextmanager
def started(directory: Path, name: str) -> Iterator[tuple[int, int, How]]:
    """Start a server; hotport hands over WebSockets."""
    (directory / "apps.py").write_text(APP)
    if name != "hotport":
        with _started(directory, PEERS[name]) as found:
            yield found
        return
    with hotport(directory, "app", "--workers", "2", "--handoff", "websocket", "apps:app") as service:
        yield service.process.pid, service.port, AskHotport("app", service.runtime / "control.sock")


def workers(pid: int) -> set[int]:
    """The processes of a server but its first one."""
    return {child.pid for child in psutil.Process(pid).children(recursive=True)}


def restarted(name: str) -> Counter[str]:
    """Restart a server with open WebSockets: ``kept``, or the code with which each was closed."""
    with tempfile.TemporaryDirectory(prefix="hotport-bench-") as text, started(Path(text), name) as (pid, port, how):
        eventually(lambda: _answers(port), f"{name} answers")
        eventually(lambda: len(workers(pid)) >= 2, f"{name} has its workers")
        with ExitStack() as stack:
            clients = [stack.enter_context(connect(f"ws://127.0.0.1:{port}/")) for _ in range(SOCKETS)]
            assert all(echo(client) == "kept" for client in clients)
            before = workers(pid)
            if isinstance(how, AskHotport):
                environment = {"HOTPORT_RUNTIME_DIR": str(how.control.parent.parent), "PATH": "/usr/bin:/bin"}
                subprocess.run([*HOTPORT, "restart", how.name], env=environment, check=True, capture_output=True)
            else:
                assert isinstance(how, SendSignal)
                psutil.Process(pid).send_signal(how.signum)
            end = time.monotonic() + LIMIT_S
            while before & workers(pid) and time.monotonic() < end:
                time.sleep(0.1)
            return Counter(echo(client) for client in clients)


def echo(client: ClientConnection) -> str:
    """``kept`` if a message comes back, else how the connection ended."""
    try:
        client.send("hello")
        return "kept" if client.recv(10) == "hello" else "wrong"
    except ConnectionClosed as closed:
        return str(closed.rcvd.code) if closed.rcvd is not None else "1006"
    except TimeoutError:
        return "silent"


def blocked_s(name: str) -> float:
    """Block a worker's event loop: seconds until another one is started for it, `LIMIT_S` if none is."""
    with tempfile.TemporaryDirectory(prefix="hotport-bench-") as text, started(Path(text), name) as (pid, port, _):
        eventually(lambda: _answers(port), f"{name} answers")
        eventually(lambda: len(workers(pid)) >= 2, f"{name} has its workers")
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /block HTTP/1.1\r\nHost: bench\r\n\r\n")
            eventually(lambda: any(file.read_text() for file in Path(text).rglob("blocked")), "a worker is blocked")
            began = time.monotonic()
            before = workers(pid)
            while not workers(pid) - before and time.monotonic() - began < LIMIT_S:
                time.sleep(0.1)
            took_s = time.monotonic() - began
        for child in workers(pid):
            psutil.Process(child).kill()
        return min(took_s, LIMIT_S)


def main() -> int:
    """Measure and report."""
    parser = arguments(__doc__, name="open.json", rounds=1)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), metavar="SERVER")
    options = parser.parse_args()
    samples: dict[str, Samples] = {}
    closed, versions, skipped = {}, {}, {}
    for name in options.servers:
        if missing := _missing(PEERS[name]):
            skipped[name] = missing
            continue
        found = [restarted(name) for _ in range(options.rounds)]
        samples[f"{name}: cut"] = Samples(SOCKETS - each["kept"] for each in found)
        closed[name] = dict(sum(found, Counter()))
        samples[f"{name}: blocked s"] = Samples(blocked_s(name) for _ in range(options.rounds))
        versions[name] = _version(PEERS[name])
        print(f"{name:16} {closed[name]}; blocked for {samples[f'{name}: blocked s']}", flush=True)
    goals = [Goal("hotport cuts no WebSocket", sum(samples["hotport: cut"]), at_most=0)] if "hotport" in samples else []
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=goals,
        skipped=skipped,
        sockets=SOCKETS,
        limit_s=LIMIT_S,
        closed=closed,
        versions=versions,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
