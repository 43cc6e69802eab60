"""TLS connections: which certificate they get, who may connect, and what handshakes that fail leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

import hotport
from hotport.adapters.asgi import http, shared
from hotport.address import parse_address
from hotport.errors import StartError
from hotport.worker import acceptor
from tests.adapters.asgi_support import Answers, read_body, respond
from tests.support import DEADLINE_S, assert_three_lines
from tests.tls_support import Pki, connect, serial

pytestmark = pytest.mark.anyio

run = anyio.to_thread.run_sync


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


async def echo(stream: hotport.Stream) -> None:
    async for chunk in stream:
        await stream.send(chunk)


async def web(scope: Any, receive: Any, send: Any) -> None:
    await respond(send, repr(scope["extensions"].get("tls")).encode() if scope["path"] == "/tls" else b"ok")


def port_of(server: hotport.Server) -> int:
    return int(parse_address(server.addresses[0]).port)  # type: ignore[union-attr]


def serve(app: Any, **options: Any) -> Any:
    return hotport.serve(app, bind="127.0.0.1:0", **options)


async def until(claim: Callable[[], bool]) -> None:
    with anyio.fail_after(DEADLINE_S):
        while not claim():  # noqa: ASYNC110  there is nobody to set an event
            await anyio.sleep(0.01)


def names_shown(port: int, context: ssl.SSLContext, name: str | None) -> set[str]:
    """The names in the certificate that a client gets that asks for `name`."""
    context.check_hostname = False
    sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
    with sock, context.wrap_socket(sock, server_hostname=name) as client:
        told = client.getpeercert()
        assert told is not None
        return {str(pair[1]) for pair in told["subjectAltName"]}


def test_three_lines_for_a_certificate_that_nothing_can_choose(pki: Pki) -> None:
    first, second = pki.issue("a.pem", "a.example"), pki.issue("b.pem", "10.0.0.1")

    async def start() -> None:
        async with serve(echo, tls_cert=(first, second)):
            pass

    with pytest.raises(StartError) as caught:
        anyio.run(start)
    assert_three_lines(str(caught.value), "HP514")
    assert "b.pem" in caught.value.what
    assert "no DNS name" in caught.value.cause


async def test_certificates_are_chosen_by_name_and_the_first_is_for_the_rest(pki: Pki) -> None:
    files = (
        pki.issue("a.pem", "a.example", "10.0.0.1"),
        pki.issue("b.pem", "b.example", "*.b.example", has_expired=True),
        pki.issue("c.pem", "c.b.example", "*.c.example"),
    )
    client = pki.client()
    client.verify_flags |= 0x200000  # X509_V_FLAG_NO_CHECK_TIME
    async with serve(echo, tls_cert=files) as server:
        for name, expected in (
            ("a.example", "a.example"),
            ("b.example", "b.example"),
            ("X.B.example", "b.example"),
            ("c.b.example", "c.b.example"),
            ("x.c.example", "c.b.example"),
            ("c.example", "a.example"),
            ("x.y.b.example", "a.example"),
            ("unknown.example", "a.example"),
            (None, "a.example"),
        ):
            assert expected in await run(names_shown, port_of(server), client, name), name


async def test_two_certificates_with_keys_of_their_own(pki: Pki) -> None:
    (one, one_key), (two, two_key) = pki.issue_apart("one", "one.example"), pki.issue_apart("two", "two.example")
    async with serve(echo, tls_cert=(one, two), tls_key=(one_key, two_key)) as server:
        for name in ("one.example", "two.example"):
            (await run(connect, port_of(server), pki.client(), name)).close()


async def test_a_certificate_that_has_expired_is_served_and_told(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    async with serve(echo, tls_cert=pki.issue("old.pem", "localhost", has_expired=True)) as server:
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            await run(connect, port_of(server), pki.client())
    assert "old.pem has expired at 2001-01-01" in caplog.text


@pytest.mark.parametrize(
    ("app", "options", "agreed"),
    [
        (web, {"lifespan": "off"}, "http/1.1"),
        (echo, {}, None),
        (echo, {"tls_alpn": ("line/2", "line/1")}, "line/1"),
    ],
    ids=["asgi", "stream", "option"],
)
async def test_alpn(pki: Pki, app: Any, options: dict[str, Any], agreed: str | None) -> None:
    async with serve(app, tls_cert=pki.issue("a.pem", "localhost"), **options) as server:
        for offered in (["h2", "http/1.1", "line/1"], ["h2"], []):
            context = pki.client()
            if offered:
                context.set_alpn_protocols(offered)
            client = await run(connect, port_of(server), context)
            assert client.selected_alpn_protocol() == (agreed if agreed in offered else None)
            assert client.version() == "TLSv1.3"
            client.close()


async def test_an_old_protocol_is_refused(pki: Pki) -> None:
    context = pki.client()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with serve(echo, tls_cert=pki.issue("a.pem", "localhost")) as server:
        with pytest.raises(ssl.SSLError):
            await run(connect, port_of(server), context)


def says(port: int, context: ssl.SSLContext, data: bytes = b"hello") -> bytes:
    with connect(port, context) as client:
        client.sendall(data)
        return client.recv(100)


@pytest.mark.parametrize("mode", ["auto", "required", "optional", "none"])
async def test_clients_show_certificates(pki: Pki, tmp_path: Path, mode: str) -> None:
    (tmp_path / "other").mkdir()
    other = Pki(tmp_path / "other")
    clients = {
        "right": pki.client(pki.issue("client.pem", "client.example")),
        "wrong": pki.client(other.issue("wrong.pem", "client.example")),
        "expired": pki.client(pki.issue("old.pem", "client.example", has_expired=True)),
        "without": pki.client(),
    }
    allowed = {"optional": {"right", "without"}, "none": set(clients)}.get(mode, {"right"})
    certificates = (pki.issue("a.pem", "localhost"), pki.issue("b.pem", "b.example"))
    async with serve(echo, tls_cert=certificates, tls_client_ca=str(pki.ca), tls_client_auth=mode) as server:
        for name, context in clients.items():
            if name in allowed:
                assert await run(says, port_of(server), context) == b"hello"
            else:
                with pytest.raises((ssl.SSLError, ConnectionResetError)):
                    assert not await run(says, port_of(server), context)
                    raise ConnectionResetError  # an end without an alert will do
        await until(lambda: not server.connections.open)


async def test_certificates_are_read_again_for_new_connections_only(pki: Pki) -> None:
    file = pki.issue("a.pem", "localhost")
    context = pki.client()
    async with serve(echo, tls_cert=file, tasks=2) as server:
        port = port_of(server)
        early = await run(connect, port, context)
        before = early.getpeercert()
        pki.issue("a.pem", "localhost")
        server.reload_tls()
        assert before is not None
        after = await run(serial, port, context)
        assert after != before["serialNumber"]
        early.sendall(b"still here")
        assert await run(early.recv, 100) == b"still here"
        early.close()

        await anyio.Path(file).write_text("broken")
        with pytest.raises(StartError, match="HP507"):
            server.reload_tls()
        assert await run(serial, port, context) == after


async def test_a_sockets_application_does_not_serve_plain_text_where_tls_was_wanted(pki: Pki) -> None:
    async def main(sockets: list[socket.socket], lifetime: hotport.Lifetime) -> None:
        raise AssertionError

    with pytest.raises(StartError) as caught:
        async with serve(main, tls_cert=pki.issue("a.pem", "localhost")):
            pass
    assert_three_lines(str(caught.value), "HP512")


# -- handshakes ---------------------------------------------------------------------------------------------


def hello(context: ssl.SSLContext) -> bytes:
    """The first flight of a client."""
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(received, sent, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("app", [echo, web])
async def test_handshakes_that_fail_leave_nothing_behind(
    pki: Pki, app: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    first = hello(pki.client())
    async with serve(app, tls_cert=pki.issue("a.pem", "localhost"), lifespan="off") as server:
        for said in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01", os.urandom(300), first[:50], first):
            for leave in (socket.socket.close, reset, lambda sock: sock.shutdown(socket.SHUT_WR)):
                sock = socket.create_connection(("127.0.0.1", port_of(server)), DEADLINE_S)
                with sock:
                    sock.sendall(said)
                    count = server.connections.accepted
                    await until(lambda count=count: server.connections.accepted > count or not count)  # type: ignore[misc]
                    leave(sock)
                    await until(lambda: not server.connections.open)
        with pytest.raises(ssl.SSLCertVerificationError):  # a client that does not trust us
            await run(connect, port_of(server), ssl.create_default_context())
        await until(lambda: not server.connections.open)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert "Traceback" not in capfd.readouterr().err


async def test_a_handshake_has_its_time(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "HANDSHAKE_TIMEOUT_S", 0.05)
    async with serve(echo, tls_cert=pki.issue("a.pem", "localhost")) as server:
        with socket.create_connection(("127.0.0.1", port_of(server)), DEADLINE_S) as silent:
            assert await run(silent.recv, 100) == b""
        await until(lambda: not server.connections.open)


async def shake_hands(sock: socket.socket, client: ssl.SSLObject, received: ssl.MemoryBIO, sent: ssl.MemoryBIO) -> None:
    while True:
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            sock.sendall(sent.read())
            received.write(await run(sock.recv, 65536))
        else:
            sock.sendall(sent.read())
            return


async def test_a_drain_lets_a_handshake_finish_and_serves_what_follows(pki: Pki) -> None:
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = pki.client().wrap_bio(received, sent, server_hostname="localhost")
    sock = socket.socket()
    sock.settimeout(DEADLINE_S)
    async with serve(web, tls_cert=pki.issue("a.pem", "localhost"), lifespan="off") as server:
        sock.connect(("127.0.0.1", port_of(server)))
        first = hello(pki.client())
        sock.sendall(first[:10])  # of another handshake: only to be in one
        await until(lambda: server.connections.accepted == 1)
        sock.close()
        await until(lambda: not server.connections.open)
        sock = socket.create_connection(("127.0.0.1", port_of(server)), DEADLINE_S)
        await until(lambda: server.connections.accepted == 2)
        server.close()
        answers: list[bytes] = []

        async def speak() -> None:
            await server.connections.draining.wait()
            await shake_hands(sock, client, received, sent)
            client.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            sock.sendall(sent.read())
            answer = Answers()
            while True:
                received.write(await run(sock.recv, 65536))
                try:
                    if (whole := answer.feed(client.read())) is not None:
                        break
                except ssl.SSLWantReadError:
                    pass
            assert whole.says_close
            answers.append(whole.body)
            sock.close()

        speaking = asyncio.create_task(speak())
    await speaking
    assert answers == [b"ok"]
    assert server.connections.fates == {"told_to_close": 1}


@pytest.mark.parametrize("app", [echo, web])
async def test_a_handshake_that_outlives_the_drain_is_cut(pki: Pki, app: Any) -> None:
    with socket.socket() as silent:
        silent.settimeout(DEADLINE_S)
        options = {"tls_cert": pki.issue("a.pem", "localhost"), "drain_timeout": 0.05, "lifespan": "off"}
        async with serve(app, **options) as server:
            silent.connect(("127.0.0.1", port_of(server)))
            await until(lambda: server.connections.accepted == 1)
        assert [fate.startswith("cut_") for fate in server.connections.fates] == [True]
        with anyio.fail_after(acceptor.HANDSHAKE_TIMEOUT_S / 2):
            assert await run(silent.recv, 100) == b""


# -- streams and HTTP ---------------------------------------------------------------------------------------


async def test_a_large_body_arrives_whole_both_ways(pki: Pki) -> None:
    async def double(scope: Any, receive: Any, send: Any) -> None:
        body = await read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": body})

    data = os.urandom(5_000_000)

    def ask(port: int) -> bytes:
        with connect(port, pki.client()) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(data))
            client.sendall(data)
            answers = Answers()
            while (answer := answers.feed(client.recv(65536), method="POST")) is None:
                pass
            assert client.recv(10) == b"", "it says goodbye"
            return answer.body

    async with serve(double, tls_cert=pki.issue("a.pem", "localhost"), lifespan="off") as server:
        assert await run(ask, port_of(server)) == data + data


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_client_that_says_goodbye_behind_its_request_gets_its_answer_in_tls_13_only(
    pki: Pki, caplog: pytest.LogCaptureFixture, version: ssl.TLSVersion
) -> None:
    """TLS 1.2 wants the connection closed at once (RFC 5246 section 7.2.1); TLS 1.3 does not (RFC 8446 section 6.1)."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            seen.append(message["type"])
        seen.append("the client's end")
        await respond(send, b"in time")

    def ask(port: int) -> bytes:
        context = pki.client()
        context.maximum_version = version
        received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(received, sent, server_hostname="localhost")
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as sock:
            while True:
                try:
                    client.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(sent.read())
                    received.write(sock.recv(65536))
            client.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            with pytest.raises(ssl.SSLWantReadError):
                client.unwrap()
            sock.sendall(sent.read())
            answer = b""
            while data := sock.recv(65536):
                received.write(data)
                with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
                    while True:
                        answer += client.read()
            return answer

    async with serve(app, tls_cert=pki.issue("a.pem", "localhost"), lifespan="off") as server:
        answer = await run(ask, port_of(server))
        await until(lambda: "the client's end" in seen and not server.connections.open)
    assert seen == ["http.request", "the client's end"]
    assert answer.endswith(b"in time") is (version == ssl.TLSVersion.TLSv1_3)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_client_that_never_says_goodbye_is_not_waited_for_long(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "LINGER_S", 0.05)
    async with serve(web, tls_cert=pki.issue("a.pem", "localhost"), lifespan="off", keep_alive=0.05) as server:
        client = await run(connect, port_of(server), pki.client())
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await run(client.recv, 65536)
        begin = anyio.current_time()
        await until(lambda: not server.connections.open)
        assert anyio.current_time() - begin < acceptor.GOODBYE_TIMEOUT_S
        client.close()


@pytest.mark.parametrize("size", [5_000_000, 60_000], ids=["more than the kernel takes", "less than makes TLS wait"])
async def test_a_slow_client_gets_the_last_answer_whole(pki: Pki, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(shared, "LINGER_S", 0.01)
    looks: list[http.HttpConnection] = []
    expire = http.HttpConnection.expire

    def look(connection: http.HttpConnection) -> None:
        looks.append(connection)
        expire(connection)

    monkeypatch.setattr(http.HttpConnection, "expire", look)
    data = os.urandom(size)

    async def download(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, data)

    def rest(client: ssl.SSLSocket) -> bytes:
        answers = Answers()
        while (answer := answers.feed(client.recv(65536))) is None:
            pass
        return answer.body

    async with serve(download, tls_cert=pki.issue("a.pem", "localhost"), lifespan="off") as server:
        sock = socket.socket()
        sock.settimeout(DEADLINE_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least that there is
        sock.connect(("127.0.0.1", port_of(server)))
        client = await run(lambda: pki.client().wrap_socket(sock, server_hostname="localhost"))
        [connection] = server.connections.open
        ours = connection.transport.get_extra_info("socket")
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        await until(lambda: len(looks) > 4 or not server.connections.open)
        assert await run(rest, client) == data
        client.close()
