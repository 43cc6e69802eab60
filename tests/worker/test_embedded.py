"""`hotport.serve`: acceptors, adapters and drain inside one's own event loop, with real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme
from anyio.abc import SocketAttribute

import hotport
from hotport.address import parse_address
from hotport.errors import ConfigError, KernelError, StartError
from tests.support import DEADLINE_S

pytestmark = pytest.mark.anyio


async def echo(stream: hotport.Stream) -> None:
    async for chunk in stream:
        await stream.send(chunk)


class EchoProtocol(asyncio.Protocol):
    notices: list[hotport.Draining] = []  # noqa: RUF012  read by the one test that resets it

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def drain_started(self, draining: hotport.Draining) -> None:
        self.notices.append(draining)


class BufferedEcho(asyncio.BufferedProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.buffer = bytearray(64)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(bytes(self.buffer[:nbytes]))


def port_of(server: hotport.Server) -> int:
    address = parse_address(server.addresses[0])
    return int(address.port)  # type: ignore[union-attr]


@asynccontextmanager
async def connected(server: hotport.Server) -> AsyncIterator[anyio.abc.SocketStream]:
    async with await anyio.connect_tcp("127.0.0.1", port_of(server)) as client:
        yield client


async def echoes(client: anyio.abc.ByteStream, data: bytes) -> bool:
    await client.send(data)
    received = b""
    while len(received) < len(data):
        received += await client.receive()
    return received == data


@pytest.mark.parametrize("app", [echo, EchoProtocol, BufferedEcho])
async def test_each_kind_of_application_answers(app: Any) -> None:
    async with hotport.serve(app, bind="127.0.0.1:0") as server, connected(server) as client:
        assert await echoes(client, b"hello")


@pytest.mark.parametrize("tasks", [1, 3])
async def test_every_connection_of_a_burst_is_served(tasks: int) -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0", tasks=tasks) as server:
        sockets = [socket.create_connection(("127.0.0.1", port_of(server))) for _ in range(100)]
        for each in sockets:
            each.sendall(b"x")
        for each in sockets:
            assert await anyio.to_thread.run_sync(each.recv, 1) == b"x"
            each.close()
        assert server.connections.accepted == 100


async def test_what_waits_in_the_accept_queue_is_served_when_the_server_ends() -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0") as server:
        port = port_of(server)
        late = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]  # the loop has not turned since
        for each in late:
            each.sendall(b"late")
            each.shutdown(socket.SHUT_WR)
    assert [each.recv(10) for each in late] == [b"late"] * 50
    for each in late:
        each.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


async def test_a_stream_handler_learns_that_draining_has_started() -> None:
    told = anyio.Event()

    async def handler(stream: hotport.Stream) -> None:
        draining = stream.extra(hotport.StreamAttribute.draining)
        assert not draining.is_set()
        assert draining.remaining_s() == float("inf")
        await stream.send(b"ready")
        await draining.wait()
        assert 0 < draining.remaining_s() <= 20
        told.set()
        await stream.send(b"bye")

    async with hotport.serve(handler, bind="127.0.0.1:0", drain_timeout=20) as server:
        client = await anyio.connect_tcp("127.0.0.1", port_of(server))
        assert await client.receive() == b"ready"
    assert told.is_set()
    assert await client.receive() == b"bye"
    with pytest.raises(anyio.EndOfStream):
        await client.receive()
    await client.aclose()


async def test_a_protocol_learns_that_draining_has_started() -> None:
    EchoProtocol.notices.clear()
    async with hotport.serve(EchoProtocol, bind="127.0.0.1:0", drain_timeout=0.05) as server:
        client = await anyio.connect_tcp("127.0.0.1", port_of(server))
        assert await echoes(client, b"x")
    assert len(EchoProtocol.notices) == 1
    assert server.connections.fates == {"cut_protocol": 1}
    await client.aclose()


async def test_what_outlives_the_deadline_is_cut_and_counted() -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0", drain_timeout=0.05) as server:
        client = await anyio.connect_tcp("127.0.0.1", port_of(server))
        assert await echoes(client, b"x")
    assert server.connections.fates == {"cut_stream": 1}
    with pytest.raises(anyio.EndOfStream):
        await client.receive()
    await client.aclose()


async def test_connections_of_a_server_are_read_only() -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0") as server, connected(server) as client:
        assert await echoes(client, b"x")
        (connection,) = server.connections.open
        assert (server.connections.accepted, server.connections.requests, server.connections.errors) == (1, 1, 0)
        with pytest.raises(TypeError):
            server.connections.open[connection] = 0.0  # type: ignore[index]
        with pytest.raises(AttributeError):
            server.connections.accepted = 0  # type: ignore[misc]
    assert server.connections.draining.is_set()


async def test_everybody_who_waits_for_the_last_connection_learns_of_its_end() -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0") as server:
        client = await anyio.connect_tcp("127.0.0.1", port_of(server))
        assert await echoes(client, b"x")
        async with anyio.create_task_group() as waiting:
            for _ in range(2):
                waiting.start_soon(server._inner.connections.wait_empty)
            await client.aclose()


async def test_a_failing_block_cuts_at_once() -> None:
    with pytest.raises(ZeroDivisionError):
        async with hotport.serve(echo, bind="127.0.0.1:0", drain_timeout=60) as server:
            client = await anyio.connect_tcp("127.0.0.1", port_of(server))
            assert await echoes(client, b"x")
            raise ZeroDivisionError
    await client.aclose()


async def test_accepting_pauses_at_the_limit_and_resumes_below_it() -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0", connections_max=2) as server:
        first, second = [await anyio.connect_tcp("127.0.0.1", port_of(server)) for _ in range(2)]
        assert await echoes(first, b"1")
        assert await echoes(second, b"2")
        third = await anyio.connect_tcp("127.0.0.1", port_of(server))  # waits in the accept queue
        await third.send(b"3")
        assert server.connections.accepted == 2
        await first.aclose()
        assert await third.receive() == b"3"
        await second.aclose()
        await third.aclose()


async def test_connections_wait_in_the_queue_while_descriptors_have_run_out(caplog: pytest.LogCaptureFixture) -> None:
    """libuv would close them: its listeners accept and drop what waits, to get rid of the event."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = [socket.socket() for _ in range(20)]
    async with hotport.serve(echo, bind="127.0.0.1:0") as server:
        resource.setrlimit(resource.RLIMIT_NOFILE, (clients[-1].fileno() + 10, hard))
        try:
            for client in clients:
                client.connect(("127.0.0.1", port_of(server)))
                client.sendall(b"x")
            while "cannot accept" not in caplog.text:
                await anyio.lowlevel.checkpoint()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for client in clients:
            assert await anyio.to_thread.run_sync(client.recv, 1) == b"x"
            client.close()


@pytest.mark.parametrize("tasks", [1, 3])
async def test_what_could_not_be_accepted_by_the_deadline_is_counted(tasks: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = [socket.socket() for _ in range(3)]
    try:
        async with hotport.serve(echo, bind="127.0.0.1:0", drain_timeout=0.2, tasks=tasks) as server:
            for client in clients:
                client.connect(("127.0.0.1", port_of(server)))
            resource.setrlimit(resource.RLIMIT_NOFILE, (clients[-1].fileno(), hard))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert server.connections.fates == {"cut_unaccepted": 3}
    for client in clients:
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        client.close()


async def test_a_handler_that_raises_resets_its_connection_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(stream: hotport.Stream) -> None:
        if await stream.receive() == b"raise":
            raise ValueError("on purpose")
        await echo(stream)

    async with hotport.serve(handler, bind="127.0.0.1:0") as server, connected(server) as other:
        await other.send(b"fine")
        async with connected(server) as client:
            await client.send(b"raise")
            with pytest.raises(anyio.BrokenResourceError):
                await client.receive()
        assert await echoes(other, b"still here")
    assert "on purpose" in caplog.text


async def test_a_large_transfer_arrives_whole_both_ways() -> None:
    data = os.urandom(3_000_000)
    async with hotport.serve(echo, bind="127.0.0.1:0") as server, connected(server) as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.send, data)
            received = bytearray()
            while len(received) < len(data):
                received += await client.receive()
        assert received == data


async def test_a_half_closed_client_still_gets_its_answer() -> None:
    async def count(stream: hotport.Stream) -> None:
        total = 0
        async for chunk in stream:
            total += len(chunk)
        await stream.send(str(total).encode())

    async with hotport.serve(count, bind="127.0.0.1:0") as server, connected(server) as client:
        await client.send(b"x" * 1000)
        await client.send_eof()
        assert await client.receive() == b"1000"


async def test_the_stream_knows_its_addresses_and_ends() -> None:
    seen: dict[str, Any] = {}

    async def handler(stream: hotport.Stream) -> None:
        seen["remote"] = stream.extra(SocketAttribute.remote_address)
        seen["local"] = stream.extra(SocketAttribute.local_address)
        seen["family"] = stream.extra(SocketAttribute.family)
        await stream.send_eof()
        assert await stream.receive() == b"after my end"
        await stream.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await stream.send(b"x")
        with pytest.raises(anyio.ClosedResourceError):
            await stream.receive()

    async with hotport.serve(handler, bind="127.0.0.1:0") as server, connected(server) as client:
        with pytest.raises(anyio.EndOfStream):
            await client.receive()
        await client.send(b"after my end")
        local = client.extra(SocketAttribute.local_address)
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            while True:
                await client.receive()
    assert seen["remote"] == local
    assert seen["family"] == socket.AF_INET


async def test_two_readers_of_one_stream_are_told_apart() -> None:
    async def handler(stream: hotport.Stream) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.receive)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await stream.receive()
            await stream.send(b"busy")

    async with hotport.serve(handler, bind="127.0.0.1:0") as server, connected(server) as client:
        assert await client.receive() == b"busy"
        await client.send(b"x")


@pytest.mark.parametrize("app", [echo, EchoProtocol])
async def test_tls_is_served_and_a_failed_handshake_leaves_nothing_behind(app: Any, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    pem = tmp_path / "cert.pem"
    certificate.private_key_and_cert_chain_pem.write_to_path(str(pem))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with hotport.serve(app, bind="127.0.0.1:0", tls_cert=str(pem)) as server:
        with socket.create_connection(("127.0.0.1", port_of(server))) as liar:
            liar.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while await anyio.to_thread.run_sync(liar.recv, 100):
                pass
        client = await anyio.connect_tcp(
            "127.0.0.1", port_of(server), ssl_context=context, tls_hostname="localhost", tls_standard_compatible=False
        )
        assert await echoes(client, b"secret")
        await client.aclose()
    assert not server.connections.open


async def test_a_missing_certificate_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="HP507") as caught:
        async with hotport.serve(echo, bind="127.0.0.1:0", tls_cert=str(tmp_path / "none.pem")):
            pass
    assert "none.pem" in str(caught.value)


async def test_a_taken_port_is_a_clear_error() -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0") as server:
        with pytest.raises(KernelError, match="HP101") as caught:
            async with hotport.serve(echo, bind=server.addresses[0]):
                pass
    assert str(os.getpid()) in caught.value.cause


async def test_a_wrong_option_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="HP304"):
        async with hotport.serve(echo, bind="127.0.0.1:0", drain_timeout="soon"):
            pass


async def test_a_unix_socket_whose_file_is_removed_is_bound_again(tmp_path: Path) -> None:
    """Nobody could connect any more, and a restart passed the dead listener on."""
    path = tmp_path / "app.sock"
    async with hotport.serve(echo, bind=[f"unix:{path}", "tcp://127.0.0.1:0"], tasks=2) as server:
        async with await anyio.connect_unix(path) as before:
            for _ in range(2):
                os.unlink(path)
                with anyio.fail_after(DEADLINE_S):
                    while not os.access(path, os.F_OK):
                        await anyio.lowlevel.checkpoint()
            async with await anyio.connect_unix(path) as client:
                for each in (before, client):
                    await each.send(b"hello")
                    assert await each.receive() == b"hello"
        async with await anyio.connect_tcp("127.0.0.1", int(server.addresses[1].rpartition(":")[2])) as other:
            await other.send(b"hello")
            assert await other.receive() == b"hello"
    assert not os.access(path, os.F_OK)


@pytest.mark.parametrize("what", ["another server", "a file", "an application that takes no more"])
async def test_a_unix_socket_that_cannot_be_bound_again_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    path = tmp_path / "app.sock"

    async def takes_no_more(sockets: list[socket.socket], lifetime: hotport.Lifetime) -> None:
        lifetime.started()
        try:
            await asyncio.Event().wait()
        finally:
            for each in sockets:
                each.close()

    app: Any = takes_no_more if what == "an application that takes no more" else echo
    async with hotport.serve(app, bind=f"unix:{path}", drain_timeout="10ms") as server:
        os.unlink(path)
        with socket.socket(socket.AF_UNIX) as other:
            if what == "another server":
                other.bind(str(path))
                other.listen()
            elif what == "a file":
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
            assert not await server._mend_in_between()
        assert "is gone, and is not made again" in caplog.text
        assert os.access(path, os.F_OK) == (app is echo)
    assert os.access(path, os.F_OK) == (app is echo)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


async def test_a_unix_socket_is_served_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "echo.sock"
    async with hotport.serve(echo, bind=f"unix:{path}") as server:
        assert server.addresses == (f"unix:{path}",)
        async with await anyio.connect_unix(path) as client:
            assert await echoes(client, b"hello")
    assert not path.exists()


async def test_wait_closed_returns_when_the_server_is_closed() -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0") as server, anyio.create_task_group() as tasks:
        tasks.start_soon(server.wait_closed)
        await anyio.wait_all_tasks_blocked()
        server.close()


async def test_a_protocol_factory_that_raises_costs_only_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    def factory() -> EchoProtocol:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("first one fails")
        return EchoProtocol()

    async with hotport.serve(factory, bind="127.0.0.1:0", kind="protocol") as server:
        async with connected(server) as client:
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await client.receive()
        async with connected(server) as client:
            assert await echoes(client, b"second one works")
    assert "first one fails" in caplog.text


async def test_a_sockets_application_runs_its_own_server() -> None:
    async def main(sockets: list[socket.socket], lifetime: hotport.Lifetime) -> None:
        server = await asyncio.start_server(_echo_streams, sock=sockets[0])
        lifetime.started()
        await lifetime.draining.wait()
        server.close()

    async with hotport.serve(main, bind="127.0.0.1:0") as server, connected(server) as client:
        assert await echoes(client, b"hello")


async def _echo_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data)
    writer.close()


async def test_a_sockets_application_that_never_says_started_and_returns_is_a_clear_error() -> None:
    async def main(sockets: list[socket.socket], lifetime: hotport.Lifetime) -> None:
        for each in sockets:
            each.close()

    with pytest.raises(StartError, match="HP506"):
        async with hotport.serve(main, bind="127.0.0.1:0"):
            pass


async def answer_ok(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.parametrize("app", [answer_ok, echo, EchoProtocol])
async def test_a_connection_that_has_ended_is_freed_at_once(app: Any) -> None:
    """In a reference cycle it would stay until the garbage collector comes by: megabytes in each worker."""
    async with hotport.serve(app, bind="127.0.0.1:0", lifespan="off") as server:
        for _ in range(3):
            gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                async with connected(server) as client:
                    await client.send(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
                    await client.receive()
            while server.connections.open:
                await anyio.lowlevel.checkpoint()
            await anyio.wait_all_tasks_blocked()
            kinds = ("HttpConnection", "Stream", "_Tracked")
            left = [each for each in gc.get_objects() if type(each).__name__ in kinds]
            assert len(left) < 3, "the last one may still be in the hands of the event loop"
        finally:
            gc.enable()
