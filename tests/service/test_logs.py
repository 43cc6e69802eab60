"""Logs: one chain, one format, and nothing of what workers write is lost."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import DEADLINE_S, HOTPORT, Service, ask_line, eventually, http_get, write_code

TALKING = """\
import asyncio, logging, os, sys, warnings

log = logging.getLogger("shop.orders")

async def app(stream):
    word = (await stream.receive()).decode().strip()
    log.warning("order %s taken", word, extra={"order": word})
    asyncio.get_running_loop().call_exception_handler({"message": "asyncio has something to say"})
    warnings.warn("an old way of doing it", DeprecationWarning, stacklevel=1)
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("it failed")
    print("printed " + "x" * 10000 + " to the end", flush=True)
    os.write(1, b"written to stdout\\n")
    os.write(2, b"written to stderr\\n")
    await stream.send(f"one 1 {os.getpid()}\\n".encode())
"""


def test_every_line_off_a_terminal_is_json_and_says_whose_it_is(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", TALKING)
    with Service(tmp_path, "app:app", env={"PYTHONWARNINGS": "default"}).wait_ready() as service:
        pid = ask_line(service.port).pid
        service.restart()
    others = []
    lines = []
    for text in service.log().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            others.append(text)

    assert others == ["printed " + "x" * 10000 + " to the end", "written to stdout", "written to stderr"]
    for line in lines:
        assert {"timestamp", "level", "logger", "event", "service", "pid"} <= line.keys(), line
        assert line["service"] == "svc"
        assert line["pid"] == service.process.pid or {"generation", "worker"} <= line.keys(), line
    of_worker = [line for line in lines if line["pid"] == pid]
    by_logger = {line["logger"]: line for line in of_worker}
    assert all((line["generation"], line["worker"]) == (1, 1) for line in of_worker)
    assert "asyncio has something to say" in by_logger["asyncio"]["event"]
    assert "an old way of doing it" in by_logger["py.warnings"]["event"]
    taken, failed = (line for line in of_worker if line["logger"] == "shop.orders")
    assert (taken["event"], taken["level"], taken["order"]) == ("order who taken", "warning", "who")
    assert "ZeroDivisionError" in failed["exception"]


def test_level_is_the_least_that_is_written(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", TALKING)
    with Service(tmp_path, "app:app", "--log-level", "error").wait_ready() as service:
        ask_line(service.port)
    levels = {json.loads(line)["level"] for line in service.log().splitlines() if line.startswith("{")}
    assert levels == {"error"}


def test_stable_events_tell_the_life_of_a_service(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", TALKING)
    with Service(tmp_path, "app:app").wait_ready() as service:
        service.restart()
        service.run("stop")
        service.wait()
    told = [line["event"] for line in service.log_lines() if line.get("role") == "supervisor"]
    expected = [
        "service.starting",
        "worker.spawned",
        "service.started",
        "restart.began",
        "worker.spawned",
        "restart.ready",
        "restart.committed",
        "restart.quiesced",
        "restart.draining",
        "restart.done",
        "worker.retired",
        "restart.report",
        "service.stopping",
        "worker.retired",
        "service.ended",
    ]
    assert [event for event in told if event in expected] == expected


def test_lines_on_a_terminal_are_for_people(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", TALKING)
    ours, theirs = pty.openpty()
    env = {**os.environ, "HOTPORT_RUNTIME_DIR": str(tmp_path / "run"), "TERM": "xterm"}
    env.pop("NO_COLOR", None)
    try:
        process = subprocess.Popen(
            [*HOTPORT, "serve", "app:app", "--bind", "unix:app.sock"],
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
        )
    finally:
        os.close(theirs)
    shown = b""
    try:
        while b"service.started" not in shown:
            assert select.select([ours], [], [], DEADLINE_S)[0], shown
            shown += os.read(ours, 65536)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: process.poll() is not None, "it has stopped")
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[" in shown  # colours
    plain = re.sub(rb"\x1b\[[0-9;]*m", b"", shown)
    line = next(line for line in plain.splitlines() if b"worker.ready" in line)
    assert not line.startswith(b"{")
    assert b"generation=1" in line
    assert b"worker=1" in line
    assert re.search(rb"\bpid=\d+", line)


CONFIGURING = """\
import logging.config
import structlog

logging.config.dictConfig({
    "version": 1,
    "formatters": {"own": {"format": "own %(message)s"}},
    "handlers": {"own": {"class": "logging.StreamHandler", "formatter": "own"}},
    "root": {"handlers": ["own"], "level": "ERROR"},
})  # this also disables every logger that it does not name
structlog.configure(processors=[structlog.processors.KeyValueRenderer()], logger_factory=structlog.PrintLoggerFactory())

async def app(stream):
    logging.error("said")
    raise RuntimeError("broken")
"""


def test_application_that_configures_logging_for_itself_does_not_touch_ours(tmp_path: Path) -> None:
    """A Django or Litestar service had no log lines of its workers, or had them in the application's format."""
    write_code(tmp_path / "app.py", CONFIGURING)
    with Service(tmp_path, "app:app").wait_ready() as service:
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as client, suppress(ConnectionError):
            client.recv(1)
        service.restart()
        assert len(service.log_events("worker.ready")) == 2
        assert len(service.log_events("drain.ended")) == 1
        [failure] = service.log_events("stream handler failed")
        assert "RuntimeError: broken" in failure["exception"]
        assert "own said\n" in service.log()


PAGES = """\
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
"""


def answers(service: Service, count: int) -> int:
    """How many of so many requests are answered, 50 at once, each with a long line in the access log."""
    request = b"GET /%b HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n" % (b"x" * 3000)
    port, seen = service.port, 0
    for _ in range(count // 50):
        clients = [socket.create_connection(("127.0.0.1", port), DEADLINE_S) for _ in range(50)]
        for client in clients:
            client.sendall(request)
        for client in clients:
            with client, client.makefile("rb") as answer:
                seen += answer.read().count(b"HTTP/1.1 200 OK")
    return seen


def test_service_whose_log_is_not_read_serves_restarts_and_stops(tmp_path: Path) -> None:
    """Workers and supervisor were blocked in write(2): no client got an answer, and only SIGKILL helped.

    What a worker has not written when it ends is lost: it waits a second for its reader.
    """
    write_code(tmp_path / "app.py", PAGES)
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    prefix = ("sh", "-c", 'exec "$0" "$@" 2>fifo')
    try:
        with Service(tmp_path, "app:app", "--access-log", "structured", prefix=prefix).wait_ready() as service:
            assert answers(service, 600) == 600
            status = service.status()
            [worker] = status["workers"]
            assert worker["log_dropped"] > 0
            assert status["log_dropped"] == 0  # it has little to say: it waits
            assert f"worker 1 has dropped {worker['log_dropped']} lines of its log" in service.run("status").stdout
            assert service.restart()["outcome"] == "done"
            assert answers(service, 600) == 600
            told = read_until(reader, b'"log.dropped"')
            [worker] = service.status()["workers"]
            service.process.send_signal(signal.SIGTERM)
            told += read_until(reader, b'"service.ended"')
            assert service.wait() == 0
    finally:
        os.close(reader)
    lines = [json.loads(line) for line in told.splitlines()]
    [dropped] = [line for line in lines if line["event"] == "log.dropped"]
    assert (dropped["worker"], dropped["lines"]) == (2, worker["log_dropped"])
    events = [line["event"] for line in lines if line.get("role") == "supervisor"]
    assert {"service.started", "restart.done", "service.ended"} <= {*events}


def read_until(fd: int, what: bytes) -> bytes:
    """All that comes, up to the end of the line that has `what` in it."""
    told = b""
    while what not in told or not told.endswith(b"\n"):
        assert select.select([fd], [], [], DEADLINE_S)[0]
        told += os.read(fd, 1 << 20)
    return told


@pytest.mark.parametrize("where", ["fifo", "/dev/full"])
def test_service_whose_log_cannot_be_written_answers_and_restarts(where: str, tmp_path: Path) -> None:
    """An access log that raised cost clients their answers, and connections stayed open for ever."""
    write_code(tmp_path / "app.py", PAGES)
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    prefix = ("sh", "-c", f'exec "$0" "$@" 2>{where}')
    with Service(tmp_path, "app:app", "--access-log", "combined", prefix=prefix).wait_ready() as service:
        os.close(reader)
        assert answers(service, 200) == 200
        assert service.restart()["outcome"] == "done"
        assert answers(service, 50) == 50
        status = service.status()
        if where == "fifo":
            assert status["log_dropped"] > 0
            assert status["workers"][0]["log_dropped"] > 0
        assert service.stop() == 0


def test_failed_start_with_a_log_that_is_not_read_ends(tmp_path: Path) -> None:
    """Its first line waited for ever, and so did the traceback of the application."""
    write_code(tmp_path / "app.py", "raise RuntimeError('never')\n")
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    try:
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        with Service(tmp_path, "app:app", prefix=("sh", "-c", 'exec "$0" "$@" 2>fifo')) as service:
            assert service.wait() == 3
    finally:
        os.close(reader)
        os.close(writer)


def test_log_level_changes_at_run_time_until_the_next_restart(tmp_path: Path) -> None:
    app = """
import logging
async def app(scope, receive, send):
    logging.getLogger("shop").debug("a detail")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
"""
    write_code(tmp_path / "app.py", app)

    def details() -> int:
        assert http_get(service.port)[0] == 200
        return len(service.log_events("a detail"))

    with Service(tmp_path, "app:app", "--lifespan", "off") as service:
        service.wait_ready()
        assert details() == 0
        told = service.run("log-level", "debug", "svc")
        assert told.stdout == "log level debug until the next restart (it was info)\n"
        eventually(lambda: len(service.log_events("log.level")) == 2, "the supervisor and the worker have taken it")
        assert details() == 1
        worker = service.worker_pids()[0]
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: service.worker_pids() not in ([worker], []), "it is replaced")
        service.wait_serving(1)
        assert details() == 2
        assert service.restart()["outcome"] == "done"
        assert details() == 2
        refused = service.run("log-level", "loud", "svc")
        assert refused.returncode == 2
        assert service.run("log-level", "--json", "error").returncode == 0
        assert service.run("status", "svc").returncode == 0
