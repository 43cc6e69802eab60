"""WebSockets: every message and every way in which a connection ends, and TLS below."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import Server, ServerConnection, serve

from hotport.churn.engine import Engine
from hotport.churn.result import Load
from tests.churn.scripted import Scripted, Seen, plan, read_head, reset, run, target
from tests.support import DEADLINE_S, SLOWNESS
from tests.tls_support import Pki


@contextmanager
def _serving(handler: Callable[[ServerConnection], None], **options: object) -> Iterator[int]:
    server: Server = serve(handler, "127.0.0.1", 0, **options)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()
        thread.join(DEADLINE_S)


def _run_until_stopped(port: int, engines: list[Engine], load: Load) -> Seen:
    return run(plan(target(port), load, duration_ms=60_000, arrivals="even"), engines.append)


@pytest.mark.parametrize(
    ("code", "event"), [(1001, "told to close"), (1012, "told to close"), (1000, "idle close"), (1011, "idle close")]
)
def test_restarting_server_is_told_from_one_that_just_leaves(code: int, event: str) -> None:
    answered = connected = 0
    engines: list[Engine] = []

    def handler(connection: ServerConnection) -> None:
        nonlocal answered, connected
        connected += 1
        for number, message in enumerate(connection):
            if connected == 4:
                engines[0].stop()
                with contextlib.suppress(ConnectionClosed):
                    connection.recv()
                return
            connection.send(message)
            answered += 1
            if number == 1:
                connection.close(code)
                return

    with _serving(handler) as port:
        # The pause between messages is so long that the end comes before the next one is sent.
        seen = _run_until_stopped(port, engines, Load("websocket", rate=5 / SLOWNESS, count=1))
    assert seen.fates == {"answered": answered, event: 3, "reconnected": 3}
    assert seen.connections == 4
    assert answered == 6


def test_one_connection_lasts_as_long_as_the_server_lets_it() -> None:
    answered = 0

    def handler(connection: ServerConnection) -> None:
        nonlocal answered
        for message in connection:
            connection.send(message)
            answered += 1

    with _serving(handler) as port:
        seen = run(plan(target(port), Load("websocket", count=3, think_ms=1)))
    assert seen.fates == {"answered": answered}
    assert answered > 30
    assert seen.connections == 3


def test_messages_that_nobody_answers_are_lost_with_their_connection() -> None:
    answered = connected = 0
    engines: list[Engine] = []

    def handler(connection: ServerConnection) -> None:
        nonlocal answered, connected
        connected += 1
        for number, message in enumerate(connection):
            if connected == 4:
                engines[0].stop()
                with contextlib.suppress(ConnectionClosed):
                    while True:  # to the end of what was sent before it knew: it must not find us gone
                        connection.recv()
                return
            if number == 10:
                connection.socket.shutdown(socket.SHUT_WR)
                return
            connection.send(message)
            answered += 1
            if number == 5:
                connection.send(message)

    with _serving(handler) as port:
        seen = _run_until_stopped(port, engines, Load("websocket", rate=100, count=1))
    fates = seen.fates
    lost = fates.pop("lost message")
    assert lost >= 3  # and those that were sent before the client knew
    assert fates == {"answered": answered, "duplicated message": 3, "reconnected": 3}
    assert answered == 30


def test_refused_handshake_is_a_wrong_status() -> None:
    def refuse(connection: ServerConnection, _: object) -> object:
        return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "later\n")

    with _serving(lambda connection: None, process_request=refuse) as port:
        seen = run(plan(target(port), Load("websocket", rate=50, count=1)))
    assert set(seen.fates) <= {"wrong status", "reconnected"}
    assert {incident.detail.rpartition(": ")[2] for incident in seen.incidents} == {"503"}


@pytest.mark.parametrize(
    ("end", "fate"), [(reset, "reset after send"), (lambda sock: None, "closed unanswered")], ids=["reset", "close"]
)
def test_end_in_the_handshake_says_how_far_it_was(end: Callable[[socket.socket], None], fate: str) -> None:
    def serve_once(sock: socket.socket) -> None:
        read_head(sock)
        end(sock)

    with Scripted(serve_once) as server:
        seen = run(plan(target(server.port), Load("websocket", rate=200, count=1)))
    assert set(seen.fates) == {fate, "reconnected"}


@pytest.mark.parametrize("load", [Load("tls", rate=100), Load("tls", count=1, think_ms=20)], ids=["new", "kept"])
def test_requests_go_over_tls(load: Load, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Pki(tmp_path).issue("server.pem", "localhost"))
    asked = connected = 0

    def serve_tls(raw: socket.socket) -> None:
        nonlocal asked, connected
        with context.wrap_socket(raw, server_side=True) as sock:
            connected += 1
            while read_head(sock):
                asked += 1
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n" + bytes(70_000))

    with Scripted(serve_tls) as server:
        seen = run(plan(target(server.port, tls=True), load, verify_tls=False, duration_ms=300 * SLOWNESS))
    assert set(seen.fates) == {"answered"}
    assert seen.fates["answered"] == asked
    assert connected == (asked if load.rate else 1)


def test_end_in_the_tls_handshake_is_before_anything_was_sent() -> None:
    def serve_once(sock: socket.socket) -> None:
        sock.recv(10_000)
        reset(sock)

    with Scripted(serve_once) as server:
        seen = run(plan(target(server.port, tls=True), Load("connect", rate=200)))
    assert set(seen.fates) == {"reset before send"}
