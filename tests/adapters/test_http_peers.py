"""Clients that others have written: curl, aiohttp, httpx and the standard library."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import http.client
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from hotport.adapters.asgi.spec import Receive, Scope, Send
from tests.adapters.asgi_support import DEADLINE_S, Rig, read_body, respond, serving

pytestmark = pytest.mark.anyio

MIB = bytes(range(256)) * 4096


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Echoes; with gzip if it is asked for on /gzip, in pieces on /pieces, and without reading on /early."""
    path = scope["path"]
    if path == "/early":
        await respond(send, b"no", status=403)
        return
    body = await read_body(receive)
    if path == "/gzip":
        assert b"gzip" in dict(scope["headers"])[b"accept-encoding"]
        await respond(send, gzip.compress(MIB), (b"content-encoding", b"gzip"))
    elif path == "/pieces":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for place in range(0, len(body), 50_000):
            await send({"type": "http.response.body", "body": body[place : place + 50_000], "more_body": True})
        await send({"type": "http.response.body"})
    else:
        await respond(send, body, (b"x-sha", hashlib.sha256(body).hexdigest().encode()))


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[tuple[Rig, int]]:
    """The application on a port."""
    async with serving(application) as rig:
        server = await asyncio.get_running_loop().create_server(rig.adapter.connection, "127.0.0.1", 0)
        try:
            yield rig, server.sockets[0].getsockname()[1]
        finally:
            server.close()


# -- curl ------------------------------------------------------------------------------------------------------

curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


async def run_curl(*args: str) -> tuple[bytes, str]:
    """What it wrote, and what it told of the conversation."""
    process = await asyncio.create_subprocess_exec(
        *("curl", "--silent", "--verbose", "--noproxy", "*", "--max-time", str(int(DEADLINE_S)), *args),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err
    return out, err.decode(errors="replace")


@pytest.fixture
def mebibyte(tmp_path: Path) -> Path:
    path = tmp_path / "mebibyte"
    path.write_bytes(MIB)
    return path


@curl
async def test_curl_keeps_its_connection() -> None:
    async with served() as (rig, port):
        out, told = await run_curl("-d", "a", f"http://127.0.0.1:{port}/", "-d", "a", f"http://127.0.0.1:{port}/b")
        assert out == b"a&aa&a"
        assert "Re-using existing connection" in told or "Reusing existing" in told
        assert (rig.connections.accepted, rig.connections.requests) == (1, 2)


@curl
async def test_curl_waits_for_continue_before_a_large_body(mebibyte: Path) -> None:
    async with served() as (_, port):
        url = f"http://127.0.0.1:{port}/pieces"
        out, told = await run_curl(
            "-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary", f"@{mebibyte}", url
        )
        assert out == MIB
        assert "< HTTP/1.1 100 Continue" in told
        assert "< HTTP/1.1 200 OK" in told


@curl
async def test_curl_that_is_refused_instead_of_told_to_continue_keeps_its_body(mebibyte: Path) -> None:
    async with served() as (_rig, port):
        out, told = await run_curl(
            *("-H", "Expect: 100-continue", "--expect100-timeout", "60", "--data-binary", f"@{mebibyte}"),
            f"http://127.0.0.1:{port}/early",
        )
        assert out == b"no"
        assert "100 Continue" not in told
        assert "< HTTP/1.1 403 Forbidden" in told


@curl
async def test_curl_uploads_in_chunks(mebibyte: Path) -> None:
    async with served() as (_, port):
        args = ("-T", str(mebibyte), "-H", "Transfer-Encoding: chunked")
        out, told = await run_curl(*args, f"http://127.0.0.1:{port}/")
        assert out == MIB
        assert "Transfer-Encoding: chunked" in told


@curl
@pytest.mark.parametrize("path", ["/", "/pieces"])
async def test_curl_in_http_1_0_gets_all_of_it_both_ways(path: str, mebibyte: Path) -> None:
    async with served() as (_, port):
        out, told = await run_curl("-0", "--data-binary", f"@{mebibyte}", f"http://127.0.0.1:{port}{path}")
        assert out == MIB
        assert "< connection: close" in told
        assert "chunked" not in told


@curl
async def test_curl_asks_for_the_head_only() -> None:
    async with served() as (_, port):
        out, told = await run_curl("-I", f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/")
        assert out.count(b"HTTP/1.1 200 OK") == 2
        assert "left intact" in told


@curl
async def test_curl_reads_what_is_compressed() -> None:
    async with served() as (_, port):
        out, _told = await run_curl("--compressed", f"http://127.0.0.1:{port}/gzip")
        assert out == MIB


# -- aiohttp ---------------------------------------------------------------------------------------------------


async def in_pieces() -> AsyncIterator[bytes]:
    for place in range(0, len(MIB), 100_000):
        yield MIB[place : place + 100_000]
        await asyncio.sleep(0)


async def test_aiohttp_does_everything_over_one_connection() -> None:
    async with served() as (rig, port), aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        for path in ("/", "/pieces"):
            for data in (MIB, in_pieces()):
                async with session.post(path, data=data) as answer:
                    assert await answer.read() == MIB
        async with session.post("/", data=MIB, expect100=True) as answer:
            assert await answer.read() == MIB
        async with session.get("/gzip") as answer:
            assert await answer.read() == MIB
        async with session.head("/") as answer:  # the last: aiohttp closes behind an answer that names no length
            assert (answer.status, await answer.read()) == (200, b"")
        assert (rig.connections.accepted, rig.connections.requests) == (1, 7)


async def test_aiohttp_gets_its_refusal_though_it_is_still_sending() -> None:
    async with served() as (_, port), aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        for data in (MIB, in_pieces()):
            async with session.post("/early", data=data) as answer:
                assert (answer.status, await answer.read()) == (403, b"no")


# -- httpx -----------------------------------------------------------------------------------------------------


async def test_httpx_does_everything_over_one_connection() -> None:
    async with (
        served() as (rig, port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=DEADLINE_S) as client,
    ):
        for path in ("/", "/pieces"):
            for content in (MIB, in_pieces()):
                assert (await client.post(path, content=content)).content == MIB
        assert (await client.head("/")).status_code == 200
        assert (await client.get("/gzip")).content == MIB
        assert (rig.connections.accepted, rig.connections.requests) == (1, 6)


# -- the standard library --------------------------------------------------------------------------------------


async def in_a_thread(talk: Callable[[http.client.HTTPConnection], Any], port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        await asyncio.to_thread(talk, connection)
    finally:
        connection.close()


async def test_standard_library_does_everything_over_one_connection() -> None:
    def talk(connection: http.client.HTTPConnection) -> None:
        for path in ("/", "/pieces"):
            for chunked in (False, True):
                body: Any = iter([MIB[:500_000], MIB[500_000:]]) if chunked else MIB
                connection.request("POST", path, body=body, encode_chunked=chunked)
                assert connection.getresponse().read() == MIB
        connection.request("HEAD", "/")
        assert connection.getresponse().read() == b""
        connection.request("GET", "/gzip", headers={"Accept-Encoding": "gzip"})
        assert gzip.decompress(connection.getresponse().read()) == MIB

    async with served() as (rig, port):
        await in_a_thread(talk, port)
        assert (rig.connections.accepted, rig.connections.requests) == (1, 6)


async def test_standard_library_in_http_1_0_gets_all_of_it_both_ways() -> None:
    def talk(connection: http.client.HTTPConnection) -> None:
        connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"  # type: ignore[attr-defined]
        for path in ("/", "/pieces"):
            connection.request("POST", path, body=MIB)
            assert connection.getresponse().read() == MIB

    async with served() as (rig, port):
        await in_a_thread(talk, port)
        assert rig.connections.accepted == 2
