"""What clients see of restarts: nothing. Real clients, a real framework, new code each time."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from hotport.wire.messages import Report, RestartRequest
from tests.support import (
    DEADLINE_S,
    RESTARTS,
    SLOWNESS,
    Service,
    eventually,
    http_get,
    loops,
    need,
    read_response,
    write_code,
)

APP = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

VERSION = "{version}"

async def index(request):
    return PlainTextResponse(VERSION)

async def slow(request):
    await request.scope["extensions"]["hotport"]["draining"].wait()
    return PlainTextResponse("slow " + VERSION)

async def stream(request):
    draining = request.scope["extensions"]["hotport"]["draining"]
    async def chunks():
        for n in range(20):
            yield f"{{n}}\\n"
            if n == 10:
                await draining.wait()
    return StreamingResponse(chunks())

async def events(request):
    draining = request.scope["extensions"]["hotport"]["draining"]
    async def until_draining():
        yield "open\\n"
        await draining.wait()
        yield "retry\\n"
    return StreamingResponse(until_draining())

async def upload(request):
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
    return PlainTextResponse(f"{{total}} {{VERSION}}")

app = Starlette(routes=[
    Route("/", index), Route("/slow", slow), Route("/stream", stream), Route("/events", events),
    Route("/upload", upload, methods=["POST"]),
])
"""


def deploy(service_or_directory: Service | Path, version: str) -> None:
    directory = service_or_directory.directory if isinstance(service_or_directory, Service) else service_or_directory
    write_code(directory / "app.py", APP.format(version=version))


@pytest.fixture(params=["uvloop", "asyncio"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    deploy(tmp_path, "v0")
    with Service(tmp_path, "app:app", "--workers", "2", "--loop", request.param, "--keep-alive", "1h") as running:
        yield running.wait_ready()


def restart_into(service: Service, version: str) -> Report:
    """Deploy and restart; the new code answers, and the old processes are gone."""
    deploy(service, version)
    before = service.worker_pids()
    report = service.ask(RestartRequest())[-1]
    assert isinstance(report, Report)
    assert report.outcome == "done"
    assert http_get(service.port) == (200, version.encode())
    for pid in before:
        eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"worker {pid} is gone")  # type: ignore[misc]
    return report


def wait_draining(service: Service) -> None:
    """Both workers of the first generation have told their connections."""
    eventually(lambda: len(service.log_events("drain.began")) == 2, "the old generation drains")


WRK_LUA = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("requests %d connect %d read %d write %d timeout %d status %d\\n",
    summary.requests, e.connect, e.read, e.write, e.timeout, e.status))
end
"""


#: wrk connects once, and closes, to find out whether anybody is there.
WRK_PROBES = 1


@contextmanager
def wrk(tmp_path: Path, url: str, *, connections: int, lua: str = "", name: str = "wrk") -> Iterator[psutil.Popen]:
    """wrk at full speed until the block ends; then it has lost nothing."""
    script = tmp_path / f"{name}.lua"
    script.write_text(lua + WRK_LUA)
    arguments = ["-t1", f"-c{connections}", "-d3600s", "--timeout", "30s", "-s", str(script), url]
    process = psutil.Popen([need("wrk"), *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)  # it stops and prints its summary
        out, _ = process.communicate(timeout=DEADLINE_S)
    counts = {k: int(v) for k, v in re.findall(r"(\w+) (\d+)", out.splitlines()[-1])}
    assert counts.pop("requests") > 100, name
    assert counts == dict.fromkeys(["connect", "read", "write", "timeout", "status"], 0), f"{name}: {out}"


def assert_nobody_was_cut(report: Report) -> None:
    assert report.connections is not None
    assert not any(fate.startswith(("cut_", "workers_")) for fate in report.connections), report
    assert report.dropped == 0
    assert report.accept_gap_ms == 0


@pytest.mark.soak
@pytest.mark.timeout(60 + 20 * RESTARTS * SLOWNESS)
def test_restarts_under_full_load_cost_no_request_and_no_connection(tmp_path: Path) -> None:
    deploy(tmp_path, "v0")
    with Service(tmp_path, "app:app", "--workers", "2").wait_ready() as service:
        url = f"http://127.0.0.1:{service.port}/"
        with wrk(tmp_path, url, connections=256) as load:

            def its_ports() -> set[int]:
                return {each.laddr.port for each in load.net_connections() if each.status == psutil.CONN_ESTABLISHED}

            eventually(lambda: service.accepted() == 256 + WRK_PROBES, "every connection is accepted")
            ports = its_ports()
            assert len(ports) == 256
            for number in range(1, RESTARTS + 1):
                report = restart_into(service, f"v{number}")
                assert_nobody_was_cut(report)
                assert report.connections == {"moved_http": 256}
                assert service.accepted() == 1, "nobody has connected to this generation but `restart_into`"
            assert its_ports() == ports


@pytest.mark.soak
@pytest.mark.timeout(60 + 20 * RESTARTS * SLOWNESS)
def test_restarts_under_full_load_of_new_connections_cost_no_request(tmp_path: Path) -> None:
    deploy(tmp_path, "v0")
    with Service(tmp_path, "app:app", "--workers", "2").wait_ready() as service:
        url = f"http://127.0.0.1:{service.port}/"
        with wrk(tmp_path, url, connections=64, lua='wrk.headers["Connection"] = "close"\n'):
            for number in range(1, RESTARTS + 1):
                assert_nobody_was_cut(restart_into(service, f"v{number}"))


LOADS_APP = """
import os
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

VERSION = "{version}"
app = FastAPI()

@app.get("/")
async def index():
    return PlainTextResponse(VERSION)

@app.get("/json")
async def small(name: str = "x"):
    return {{"name": name, "version": VERSION, "numbers": [1, 2, 3]}}

@app.get("/body")
async def body():
    return Response(b"x" * 65536)

@app.get("/stream")
async def stream():
    async def chunks():
        for _ in range(16):
            yield b"x" * 65536
    return StreamingResponse(chunks())

@app.post("/upload")
async def upload(request: Request):
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
    return Response(status_code=200 if total == 1 << 20 else 400)
"""

LOADS = {
    "json": "",
    "body": "",
    "stream": "",
    "upload": 'wrk.method = "POST"\nwrk.body = string.rep("x", 1048576)\n',
}


@pytest.mark.soak
@pytest.mark.timeout(60 + 20 * RESTARTS * SLOWNESS)
def test_restarts_under_all_kinds_of_load_at_once_cost_no_request(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LOADS_APP.format(version="v0"))
    with Service(tmp_path, "app:app", "--access-log", "structured").wait_ready() as service:
        with ExitStack() as running:
            for name, lua in LOADS.items():
                url = f"http://127.0.0.1:{service.port}/{name}"
                running.enter_context(wrk(tmp_path, url, connections=4, lua=lua, name=name))
            eventually(lambda: service.accepted() == len(LOADS) * (4 + WRK_PROBES), "every connection is accepted")
            for number in range(1, RESTARTS + 1):
                write_code(tmp_path / "app.py", LOADS_APP.format(version=f"v{number}"))
                report = service.ask(RestartRequest())[-1]
                assert report.connections == {"moved_http": 4 * len(LOADS)}
                assert http_get(service.port) == (200, f"v{number}".encode())
        logged = service.log_events("request")
        assert {line["status"] for line in logged} == {200}
        assert {line["path"] for line in logged} == {"/", "/json", "/body", "/stream", "/upload"}


@pytest.mark.soak
@pytest.mark.parametrize("service", loops(0), indirect=True)
def test_connections_that_send_only_after_the_restart_are_answered(service: Service) -> None:
    port = service.port
    early = [socket.create_connection(("127.0.0.1", port), DEADLINE_S) for _ in range(300)]
    halves = [socket.create_connection(("127.0.0.1", port), DEADLINE_S) for _ in range(50)]
    for each in halves:
        each.sendall(b"GET / HTTP/1.1\r\nHo")
    deploy(service, "v1")
    answers: list[tuple[int, bytes]] = []

    def speak_when_committed() -> None:
        wait_draining(service)
        for each in early:
            each.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        for each in halves:
            each.sendall(b"st: test\r\n\r\n")
        answers.extend(read_response(each) for each in early + halves)

    speaker = threading.Thread(target=speak_when_committed)
    speaker.start()
    report = service.restart()
    speaker.join(DEADLINE_S)
    for each in early + halves:
        each.close()
    assert len(answers) == 350
    assert {status for status, _ in answers} == {200}
    assert {body for _, body in answers} <= {b"v0", b"v1"}
    assert report["connections"] == {"moved_http": 350}


@pytest.mark.soak
def test_what_is_in_flight_arrives_whole(service: Service) -> None:
    port = service.port
    slow, stream, upload, events = (socket.create_connection(("127.0.0.1", port), DEADLINE_S) for _ in range(4))
    for sock, path in ((slow, "/slow"), (stream, "/stream"), (events, "/events")):
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    upload.sendall(b"POST /upload HTTP/1.1\r\nHost: test\r\nContent-Length: 100000\r\n\r\n" + b"x" * 50_000)
    opened = b""
    while b"open\n" not in opened:
        opened += events.recv(65536)
    deploy(service, "v1")

    def finish_upload() -> None:
        wait_draining(service)
        upload.sendall(b"x" * 50_000)

    with ThreadPoolExecutor() as threads:
        uploading = threads.submit(finish_upload)
        reading = [threads.submit(read_chunked, sock) for sock in (stream, events)]
        report = service.restart()
        uploading.result()
        whole, rest = (future.result() for future in reading)
    with slow, upload:
        assert read_response(slow) == (200, b"slow v0")
        assert read_response(upload) == (200, b"100000 v0")
    assert all(f"{n}\n".encode() in whole for n in range(20))
    assert b"retry\n" in rest, "the application was told that draining had started"
    assert sum(report["connections"].values()) >= 4
    assert not any(fate.startswith(("cut_", "workers_")) for fate in report["connections"]), report


def read_chunked(sock: socket.socket) -> bytes:
    """An answer to the end of its chunked body; then the client closes."""
    received = b""
    with sock:
        while not received.endswith(b"0\r\n\r\n"):
            data = sock.recv(65536)
            assert data, "the chunked body has its end"
            received += data
    return received


def read_to_end(sock: socket.socket) -> bytes:
    received = b""
    with sock:
        while data := sock.recv(65536):
            received += data
    return received


@pytest.mark.soak
@pytest.mark.parametrize("service", loops(1), indirect=True)
def test_an_idle_keep_alive_connection_is_answered_by_the_new_code(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as client:
        for number in range(RESTARTS + 1):
            client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            assert read_response(client) == (200, f"v{number}".encode())
            deploy(service, f"v{number + 1}")
            assert service.restart()["connections"] == {"moved_http": 1}


def test_without_handoff_an_idle_connection_is_answered_once_more_and_told_to_close(tmp_path: Path) -> None:
    deploy(tmp_path, "v0")
    with (
        Service(tmp_path, "app:app", "--workers", "2", "--handoff", "off", "--keep-alive", "1h") as service,
        socket.create_connection(("127.0.0.1", service.wait_ready().port), DEADLINE_S) as client,
    ):
        client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        assert read_response(client) == (200, b"v0")
        deploy(service, "v1")
        answers: list[bytes] = []

        def ask_again() -> None:
            wait_draining(service)
            client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            answers.append(read_to_end(client))

        asker = threading.Thread(target=ask_again)
        asker.start()
        report = service.restart()
        asker.join(DEADLINE_S)
    assert answers[0].startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answers[0].lower()
    assert answers[0].endswith(b"v0")
    assert report["connections"] == {"told_to_close": 1}


@pytest.mark.parametrize("framework", ["fastapi", "starlette"])
def test_frameworks_with_a_lifespan_are_served_and_restarted(tmp_path: Path, framework: str) -> None:
    code = {
        "fastapi": "from fastapi import FastAPI as App\ndecorate = lambda app: app.get('/')",
        "starlette": "from starlette.applications import Starlette as App\n"
        "from starlette.responses import JSONResponse\n"
        "def decorate(app):\n"
        "    def add(f):\n"
        "        async def endpoint(request): return JSONResponse(await f())\n"
        "        app.add_route('/', endpoint)\n"
        "    return add",
    }[framework]
    app = f"""
from contextlib import asynccontextmanager
{code}

@asynccontextmanager
async def lifespan(app):
    open("started-{{version}}", "w").close()
    yield
    open("stopped-{{version}}", "w").close()

app = App(lifespan=lifespan)

@decorate(app)
async def index():
    return {{{{"version": "{{version}}"}}}}
"""
    write_code(tmp_path / "app.py", app.format(version="v0"))
    with Service(tmp_path, "app:app") as service:
        assert http_get(service.wait_ready().port)[1] == b'{"version":"v0"}'
        assert (tmp_path / "started-v0").exists()
        write_code(tmp_path / "app.py", app.format(version="v1"))
        service.restart()
        assert http_get(service.port)[1] == b'{"version":"v1"}'
        assert (tmp_path / "stopped-v0").exists()


@pytest.mark.usefixtures("either_start")
def test_phased_restarts_replace_workers_one_by_one_and_lose_nothing(tmp_path: Path) -> None:
    deploy(tmp_path, "v0")
    with Service(tmp_path, "app:app", "--workers", "3", "--phased") as service:
        port = service.wait_ready().port
        failures: list[object] = []
        stop = threading.Event()

        def hammer() -> None:
            while not stop.is_set():
                try:
                    status, _ = http_get(port)
                    if status != 200:
                        failures.append(status)
                except OSError as error:
                    failures.append(error)

        hammering = threading.Thread(target=hammer)
        hammering.start()
        deploy(service, "v1")
        report = service.restart()
        stop.set()
        hammering.join(DEADLINE_S)
        assert failures == []
        assert report["is_phased"]
        assert [phase["name"] for phase in report["phases"]].count("committed") == 3
        assert {worker["generation"] for worker in service.status()["workers"]} == {2}
