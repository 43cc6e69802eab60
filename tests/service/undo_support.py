"""Clients that keep their connections through a restart and its undo, and an application that can be bad."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from websockets.asyncio.client import connect

from tests.support import DEADLINE_S, write_code

APP = """
import os, time

async def app(scope, receive, send):
    if scope["type"] == "websocket":
        await receive()
        await send({{"type": "websocket.accept"}})
        while (message := await receive())["type"] == "websocket.receive":
            await send({{"type": "websocket.send", "text": "{version} " + message["text"]}})
    elif scope["type"] == "http":
        status = 200
        {bad}
        body = b"{version}"
        await send({{"type": "http.response.start", "status": status, "headers": [(b"content-length", b"1")]}})
        await send({{"type": "http.response.body", "body": body}})

leaked = []
stalls = [{stall_s}]
"""

#: What a version does before it answers, by what is wrong with it.
BAD = {
    "fails": "status = 500",
    "leaks": "leaked.append(os.urandom(1 << 20))",
    "stalls": "time.sleep(stalls.pop() if stalls else 0)",
    "is well": "pass",
    "is sick": 'status = 503 if scope["path"] == "/health" else 200',
    "hangs when asked": 'if scope["path"] == "/health": await receive(); await receive()',
}


def write_version(directory: Path, version: str, bad: str = "is well", *, stall_s: float = 0.0) -> None:
    """Deploy; a version is one character."""
    write_code(directory / "app.py", APP.format(version=version, bad=BAD[bad], stall_s=stall_s))


class Clients:
    """In a thread: HTTP and WebSocket clients with one connection each, which they never give up; and newcomers.

    A connection that ends, or an answer that is missing or wrong, is a failure; so is a newcomer that is not served.

    Attributes:
        failures: What went wrong, in words.
        statuses: HTTP answers by status.
    """

    def __init__(self, port: int, *, http: int = 8, websockets: int = 4, newcomers: int = 2) -> None:
        self.failures: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self._counts = {"http": http, "websocket": websockets, "newcomer": newcomers}
        self._port = port
        self._answers: Counter[tuple[str, int, str]] = Counter()
        self._told = threading.Condition()
        self._is_over = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def wait(self, version: str) -> None:
        """Return when every client has had two more answers of this version."""
        clients = [(kind, number) for kind, count in self._counts.items() for number in range(count)]
        with self._told:
            wanted = {client: self._answers[*client, version] + 2 for client in clients}

            def has_come() -> bool:
                return bool(self.failures) or all(self._answers[*each, version] >= n for each, n in wanted.items())

            assert self._told.wait_for(has_come, DEADLINE_S), f"{version}: {self._answers}"
            assert not self.failures, self.failures

    async def _run(self) -> None:
        talk: dict[str, Callable[[int], object]] = {
            "http": self._talk_http,
            "websocket": self._talk_websocket,
            "newcomer": self._come_newly,
        }
        async with asyncio.TaskGroup() as tasks:
            for kind, count in self._counts.items():
                for number in range(count):
                    tasks.create_task(self._watch(kind, talk[kind], number))

    async def _watch(self, kind: str, talk: Callable[[int], object], number: int) -> None:
        try:
            await talk(number)  # type: ignore[misc]
        except Exception as error:
            with self._told:
                self.failures[f"{kind}: {error!r}"] += 1
                self._told.notify_all()

    def _count(self, kind: str, number: int, version: str) -> None:
        with self._told:
            self._answers[kind, number, version] += 1
            self._told.notify_all()

    async def _talk_http(self, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        while not self._is_over:
            self._count("http", number, await self._ask(reader, writer))
            await asyncio.sleep(0.01)
        writer.close()

    async def _come_newly(self, number: int) -> None:
        while not self._is_over:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            self._count("newcomer", number, await self._ask(reader, writer))
            writer.close()
            await asyncio.sleep(0.01)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(DEADLINE_S):
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(1)
        if b"connection: close" in head.lower():
            raise EOFError("it was told to close")
        self.statuses[int(head.split()[1])] += 1
        return body.decode()

    async def _talk_websocket(self, number: int) -> None:
        async with connect(f"ws://127.0.0.1:{self._port}/", open_timeout=DEADLINE_S) as client:
            count = 0
            while not self._is_over:
                count += 1
                async with asyncio.timeout(DEADLINE_S):
                    await client.send(f"{number}.{count}")
                    version, _, told = str(await client.recv()).partition(" ")
                if told != f"{number}.{count}":
                    raise ValueError(f"{told} came for {number}.{count}")
                self._count("websocket", number, version)
                await asyncio.sleep(0.01)
