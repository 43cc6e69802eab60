"""What a server does when something fails that nobody expected."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from hotport.adapters.base import Connections, Context
from hotport.options import Options
from hotport.worker.server import make_server
from tests.adapters.asgi_support import until
from tests.support import DEADLINE_S

pytestmark = pytest.mark.anyio


async def hold(stream: Any) -> None:
    await stream.receive()
    await asyncio.Event().wait()


async def test_drain_that_fails_cuts_what_is_left_and_counts_it(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """The worker ended with a traceback, and its connections were counted as those of one that was killed."""

    async def fail(_: Connections) -> None:
        raise LookupError("a bug of ours")

    monkeypatch.setattr(Connections, "wait_empty", fail)
    connections = Connections()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        server = make_server(hold, Context(connections), Options(kind="stream"), [listener.dup()])
        await server.startup()
        await server.accept()
        _, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"hello")
        await until(lambda: len(connections.open) == 1)
        async with asyncio.timeout(DEADLINE_S):
            fates = await server.drain(DEADLINE_S)
        await server.shutdown()
        assert fates == {"cut_stream": 1}
        assert "drain.failed" in log.text
        writer.close()
