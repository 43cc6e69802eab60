"""How much of a request is hotport's own: ASGI servers beside the least that an ASGI server can do.

The *floor* is the same parser, event loop and application with a few lines between them: no limits, no states, no
timeouts, no drain, one body in one write. Each request has a task, or with `floor, eager` none: there the application
has to answer in its first step. *bare* answers whatever it reads, without a parser and without an application.

One worker each, all of its threads on one core; the load generator runs on another. Each row starts its own servers
and loads them in turns: of its rounds the first is dropped, and every other one goes through the servers backwards.
Ratios are made round by round, of what is done in a second of the server's processor time: these can be compared on
a machine that has something else to do, too. Without access log.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import HELLO, Goal, Samples, arguments, save, show
from benchmarks.http import FASTAPI, Row, Run, Server, compared, launched, load_wrk, rates

#: The module `floor`: ``python -m floor KIND``.
FLOOR: Final = """\
import asyncio
import importlib
import sys

import httptools
import uvloop

kind, name = sys.argv[1:]
module, _, attribute = name.partition(":")
application = getattr(importlib.import_module(module), attribute)
ANSWER = b"HTTP/1.1 200 OK\\r\\ncontent-length: 13\\r\\n\\r\\nHello, world!"
END = b"HTTP/1.1 200 OK\\r\\ncontent-length: 13\\r\\nconnection: close\\r\\n\\r\\nHello, world!"


class Bare(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        if b"onnection: close" in data:
            self.transport.write(END)
            self.transport.close()
        else:
            self.transport.write(ANSWER)


class Answer:
    __slots__ = ("closes", "head", "transport")

    def __init__(self, transport, closes):
        self.transport = transport
        self.closes = closes

    async def receive(self):
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message):
        if message["type"] == "http.response.start":
            lines = [b"HTTP/1.1 200 OK\\r\\n"]
            for field, value in message["headers"]:
                lines.append(field + b": " + value + b"\\r\\n")
            lines.append(b"connection: close\\r\\n\\r\\n" if self.closes else b"\\r\\n")
            self.head = b"".join(lines)
        else:
            self.transport.write(self.head + message["body"])
            if self.closes:
                self.transport.close()


class Floor(asyncio.Protocol):
    __slots__ = ("headers", "parser", "transport", "url")

    def connection_made(self, transport):
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data):
        self.parser.feed_data(data)

    def on_message_begin(self):
        self.headers = []

    def on_url(self, url):
        self.url = url

    def on_header(self, field, value):
        self.headers.append((field.lower(), value))

    def on_message_complete(self):
        path, _, query = self.url.partition(b"?")
        answer = Answer(self.transport, not self.parser.should_keep_alive())
        running = application(
            {
                "type": "http",
                "asgi": {"version": "3.0", "spec_version": "2.4"},
                "http_version": "1.1",
                "method": self.parser.get_method().decode(),
                "scheme": "http",
                "path": path.decode(),
                "raw_path": path,
                "query_string": query,
                "root_path": "",
                "headers": self.headers,
                "client": ("127.0.0.1", 1),
                "server": ("127.0.0.1", 2),
            },
            answer.receive,
            answer.send,
        )
        if kind == "eager":
            try:
                running.send(None)
            except StopIteration:
                return
            raise RuntimeError("the application waits")
        loop.create_task(running)


async def main():
    global loop
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Bare if kind == "bare" else Floor, "127.0.0.1", 0, backlog=4096)
    await server.serve_forever()


uvloop.run(main())
"""

#: Beside hotport itself; each binds a port that it likes.
COMMANDS: Final[Mapping[str, tuple[str, ...]]] = {
    "floor": ("floor", "tasks"),
    "floor, eager": ("floor", "eager"),
    "bare": ("floor", "bare"),
    "uvicorn": (
        *("uvicorn", "--loop", "uvloop", "--http", "httptools", "--ws", "none"),
        *("--no-access-log", "--log-level", "warning", "--port", "0"),
    ),
    "granian": ("granian", "--interface", "asgi", "--no-access-log", "--log-level", "warning", "--port", "0"),
    "gunicorn": (
        *("gunicorn", "--worker-class", "asgi", "--no-control-socket", "--log-level", "warning"),
        *("--bind", "127.0.0.1:0", "--keep-alive", "60"),
    ),
}
SERVERS: Final = ("hotport", *COMMANDS)

#: Each request asks for another target: what a server remembers of the last ones does not help.
TARGETS: Final = """\
local count = 0
request = function()
  count = count + 1
  return wrk.format("GET", "/items/" .. count .. "?page=" .. count)
end
"""

RATE: Final = ("requests/CPU s",)

ROWS: Final[Mapping[str, Row]] = {
    "keep-alive": Row(
        app="apps:hello",
        measure=partial(rates, load=load_wrk),
        compare=RATE,
        goals={"floor, eager": 0.8, "granian": 2.0},
    ),
    "targets": Row(
        app="apps:hello",
        measure=partial(rates, load=partial(load_wrk, script=TARGETS)),
        compare=RATE,
        goals={"floor, eager": 0.8},
    ),
    "connections": Row(
        app="apps:hello",
        measure=partial(rates, load=partial(load_wrk, close=True)),
        compare=RATE,
        goals={"floor, eager": 0.8, "granian": 1.2},
    ),
    "fastapi": Row(app="api:app", measure=partial(rates, load=load_wrk), compare=RATE, goals={"uvicorn": 1.3}),
}


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="floor.json", rounds=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement [default: 2]")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=list(SERVERS), metavar="SERVER", help=", ".join(SERVERS)
    )
    options = parser.parse_args()
    samples: dict[str, Samples] = {}
    goals: list[Goal] = []
    for name in options.only:
        row = ROWS[name]
        names = [each for each in options.servers if row.app == "apps:hello" or each != "bare"]
        found = row.measure(Run(names, options.rounds, options.seconds, partial(started, row=row)))
        goals += compared(name, row, found, names)
        found = {f"{name}: {key}": values for key, values in found.items()}
        show(f"{options.rounds} rounds of {options.seconds:g} s", found)
        samples |= found
    save(options.output, method=(__doc__ or "").strip(), samples=samples, goals=goals, seconds=options.seconds)
    return 0


def started(name: str, row: Row) -> AbstractContextManager[Server]:
    """Start a server that serves a row's application."""
    command = (row.app, "--log-level", "warning") if name == "hotport" else (*COMMANDS[name], row.app)
    return launched(name, {"apps.py": HELLO, "api.py": FASTAPI, "floor.py": FLOOR}, command)


if __name__ == "__main__":
    sys.exit(main())
