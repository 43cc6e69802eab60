"""Connections outlive the code, seen by clients that nobody here wrote: each keeps the connections that it has."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from websockets.asyncio.client import connect

from tests.support import DEADLINE_S, RESTARTS, Service, loops, need, write_code

APP = """
import asyncio, os

VERSION = "{version}"

async def app(scope, receive, send):
    if scope["type"] == "websocket":
        return await echo(scope["extensions"]["hotport"], receive, send)
    if scope["type"] != "http":
        raise NotImplementedError
    await asyncio.sleep(0.01)
    status = 410 if os.path.exists("over") else 200
    await send({{"type": "http.response.start", "status": status, "headers": [(b"content-length", b"3")]}})
    await send({{"type": "http.response.body", "body": VERSION.encode()}})

async def echo(hotport, receive, send):
    count = hotport["state"] or 0
    hotport["movable"](lambda: count)
    await receive()
    await send({{"type": "websocket.accept"}})
    while (message := await receive())["type"] == "websocket.receive":
        count += 1
        if message.get("text") is not None:
            await send({{"type": "websocket.send", "text": f"{{count}} {{VERSION}} " + message["text"]}})
        else:
            await send({{"type": "websocket.send", "bytes": b"%d %b " % (count, VERSION.encode()) + message["bytes"]}})
"""

#: Connections of a pool, and WebSockets.
CLIENTS = 10

#: Messages on their way at a time.
AHEAD = 16

VERSIONS = [f"v{number:02}" for number in range(RESTARTS + 1)]


def deploy(directory: Path, version: str) -> None:
    write_code(directory / "app.py", APP.format(version=version))


@pytest.fixture
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    deploy(tmp_path, VERSIONS[0])
    options = ("--workers", "2", "--loop", request.param, "--keep-alive", "1h", "--settle", "0s")
    with Service(tmp_path, "app:app", *options) as running:
        yield running.wait_ready()


class Answers:
    """How often each version has answered."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._changed = asyncio.Event()

    def add(self, version: str) -> None:
        self._counts[version] += 1
        self._changed.set()

    async def wait(self, version: str) -> None:
        """Return when it has answered everybody a few times, as far as one can tell."""
        async with asyncio.timeout(DEADLINE_S):
            while self._counts[version] < 5 * CLIENTS:
                self._changed.clear()
                await self._changed.wait()


async def restart(service: Service, answers: Answers, fates: Callable[[], dict[str, int]]) -> None:
    """Restart into each version when the one before has answered; each time `fates` become of the connections."""
    for version in VERSIONS[1:]:
        await answers.wait(VERSIONS[VERSIONS.index(version) - 1])
        deploy(service.directory, version)
        report = await asyncio.to_thread(service.restart)
        assert report["connections"] == fates()
    await answers.wait(VERSIONS[-1])


def on(number: int) -> pytest.MarkDecorator:
    """Requests move on both event loops, and so do WebSockets; each client of them sees one, or in the soak both."""
    return pytest.mark.parametrize("service", loops(number), indirect=True)


async def while_asking(
    service: Service, ask: Callable[[int, Answers], Coroutine[Any, Any, None]], fates: Callable[[], dict[str, int]]
) -> None:
    """`restart` while `CLIENTS` tasks do not stop asking."""
    answers = Answers()
    async with asyncio.TaskGroup() as tasks:
        asking = [tasks.create_task(ask(number, answers)) for number in range(CLIENTS)]
        await restart(service, answers, fates)
        for each in asking:
            each.cancel()


@pytest.mark.soak
@on(0)
def test_aiohttp_s_pool_keeps_its_connections(service: Service) -> None:
    async def main() -> None:
        connects = 0

        async def on_connect(*_: object) -> None:
            nonlocal connects
            connects += 1

        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(on_connect)
        pool = aiohttp.TCPConnector(keepalive_timeout=3600)  # else it closes those that it has not used for a while
        url = f"http://127.0.0.1:{service.port}"
        async with aiohttp.ClientSession(url, connector=pool, trace_configs=[trace]) as session:

            async def ask(_: int, answers: Answers) -> None:
                while True:
                    async with session.get("/") as answer:
                        assert answer.status == 200
                        answers.add(await answer.text())

            await while_asking(service, ask, lambda: {"moved_http": connects})

    asyncio.run(main())


@pytest.mark.soak
@on(1)
def test_httpx_s_pool_keeps_its_connections(service: Service) -> None:
    url = f"http://127.0.0.1:{service.port}/"

    async def main() -> None:
        connects = 0

        async def trace(event: str, _: object) -> None:
            nonlocal connects
            connects += event == "connection.connect_tcp.complete"

        limits = httpx.Limits(keepalive_expiry=None)  # else it closes those that it has not used for five seconds
        async with httpx.AsyncClient(timeout=DEADLINE_S, verify=False, limits=limits) as client:

            async def ask(_: int, answers: Answers) -> None:
                while True:
                    answer = await client.get(url, extensions={"trace": trace})
                    assert answer.status_code == 200
                    answers.add(answer.text)

            await while_asking(service, ask, lambda: {"moved_http": connects})

    asyncio.run(main())


@pytest.mark.soak
@on(2)
def test_curl_keeps_its_connection(service: Service) -> None:
    arguments = ["--silent", "--no-buffer", "--rate", "100/s", "--fail-early", "--fail"]
    arguments += ["--write-out", " %{http_code} %{num_connects}\n", f"http://127.0.0.1:{service.port}/[1-1000000]"]

    async def main() -> None:
        answers = Answers()
        curl = await asyncio.create_subprocess_exec(need("curl"), *arguments, stdout=asyncio.subprocess.PIPE)

        async def read() -> int:
            assert curl.stdout is not None
            connects = 0
            async for line in curl.stdout:
                *version, status, new = line.decode().split()
                connects += int(new)
                if status == "410":
                    return connects
                assert status == "200"
                answers.add(*version)
            raise AssertionError("curl has ended")

        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(read())
            await restart(service, answers, lambda: {"moved_http": 1})
            (service.directory / "over").touch()
            assert await reading == 1
        await curl.wait()

    asyncio.run(main())


async def converse(
    number: int,
    answers: Answers,
    send: Callable[[str | bytes], Awaitable[None]],
    receive: Callable[[], Awaitable[str | bytes]],
) -> None:
    """Say texts and byte strings of all sizes, many at a time; each is answered once, in order, with its number."""
    under_way: deque[str | bytes] = deque()
    room = asyncio.Semaphore(AHEAD)

    async def hear() -> None:
        for count in itertools.count(1):
            answer = await receive()
            said = under_way.popleft()
            assert type(answer) is type(said)
            told, version, rest = as_bytes(answer).split(b" ", 2)
            assert (int(told), rest) == (count, as_bytes(said))
            answers.add(version.decode())
            room.release()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(hear())
        for count in itertools.count(1):
            await room.acquire()
            text = f"{number}.{count} {'x' * (count * 37 % 3000)}"
            said = text if count % 2 else text.encode()
            under_way.append(said)
            await send(said)
            if count % AHEAD == 0:
                await asyncio.sleep(0.02)  # load, but not so much that what is tested gets no processor


def as_bytes(message: str | bytes) -> bytes:
    return message.encode() if isinstance(message, str) else message


async def fragments(message: Any) -> AsyncIterator[Any]:
    for at in range(0, len(message), 1000):
        yield message[at : at + 1000]
        await asyncio.sleep(0.001)


@pytest.mark.soak
@on(4)
def test_websockets_client_stays_connected_with_compression_and_fragments(service: Service) -> None:
    url = f"ws://127.0.0.1:{service.port}/"

    async def talk(number: int, answers: Answers) -> None:
        async with connect(url, open_timeout=DEADLINE_S) as client:
            assert client.response is not None
            assert "permessage-deflate" in client.response.headers["Sec-WebSocket-Extensions"]

            async def send(said: str | bytes) -> None:
                await client.send(fragments(said) if len(said) > 2000 else said)

            await converse(number, answers, send, client.recv)

    asyncio.run(while_asking(service, talk, lambda: {"moved_websocket": CLIENTS}))


@pytest.mark.soak
@on(3)
def test_aiohttp_s_websocket_stays_connected_with_compression(service: Service) -> None:
    async def main() -> None:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{service.port}") as session:

            async def talk(number: int, answers: Answers) -> None:
                async with session.ws_connect("/", compress=15) as websocket:
                    assert websocket.compress

                    async def send(said: str | bytes) -> None:
                        await (websocket.send_str(said) if isinstance(said, str) else websocket.send_bytes(said))

                    async def receive() -> str | bytes:
                        message = await websocket.receive()
                        assert message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY), message
                        answer: str | bytes = message.data
                        return answer

                    await converse(number, answers, send, receive)

            await while_asking(service, talk, lambda: {"moved_websocket": CLIENTS})

    asyncio.run(main())
