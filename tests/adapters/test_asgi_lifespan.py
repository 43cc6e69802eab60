"""The lifespan protocol: what an application says at its start and end, and what becomes of it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from hotport.adapters.asgi import AsgiAdapter
from hotport.adapters.asgi.spec import Application, Receive, Scope, Send
from hotport.adapters.base import Connections, Context
from hotport.errors import StartError
from hotport.options import Options
from tests.adapters.asgi_support import turns

pytestmark = pytest.mark.anyio


def adapter(application: Application, lifespan: Any = "auto") -> AsgiAdapter:
    return AsgiAdapter(application, Context(Connections()), Options(lifespan=lifespan))


async def test_application_lives_from_startup_to_shutdown_in_one_task() -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["type"], scope["asgi"], set(scope["extensions"]["hotport"])))
        seen.append((await receive())["type"])
        await send({"type": "lifespan.startup.complete"})
        seen.append((await receive())["type"])
        await send({"type": "lifespan.shutdown.complete"})
        await asyncio.sleep(0)
        seen.append("returned")

    it = adapter(app, "on")
    await it.startup()
    assert seen[1:] == ["lifespan.startup"]
    await it.shutdown()
    assert seen == [
        ("lifespan", {"version": "3.0", "spec_version": "2.0"}, {"generation", "worker", "draining"}),
        "lifespan.startup",
        "lifespan.shutdown",
        "returned",
    ]


@pytest.mark.parametrize("mode", ["auto", "on"])
async def test_failed_startup_is_a_start_error_with_the_applications_own_message(mode: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database at db:5432"})
        raise RuntimeError("as Starlette does after it")

    with pytest.raises(StartError) as caught:
        await adapter(app, mode).startup()
    assert caught.value.code == "HP509"
    assert caught.value.cause == "no database at db:5432"


async def test_long_message_is_cut_to_its_last_lines() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        message = "Traceback\n" + "\n".join(f"line {n}" for n in range(50)) + "\nValueError: broken\n"
        await send({"type": "lifespan.startup.failed", "message": message})

    with pytest.raises(StartError) as caught:
        await adapter(app).startup()
    assert caught.value.cause.endswith("ValueError: broken")
    assert len(caught.value.cause.splitlines()) == 8


async def test_failure_without_a_reason_says_so() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed"})

    with pytest.raises(StartError, match="it gave no reason"):
        await adapter(app).startup()


async def http_only(scope: Scope, receive: Receive, send: Send) -> None:
    assert scope["type"] == "http", "only http is known here"


async def test_auto_goes_on_without_an_application_that_does_not_know_the_protocol(
    caplog: pytest.LogCaptureFixture,
) -> None:
    it = adapter(http_only)
    await it.startup()
    await it.shutdown()
    assert not caplog.records


async def test_auto_warns_of_an_application_that_raises_after_it_has_asked_for_its_startup(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise ValueError("half a startup")

    await adapter(app).startup()
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "half a startup" in caplog.text


async def test_auto_goes_on_without_an_application_that_answers_as_if_it_were_a_request() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})

    await adapter(app).startup()


async def test_on_demands_that_the_application_takes_part() -> None:
    with pytest.raises(StartError) as caught:
        await adapter(http_only, "on").startup()
    assert caught.value.code == "HP510"
    assert "AssertionError: only http is known here" in caught.value.cause
    assert "in http_only" in caught.value.cause

    async def returns(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    with pytest.raises(StartError, match="returned before it had started up"):
        await adapter(returns, "on").startup()


async def test_off_does_not_ask_the_application() -> None:
    it = adapter(http_only, "off")
    await it.startup()
    await it.shutdown()


async def test_failed_shutdown_is_logged_and_does_not_stop_the_worker_from_leaving(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.failed", "message": "could not flush"})

    it = adapter(app)
    await it.startup()
    await it.shutdown()
    assert "could not flush" in caplog.text


@pytest.mark.parametrize("when", ["while serving", "at shutdown"])
async def test_application_that_raises_later_is_logged(when: str, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        if when == "at shutdown":
            await receive()
        raise ValueError("later")

    it = adapter(app)
    await it.startup()
    await turns()
    await it.shutdown()
    assert "ValueError: later" in caplog.text


@pytest.mark.parametrize("when", ["startup", "shutdown"])
async def test_cancelled_wait_ends_the_applications_task(when: str) -> None:
    outcome: list[str] = []
    is_waiting = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
            if when == "shutdown":
                await send({"type": "lifespan.startup.complete"})
                await receive()
            is_waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            outcome.append("cancelled")
            raise

    it = adapter(app)
    if when == "shutdown":
        await it.startup()
    task = asyncio.create_task(it.startup() if when == "startup" else it.shutdown())
    await is_waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await turns()
    assert outcome == ["cancelled"]


async def test_answer_to_something_that_was_not_asked_is_the_applications_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    it = adapter(app)
    await it.startup()
    await turns()
    await it.shutdown()
    assert "'lifespan.shutdown.complete' does not answer" in caplog.text
