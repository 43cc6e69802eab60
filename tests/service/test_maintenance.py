"""Between restarts: workers die, expire, are wanted or not, and clients see as little of it as can be."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from hotport.wire.messages import RestartRequest, ScaleRequest
from tests.support import DEADLINE_S, LINE_APP, Hammer, Service, ask_line, eventually, watching_pid, write_code


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    return tmp_path


@contextmanager
def hammered(directory: Path, *args: str) -> Iterator[tuple[Service, Hammer]]:
    """A service with clients on it, that lost nothing until the block ends."""
    with Service(directory, "app:app", *args).wait_ready() as service, Hammer(service.port) as hammer:
        hammer.wait_answers()
        yield service, hammer
        hammer.wait_answers()
        assert not hammer.failures


# -- workers that die ---------------------------------------------------------------------------------------


def test_killed_worker_is_replaced_and_connections_go_on_being_accepted(directory: Path) -> None:
    with Service(directory, "app:app", "--workers", "2").wait_ready() as service, Hammer(service.port) as hammer:
        hammer.wait_answers()
        victim, _ = service.worker_pids()
        os.kill(victim, signal.SIGKILL)
        hammer.wait(lambda: len(hammer.pids - {victim}) >= 2, "a replacement answers")
        assert "ConnectionRefusedError" not in hammer.failures  # what the victim had accepted died with it, no more
        assert hammer.failures.total() <= 2
        service.wait_serving(2)
        assert victim not in service.worker_pids()
        (lost,) = service.log_events("worker.lost")
        assert lost["why"] == "killed by SIGKILL"


def test_only_worker_is_replaced_while_connections_wait_in_the_accept_queue(directory: Path) -> None:
    with Service(directory, "app:app").wait_ready() as service:
        (victim,) = service.worker_pids()
        os.kill(victim, signal.SIGKILL)
        assert ask_line(service.port).pid != victim


def kill_only_worker(service: Service) -> None:
    """Return when its replacement starts."""
    (victim,) = service.worker_pids()
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: service.worker_pids() not in ([], [victim]), "it is replaced")


def test_crash_loop_backs_off(directory: Path) -> None:
    with Service(directory, "app:app").wait_ready() as service:
        for _ in range(3):
            kill_only_worker(service)
        service.wait_serving(1)
        assert [event["why"] for event in service.log_events("worker.backing_off")] == ["0.5 s", "1 s"]


def test_service_that_has_lost_everything_recovers_when_its_code_does(directory: Path) -> None:
    with Service(directory, "app:app").wait_ready() as service:
        write_code(directory / "app.py", "raise RuntimeError('broken since')")
        os.kill(service.worker_pids()[0], signal.SIGKILL)
        eventually(lambda: len(service.log_events("worker.backing_off")) >= 2, "it tries again")
        assert "RuntimeError: broken since" in service.log_events("worker.lost")[-1]["exception"]
        write_code(directory / "app.py", LINE_APP.format(version="two"))
        answer = ask_line(service.port)  # waits in the accept queue meanwhile
        assert (answer.version, answer.generation) == ("two", "1")


def test_restart_works_while_every_old_worker_is_dead(directory: Path) -> None:
    with Service(directory, "app:app", "--workers", "2").wait_ready() as service:
        write_code(directory / "app.py", "raise RuntimeError('broken since')")
        for pid in service.worker_pids():
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(service.log_events("worker.backing_off")) >= 2, "it tries in vain")
        write_code(directory / "app.py", LINE_APP.format(version="two"))
        report = service.ask(RestartRequest())[-1]
        assert report.outcome == "done", report
        service.wait_serving(2)
        assert ask_line(service.port).generation == "2"


def test_worker_that_is_terminated_by_hand_drains_and_is_replaced(directory: Path) -> None:
    with hammered(directory, "--workers", "2") as (service, hammer):
        victim = service.worker_pids()[0]
        os.kill(victim, signal.SIGTERM)
        hammer.wait(lambda: len(hammer.pids - {victim}) >= 2, "a replacement answers")


MOVABLE_APP = """
import asyncio, os

class app(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(b"%d\\n" % os.getpid())

    def drain_started(self, draining):
        self.transport.write(b"told\\n")

    def export_state(self):
        return True

    def import_state(self, state):
        pass
"""


def test_connections_of_a_worker_that_is_terminated_by_hand_go_to_the_others(tmp_path: Path) -> None:
    """It had told them to end before it knew of any others."""
    write_code(tmp_path / "app.py", MOVABLE_APP)
    with (
        Service(tmp_path, "app:app", "--workers", "2").wait_ready() as service,
        socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as client,
        client.makefile("r") as lines,
    ):
        client.sendall(b"?")
        victim = int(lines.readline())
        with watching_pid(victim) as wait_ended:
            os.kill(victim, signal.SIGTERM)
            wait_ended()
        client.sendall(b"?")
        assert int(lines.readline()) in service.worker_pids()


# -- workers that have served long enough -------------------------------------------------------------------


def assert_one_at_a_time(service: Service) -> None:
    """By the log: a replacement is started when the one before it is ready, and not sooner."""
    starting: set[int] = set()
    for line in service.log_lines():
        if line["event"] == "worker.spawned" and line["worker"] > 2:
            starting.add(line["worker"])
            assert len(starting) == 1, service.log()
        elif line["event"] == "worker.ready":
            starting.discard(line["worker"])


def test_workers_are_recycled_after_max_requests_one_at_a_time_without_a_loss(directory: Path) -> None:
    args = ("--workers", "2", "--max-requests", "40", "--max-requests-jitter", "20")
    with hammered(directory, *args) as (service, hammer):
        hammer.wait(lambda: len(hammer.pids) >= 5, "three replacements have answered")
        assert_one_at_a_time(service)
        assert service.status()["generation"] == 1


def test_workers_are_recycled_at_max_age_without_a_loss(directory: Path) -> None:
    with hammered(directory, "--workers", "2", "--max-age", "700ms") as (service, hammer):
        hammer.wait(lambda: len(hammer.pids) >= 4, "two replacements have answered")
        assert_one_at_a_time(service)


def test_worker_is_recycled_at_max_memory_without_a_loss(directory: Path) -> None:
    grow = "\n    if os.path.exists('f'):\n        os.unlink('f')\n        globals()['ballast'] = b'x' * (128 << 20)\n"
    write_code(directory / "app.py", LINE_APP.format(version="one") + grow)
    (directory / "f").touch()
    with hammered(directory, "--max-memory", "120M") as (service, _):
        eventually(lambda: bool(service.log_events("worker.retired")), "the fat one has left")
        assert "MiB of memory" in service.log_events("worker.expired")[0]["why"]
        assert len(service.log_events("worker.spawned")) == 2


def test_worker_that_starts_beyond_max_memory_is_not_replaced_for_that(directory: Path) -> None:
    """Its replacement would be replaced at once, too: for ever, and fast with preload."""
    with hammered(directory, "--max-memory", "1M") as (service, _):
        eventually(lambda: bool(service.log_events("memory.not_watched")), "it is said")
        (warned,) = service.log_events("memory.not_watched")
        assert "max_memory is 1 MiB" in warned["why"]
        assert not service.log_events("worker.expired")


# -- more and fewer workers ---------------------------------------------------------------------------------


def test_scaling_up_and_down_loses_nothing(directory: Path) -> None:
    with hammered(directory) as (service, hammer):
        for workers in (4, 1, 3, 2):
            assert service.ask(ScaleRequest(workers=workers))[-1].exit_code == 0
            hammer.wait_answers()
            service.wait_serving(workers)
        result = service.run("scale", "1")
        assert result.returncode == 0, result.stderr
        service.wait_serving(1)


def test_scale_to_code_that_does_not_start_is_told_so(directory: Path) -> None:
    with hammered(directory) as (service, hammer):
        write_code(directory / "app.py", "raise RuntimeError('broken since')")
        result = service.run("scale", "2")
        assert result.returncode == 4, result.stdout
        assert "HP412" in result.stderr
        assert set(hammer.answers) == {"one"}


# -- workers without a supervisor ---------------------------------------------------------------------------


def test_orphans_serve_on_and_leave_after_their_time(directory: Path) -> None:
    with Service(directory, "app:app", "--orphan-timeout", "1s").wait_ready() as service:
        (pid,) = service.worker_pids()
        with (
            watching_pid(pid) as wait_ended,
            socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as client,
        ):
            eventually(lambda: service.accepted() == 1, "it is accepted")
            service.kill()
            client.sendall(b"who\n")
            assert client.recv(100).endswith(f" {pid}\n".encode())
            wait_ended()
    assert not list(service.runtime.glob("worker-*"))


# -- what workers start -------------------------------------------------------------------------------------

STRAY = """\
import os, subprocess

async def app(stream):
    await stream.receive()
    stray = subprocess.Popen(["sleep", "1000"])
    await stream.send(f"stray 1 {stray.pid}\\n".encode())
"""


@pytest.mark.parametrize("end", ["restart", "SIGKILL", "stop"])
def test_stray_subprocess_ends_with_its_worker(directory: Path, end: str) -> None:
    write_code(directory / "app.py", STRAY)
    with Service(directory, "app:app").wait_ready() as service:
        stray = ask_line(service.port).pid
        assert psutil.pid_exists(stray)
        with watching_pid(stray) as wait_ended:
            if end == "restart":
                service.restart()
            elif end == "stop":
                service.run("stop")
            else:
                os.kill(service.worker_pids()[0], signal.SIGKILL)
            wait_ended()
