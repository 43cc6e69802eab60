"""``hotport demo``: what it shows is what happened, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET

import pytest
from click.testing import CliRunner

from hotport.cli import _load, demo
from hotport.cli._load import CROSSINGS, Load
from hotport.errors import ConfigError
from tests.support import DEADLINE_S, HOTPORT

SMALL = ("demo", "--restarts", "1", "--connections", "10")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where the demo makes its directory; unix sockets lie there, so the path is short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def environment(temporary: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(temporary), "TERM": "xterm"}


def test_no_request_is_lost_and_every_version_answers(temporary: Path) -> None:
    result = subprocess.run(
        [*HOTPORT, *SMALL, "--json"], env=environment(temporary), capture_output=True, text=True, timeout=2 * DEADLINE_S
    )
    assert result.returncode == 0, result.stdout + result.stderr
    seen = json.loads(result.stdout)
    assert seen["failed"] == 0
    assert set(seen["failures"]) == set(_load.KINDS)
    assert [(a["version"], a["generation"]) for a in seen["answers"]] == [("v1", 1), ("v2", 2)]
    assert sum(answer["requests"] for answer in seen["answers"]) == seen["requests"]
    assert seen["crossed"] == CROSSINGS
    assert [report["outcome"] for report in seen["restarts"]] == ["done"]
    assert not list(temporary.iterdir())


def test_a_terminal_gets_a_picture_and_a_verdict(temporary: Path) -> None:
    ours, theirs = os.openpty()
    try:
        with subprocess.Popen(
            [*HOTPORT, *SMALL], env=environment(temporary), stdout=subprocess.PIPE, stderr=theirs, text=True
        ) as process:
            os.close(theirs)
            words = read_terminal(ours)
            out = process.communicate(timeout=DEADLINE_S)[0]
    finally:
        os.close(ours)
    assert process.returncode == 0, words + out
    assert "answering" in words
    assert "█" in words
    assert "restart 1" in words
    assert "none lost; after each restart the new code answered." in out


def read_terminal(fd: int) -> str:
    """Everything written to a terminal, until the last program there closes it (pty(7): then read gives EIO)."""
    parts = []
    try:
        while data := os.read(fd, 65536):
            parts.append(data)
    except OSError:
        pass
    return b"".join(parts).decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_stops_the_service_and_removes_its_directory(temporary: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*HOTPORT, "demo"], env=environment(temporary), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("hotport demo: a Starlette app on http://127.0.0.1:")
        process.send_signal(number)
        out, words = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, words
    assert "interrupted" in words
    assert not out
    assert not list(temporary.iterdir())


def test_without_its_packages_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    result = CliRunner().invoke(demo.command)
    assert isinstance(result.exception, ConfigError)
    assert "starlette and httptools" in str(result.exception)
    assert "pip install 'hotport[demo]'" in str(result.exception)


# -- what the clients call a failure ------------------------------------------------------------------------


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def reset(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


async def truncate_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    writer.close()


async def truncate_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell")
    writer.close()


async def refuse_politely(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
    writer.close()


async def say_nothing(writer: asyncio.StreamWriter) -> None:
    """Leave the connection open."""


@pytest.mark.parametrize(
    ("behave", "kind"),
    [
        (close, "closed unanswered"),
        (reset, "reset"),
        (truncate_head, "truncated"),
        (truncate_body, "truncated"),
        (refuse_politely, "wrong status"),
        (say_nothing, "timed out"),
    ],
)
@pytest.mark.parametrize("client", ["_keep_alive", "_reconnect_always"])
def test_a_failure_is_called_what_it_was(
    behave: Callable[[asyncio.StreamWriter], Awaitable[None]], kind: str, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_load, "REQUEST_TIMEOUT_S", 0.2 if behave is say_nothing else DEADLINE_S)

    async def run() -> Load:
        handled = asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            load.stop()
            await behave(writer)
            with suppress(ConnectionError):
                await reader.read()  # until the client has closed
                writer.close()
                await writer.wait_closed()
            handled.set()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            load = Load(server.sockets[0].getsockname()[1], connections=1)
            await getattr(load, client)()
            await handled.wait()
        return load

    seen = asyncio.run(run()).seen
    assert {kind: number for kind, number in seen.failures.items() if number} == {kind: 1}
    assert seen.requests == 1
    assert not seen.answers


def test_a_closed_port_is_called_refused() -> None:
    async def run() -> Load:
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        load = Load(server.sockets[0].getsockname()[1], connections=1)
        server.close()
        asyncio.get_running_loop().call_later(0.1, load.stop)
        await load.run()
        await load.finish(await load.place())
        return load

    seen = asyncio.run(run()).seen
    assert seen.failures["refused"] == seen.requests > sum(CROSSINGS.values())
