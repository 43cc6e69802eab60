"""What WebSocket clients see of restarts: nothing; or, without handoff, a 1012, each at a moment of its own."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import websockets
from websockets.asyncio.client import connect

from hotport.wire.messages import Report, RestartRequest
from tests.support import DEADLINE_S, RESTARTS, SLOWNESS, Service, eventually, loops, write_code

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
        opened: How many connections were made.
        closes: How connections ended, by close code, and what else went wrong, by kind.
        unanswered: Messages that got no answer although their connection was not closed with 1012.
    """

    def __init__(self, port: int) -> None:
        self.answers: Counter[str] = Counter()
        self.opened = 0
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
                    self.opened += 1
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


@pytest.fixture
def options(tmp_path: Path) -> tuple[str, ...]:
    write_code(tmp_path / "app.py", APP.format(version="v0"))
    return ("--drain-timeout", "5s", "--settle", "0s", "--workers", "2")


def restart(service: Service, clients: Clients) -> Iterator[dict[str, int]]:
    """`RESTARTS` times; gives what became of the connections, once the new code answers."""
    eventually(lambda: clients.answers["v0"] > CLIENTS, "the first generation answers")
    for number in range(1, RESTARTS + 1):
        write_code(service.directory / "app.py", APP.format(version=f"v{number}"))
        report = service.ask(RestartRequest())[-1]
        assert isinstance(report, Report)
        assert report.outcome == "done"
        assert report.connections is not None
        yield report.connections
        eventually(lambda v=f"v{number}": clients.answers[v] > CLIENTS, "the new code answers")  # type: ignore[misc]


@pytest.mark.soak
@pytest.mark.parametrize("loop", loops(0))  # on the other one: test_clients.py
def test_restarts_are_noticed_by_no_client_of_an_application_that_knows_nothing_of_them(
    tmp_path: Path, options: tuple[str, ...], loop: str
) -> None:
    with (
        Service(tmp_path, "app:app", *options, "--loop", loop, "--handoff", "websocket") as service,
        Clients(service.wait_ready().port) as clients,
    ):
        eventually(lambda: clients.opened == CLIENTS, "all are connected")
        for fates in restart(service, clients):
            assert fates == {"moved_websocket": CLIENTS}
    assert (clients.opened, clients.unanswered, clients.closes) == (CLIENTS, 0, {})


@pytest.mark.soak
@pytest.mark.parametrize(
    ("handoff", "loop"), [(handoff, loop) for number, handoff in enumerate(("auto", "off")) for loop in loops(number)]
)
def test_restarts_close_with_1012_only_and_lose_no_message_where_nobody_has_agreed(
    tmp_path: Path, options: tuple[str, ...], handoff: str, loop: str
) -> None:
    options = (*options, "--loop", loop, "--drain-timeout", f"{0.5 * SLOWNESS:g}s", "--handoff", handoff)
    with Service(tmp_path, "app:app", *options) as service, Clients(service.wait_ready().port) as clients:
        told = 0
        for fates in restart(service, clients):
            assert not any(fate.startswith(("cut_", "workers_", "moved_")) for fate in fates), fates
            told += fates.get("told_to_close", 0)
    assert clients.unanswered == 0
    assert set(clients.closes) == {1012}
    assert CLIENTS < clients.closes[1012] <= told
