"""Behind a load balancer that asks who wants clients, configured as the documentation says."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import DEADLINE_S, HOTPORT, SLOWNESS, Answer, Hammer, Service, eventually, http_get, need, write_code

EXAMPLE = Path(__file__).parent.parent.parent / "docs" / "examples" / "proxies" / "load-balancer.cfg"

APP = """
import asyncio, os

async def app(scope, receive, send):
    if scope["path"] == "/slow":
        await asyncio.sleep(0.3)
    who = f"{os.environ['WHO']} 1 {os.getpid()}".encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": who})
"""


class Balancer:
    """haproxy in front of blue and green.

    Attributes:
        port: Where clients connect to servers that have an agent.
        port_by_http: Where they connect to those that are asked with HTTP.
    """

    def __init__(self, port: int, port_by_http: int, stats: Path) -> None:
        self.port = port
        self.port_by_http = port_by_http
        self._stats = stats

    def state(self, server: str, proxy: str = "shop") -> str:
        """What haproxy shows of a server: ``UP``, ``DRAIN``, ``DOWN (agent)``."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._stats))
            sock.sendall(b"show stat\n")
            rows = [line.split(",") for line in sock.makefile().read().lstrip("# ").splitlines()]
        return next(row[rows[0].index("status")] for row in rows[1:] if row[:2] == [proxy, server])

    def wait_state(self, server: str, state: str, proxy: str = "shop") -> None:
        """Return when haproxy is sure of it: ``UP 1/2`` is what it says while it is not."""
        eventually(lambda: self.state(server, proxy).removesuffix(" (agent)") == state, f"{server} is {state}")


@contextmanager
def balancer(directory: Path, hosts: dict[str, str]) -> Iterator[Balancer]:
    program = need("haproxy")
    stats = directory / "stats.sock"
    with socket.create_server(("127.0.0.1", 0)) as front, socket.create_server(("127.0.0.1", 0)) as by_http:
        text = EXAMPLE.read_text()
        for theirs, ours in (
            ("bind :80\n", f"bind fd@{front.fileno()}\n    retries 0\n"),  # what is lost must be seen
            ("bind :81\n", f"bind fd@{by_http.fileno()}\n    retries 0\n"),
            ("inter 1s", "inter 200ms"),
            ("10.0.0.11", hosts["blue"]),
            ("10.0.0.12", hosts["green"]),
        ):
            assert theirs in text
            text = text.replace(theirs, ours)
        config = directory / "haproxy.cfg"
        config.write_text(f"global\n    stats socket {stats}\n{text}")
        command = [program, "-db", "-q", "-f", str(config)]
        passed = (front.fileno(), by_http.fileno())
        with subprocess.Popen(command, pass_fds=passed, stderr=subprocess.DEVNULL) as process:
            try:
                eventually(stats.exists, "haproxy has started")
                yield Balancer(front.getsockname()[1], by_http.getsockname()[1], stats)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(DEADLINE_S)
                stats.unlink(missing_ok=True)


@pytest.fixture
def hosts() -> dict[str, str]:
    """Addresses of this machine that nobody else uses, so that a server can come back to its ports."""
    third, fourth = os.getpid() >> 8 & 255, os.getpid() & 255
    return {"blue": f"127.100.{third}.{fourth}", "green": f"127.101.{third}.{fourth}"}


@contextmanager
def server(directory: Path, name: str, host: str, *args: str) -> Iterator[Service]:
    where = ("--bind", f"{host}:8000", "--status-bind", f"{host}:9000", "--keep-alive", "5s")
    with Service(directory, "app:app", *where, *args, name=name, env={"WHO": name}) as service:
        yield service.wait_ready()


def wait_left_alone(service: Service) -> None:
    """Return when the balancer has let its connections go: they are idle for a while, and then closed."""
    service.wait_until(lambda: not any(each["connections"] for each in service.status()["workers"]), "all have left")


@pytest.mark.timeout(120 * SLOWNESS)
def test_a_lame_duck_is_taken_out_before_it_refuses_anybody(tmp_path: Path, hosts: dict[str, str]) -> None:
    write_code(tmp_path / "app.py", APP)
    with ExitStack() as stack:
        green = stack.enter_context(server(tmp_path, "green", hosts["green"]))
        blue = stack.enter_context(server(tmp_path, "blue", hosts["blue"]))
        haproxy = stack.enter_context(balancer(tmp_path, hosts))
        haproxy.wait_state("blue", "UP")
        haproxy.wait_state("green", "UP")
        stop = shlex.join([*HOTPORT, "stop", "blue", "--lame-duck", "1h"])
        load = green.start(
            *("churn", f"http://127.0.0.1:{haproxy.port}/", "--connect", "40/s", "--keepalive", "5", "--slow", "8/s"),
            *("--restart", stop, "--after", "500ms", "--times", "1", "--json", "run.json", "--engines", "1"),
        )
        haproxy.wait_state("blue", "DRAIN")
        assert blue.status()["stage"] == "lame duck"
        wait_left_alone(blue)
        assert blue.run("stop", "blue").returncode == 0
        output = "".join(load.communicate(timeout=DEADLINE_S))
        assert blue.wait() == 0
        found = json.loads((tmp_path / "run.json").read_text())
        assert [incident for incident in found["incidents"] if incident["fate"] != "late"] == []
        assert load.returncode == 0 or not found["verdict"]["is_valid"], output
        assert found["totals"]["connect"]["answered"] > 0
        stack.enter_context(server(tmp_path, "blue", hosts["blue"]))
        haproxy.wait_state("blue", "UP")  # what its agent said last held it back until now


def ask(port: int) -> Answer:
    status, body = http_get(port)
    if status != 200:
        raise ValueError(status)
    who, generation, pid = body.decode().split()
    return Answer(who, generation, int(pid))


def test_sigterm_makes_a_lame_duck_that_health_checks_see(tmp_path: Path, hosts: dict[str, str]) -> None:
    write_code(tmp_path / "app.py", APP)
    with ExitStack() as stack:
        stack.enter_context(server(tmp_path, "green", hosts["green"]))
        blue = stack.enter_context(server(tmp_path, "blue", hosts["blue"], "--lame-duck", "1h"))
        haproxy = stack.enter_context(balancer(tmp_path, hosts))
        haproxy.wait_state("blue", "UP", "shop-by-http")
        haproxy.wait_state("green", "UP", "shop-by-http")
        with Hammer(haproxy.port_by_http, ask=ask) as hammer:
            hammer.wait_answers(version="blue")
            blue.process.send_signal(signal.SIGTERM)
            haproxy.wait_state("blue", "DOWN", "shop-by-http")
            assert blue.process.poll() is None
            wait_left_alone(blue)
            blue.process.send_signal(signal.SIGTERM)
            assert blue.wait() == 0
            hammer.wait_answers(version="green")
    assert not hammer.failures
