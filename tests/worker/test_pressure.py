"""What a worker does when memory is short."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hotport.adapters.base import HELD_BYTES_MIN, Connections, Context
from hotport.options import Options
from hotport.worker import pressure
from hotport.worker.pressure import Pressure
from hotport.worker.server import ApplicationServer, make_server
from tests.adapters.asgi_support import until

pytestmark = pytest.mark.anyio

MIB = 1 << 20
ASK = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """``/big`` is answered with 8 MiB, others with nothing."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(8 * MIB) if scope["path"] == "/big" else b""})


class Memory:
    """As much as it is told, and what connections hold."""

    def __init__(self) -> None:
        self.other_bytes = 0
        self.connections: Connections

    def __call__(self) -> int:
        return self.other_bytes + sum(each.held_bytes for each in self.connections.open)


@asynccontextmanager
async def serving(memory: Memory) -> AsyncIterator[tuple[ApplicationServer, Pressure, tuple[str, int]]]:
    connections = memory.connections = Connections(maximum=100)
    options = Options(target="app:app", lifespan="off", handoff="off")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = listener.getsockname()
        server = make_server(answer, Context(connections), options, [listener.dup()])
    await server.startup()
    await server.accept()
    watch = Pressure(connections, 4 * MIB, memory)
    try:
        yield server, watch, address
    finally:
        watch.close()
        await server.drain(0)
        await server.shutdown()


async def test_who_holds_most_goes_first_and_others_stay() -> None:
    memory = Memory()
    async with serving(memory) as (server, watch, address):
        greedy, polite = [await asyncio.open_connection(*address) for _ in range(2)]
        greedy[1].write(ASK.replace(b"/ ", b"/big "))
        polite[1].write(ASK)
        assert await polite[0].readuntil(b"\r\n\r\n")
        await until(lambda: memory() > 4 * MIB)
        watch.look()
        assert server.connections.cuts == {"cut_memory": 1}
        assert memory() < HELD_BYTES_MIN
        polite[1].write(ASK)
        assert await polite[0].readuntil(b"\r\n\r\n")
        for _, writer in (greedy, polite):
            writer.close()


async def test_nothing_is_accepted_until_memory_is_there_again() -> None:
    memory = Memory()
    async with serving(memory) as (server, watch, address):
        memory.other_bytes = 5 * MIB
        watch.look()
        assert server.connections.is_full
        reader, writer = await asyncio.open_connection(*address)  # waits in the accept queue
        writer.write(ASK)
        memory.other_bytes = int(3.9 * MIB)  # not enough to begin again
        watch.look()
        assert server.connections.is_full
        assert not server.connections.open
        memory.other_bytes = 3 * MIB
        watch.look()
        assert await reader.readuntil(b"\r\n\r\n")
        writer.close()


async def test_it_looks_by_itself_and_collects_garbage_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "LOOK_S", 0.001)
    collected: list[None] = []
    monkeypatch.setattr("gc.collect", lambda: collected.append(None))
    memory = Memory()
    async with serving(memory) as (server, _, _):
        memory.other_bytes = 5 * MIB
        await until(lambda: server.connections.is_full)
        memory.other_bytes = 0
        await until(lambda: not server.connections.is_full)
    assert len(collected) == 1
