"""Requests that take longer than ``request_timeout``."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from typing import Any

import anyio
import anyio.to_thread
import h11
import pytest

from hotport.adapters.asgi import exchange as exchange_module
from hotport.adapters.asgi import shared as shared_module
from hotport.adapters.asgi.spec import Receive, Scope, Send
from hotport.adapters.asgi.states import State
from tests.adapters.asgi_support import DEADLINE_S, Rig, respond, serving, until

pytestmark = pytest.mark.anyio

TIMEOUT_S = 0.05


def get(path: str = "/", *fields: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: x", *fields, "", ""]).encode()


class Hanging:
    """Hangs where the path says; notes how it ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.has_begun = asyncio.Event()
        self.may_end = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.has_begun.set()
        try:
            match path:
                case "/quick":
                    await respond(send, b"quick")
                case "/held":
                    await send({"type": "http.response.start", "status": 200})
                    await self.stand_still()
                case "/begun":
                    await send({"type": "http.response.start", "status": 200})
                    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
                    await self.stand_still()
                case "/stubborn":
                    while not self.may_end.is_set():
                        with suppress(asyncio.CancelledError):
                            await self.may_end.wait()
                    await respond(send, b"late")
                case "/late":
                    with suppress(asyncio.CancelledError):
                        await self.stand_still()
                    assert (await receive())["type"] == "http.disconnect"
                    await respond(send, b"late")
                case "/background":
                    await respond(send, b"answered")
                    await self.may_end.wait()
                case "/thread":
                    await anyio.to_thread.run_sync(threading.Event().wait, DEADLINE_S / 10)
                case _:
                    await self.stand_still()
            self.ended.append(f"{path} returned")
        except BaseException as error:
            self.ended.append(f"{path} {type(error).__name__}")
            raise

    async def stand_still(self) -> None:
        await asyncio.Event().wait()


def shown(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as an error, with its traceback."""
    format = logging.Formatter("%(message)s").format
    return [format(record) for record in caplog.records if record.levelno == logging.ERROR]


def hanging(app: Any, **options: Any) -> Any:
    return serving(app, request_timeout_s=TIMEOUT_S, **options)


async def test_a_request_without_an_answer_gets_503_and_the_connection_stays(caplog: pytest.LogCaptureFixture) -> None:
    """A client used to wait for ever for an application that waits for ever."""
    app = Hanging()
    async with hanging(app) as rig:
        client, connection = await rig.connect()
        await client.send(get("/silent"))
        answer = await client.answer()
        assert (answer.status, answer.says_close) == (503, False)
        assert answer.body == b"the request took too long\n"
        assert connection.state is State.IDLE
        await client.send(get("/quick"))
        assert (await client.answer()).body == b"quick"
        assert app.ended == ["/silent CancelledError", "/quick returned"]
        assert (rig.connections.timeouts, rig.connections.errors, rig.connections.requests) == (1, 1, 2)
    [line] = shown(caplog)
    assert line.startswith("the application took longer than request_timeout (50ms) and is cancelled: GET /silent\n")
    assert "await asyncio.Event().wait()" in line, "the innermost line is shown, not only the outermost"


@pytest.mark.parametrize("path", ["/held", "/begun"])
async def test_an_answer_that_has_begun_is_truncated(path: str, caplog: pytest.LogCaptureFixture) -> None:
    app = Hanging()
    async with hanging(app) as rig:
        client, _ = await rig.connect()
        await client.send(get(path))
        with pytest.raises((h11.RemoteProtocolError, ConnectionError)):
            await client.answer()
        await until(lambda: not rig.connections.open)
        assert app.ended == [f"{path} CancelledError"]
        assert (rig.connections.timeouts, rig.connections.errors) == (1, 1)
    assert len(shown(caplog)) == 1


async def test_an_application_that_swallows_its_cancellation_delays_no_client(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "STUBBORN_S", TIMEOUT_S)
    app = Hanging()
    async with hanging(app) as rig:
        client, _ = await rig.connect()
        await client.send(get("/stubborn"))
        assert (await client.answer()).status == 503
        await client.send(get("/quick"))
        assert (await client.answer()).body == b"quick"
        await until(lambda: len(shown(caplog)) == 2)
        app.may_end.set()
        await until(lambda: len(app.ended) == 2)
        assert app.ended[-1] == "/stubborn ClientLeft", "its late answer is not taken for another one"
        await client.send(get("/quick"))
        assert (await client.answer()).body == b"quick"
    first, second = shown(caplog)
    assert "still runs after request_timeout (50ms) and a cancellation: GET /stubborn" in second
    assert "self.may_end.wait()" in first
    assert "self.may_end.wait()" in second


async def test_a_late_answer_goes_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    app = Hanging()
    async with hanging(app) as rig:
        client, _ = await rig.connect()
        await client.send(get("/late") + get("/quick"))
        assert (await client.answer()).status == 503
        assert (await client.answer()).body == b"quick"
        assert "/late ClientLeft" in app.ended
    assert len(shown(caplog)) == 1, "what follows from the cancellation is no error of its own"


async def test_the_time_of_a_request_begins_with_its_turn(caplog: pytest.LogCaptureFixture) -> None:
    """Of two pipelined requests that hang, each is answered, in order."""
    app = Hanging()
    async with hanging(app) as rig:
        client, connection = await rig.connect()
        await client.send(get("/one") + get("/two") + get("/quick"))
        assert [(await client.answer()).status for _ in range(3)] == [503, 503, 200]
        assert rig.connections.timeouts == 2
        assert connection.state is State.IDLE
        await until(lambda: "/two CancelledError" in app.ended)
    assert [line.splitlines()[0][-4:] for line in shown(caplog)] == ["/one", "/two"]


async def test_a_body_that_does_not_come_counts_too() -> None:
    bodies = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            bodies.append(message)

    async with hanging(app) as rig:
        client, connection = await rig.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        assert (await client.answer()).status == 503
        await client.send(b"other" + get("/next"))
        assert (await client.answer()).status == 503
        assert rig.connections.timeouts == 2
        await until(lambda: connection.state is State.IDLE)


async def test_what_runs_after_the_answer_is_not_limited() -> None:
    app = Hanging()
    async with hanging(app) as rig:
        client, _ = await rig.connect()
        await client.send(get("/background"))
        assert (await client.answer()).body == b"answered"
        other, _ = await rig.connect()
        await other.send(get("/silent"))
        assert (await other.answer()).status == 503, "as much time has passed"
        assert app.ended == ["/silent CancelledError"]
        app.may_end.set()
        await until(lambda: len(app.ended) == 2)
        assert app.ended[-1] == "/background returned"


async def test_a_handler_in_a_thread_is_answered_for_and_its_thread_goes_on() -> None:
    app = Hanging()
    async with hanging(app) as rig:
        client, _ = await rig.connect()
        await client.send(get("/thread"))
        assert (await client.answer()).status == 503
        await until(lambda: bool(app.ended))
        assert app.ended == ["/thread CancelledError"]


async def test_the_place_is_found_behind_middleware_that_runs_the_application_in_a_task(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log used to say no more than that the middleware waits for its task."""
    app = Hanging()

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app, scope, receive, send)
            await anyio.sleep_forever()

    async with hanging(middleware) as rig:
        first, _ = await rig.connect()
        await first.send(get("/silent"))
        assert (await first.answer()).status == 503
    [line] = shown(caplog)
    assert "sleep_forever()" in line
    assert "await self.stand_still()" in line


async def test_when_everything_hangs_few_stacks_are_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_module, "STACKS_S", DEADLINE_S * 100)
    app = Hanging()
    async with hanging(app) as rig:
        clients = [(await rig.connect())[0] for _ in range(12)]
        for client in clients:
            await client.send(get("/silent"))
        assert {(await client.answer()).status for client in clients} == {503}
    lines = shown(caplog)
    assert len(lines) == 12
    assert sum("stand_still" in line for line in lines) == shared_module.STACKS_MAX


async def test_an_answer_in_time_ends_the_watch() -> None:
    """Keep-alive has a time of its own, and so has the next request."""
    async with hanging(Hanging()) as rig:
        assert isinstance(rig, Rig)
        connection, transport = rig.memory()
        connection.data_received(get("/quick"))
        await until(lambda: len(transport.answers()) == 1)
        idle_due = connection.due
        assert connection.due - connection.shared.deadlines.now >= connection.shared.keep_alive_ticks
        connection.data_received(get("/quick", "Connection: close"))
        await until(lambda: len(transport.answers()) == 2)
        assert connection.due < idle_due, "only the end of the connection is waited for"
        assert rig.connections.timeouts == 0


async def test_without_the_option_nothing_is_watched() -> None:
    app = Hanging()
    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(get("/silent"))
        await app.has_begun.wait()
        assert connection.due == 0
        transport.close()
