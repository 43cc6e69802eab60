"""Workers that hang are found, explained and replaced; those that only seem to are left alone."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import DEADLINE_S, Hammer, Service, ask_line, eventually, watching_pid, write_code

#: Answers like `tests.support.LINE_APP`, and hangs in the way that a client names.
APP = """\
import asyncio, ctypes, os, re, threading, time

def sleep():
    time.sleep(900)

def loop():
    while True:
        pass

def lock():
    held = threading.Lock()
    held.acquire()
    held.acquire()

def regex():
    re.match(r"(a+)+$", "a" * 90 + "b")

def in_c(library=ctypes.CDLL):
    lock, mutex = library(None).pthread_mutex_lock, bytes(64)
    lock(mutex)
    lock(mutex)

def keep_lock():
    in_c(ctypes.PyDLL)

async def app(stream):
    asked = (await stream.receive()).decode().strip()
    if asked == "thread":
        asyncio.get_running_loop().run_in_executor(None, keep_lock)
        await asyncio.sleep(900)
    elif asked.startswith("block"):
        time.sleep(float(asked.split()[1]))
    elif asked != "who":
        globals()[asked]()
    await stream.send(f"one {os.environ['HOTPORT_GENERATION']} {os.getpid()}\\n".encode())
"""


FAST = ("--hang-report", "300ms", "--hang-timeout", "1s", "--drain-timeout", "200ms", "--kill-timeout", "200ms")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_code(tmp_path / "app.py", APP)
    return tmp_path


@contextmanager
def asking(port: int, what: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as sock:
        sock.settimeout(DEADLINE_S)
        sock.sendall(f"{what}\n".encode())
        yield sock


def wait_event(service: Service, event: str, count: int = 1) -> dict[str, object]:
    """The last of so many lines with this event."""
    eventually(lambda: len(service.log_events(event)) >= count, event)
    return service.log_events(event)[count - 1]


#: Ways to hang, and where: the last one is a thread that keeps the interpreter's lock.
WAYS = {
    "sleep": "app.py:4 in sleep",
    "loop": "app.py:7 in loop",
    "lock": "app.py:13 in lock",
    "regex": "app.py:16 in regex",
    "in_c": "app.py:21 in in_c",
    "thread": "app.py:21 in in_c",
}


def test_workers_that_hang_are_reported_with_their_lines_and_replaced_while_others_serve(directory: Path) -> None:
    with Service(directory, "app:app", "--workers", "7", *FAST).wait_ready() as service, Hammer(service.port) as hammer:
        hammer.wait_answers()
        pids = set(service.worker_pids())
        with ExitStack() as clients:
            for how in WAYS:
                clients.enter_context(asking(service.port, how))
            wait_event(service, "worker.hung", len(WAYS))
            hammer.wait_answers()
            wait_event(service, "worker.given_up", len(WAYS))
            wait_event(service, "worker.retired", len(WAYS))
        service.wait_serving(7)
        hung = service.log_events("worker.hung")
        assert sorted(line["at"] for line in hung) == sorted(WAYS.values())
        assert all(f"line {line['at'][7:]}" in line["stack"] for line in hung)
        gone = {line["worker_pid"] for line in hung}
        assert pids - set(service.worker_pids()) == gone
        assert {line["why"] for line in service.log_events("worker.retired")} == {"killed by SIGKILL"}
        hammer.wait(lambda: bool(hammer.pids - pids), "a replacement answers")
        assert hammer.failures.total() <= len(WAYS)  # what they had accepted in the turn in which they began to hang


@pytest.mark.parametrize("args", [(), ("--preload",)], ids=["exec", "preload"])
def test_only_worker_that_hangs_is_replaced_and_clients_wait_in_the_accept_queue(
    directory: Path, args: tuple[str, ...]
) -> None:
    with Service(directory, "app:app", *FAST, *args).wait_ready() as service, asking(service.port, "sleep"):
        hung = wait_event(service, "worker.hung")
        assert hung["at"] == "app.py:4 in sleep"
        assert ask_line(service.port).pid != hung["worker_pid"]


def test_status_shows_where_a_worker_hangs_and_the_lag_of_the_others(directory: Path) -> None:
    args = ("--workers", "2", "--hang-report", "300ms", "--drain-timeout", "100ms", "--kill-timeout", "100ms")
    with Service(directory, "app:app", *args).wait_ready() as service, asking(service.port, "lock"):
        wait_event(service, "worker.hung")
        hung, well = sorted(service.status()["workers"], key=lambda worker: not worker["hung_at"])
        assert hung["hung_at"] == "app.py:13 in lock"
        assert hung["hung_s"] >= 0.3
        assert hung["lag_s"] >= 0.3
        assert "line 13 in lock" in hung["stack"]
        assert (well["hung_s"], well["hung_at"], well["stack"]) == (None, "", "")
        eventually(lambda: all(each["lag_s"] is not None for each in service.status()["workers"]), "all are asked")
        assert "at app.py:13 in lock" in service.run("status", service.name).stdout


def test_worker_that_blocks_again_and_again_for_less_than_hang_timeout_is_never_replaced(directory: Path) -> None:
    args = ("--hang-report", "200ms", "--hang-timeout", "20s")
    with Service(directory, "app:app", *args).wait_ready() as service:
        pids = service.worker_pids()
        for count in range(1, 4):
            with asking(service.port, "block 0.6") as sock:
                assert sock.recv(100)
            wait_event(service, "worker.unhung", count)
        assert service.worker_pids() == pids
        assert service.log_events("worker.given_up") == []


def test_service_that_is_stopped_as_a_whole_and_continued_loses_no_worker(directory: Path) -> None:
    """The machine was suspended, or a container paused: everything is late, and nothing hangs."""
    other = directory / "other"
    other.mkdir()
    write_code(other / "app.py", APP)
    with Service(directory, "app:app", "--workers", "2", *FAST).wait_ready() as service:
        workers = service.worker_pids()
        everyone = [service.process.pid, *workers]
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        with Service(other, "app:app", *FAST).wait_ready() as clock, asking(clock.port, "sleep"):
            wait_event(clock, "worker.given_up")  # all the time that a worker has
        for pid in reversed(everyone):
            os.kill(pid, signal.SIGCONT)
        for _ in range(20):
            ask_line(service.port)
        assert service.worker_pids() == workers
        assert [
            line for line in service.log_lines() if str(line.get("event")).startswith(("worker.hung", "worker.given"))
        ] == []


def test_worker_that_is_stopped_alone_is_named_and_not_replaced(directory: Path) -> None:
    with Service(directory, "app:app", "--workers", "2", *FAST).wait_ready() as service:
        workers = service.worker_pids()
        os.kill(workers[0], signal.SIGSTOP)
        with asking(service.port, "sleep"), asking(service.port, "sleep"):  # the other one hangs, which takes its time
            stopped = wait_event(service, "worker.stopped")
            given_up = wait_event(service, "worker.given_up")
        assert (stopped["worker_pid"], stopped["fix"]) == (workers[0], f"kill -CONT {workers[0]}")
        assert given_up["worker"] != stopped["worker"]
        assert any(each["is_stopped"] for each in service.status()["workers"])
        os.kill(workers[0], signal.SIGCONT)
        wait_event(service, "worker.continued")
        assert workers[0] in service.worker_pids()


def test_workers_that_all_hang_are_replaced_one_after_the_other(directory: Path) -> None:
    """A request that a client tries again blocks them all."""
    with Service(directory, "app:app", "--workers", "2", *FAST).wait_ready() as service:
        pids = set(service.worker_pids())
        with asking(service.port, "sleep"), asking(service.port, "sleep"):
            wait_event(service, "worker.given_up", 2)
            eventually(lambda: pids.isdisjoint(service.worker_pids()), "both are gone")
        service.wait_serving(2)
        events = [line["event"] for line in service.log_lines()]
        spawned = [number for number, event in enumerate(events) if event == "worker.spawned"]
        given_up = [number for number, event in enumerate(events) if event == "worker.given_up"]
        assert given_up[0] < spawned[2] < given_up[1]


def test_worker_that_was_adopted_is_watched_and_tells_its_stack(directory: Path) -> None:
    args = ("--workers", "2", *FAST)
    first = Service(directory, "app:app", *args).wait_ready()
    bind, pids = f"127.0.0.1:{first.port}", set(first.worker_pids())
    first.process.kill()
    first.process.wait(DEADLINE_S)
    first.end()
    with Service(directory, "app:app", *args, "--bind", bind).wait_ready() as second, asking(second.port, "lock"):
        assert set(second.worker_pids()) == pids
        hung = wait_event(second, "worker.hung")
        assert (hung["at"], hung["worker_pid"] in pids) == ("app.py:13 in lock", True)
        wait_event(second, "worker.given_up")
        second.wait_serving(2)


#: Says that it is alive until a file is there.
PROGRAM = """\
import os, socket, time

notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"])
notify.send(b"READY=1")
every_s = int(os.environ["WATCHDOG_USEC"]) / 1e6 / 4
listener = socket.socket(fileno=3)
listener.settimeout(every_s)
while True:
    if WATCHED and not os.path.exists("hang"):
        notify.send(b"WATCHDOG=1")
    try:
        client, _ = listener.accept()
    except OSError:  # in time, or another process was quicker
        continue
    client.settimeout(None)
    client.recv(100)
    client.send(f"one {os.environ['HOTPORT_GENERATION']} {os.getpid()}\\n".encode())
    client.close()
"""


def test_program_that_does_not_say_watchdog_any_more_is_replaced(tmp_path: Path) -> None:
    write_code(tmp_path / "server.py", PROGRAM.replace("WATCHED", "True"))
    with Service(tmp_path, *FAST, "--", sys.executable, "server.py").wait_ready() as service:
        (pid,) = service.worker_pids()
        with watching_pid(pid) as wait_for_its_end:
            (tmp_path / "hang").touch()
            hung = wait_event(service, "worker.hung")
            assert (hung["worker_pid"], hung["why"]) == (pid, "it does not say WATCHDOG=1 any more")
            (tmp_path / "hang").unlink()
            wait_event(service, "worker.given_up")
            wait_for_its_end()
        service.wait_serving(1)
        assert ask_line(service.port).pid != pid


def test_program_that_has_never_said_watchdog_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_code(other / "app.py", APP)
    write_code(tmp_path / "server.py", PROGRAM.replace("WATCHED", "False"))
    with Service(tmp_path, *FAST, "--", sys.executable, "server.py").wait_ready() as service:
        (pid,) = service.worker_pids()
        with Service(other, "app:app", *FAST).wait_ready() as clock, asking(clock.port, "sleep"):
            wait_event(clock, "worker.given_up")
        assert ask_line(service.port).pid == pid
        assert service.log_events("worker.hung") == []
