"""Metrics of a service: they tell what clients saw, whatever happens to its processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.service.test_status_port import StatusPort
from tests.support import DEADLINE_S, LINE_APP, Service, eventually, http_get, need, write_code
from tests.tls_support import Pki

#: Ends as its path says.
APP = """
import asyncio, os, signal

async def app(scope, receive, send):
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept" if scope["path"] == "/ws" else "websocket.close"})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        return
    if scope["type"] != "http":
        raise RuntimeError("no lifespan")
    path = scope["path"]
    if path == "/kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if path == "/boom":
        raise ValueError
    if path == "/wait":
        await asyncio.sleep(1000)
    status = int(path[1:] or 200)
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    for piece in (b"a", b"b"):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        if path == "/206":
            raise ValueError
    await send({"type": "http.response.body", "body": b""})
"""

Samples = dict[str, float]


def scrape(port: StatusPort) -> Samples:
    """All samples of /metrics, by name and labels as they are written."""
    status, _, body = port.get("/metrics")
    assert status == 200, body
    return samples(body.decode())


def samples(text: str) -> Samples:
    found = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(each.labels.items()))
            found[f"{each.name}{{{labels}}}"] = each.value
    return found


def requests(found: Samples) -> Samples:
    """The requests that are not 0, by method and status."""
    name = "hotport_http_requests_total"
    return {key.removeprefix(name)[1:-1]: value for key, value in found.items() if key.startswith(name) and value}


@contextmanager
def serving(directory: Path, *args: str, code: str = APP) -> Iterator[tuple[Service, StatusPort]]:
    write_code(directory / "app.py", code)
    with Service(directory, "app:app", "--status-bind", "127.0.0.1:0", *args) as service:
        yield service.wait_ready(), StatusPort(service)


def ask(port: int, text: str) -> bytes:
    """Send bytes on a connection of their own, and return what is answered."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as sock:
        sock.sendall(text.encode())
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while data := sock.recv(65536):
            answer += data
        return answer


def test_every_way_in_which_a_request_ends_is_counted_once(tmp_path: Path) -> None:
    with serving(tmp_path, "--body-max", "10") as (service, port):
        assert scrape(port)["hotport_http_requests_total{method=GET,status=2xx}"] == 0  # there from the beginning
        for path, status in (("/", 200), ("/304", 304), ("/404", 404), ("/boom", 500)):
            assert http_get(service.port, path)[0] == status
        for method in ("HEAD", "PROPFIND"):
            assert b" 200 " in ask(service.port, f"{method} / HTTP/1.1\r\nHost: a\r\n\r\n")
        for line in ("BREW / HTTP/1.1", "nonsense"):
            assert b" 400 " in ask(service.port, f"{line}\r\n\r\n")
        assert b" 413 " in ask(service.port, "PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n")
        broken = ask(service.port, "OPTIONS /206 HTTP/1.1\r\nHost: a\r\n\r\n")
        assert broken.endswith(b"a\r\n")
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as sock:
            sock.sendall(b"DELETE /wait HTTP/1.1\r\nHost: a\r\n\r\n")
            eventually(lambda: scrape(port)["hotport_connections{kind=http,state=serving}"] == 1, "it is open")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it leaves with a reset
        wanted = {
            "method=GET,status=2xx": 1,
            "method=GET,status=3xx": 1,
            "method=GET,status=4xx": 1,
            "method=GET,status=5xx": 1,
            "method=HEAD,status=2xx": 1,
            "method=PUT,status=4xx": 1,
            "method=other,status=2xx": 1,
            "method=other,status=4xx": 2,
            "method=OPTIONS,status=none": 1,
            "method=DELETE,status=none": 1,
        }
        eventually(lambda: requests(scrape(port)) == wanted, f"{wanted} rather than {requests(scrape(port))}")
        found = scrape(port)
        counts = [found[f"hotport_http_request_duration_seconds_count{{status={n}xx}}"] for n in range(1, 6)]
        assert counts == [0, 3, 1, 4, 1]
        assert found["hotport_connections_accepted_total{}"] == 11
        assert found["hotport_connections_closed_total{fate=finished}"] == 11
        assert found["hotport_connections{kind=http,state=serving}"] == 0


def test_websockets_are_counted_by_their_handshake(tmp_path: Path) -> None:
    upgrade = (
        "GET {} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with serving(tmp_path) as (service, port):
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as sock:
            sock.sendall(upgrade.format("/ws").encode())
            assert b" 101 " in sock.recv(1000)
            found = scrape(port)
            assert requests(found) == {"method=GET,status=1xx": 1}
            assert found["hotport_connections{kind=websocket,state=serving}"] == 1
            assert found["hotport_connections{kind=http,state=serving}"] == 0
        assert b" 403 " in ask(service.port, upgrade.format("/denied"))
        assert b" 400 " in ask(service.port, upgrade.format("/ws").replace("13", "12"))
        eventually(lambda: scrape(port).get("hotport_connections{kind=websocket,state=serving}", 0) == 0, "it is gone")
        assert requests(scrape(port)) == {"method=GET,status=1xx": 1, "method=GET,status=4xx": 2}


@pytest.mark.parametrize("preload", [False, True])
def test_sums_go_on_through_everything_that_may_happen_to_processes(tmp_path: Path, preload: bool) -> None:
    with ExitStack() as stack:
        args = ["app:app", "--workers", "2", *(["--preload"] if preload else [])]
        write_code(tmp_path / "app.py", APP)
        service = stack.enter_context(Service(tmp_path, *args, "--status-bind", "127.0.0.1:0")).wait_ready()
        address = service.status()["status_address"].removeprefix("tcp://")
        asked = 0
        port = StatusPort(service)

        def check() -> Samples:
            nonlocal asked
            for _ in range(5):
                assert http_get(service.port)[0] == 200
                asked += 1
            found = scrape(port)
            assert requests(found)["method=GET,status=2xx"] == asked
            return found

        check()
        service.restart()
        check()
        assert service.run("scale", "3", "svc").returncode == 0
        check()
        with suppress(ConnectionError):
            assert ask(service.port, "GET /kill HTTP/1.1\r\nHost: a\r\n\r\n") == b""
        eventually(lambda: len(service.worker_pids()) == 3, "the killed one is replaced")
        found = check()
        assert found["hotport_worker_events_total{event=lost}"] == 1
        assert found["hotport_connections_closed_total{fate=cut_killed}"] == 1
        assert service.run("upgrade", "svc").returncode == 0
        found = check()
        assert found["hotport_restarts_total{outcome=done}"] == 1
        service.process.send_signal(signal.SIGKILL)
        service.process.wait()
        service = stack.enter_context(Service(tmp_path, *args, "--status-bind", address)).wait_ready()
        found = check()
        assert found["hotport_worker_events_total{event=lost}"] == 1
        write_code(tmp_path / "app.py", "raise ValueError\n")
        service.restart(expect=4)
        found = check()
        assert found["hotport_restarts_total{outcome=aborted}"] == 1
        write_code(tmp_path / "app.py", APP)
        new = stack.enter_context(Service(tmp_path, *args, "--status-bind", address, "--take-over"))
        assert service.wait() == 0
        service = new.wait_ready()
        found = check()
        assert found["hotport_restarts_total{outcome=done}"] == 1
        assert found["hotport_connections_accepted_total{}"] == asked + 1
        assert service.run("stop", "svc").returncode == 0
        assert service.wait() == 0
        assert not (service.runtime / "counters").exists()


def test_a_worker_that_hangs_is_read_like_any_other(tmp_path: Path) -> None:
    with serving(tmp_path) as (service, port):
        assert http_get(service.port)[0] == 200
        (worker,) = service.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        try:
            with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S):
                address = f"tcp://127.0.0.1:{service.port}"
                queued = f"hotport_listener_queue_connections{{address={address}}}"
                eventually(lambda: scrape(port)[queued] == 1, "the kernel has it")
            found = scrape(port)
            assert requests(found) == {"method=GET,status=2xx": 1}
            assert found["hotport_worker_resident_memory_bytes{slot=0}"] > 1e6
        finally:
            os.kill(worker, signal.SIGCONT)


def test_openmetrics_is_rendered_for_those_who_ask_for_it(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, port):
        question = (
            "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=1.0.0,text/plain;q=0.5\r\n\r\n"
        )
        head, _, body = port.say(question.encode()).partition(b"\r\n\r\n")
        assert b"Content-Type: application/openmetrics-text; version=1.0.0" in head
        names = {family.name for family in parse_openmetrics(body.decode())}  # type: ignore[no-untyped-call]
        assert {"hotport_http_requests", "hotport_http_request_duration_seconds", "hotport_stage"} <= names
        assert port.get("/metrics")[1].count(b"Content-Type: text/plain; version=0.0.4") == 1
        assert port.get("/metrics", "HEAD")[2] == b""


def test_without_the_package_the_answer_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError\n")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['prometheus_client'] = None\n")
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    env = {"PYTHONPATH": str(tmp_path)}
    with Service(tmp_path, "app:app", "--status-bind", "127.0.0.1:0", env=env) as service:
        status, _, body = StatusPort(service.wait_ready()).get("/metrics")
        assert status == 501
        assert f"{sys.executable} -m pip install prometheus-client" in body.decode()


def test_certificates_are_watched_as_workers_use_them(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    name = "hotport_tls_certificate_expiry_timestamp_seconds{certificate=cert.pem}"
    with serving(tmp_path, "--tls-cert", pki.issue("cert.pem", "localhost", has_expired=True)) as (service, port):
        before = scrape(port)[name]
        pki.issue("cert.pem", "localhost")
        assert scrape(port)[name] == before, "nobody has read it yet"
        assert service.run("reload-tls", "svc").returncode == 0
        assert scrape(port)[name] > before


def test_nothing_that_is_bounded_grows_with_restarts(tmp_path: Path) -> None:
    with serving(tmp_path) as (service, port):
        service.restart()
        lag = {"hotport_worker_event_loop_lag_seconds{slot=0}"}  # is there once the worker has told it
        before = scrape(port).keys() - lag
        for _ in range(3):
            service.restart()
        assert scrape(port).keys() - lag == before
        assert before >= {"hotport_worker_generation{slot=0}", "hotport_generation{}"}
        assert len(list((service.runtime / "counters").iterdir())) == 3  # of the worker, the supervisor, and the total


@pytest.mark.parametrize("kind", ["stream", "foreign"])
def test_other_kinds_of_applications_have_metrics_too(tmp_path: Path, kind: str) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    foreign = "import os, socket\ns = socket.socket(fileno=3)\nwhile True: s.accept()[0].close()\n"
    (tmp_path / "program.py").write_text(foreign)
    what = ("--ready", "exec", "--", sys.executable, "program.py") if kind == "foreign" else ("app:app",)
    args = ("--status-bind", "127.0.0.1:0", *what) if kind == "foreign" else (*what, "--status-bind", "127.0.0.1:0")
    with Service(tmp_path, *args) as service:
        port = StatusPort(service.wait_ready())
        if kind == "stream":
            with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as sock:
                name = "hotport_connections{kind=stream,state=serving}"
                eventually(lambda: scrape(port).get(name) == 1, "it is open")
                sock.sendall(b"who\n")
                assert sock.recv(100)
        found = scrape(port)
        assert found["hotport_workers{phase=serving}"] == 1
        assert found["hotport_connections_accepted_total{}"] == (kind == "stream")


def test_every_metric_is_in_the_reference(tmp_path: Path) -> None:
    with serving(tmp_path, "--tls-cert", Pki(tmp_path).issue("cert.pem", "localhost")) as (service, port):
        service.restart()
        families = text_string_to_metric_families(port.get("/metrics")[2].decode())
        told = {(each.name, each.type) for each in families}
    page = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    described = set(re.findall(r"^\| `(hotport_\w+)` \| (\w+) ", page, re.MULTILINE))
    assert told == described


def test_promtool_finds_nothing_to_improve(tmp_path: Path) -> None:
    promtool = need("promtool")
    with serving(tmp_path, "--tls-cert", Pki(tmp_path).issue("cert.pem", "localhost")) as (service, port):
        service.restart()
        body = port.get("/metrics")[2]
    done = subprocess.run([promtool, "check", "metrics"], input=body, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
