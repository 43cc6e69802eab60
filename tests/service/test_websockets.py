"""What WebSocket clients see of restarts: a 1012, each at a moment of its own, and then the new code."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from pathlib import Path

import pytest
import websockets
from websockets.asyncio.client import connect

from hotport.wire.messages import Report, RestartRequest
from tests.support import DEADLINE_S, Service, eventually, write_code

APP = """
async def app(scope, receive, send):
    if scope["type"] != "websocket":
        return
    await receive()
    await send({{"type": "websocket.accept"}})
    while (message := await receive())["type"] == "websocket.receive":
        await send({{"type": "websocket.send", "text": "{version} " + message["text"]}})
"""

CLIENTS = 20


class Clients:
    """Clients in a thread that send and wait for the answer, and reconnect when they are told to.

    Attributes:
        answers: How often each version has answered.
        closes: How connections ended, by close code, and what else went wrong, by kind.
        unanswered: Messages that got no answer although their connection was not closed with 1012.
    """

    def __init__(self, port: int) -> None:
        self.answers: Counter[str] = Counter()
        self.closes: Counter[object] = Counter()
        self.unanswered = 0
        self._port = port
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        count = 0
        while not self._is_over.is_set():
            try:
                async with connect(f"ws://127.0.0.1:{self._port}/", open_timeout=DEADLINE_S) as client:
                    while not self._is_over.is_set():
                        count += 1
                        is_answered = False
                        try:
                            await client.send(f"{number}.{count}")
                            version, _, told = str(await client.recv()).partition(" ")
                            is_answered = told == f"{number}.{count}"
                            self.answers[version] += 1
                        finally:
                            self.unanswered += not is_answered and client.close_code != 1012
                        await asyncio.sleep(0.005)  # load, but not so much that what is tested gets no processor
            except websockets.ConnectionClosed as closed:
                self.closes[closed.rcvd.code if closed.rcvd is not None else 1006] += 1
            except (OSError, websockets.WebSocketException, TimeoutError) as error:
                self.closes[type(error).__name__] += 1


@pytest.mark.unmeasured
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_ten_restarts_on_each_loop_close_with_1012_only_and_lose_no_message(tmp_path: Path, loop: str) -> None:
    write_code(tmp_path / "app.py", APP.format(version="v0"))
    options = ("--drain-timeout", "500ms", "--settle", "0s", "--workers", "2", "--loop", loop)
    with Service(tmp_path, "app:app", *options) as service, Clients(service.wait_ready().port) as clients:
        eventually(lambda: clients.answers["v0"] > CLIENTS, "the first generation answers")
        told = 0
        for number in range(1, 11):
            write_code(tmp_path / "app.py", APP.format(version=f"v{number}"))
            report = service.ask(RestartRequest())[-1]
            assert isinstance(report, Report)
            assert report.outcome == "done"
            assert report.connections is not None
            assert not any(fate.startswith(("cut_", "workers_")) for fate in report.connections), report
            told += report.connections.get("told_to_close", 0)
            eventually(lambda v=f"v{number}": clients.answers[v] > CLIENTS, "the new code answers")  # type: ignore[misc]
    assert clients.unanswered == 0
    assert set(clients.closes) == {1012}
    assert CLIENTS < clients.closes[1012] <= told
