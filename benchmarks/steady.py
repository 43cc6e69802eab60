"""What hotport costs when nothing is restarted.

Speed: the same asyncio.Protocol under `hotport serve --kind protocol` and on bare uvloop (`loop.create_server`),
one process each that serves, pinned to one core, wrk on another; rounds alternate between the two, and the first of
each is dropped. Beside requests a second stand requests a second of the server's *processor* time: on a machine that
has something else to do, too, only these can be compared. Memory: the supervisor, and a worker with an ASGI
application beside uvicorn (without WebSockets) with the same one, after the same number of seconds of load.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import HELLO, Goal, Samples, arguments, cpu_s, hotport, pinned, save, script, show, wrk
from hotport.kernel.process import rss_bytes

CONNECTIONS: Final = 64

RATIO: Final = 0.97
SUPERVISOR_MIB: Final = 32.0

PROTOCOL: Final = '''\
import asyncio

ANSWER = b"HTTP/1.1 200 OK\\r\\ncontent-length: 13\\r\\n\\r\\nHello, world!"
LAST = b"HTTP/1.1 200 OK\\r\\ncontent-length: 13\\r\\nconnection: close\\r\\n\\r\\nHello, world!"


class Fixed(asyncio.Protocol):
    """Answers every request alike; wrk sends each in one piece."""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        if b"Connection: close" in data:
            self.transport.write(LAST)
            self.transport.close()
        else:
            self.transport.write(ANSWER)
'''

BARE: Final = """\
import asyncio, socket, uvloop
from apps import Fixed

async def main():
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        server = await loop.create_server(Fixed, sock=listener, backlog=4096)
        print(listener.getsockname()[1], flush=True)
        await server.serve_forever()

asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())
"""

UVICORN: Final = """\
import socket, uvicorn
from apps import hello

with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(hello, loop="uvloop", http="httptools", ws="none", access_log=False, log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])
"""


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="steady.json", rounds=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement [default: 4]")
    options = parser.parse_args()
    rounds, seconds = options.rounds, options.seconds

    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotport-bench-")))
        (directory / "apps.py").write_text(PROTOCOL + HELLO)
        quiet = ("--log-level", "warning")
        with pinned(0):
            raw = stack.enter_context(hotport(directory, "raw", "apps:Fixed", "--kind", "protocol", *quiet))
            asgi = stack.enter_context(hotport(directory, "asgi", "apps:hello", *quiet))
            bare_port, bare = stack.enter_context(script(directory, BARE))
            uvicorn_port, uvicorn = stack.enter_context(script(directory, UVICORN))

        samples: dict[str, Samples] = {}
        servers = (("hotport", raw.port, raw.worker_pids()[0]), ("uvloop", bare_port, bare.pid))
        for kind, close in (("requests", False), ("connections", True)):
            for number in range(rounds + 1):
                for name, port, pid in servers:
                    before = cpu_s(pid)
                    rate, count = _load(port, seconds, close=close)
                    if number:  # the first round warms up
                        samples.setdefault(f"{name} {kind}/s", Samples()).append(rate)
                        samples.setdefault(f"{name} {kind}/CPU s", Samples()).append(count / (cpu_s(pid) - before))
            for unit in ("s", "CPU s"):
                ours, theirs = (samples[f"{name} {kind}/{unit}"] for name in ("hotport", "uvloop"))
                samples[f"ratio {kind}/{unit}"] = ours.to(theirs)

        rss: dict[str, float] = {}
        for port in (asgi.port, uvicorn_port):
            for close in (False, True):
                _load(port, seconds, close=close)
        for name, pid in (
            ("supervisor", asgi.process.pid),
            ("worker", asgi.worker_pids()[0]),
            ("raw worker", raw.worker_pids()[0]),
            ("uvicorn", uvicorn.pid),
        ):
            rss[name] = rss_bytes(pid) / 2**20

    show(f"{rounds} rounds of {seconds:g} s", samples)
    for name, size in rss.items():
        print(f"{'RSS of ' + name:52}{size:>10.1f} MiB")
    print()
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=[
            *(
                Goal(f"{name}, hotport to bare uvloop", samples[f"ratio {name}"].median, at_least=RATIO)
                for name in ("requests/s", "requests/CPU s", "connections/s", "connections/CPU s")
            ),
            Goal("supervisor RSS in MiB", rss["supervisor"], at_most=SUPERVISOR_MIB),
            Goal("ASGI worker RSS to uvicorn's", rss["worker"] / rss["uvicorn"], at_most=1.0),
        ],
        rss_mib=rss,
        seconds=seconds,
    )
    return 0


def _load(port: int, seconds: float, *, close: bool) -> tuple[float, int]:
    return wrk(port, seconds=seconds, connections=CONNECTIONS, close=close)


if __name__ == "__main__":
    sys.exit(main())
