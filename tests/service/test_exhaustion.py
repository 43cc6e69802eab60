"""What becomes of a service when it runs out of descriptors, places or processor time: it loses nobody."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import (
    DEADLINE_S,
    HOTPORT,
    LINE_APP,
    Gate,
    Service,
    ask_line,
    eventually,
    need,
    read_response,
    write_code,
)


def limited(descriptors: int) -> tuple[str, ...]:
    """Runs a command with few descriptors, and no right to more."""
    return (need("prlimit"), f"--nofile={descriptors}:{descriptors}")


def answered(sock: socket.socket) -> bool:
    """Whether the server says anything; raises ConnectionResetError if it drops us."""
    return bool(sock.recv(100))


def test_supervisor_out_of_descriptors_serves_its_clients_when_some_are_free(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app", prefix=limited(40)).wait_ready() as service:
        port, fresh = service.port, service.descriptors()
        with ExitStack() as silent:
            for _ in range(60):
                sock = silent.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(str(service.runtime / "control.sock"))
            eventually(lambda: bool(service.log_events("control.accept_failed")), "it has run out")
            assert ask_line(port).version == "one"
        assert service.status()["generation"] == 1
        eventually(lambda: service.descriptors() <= fresh, "they are given back")
        assert service.restart()["outcome"] == "done"


LEAKING = """\
import os

held = []

async def app(stream):
    async for word in stream:
        if word == b"leak\\n":
            try:
                while True:
                    held.append(os.dup(0))
            except OSError:
                pass
        elif word == b"free\\n":
            while held:
                os.close(held.pop())
        await stream.send(word)
"""


def test_worker_out_of_descriptors_still_hears_its_supervisor(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LEAKING)
    with Service(tmp_path, "app:app", prefix=limited(200)).wait_ready() as service:
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as sock:
            sock.sendall(b"leak\n")
            assert sock.recv(100) == b"leak\n"
            (worker,) = service.status()["workers"]
            assert worker["connections"] == 1  # it has answered
            sock.sendall(b"free\n")
            assert sock.recv(100) == b"free\n"
            (worker,) = service.status()["workers"]
            assert worker["connections"] == 1
        report = service.restart()
        assert report["outcome"] == "done"
        assert [phase["name"] for phase in report["phases"]].count("quiesce overdue") == 0


ECHO = """\
async def app(stream):
    async for data in stream:
        await stream.send(data)
"""


def test_stop_answers_what_waits_behind_a_full_registry(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", ECHO)
    with Service(tmp_path, "app:app", "--connections-max", "2").wait_ready() as service, ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection(("127.0.0.1", service.port), DEADLINE_S)) for _ in range(10)
        ]
        socks[0].sendall(b"held")
        assert answered(socks[0])
        with service.start("stop") as stop:
            eventually(lambda: bool(service.log_events("drain.began")), "it drains")
            for sock in socks:
                sock.sendall(b"late")
                assert answered(sock)
                sock.close()
            assert stop.wait(DEADLINE_S) == 0
        (ended,) = service.log_events("drain.ended")
        assert not [key for key in ended if key.startswith("cut")]


#: Cannot be asked to leave; says when it has come so far.
STUBBORN = """\
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("stubborn", flush=True)
"""


def test_stop_during_a_restart_that_hangs_drops_nobody(tmp_path: Path) -> None:
    """Nobody took what queued until the hanging worker was killed, which closed the last listener on them."""
    gate = Gate(tmp_path)
    write_code(tmp_path / "app.py", ECHO)
    with Service(tmp_path, "app:app", "--kill-timeout", "1h").wait_ready() as service:
        port = service.port
        write_code(tmp_path / "app.py", STUBBORN + Gate.LINE + "raise SystemExit(1)\n")
        with ExitStack() as commands:
            restart = commands.enter_context(service.start("restart"))
            eventually(lambda: "stubborn" in service.log(), "the new worker hangs")
            stop = commands.enter_context(service.start("stop"))
            eventually(lambda: bool(service.log_events("service.stopping")), "it is told to stop")
            with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as sock:
                sock.sendall(b"still there?")
                assert answered(sock)
            gate.open()
            assert stop.wait(DEADLINE_S) == 0
            restart.communicate(timeout=DEADLINE_S)
        assert restart.returncode == 4


def test_scaling_ends_when_the_service_does(tmp_path: Path) -> None:
    Gate(tmp_path)
    write_code(tmp_path / "app.py", ECHO)
    with Service(tmp_path, "app:app", "--kill-timeout", "300ms").wait_ready() as service:
        write_code(tmp_path / "app.py", Gate.LINE)
        with service.start("scale", "2") as scale:
            eventually(lambda: service.status()["wanted"] == 2, "it is scaling")
            service.process.send_signal(signal.SIGTERM)
            _, error = scale.communicate(timeout=DEADLINE_S)
        assert scale.returncode == 4
        assert "HP410" in error
        assert "stopping" in error


READY_TOGETHER = """\
import os, time

while not os.path.exists("go"):
    time.sleep(0.01)

"""


def test_many_workers_become_ready_while_the_supervisor_is_not_scheduled(tmp_path: Path) -> None:
    """More words than its socket's queue holds (net.unix.max_dgram_qlen, 10) for longer than a worker waits."""
    write_code(tmp_path / "app.py", READY_TOGETHER + LINE_APP.format(version="one"))
    count = 14
    with Service(tmp_path, "app:app", "--workers", str(count), "--ready-timeout", "1h") as service:
        eventually(lambda: len(service.descendants()) == count, "every worker is started")
        service.process.send_signal(signal.SIGSTOP)
        (tmp_path / "go").touch()
        eventually(lambda: len(service.log_events("worker.ready")) == count, "every worker has tried to say so")
        service.process.send_signal(signal.SIGCONT)
        service.wait_ready().wait_serving(count)


#: One worker cannot be asked to leave and waits at the gate; the other one fails once that is so.
STUBBORN_AND_BROKEN = """\
import os
try:
    os.mkdir("first")
except FileExistsError:
    open("stubborn").close()
    raise SystemExit(1)
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("stubborn", "w").close()
"""


def test_late_end_of_an_aborted_restart_leaves_the_options_of_a_later_one(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    options = tmp_path / "hotport.toml"
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    os.mkfifo(tmp_path / "stubborn")
    options.write_text("kill_timeout = '1h'\nworkers = 1\n")
    with Service(tmp_path, "app:app").wait_ready() as service:
        options.write_text("kill_timeout = '1h'\nworkers = 2\nstart_parallel = 2\n")
        write_code(tmp_path / "app.py", STUBBORN_AND_BROKEN + Gate.LINE + "raise SystemExit(1)\n")
        with service.start("restart") as first:
            eventually(lambda: bool(service.log_events("restart.aborted")), "it is aborted")
            write_code(tmp_path / "app.py", LINE_APP.format(version="two"))
            assert service.restart()["outcome"] == "done"
            gate.open()
            assert first.wait(DEADLINE_S) == 4
        assert service.run("scale", "3").returncode == 0
        assert service.restart()["outcome"] == "done"
        service.wait_serving(3)  # what was scaled stays until the option changes


@pytest.mark.parametrize("closing", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_service_with_closed_standard_streams(tmp_path: Path, closing: str) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    command = " ".join((*HOTPORT, "serve", "app:app", "--name", "svc", "--bind", "unix:app.sock"))
    environment = {**os.environ, "HOTPORT_RUNTIME_DIR": str(tmp_path / "run")}
    process = subprocess.Popen(["sh", "-c", f"exec {command} {closing}"], cwd=tmp_path, env=environment)
    try:

        def ask() -> bool:
            with socket.socket(socket.AF_UNIX) as sock:
                try:
                    sock.connect(str(tmp_path / "app.sock"))
                except (FileNotFoundError, ConnectionRefusedError):
                    assert process.poll() is None
                    return False
                sock.settimeout(DEADLINE_S)
                sock.sendall(b"who\n")
                return sock.recv(100).startswith(b"one 1 ")

        eventually(ask, "it answers")
    finally:
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


HTTP_APP = """\
async def app(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""


#: The second generation may open a few descriptors only, until it is let go.
SHORT = """\
import os, resource, threading

if os.environ["HOTPORT_GENERATION"] == "2":
    used, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, limits[1]))

    def relieve():
        open("gate").close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    threading.Thread(target=relieve, daemon=True).start()
"""


def test_new_worker_that_is_short_of_descriptors_gets_the_rest_when_there_are_some(tmp_path: Path) -> None:
    """All of 300 connections were closed after the first batch, which did not fit."""
    gate = Gate(tmp_path)
    write_code(tmp_path / "app.py", SHORT + HTTP_APP)
    with (
        Service(tmp_path, "app:app", "--keep-alive", "1h", "--lifespan", "off").wait_ready() as service,
        ExitStack() as stack,
    ):
        address = ("127.0.0.1", service.port)
        socks = [stack.enter_context(socket.create_connection(address, DEADLINE_S)) for _ in range(100)]

        def ask_all() -> None:
            for sock in socks:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
                assert read_response(sock) == (200, b"ok")

        ask_all()
        command = service.start("restart", service.name, "--json")
        eventually(lambda: len(service.log_events("restart.draining")) > 0, "the old worker leaves")
        eventually(lambda: 0 < service.status()["workers"][-1]["connections"] < 30, "some have moved")
        ask_all()
        gate.open()
        assert json.loads(command.communicate(timeout=DEADLINE_S)[0])["connections"] == {"moved_http": 100}
        ask_all()


def test_full_service_with_a_queue_closes_nobody_in_a_restart(tmp_path: Path) -> None:
    """Newcomers filled the new worker from the accept queue, and every connection of the old one was closed."""
    write_code(tmp_path / "app.py", HTTP_APP)
    limits = ("--connections-max", "30", "--keep-alive", "1h", "--lifespan", "off")
    with Service(tmp_path, "app:app", *limits).wait_ready() as service, ExitStack() as stack:

        def connect() -> socket.socket:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), DEADLINE_S))
            sock.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            return sock

        idle = [connect() for _ in range(30)]
        assert [read_response(sock) for sock in idle] == [(200, b"ok")] * 30
        queued = [connect() for _ in range(30)]
        assert service.restart()["connections"] == {"moved_http": 30}
        assert service.status()["workers"][0]["connections"] == 30
        for sock in idle:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            assert read_response(sock) == (200, b"ok")
            sock.close()
        assert [read_response(sock) for sock in queued] == [(200, b"ok")] * 30
