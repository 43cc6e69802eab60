"""Request ids: whose are taken, and where they are found."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from structlog.contextvars import get_contextvars

from hotport.adapters.asgi.spec import Receive, Scope, Send
from tests.adapters.asgi_support import respond, serving, until
from tests.adapters.test_asgi_http import get
from tests.adapters.test_asgi_websocket import handshake

pytestmark = pytest.mark.anyio

MADE = re.compile("[0-9a-f]{32}")
TRUSTED: dict[str, Any] = {"request_id": True, "trusted_proxy": ("127.0.0.1",)}
STRANGER: dict[str, Any] = {"request_id": True, "trusted_proxy": ("192.0.2.1",)}


async def tell(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the ids in all places where one is."""
    await asyncio.sleep(0)
    await respond(send, json.dumps(ids(scope)).encode())


def ids(scope: Scope) -> list[str | None]:
    fields = [value.decode() for name, value in scope["headers"] if name == b"x-request-id"]
    assert len(fields) <= 1
    context = get_contextvars().get("request_id")
    return [scope["state"].get("request_id"), next(iter(fields), None), context]


async def ask(options: dict[str, Any], *headers: str) -> list[str | None]:
    async with serving(tell, **options) as rig:
        client, _ = await rig.connect()
        await client.send(get("/", *headers))
        found = json.loads((await client.answer()).body)
    assert isinstance(found, list)
    return found


async def test_there_are_none_unless_they_are_wanted() -> None:
    assert await ask({}) == [None, None, None]
    assert await ask({}, "x-request-id: a1") == [None, "a1", None]


async def test_a_trusted_proxys_is_taken() -> None:
    assert await ask(TRUSTED, "X-Request-ID: a1-b2/c:3") == ["a1-b2/c:3"] * 3


@pytest.mark.parametrize("given", ["", "a b", '"', "é", "a" * 129])
async def test_what_would_not_be_safe_in_a_log_line_is_not_taken(given: str) -> None:
    found = await ask(TRUSTED, f"x-request-id: {given}")
    assert MADE.fullmatch(found[0] or "")
    assert found == [found[0]] * 3


async def test_a_strangers_is_replaced() -> None:
    found = await ask(STRANGER, "x-request-id: a1", "x-request-id: a2")
    assert MADE.fullmatch(found[0] or "")
    assert found == [found[0]] * 3


async def test_each_request_has_its_own_also_on_one_connection() -> None:
    async with serving(tell, request_id=True) as rig:
        client, _ = await rig.connect()
        await client.send(get() * 3)
        found = [json.loads((await client.answer()).body) for _ in range(3)]
    assert len({one for one, _, _ in found}) == 3
    assert all(len({*each}) == 1 for each in found)
    assert "request_id" not in get_contextvars()


async def test_it_is_in_the_access_log_also_if_the_application_changes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"].clear()
        scope["headers"].clear()
        await respond(send, b"")

    lines: list[str] = []
    monkeypatch.setattr("hotport.observe.logs.write", lambda text: lines.extend(text.splitlines()))
    async with serving(app, access_log="structured", **TRUSTED) as rig:
        client, _ = await rig.connect()
        await client.send(get("/", "x-request-id: a1"))
        await client.answer()
        await asyncio.sleep(0)
    assert [json.loads(line)["request_id"] for line in lines] == ["a1"]


async def test_a_websocket_has_one_too() -> None:
    found: list[list[str | None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(ids(scope))
        await receive()
        await send({"type": "websocket.close"})

    async with serving(app, **TRUSTED) as rig:
        client, _ = await rig.connect()
        await client.send(handshake("/", "x-request-id: a1"))
        await until(lambda: bool(found))
    assert found == [["a1"] * 3]
