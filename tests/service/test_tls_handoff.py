"""Connections over TLS live through restarts: their clients notice nothing, and the new code answers."""

from __future__ import annotations

import http.client
import json
import select
import ssl
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websocket

from tests.support import DEADLINE_S, RESTARTS, Service, need, write_code
from tests.tls_support import Pki, connect

APP = """
import json, os

VERSION = "{version}"


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({{"type": "lifespan.startup.complete"}})
        await receive()
        await send({{"type": "lifespan.shutdown.complete"}})
    elif scope["type"] == "websocket":
        await receive()
        await send({{"type": "websocket.accept"}})
        while (message := await receive())["type"] == "websocket.receive":
            await send({{"type": "websocket.send", "text": f"{{VERSION}} {{message['text']}}"}})
    else:
        size = 0
        while (message := await receive()):
            size += len(message["body"])
            if not message["more_body"]:
                break
        tls = scope["extensions"]["tls"]
        about = dict(
            version=VERSION, pid=os.getpid(), size=size, scheme=scope["scheme"], suite=tls["cipher_suite"],
            tls=tls["tls_version"], client=tls["client_cert_name"], chain=len(tls["client_cert_chain"]),
            server=tls["server_cert"][-60:], padding="x" * int(scope["query_string"] or 0),
        )
        body = json.dumps(about).encode()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({{"type": "http.response.start", "status": 200, "headers": headers}})
        await send({{"type": "http.response.body", "body": body}})
"""

GCM12, CBC12 = "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-AES256-SHA384"


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    (tmp_path / "pki").mkdir()
    return Pki(tmp_path / "pki")


def deploy(directory: Path, version: str) -> None:
    write_code(directory / "app.py", APP.format(version=version))


def serve(directory: Path, pki: Pki, *args: str) -> Service:
    deploy(directory, "v0")
    options = ("--tls-cert", pki.issue("server.pem", "localhost"), "--tls-handoff", "on", "--handoff", "websocket")
    return Service(
        directory, "app:app", *options, "--settle", "0s", "--keep-alive", "600s", "--drain-timeout", "5s", *args
    )


class Client:
    """A keep-alive connection that may not be closed."""

    def __init__(self, service: Service, context: ssl.SSLContext) -> None:
        self._connection = http.client.HTTPSConnection("localhost", service.port, timeout=DEADLINE_S, context=context)
        self._connection.connect()
        self._connection.auto_open = 0

    def ask(self, body: bytes = b"", padding: int = 0) -> Any:
        self._connection.request("POST", f"/?{padding}", body)
        answer = self._connection.getresponse()
        found = json.loads(answer.read())
        assert (found["size"], len(found["padding"])) == (len(body), padding)
        return found

    def close(self) -> None:
        self._connection.close()


def context(pki: Pki, suite: str | None = None) -> ssl.SSLContext:
    made = pki.client()
    if suite is not None:
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        made.set_ciphers(suite)
    return made


def websocket(service: Service, pki: Pki, stack: ExitStack, suite: str | None = None) -> ClientConnection:
    url = f"wss://localhost:{service.port}/"
    return stack.enter_context(connect_websocket(url, ssl=context(pki, suite), open_timeout=DEADLINE_S))


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_connections_over_tls_live_through_restarts(tmp_path: Path, pki: Pki, loop: str) -> None:
    with serve(tmp_path, pki, "--workers", "2", "--loop", loop) as service, ExitStack() as stack:
        service.wait_ready()
        clients = [Client(service, context(pki, suite)) for suite in (None, GCM12) for _ in range(5)]
        for client in clients:
            stack.callback(client.close)
        sockets = [websocket(service, pki, stack, suite) for suite in (None, GCM12) for _ in range(3)]
        before = [client.ask() for client in clients]
        assert {each["tls"] for each in before} == {0x0303, 0x0304}
        for number in range(1, RESTARTS + 1):
            deploy(tmp_path, f"v{number}")
            report = service.restart()
            assert report["connections"] == {"moved_http": len(clients), "moved_websocket": len(sockets)}
            for client, first in zip(clients, before, strict=True):
                later = client.ask(b"x" * 40000, padding=40000)
                assert later["version"] == f"v{number}"
                assert {k: later[k] for k in ("scheme", "suite", "tls", "server")} == {
                    k: first[k] for k in ("scheme", "suite", "tls", "server")
                }
            for each in sockets:
                each.send("hello")
                assert each.recv(DEADLINE_S) == f"v{number} hello"


def test_an_undone_restart_takes_connections_over_tls_back(tmp_path: Path, pki: Pki) -> None:
    with serve(tmp_path, pki) as service, ExitStack() as stack:
        service.wait_ready()
        client = Client(service, context(pki))
        stack.callback(client.close)
        first = client.ask()
        deploy(tmp_path, "v1")
        restart = service.start("restart", "--undo-window", "1h")
        assert restart.stderr is not None
        service.wait_until(lambda: client.ask()["version"] == "v1", "the new generation answers")
        undone = service.run("undo", "--json")
        assert undone.returncode == 0, undone.stderr
        again = client.ask()
        assert (again["version"], again["pid"]) == ("v0", first["pid"])
        restart.communicate(timeout=DEADLINE_S)


def test_connections_over_tls_follow_workers_that_come_and_go(tmp_path: Path, pki: Pki) -> None:
    with serve(tmp_path, pki) as service, ExitStack() as stack:
        service.wait_ready()
        clients = [Client(service, context(pki, suite)) for suite in (None, GCM12) for _ in range(4)]
        for client in clients:
            stack.callback(client.close)
        first = {client.ask()["pid"] for client in clients}
        assert len(first) == 1
        for command in (("scale", "2"), ("rebalance",), ("scale", "1"), ("upgrade",), ("restart", "--phased")):
            done = service.run(*command)
            assert done.returncode == 0, done.stderr
            answers = [client.ask(b"x") for client in clients]
            if command == ("rebalance",):
                assert len({each["pid"] for each in answers}) == 2
        assert {each["pid"] for each in answers} == set(service.worker_pids())


PROTOCOL = """
import asyncio

VERSION = "{version}"


class Counting(asyncio.Protocol):
    def __init__(self, count=0):
        self.count = count

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.count += len(data)
        self.transport.write(f"{{VERSION}} {{self.count}} {{self.transport.get_extra_info('cipher')[1]}}\\n".encode())

    def export_state(self):
        return self.count

    def import_state(self, count):
        self.count = count

    def pause_writing(self):
        pass

    def resume_writing(self):
        pass
"""


def test_protocols_take_their_state_along_over_tls(tmp_path: Path, pki: Pki) -> None:
    write_code(tmp_path / "app.py", PROTOCOL.format(version="v0"))
    options = ("--tls-cert", pki.issue("server.pem", "localhost"), "--tls-handoff", "on", "--settle", "0s")
    with Service(tmp_path, "app:Counting", *options) as service, ExitStack() as stack:
        port = service.wait_ready().port
        clients = [stack.enter_context(connect(port, context(pki, suite))) for suite in (None, GCM12)]
        for number in range(3):
            for client, version in zip(clients, ("TLSv1.3", "TLSv1.2"), strict=True):
                client.sendall(b"x")
                assert client.recv(100) == f"v{number} {number + 1} {version}\n".encode()
            if number < 2:
                write_code(tmp_path / "app.py", PROTOCOL.format(version=f"v{number + 1}"))
                assert service.restart()["connections"] == {"moved_protocol": 2}


def test_clients_with_certificates_keep_their_names_unless_the_authorities_change(tmp_path: Path, pki: Pki) -> None:
    with serve(tmp_path, pki, "--tls-client-ca", str(pki.ca)) as service, ExitStack() as stack:
        service.wait_ready()
        client = Client(service, pki.client(pki.issue("client.pem", "me@example.org", common_name="Me")))
        stack.callback(client.close)
        first = client.ask()
        service.restart()
        later = client.ask()
        assert later["pid"] != first["pid"]
        assert (later["client"], later["chain"]) == (first["client"], first["chain"])
        assert "CN=Me" in later["client"]
        pki.ca.write_bytes(pki.ca.read_bytes() * 2)
        report = service.restart()
        assert "moved_http" not in report["connections"]
        refusal = service.log_events("handoff.refused")[-1]
        assert "tls_client_ca or tls_client_auth has changed" in refusal["why"]


def test_what_cannot_move_is_drained_and_says_why(tmp_path: Path, pki: Pki) -> None:
    with serve(tmp_path, pki) as service, ExitStack() as stack:
        service.wait_ready()
        (old,) = service.worker_pids()
        client = Client(service, context(pki, CBC12))
        stack.callback(client.close)
        client.ask()
        restart = service.start("restart", "--json")

        def why() -> str:
            workers = [each for each in service.status()["workers"] if each["pid"] == old]
            return " ".join(each["why"] for worker in workers for each in worker["lingering"])

        service.wait_until(lambda: f"TLS: the records of {CBC12} in TLSv1.2 cannot be counted" in why(), "it says why")
        client.close()
        out, error = restart.communicate(timeout=DEADLINE_S)
        assert restart.returncode == 0, out + error
        assert "moved_http" not in out


class Peer:
    """``openssl s_client``, which can be told to send a KeyUpdate: k, or K to ask for one."""

    def __init__(self, service: Service, pki: Pki, *args: str) -> None:
        command = [
            need("openssl"),
            "s_client",
            "-connect",
            f"localhost:{service.port}",
            "-CAfile",
            str(pki.ca),
            "-crlf",
        ]
        self._process = subprocess.Popen(
            [*command, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        self._said = b""
        self.wait(b"Verify return code: 0")

    def say(self, words: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(words)

    def wait(self, what: bytes) -> None:
        assert self._process.stdout is not None
        while what not in self._said:
            assert select.select([self._process.stdout], [], [], DEADLINE_S)[0], (what, self._said)
            more = self._process.stdout.read(1 << 16)
            assert more, (what, self._said)
            self._said += more
        self._said = self._said.partition(what)[2]

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()


PEERS = [
    ("-ciphersuites", "TLS_AES_128_GCM_SHA256"),
    ("-ciphersuites", "TLS_AES_256_GCM_SHA384"),
    ("-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"),
    ("-groups", "P-521:X25519"),
    ("-maxfraglen", "512"),
    ("-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256", "-maxfraglen", "512"),
    ("-tls1_2", "-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"),
]


def test_clients_with_any_suite_update_their_keys_before_and_after_moves(tmp_path: Path, pki: Pki) -> None:
    with serve(tmp_path, pki) as service, ExitStack() as stack:
        service.wait_ready()
        peers = [Peer(service, pki, *args) for args in PEERS]
        for peer in peers:
            stack.callback(peer.close)
        for number in range(3):
            for peer, args in zip(peers, PEERS, strict=True):
                peer.say(b"POST /?3000 HTTP/1.1\nHost: x\nContent-Length: 0\n\n")
                peer.wait(b'"version": "v%d"' % number)
                peer.wait(b'xxx"}')
                for update in () if "-tls1_2" in args else (b"K\n", b"k\n"):
                    peer.say(update)
                    peer.wait(b"KEYUPDATE")
            if number < 2:
                deploy(tmp_path, f"v{number + 1}")
                assert service.restart()["connections"] == {"moved_http": len(PEERS)}
