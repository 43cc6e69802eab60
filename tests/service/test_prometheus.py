"""A real Prometheus watches a service through everything that may happen to its processes."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.service.test_metrics import samples, scrape
from tests.service.test_status_port import StatusPort
from tests.support import DEADLINE_S, SLOWNESS, Service, eventually, need, read_response, write_code

#: Answers by its path. Its loop is asyncio's, which writes at once: when the application kills its worker, every answer
#: that was counted has left it.
APP = """
import os, signal

async def app(scope, receive, send):
    if scope["type"] != "http":
        raise RuntimeError("no lifespan")
    if scope["path"] == "/kill":
        os.kill(os.getpid(), signal.SIGKILL)
    await receive()
    status = int(scope["path"][1:])
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"1")]})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else b"x"})
"""

CONFIG = """
global: {{scrape_interval: {interval}s, scrape_timeout: {interval}s, evaluation_interval: {interval}s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: hotport
    static_configs: [{{targets: ["{target}"]}}]
"""

#: Seconds between two scrapes, and for each.
INTERVAL_S = math.ceil(SLOWNESS)

#: What the clients ask for in turns: method, path, and the class of the answer's status.
MIX = (("GET", "/200", "2xx"), ("POST", "/201", "2xx"), ("GET", "/404", "4xx"), ("GET", "/503", "5xx"))


#: Everything that must only grow.
COUNTERS = '{__name__=~"hotport_(http|connections|restart|worker_events|log).*_(total|count|sum|bucket)"}'


class Clients:
    """Clients on connections that stay, each of which counts its complete answers by method and status."""

    def __init__(self, port: int, count: int = 3) -> None:
        self.answers: Counter[tuple[str, str]] = Counter()
        self.broken = 0
        self._port = port
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def wait_more(self, count: int = 20) -> None:
        """Return after so many more answers."""
        wanted = self.answers.total() + count
        eventually(lambda: self.answers.total() >= wanted, f"{wanted} answers, not {self.answers}")

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self._port), DEADLINE_S) as sock:
                    self._ask(sock)
            except (OSError, ValueError, IndexError):  # its worker was killed, or had closed it
                with self._lock:
                    self.broken += 1

    def _ask(self, sock: socket.socket) -> None:
        for method, path, status in MIX * 3:
            if self._is_over.wait(0.005):
                return
            length = "Content-Length: 0\r\n" if method == "POST" else ""
            sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: a\r\n{length}\r\n".encode())
            assert read_response(sock)[0] == int(path[1:])
            with self._lock:
                self.answers[method, status] += 1


class Prometheus:
    """A Prometheus on loopback, with its data in a directory of the test."""

    def __init__(self, directory: Path, target: str) -> None:
        rules = Path(__file__).parents[2] / "docs" / "examples" / "prometheus" / "hotport.rules.yml"
        config = directory / "prometheus.yml"
        config.write_text(CONFIG.format(target=target, rules=rules, interval=INTERVAL_S))
        subprocess.run([need("promtool"), "check", "config", config], check=True, capture_output=True)
        with socket.create_server(("127.0.0.1", 0)) as free:  # it cannot say which port 0 is
            self._port = free.getsockname()[1]
        self.log = (directory / "prometheus.log").open("wb")
        self.process = subprocess.Popen(
            [
                need("prometheus"),
                f"--config.file={config}",
                f"--storage.tsdb.path={directory / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
            ],
            stdout=self.log,
            stderr=self.log,
        )

    def ask(self, what: str, **query: object) -> Any:
        """The data of an answer of its HTTP interface."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{what}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            return json.load(answer)["data"]

    def value(self, expression: str) -> float | None:
        """The value of an expression that is one number, now; None if there is none."""
        with suppress(OSError, ValueError):
            result = self.ask("query", query=expression)["result"]
            return float(result[0]["value"][1]) if result else None
        return None

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(DEADLINE_S) == 0
        self.log.close()


@contextmanager
def prometheus(directory: Path, target: str) -> Iterator[Prometheus]:
    server = Prometheus(directory, target)
    try:
        yield server
    finally:
        server.close()


def kill_a_worker(port: int) -> None:
    """Have a worker kill itself between two requests of others."""
    with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), DEADLINE_S) as sock:
        sock.sendall(b"GET /kill HTTP/1.1\r\nHost: a\r\n\r\n")
        assert sock.recv(100) == b""


def has_workers(service: Service, count: int) -> bool:
    return len(service.worker_pids()) == count


def requests(found: dict[str, float]) -> dict[tuple[str, str], float]:
    return {
        (match[1], match[2]): value
        for key, value in found.items()
        if (match := re.fullmatch(r"hotport_http_requests_total\{method=(\w+),status=(\w+)\}", key)) and value
    }


def test_a_real_prometheus_sees_no_gap_no_step_back_and_every_request(tmp_path: Path) -> None:
    need("prometheus")
    write_code(tmp_path / "app.py", APP)
    args = ("app:app", "--workers", "2", "--loop", "asyncio", "--settle", "0", "--keep-alive", "1m")
    with ExitStack() as stack:
        service = stack.enter_context(Service(tmp_path, *args, "--status-bind", "127.0.0.1:0")).wait_ready()
        target = service.status()["status_address"].removeprefix("tcp://")
        server = stack.enter_context(prometheus(tmp_path, target))
        eventually(lambda: server.value("hotport_generation") == 1, "Prometheus has scraped the service")
        began_s = time.time()
        with Clients(service.port) as clients:
            for restart in range(10):
                clients.wait_more()
                service.restart()
                if restart == 3:
                    assert service.run("scale", "3", "svc").returncode == 0
                if restart in (4, 6):
                    kill_a_worker(service.port)
                    eventually(partial(has_workers, service, 3), "the killed one is replaced")
                if restart == 7:
                    clients.wait_more()
                    service.process.send_signal(signal.SIGKILL)
                    service.process.wait()
                    clients.wait_more()
                    service = stack.enter_context(Service(tmp_path, *args, "--status-bind", target)).wait_ready()
            clients.wait_more()
        port = StatusPort(service)
        eventually(lambda: scrape(port)["hotport_connections{kind=http,state=serving}"] == 0, "clients have left")
        text = port.get("/metrics")[2]
        found = samples(text.decode())

        # Exactly: each answer that a client has got, and nothing else.
        assert requests(found) == clients.answers
        assert found["hotport_restarts_total{outcome=done}"] == 10
        assert found["hotport_worker_events_total{event=lost}"] == 2
        assert clients.answers.total() > 200
        check = subprocess.run([need("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
        assert (check.returncode, check.stderr) == (0, b"")

        total = clients.answers.total()
        eventually(lambda: server.value("sum(hotport_http_requests_total)") == total, f"Prometheus has seen {total}")
        span_s = int(time.time() - began_s) + 1
        kept = server.ask("query", query=f"{COUNTERS}[{span_s}s]")["result"]
        assert len(kept) > 50
        for series in kept:  # Prometheus would take a step back for a restart from 0, and count everything again
            values = [float(value) for _, value in series["values"]]
            assert values == sorted(values), series["metric"]
        ended_s = time.time()
        rate = f"sum(rate(hotport_http_requests_total[{10 * INTERVAL_S}s]))"
        first_s = began_s + 3 * INTERVAL_S
        (series,) = server.ask("query_range", query=rate, start=first_s, end=ended_s, step=1)["result"]
        assert [at for at, _ in series["values"]] == pytest.approx(
            [first_s + n for n in range(int(ended_s - first_s) + 1)]
        )
        assert all(float(value) >= 0 for _, value in series["values"])
        names = {each["labels"]["alertname"] for each in server.ask("alerts")["alerts"]}
        assert "HotportUnserved" not in names
