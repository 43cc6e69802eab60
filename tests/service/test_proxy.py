"""Behind real proxies, configured as the documentation says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import DEADLINE_S, LINE_APP, Hammer, Service, need, read_response, write_code

EXAMPLES = Path(__file__).parent.parent.parent / "docs" / "examples" / "proxies"

APP = """
import json

async def app(scope, receive, send):
    assert scope["type"] == "http"
    told = {key: scope[key] for key in ("client", "server", "scheme", "path", "root_path")}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(told).encode()})
"""

#: Clients come from here, so that they are not trusted as the proxy is; all of 127.0.0.0/8 is this machine.
CLIENT = "127.0.0.2"

#: What a client claims that wants to be somebody else.
SPOOF = "X-Forwarded-For: 203.0.113.5\r\n"


@pytest.fixture(params=["tcp", "unix"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[str]]:
    """The directory of a service, and the arguments that say where it listens."""
    write_code(tmp_path / "app.py", APP)
    return tmp_path, ["--bind", "127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/app.sock"]


def address_of(service: Service, *, unix: str) -> str:
    """Where a service listens, as its proxy is told."""
    address: str = service.status()["addresses"][0]
    return address.removeprefix("tcp://") if address.startswith("tcp") else address.replace("unix:", unix)


@contextmanager
def proxy(*command: str, env: dict[str, str] | None = None, pass_fd: int) -> Iterator[None]:
    with subprocess.Popen(command, env={**os.environ, **(env or {})}, pass_fds=(pass_fd,)) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(DEADLINE_S)


@contextmanager
def haproxy(directory: Path, section: str, server: str, *, version: str = "send-proxy-v2") -> Iterator[int]:
    """haproxy with one section of the example in front of `server`; the port on which it listens."""
    program = need("haproxy")
    defaults, web, passthrough = (EXAMPLES / "haproxy.cfg").read_text().split("\n# ")
    with socket.create_server(("127.0.0.1", 0)) as front:
        text = {"web": web, "passthrough": passthrough}[section].partition("\n")[2]
        for theirs, ours in (
            ("bind :80", f"bind fd@{front.fileno()}"),
            ("bind :443", f"bind fd@{front.fileno()}"),
            ("127.0.0.1:8000", server),
            ("unix@/run/shop/app.sock", server),
            ("send-proxy-v2", version),
        ):
            text = text.replace(theirs, ours)
        config = directory / "haproxy.cfg"
        config.write_text(f"{defaults}\n{text}")
        with proxy(program, "-db", "-q", "-f", str(config), pass_fd=front.fileno()):
            yield front.getsockname()[1]


@contextmanager
def nginx(directory: Path, server: str, api: str, *, user: str = "root") -> Iterator[int]:
    """nginx with the example in front of `server` and, for ``/api/``, of `api`; the port on which it listens.

    Args:
        user: As whom its workers connect.
    """
    program = need("nginx")
    with socket.create_server(("127.0.0.1", 0)) as front:
        port = front.getsockname()[1]
        text = (EXAMPLES / "nginx.conf").read_text()
        text = text.replace("listen 80", f"listen 127.0.0.1:{port}").replace(
            "server 127.0.0.1:8000", f"server {server}"
        )
        text = text.replace("http://127.0.0.1:8001/", f"http://{api}/")
        paths = "".join(
            f"{kind}_temp_path {directory}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        text = text.replace("http {\n", f"http {{\naccess_log off;\n{paths}")
        config = directory / "nginx.conf"
        config.write_text(f"daemon off;\nuser {user};\npid {directory}/nginx.pid;\n{text}")
        inherited = {"NGINX": f"{front.fileno()};"}  # how it passes listeners to its next binary
        with proxy(program, "-e", "stderr", "-c", str(config), env=inherited, pass_fd=front.fileno()):
            yield port


def ask(port: int, path: str = "/", headers: str = "") -> tuple[dict[str, Any], tuple[str, int]]:
    """What the application tells of a request, and the address from which it was made."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S, source_address=(CLIENT, 0)) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n{headers}\r\n".encode())
        status, body = read_response(sock)
        assert status == 200, body
        return json.loads(body), sock.getsockname()


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
def test_haproxy_says_by_the_proxy_protocol_whose_connection_it_is(
    service: tuple[Path, list[str]], version: str
) -> None:
    directory, args = service
    with Service(directory, "app:app", "--proxy-protocol", *args) as running:
        server = address_of(running.wait_ready(), unix="unix@")
        with haproxy(directory, "passthrough", server, version=version) as port:
            told, address = ask(port, headers=SPOOF)
            assert told["client"] == list(address)
            assert told["server"] == ["127.0.0.1", port]


def test_haproxy_says_in_header_fields_whose_request_it_is(service: tuple[Path, list[str]]) -> None:
    directory, args = service
    with Service(directory, "app:app", *args) as running:
        server = address_of(running.wait_ready(), unix="unix@")
        with haproxy(directory, "web", server) as port:
            told, _ = ask(port, headers=f"{SPOOF}X-Forwarded-Proto: https\r\n")
            assert (told["client"], told["scheme"]) == ([CLIENT, 0], "http")


def test_haproxy_is_not_believed_where_it_is_not_trusted(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", APP)
    args = ("--trusted-proxy", "10.0.0.0/8", "--trusted-proxy", "unix")
    with Service(tmp_path, "app:app", *args) as running:
        server = address_of(running.wait_ready(), unix="unix@")
        with haproxy(tmp_path, "web", server) as port:
            assert ask(port)[0]["client"][0] == "127.0.0.1"


def test_nginx_says_in_header_fields_whose_request_it_is(service: tuple[Path, list[str]]) -> None:
    directory, args = service
    with Service(directory, "app:app", "--root-path", "/api", *args) as running:
        running.wait_ready()
        server = address_of(running, unix="unix:")
        api = f"{server}:" if server.startswith("unix:") else server
        with nginx(directory, server, api) as port:
            told, _ = ask(port, headers=f"{SPOOF}X-Forwarded-Proto: https\r\n")
            assert (told["client"], told["scheme"]) == ([CLIENT, 0], "http")
            told, _ = ask(port, "/api/items")
            assert (told["path"], told["root_path"]) == ("/api/items", "/api")


def test_a_restart_behind_haproxy_loses_no_connection(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--proxy-protocol") as running:
        server = address_of(running.wait_ready(), unix="unix@")
        with haproxy(tmp_path, "passthrough", server) as port, Hammer(port) as hammer:
            hammer.wait_answers(version="v1")
            for number in range(2, 5):
                write_code(tmp_path / "app.py", LINE_APP.format(version=f"v{number}"))
                running.restart()
                hammer.wait_answers(version=f"v{number}")
    assert not hammer.failures
