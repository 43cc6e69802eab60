"""The engine as its coordinator has it: a process that is told a plan and tells what it saw."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO

import msgspec
import psutil
import pytest

from hotport.churn.histogram import Histogram
from hotport.churn.plan import Armed, End, Plan, Said, Summary, Tick
from hotport.churn.result import Load
from tests.churn.scripted import Scripted, plan, read_head, target
from tests.support import DEADLINE_S, assert_three_lines, eventually

_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextlib.contextmanager
def _engine() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "hotport.churn.engine"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def _tell(process: subprocess.Popen[bytes], what: Plan | End) -> None:
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(what) + b"\n")
    process.stdin.flush()


def _said(process: subprocess.Popen[bytes]) -> Iterator[Armed | Tick | Summary]:
    assert process.stdout is not None
    for line in process.stdout:
        yield msgspec.json.decode(line, type=Said)


def _file(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _serve(sock: socket.socket) -> None:
    while read_head(sock):
        sock.sendall(_OK)


def test_engine_says_armed_then_each_bucket_once_then_the_summary() -> None:
    with Scripted(_serve) as server, _engine() as process:
        _tell(process, plan(target(server.port), Load("keepalive", rate=200, count=1), bucket_ms=50))
        said = list(_said(process))
        assert process.wait(DEADLINE_S) == 0
        assert _file(process.stderr).read() == b""
    armed, *ticks, summary = said
    assert isinstance(armed, Armed)
    assert isinstance(summary, Summary)
    assert [tick.bucket.at_ms for tick in ticks if isinstance(tick, Tick)] == [50 * n for n in range(len(ticks))]
    assert sum(summary.lag.values()) > 10
    assert summary.error == ""


def test_end_of_stdin_ends_it_with_what_there_is_and_an_interrupt_does_not() -> None:
    with Scripted(_serve) as server, _engine() as process:
        _tell(process, plan(target(server.port), Load("keepalive", count=1, think_ms=5), duration_ms=600_000))
        said = _said(process)
        assert isinstance(next(said), Armed)
        process.send_signal(signal.SIGINT)
        assert [isinstance(next(said), Tick) for _ in range(10)] == [True] * 10
        _file(process.stdin).close()
        *_, summary = said
        assert isinstance(summary, Summary)
        assert summary.lag
        assert process.wait(DEADLINE_S) == 0


def test_an_end_that_is_brought_forward_leaves_what_is_under_way_its_time() -> None:
    with Scripted(_serve) as server, _engine() as process:
        load = Load("connect", rate=50)  # the server serves one connection after the other
        _tell(process, plan(target(server.port), load, duration_ms=600_000))
        said = _said(process)
        assert isinstance(next(said), Armed)
        next(said)
        _tell(process, End(time.monotonic_ns()))
        *_, last, summary = said
        assert isinstance(last, Tick)
        assert last.bucket.in_flight == 0
        assert isinstance(summary, Summary)
        assert process.wait(DEADLINE_S) == 0


def test_engine_that_was_held_up_says_so_and_blames_nobody() -> None:
    with Scripted(_serve) as server, _engine() as process:
        # The time out is shorter than the engine is held up: nothing that was answered may count as timed out.
        what = plan(target(server.port), Load("keepalive", rate=100, count=1), duration_ms=600_000, timeout_ms=2000)
        _tell(process, what)
        said = _said(process)
        assert isinstance(next(said), Armed)
        for _ in range(5):
            next(said)
        process.send_signal(signal.SIGSTOP)
        held = psutil.Process(process.pid)
        eventually(lambda: held.status() == psutil.STATUS_STOPPED, "it is held up")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3.0)
        process.send_signal(signal.SIGCONT)
        for _ in range(200):  # 20 ms each: those of the time in which it was held up come at once
            next(said)
        _file(process.stdin).close()
        fates: set[str] = set()
        lag = Histogram()
        for item in said:
            if isinstance(item, Tick):
                fates |= set(item.bucket.fates.get("keepalive", {}))
            elif isinstance(item, Summary):
                lag.merge(item.lag)
    assert lag.maximum > 2_900_000
    assert fates <= {"answered"}


def test_thousands_of_connections_are_held() -> None:
    with _engine() as process, socket.create_server(("127.0.0.1", 0), backlog=4096) as server:
        what = plan(target(server.getsockname()[1]), Load("keepalive", count=2000), duration_ms=600_000, bucket_ms=100)
        _tell(process, what)
        held = 0
        for said in _said(process):
            if isinstance(said, Tick) and (held := said.bucket.connections) == 2000:
                assert said.bucket.in_flight == 2000
                _file(process.stdin).close()
                break
        assert held == 2000
        assert process.wait(DEADLINE_S) == 0


def test_own_limits_are_no_fate_of_the_targets() -> None:
    with _engine() as process, socket.create_server(("127.0.0.1", 0), backlog=4096) as server:
        import resource

        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (64, 64))
        what = plan(target(server.getsockname()[1]), Load("keepalive", count=100, think_ms=10), timeout_ms=300)
        _tell(process, what)
        *ticks, summary = _said(process)
        assert isinstance(summary, Summary)
        assert set(summary.own_limits) == {"EMFILE"}
        fates = {fate for tick in ticks if isinstance(tick, Tick) for fate in tick.bucket.fates.get("keepalive", {})}
        assert fates <= {"timed out", "connected", "reconnected"}


@pytest.mark.parametrize("text", [b"", b"\n", b"garbage\n", b"{}\n", b'{"loads": 3}\n', b"\xff\n"], ids=range(6))
def test_what_is_no_plan_is_said_in_three_lines(text: bytes) -> None:
    with _engine() as process:
        out, err = process.communicate(text, DEADLINE_S)
        assert process.returncode == 2
    assert_three_lines(err.decode(), "HP781")
    summary = msgspec.json.decode(out, type=Said)
    assert isinstance(summary, Summary)
    assert_three_lines(summary.error, "HP781")


def test_nobody_to_tell_ends_it_quietly() -> None:
    with Scripted(_serve) as server, _engine() as process:
        _tell(process, plan(target(server.port), Load("keepalive", count=1), duration_ms=600_000))
        assert _file(process.stdout).readline()
        _file(process.stdout).close()
        assert process.wait(DEADLINE_S) == 1
        assert os.read(_file(process.stderr).fileno(), 100) == b""
