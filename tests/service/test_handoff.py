"""Connections outlive their worker, when the code changes and when it leaves for another reason: nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Condition, Thread

import pytest

from hotport.wire.messages import ScaleRequest
from tests.support import DEADLINE_S, RESTARTS, Service, eventually, loops, read_response, write_code

#: Three ways to write one service: each line comes back behind its number on this connection and the code's version.
#: And one over HTTP.
APP = """
import asyncio
import hotport

VERSION = b"{version}"

class Counter:
    def __init__(self, state=None):
        self.count, self.rest = state or (0, b"")

    def answer(self, data):
        *lines, self.rest = (self.rest + data).split(b"\\n")
        answers = [b"%d %b %b\\n" % (self.count + n, VERSION, line) for n, line in enumerate(lines, 1)]
        self.count += len(lines)
        return b"".join(answers)

    @property
    def state(self):
        return [self.count, self.rest]

@hotport.restartable
async def restartable(stream):
    counter = Counter(stream.state)
    async for data in stream:
        stream.state = None  # it does not move now: not in receive()
        answer = counter.answer(data)
        if answer:
            await stream.send(answer)
        stream.state = counter.state

async def agreeing(stream):
    counter = Counter(stream.state)
    while True:
        await hotport.hand_off(counter.state)
        answer = counter.answer(await stream.receive())
        if answer:
            await stream.send(answer)

async def asgi(scope, receive, send):
    if scope["type"] == "http":
        await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}})
        await send({{"type": "http.response.body", "body": VERSION}})

class Protocol(asyncio.Protocol):
    def __init__(self):
        self.counter = Counter()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(self.counter.answer(data))

    def export_state(self):
        return self.counter.state

    def import_state(self, state):
        self.counter = Counter(state)
"""

TARGETS = {"restartable": "stream", "agreeing": "stream", "Protocol": "protocol"}

CLIENTS = 20

#: Lines on their way at a time.
AHEAD = 8


def write_version(directory: Path, version: str) -> None:
    write_code(directory / "app.py", APP.format(version=version))


class Talk:
    """Clients in a thread, each with one connection, that send lines in torn pieces and check every answer.

    A connection that ends, or an answer that is missing, doubled or out of order, ends all of them, and the test.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._told = Condition()
        self._answers: dict[tuple[int, str], int] = {}
        self._error: BaseException | None = None
        self._is_over = False
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> Talk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    def wait(self, version: str) -> None:
        """Return when every client has had a few more answers of this version."""
        with self._told:
            wanted = {number: self._answers.get((number, version), 0) + 5 for number in range(CLIENTS)}

            def is_there() -> bool:
                return self._error is not None or all(
                    self._answers.get((number, version), 0) >= count for number, count in wanted.items()
                )

            assert self._told.wait_for(is_there, DEADLINE_S), self._answers
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            with self._told:
                self._error = error
                self._told.notify_all()

    async def _main(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        sent = 0
        for answered in itertools.count(1):
            while sent < answered + AHEAD and not self._is_over:
                sent += 1
                line = b"%d.%d\n" % (number, sent)
                cut = sent % len(line)
                writer.write(line[:cut])
                await asyncio.sleep(0.001)
                writer.write(line[cut:])
            if answered > sent:
                break
            async with asyncio.timeout(DEADLINE_S):
                answer = await reader.readline()
            count, version, line = answer.split()
            assert (int(count), line) == (answered, b"%d.%d" % (number, answered))
            with self._told:
                key = (number, version.decode())
                self._answers[key] = self._answers.get(key, 0) + 1
                self._told.notify_all()
        writer.close()
        await writer.wait_closed()


@contextmanager
def talking(directory: Path, target: str, *options: str) -> Iterator[tuple[Service, Talk]]:
    write_version(directory, "v0")
    with (
        Service(directory, f"app:{target}", "--settle", "0s", *options).wait_ready() as service,
        Talk(service.port) as talk,
    ):
        talk.wait("v0")
        yield service, talk


@pytest.mark.soak
@pytest.mark.parametrize(
    ("target", "loop"), [(target, loop) for number, target in enumerate(TARGETS) for loop in loops(number)]
)
def test_restarts_move_every_connection_and_lose_no_line(tmp_path: Path, target: str, loop: str) -> None:
    with talking(tmp_path, target, "--workers", "2", "--loop", loop) as (service, talk):
        for number in range(1, RESTARTS + 1):
            write_version(tmp_path, f"v{number}")
            assert service.restart()["connections"] == {f"moved_{TARGETS[target]}": CLIENTS}
            talk.wait(f"v{number}")
            assert service.accepted() == 0, "nobody had to connect again"


@pytest.mark.parametrize("target", TARGETS)
def test_scaling_down_moves_connections_to_the_workers_that_stay(tmp_path: Path, target: str) -> None:
    with talking(tmp_path, target, "--workers", "3") as (service, talk):
        for workers in (2, 1):
            service.ask(ScaleRequest(workers=workers))
            service.wait_serving(workers)
            eventually(lambda n=workers: len(service.worker_pids()) == n, "the others have left")  # type: ignore[misc]
            talk.wait("v0")
        (left,) = service.status()["workers"]
        assert left["connections"] == left["accepted"] + left["adopted"] == CLIENTS


@pytest.mark.soak
@pytest.mark.usefixtures("either_start")
def test_recycling_after_max_requests_moves_keep_alive_connections_to_siblings(tmp_path: Path) -> None:
    write_version(tmp_path, "v0")
    options = ("--workers", "2", "--max-requests", "100", "--max-requests-jitter", "50")
    with ExitStack() as stack:
        service = stack.enter_context(Service(tmp_path, "app:asgi", *options)).wait_ready()
        address = ("127.0.0.1", service.port)
        clients = [stack.enter_context(socket.create_connection(address, DEADLINE_S)) for _ in range(CLIENTS)]
        while len(service.log_events("worker.retired")) < RESTARTS:
            for client in clients:
                client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            for client in clients:
                assert read_response(client) == (200, b"v0")
        drained = service.log_events("drain.ended")
        assert sum(line.get("moved_http", 0) for line in drained) > 0
        assert not any("told_to_close" in line for line in drained)
