"""The supervisor dies, at every step of what it does: its workers serve on, and the next one goes on with them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hotport.kernel import procfs
from hotport.wire.messages import Report, RestartRequest
from tests.service.test_handoff_faults import APP as HTTP_APP
from tests.service.test_handoff_faults import Kept
from tests.support import LINE_APP, STRIDE, Gate, Hammer, Service, ask_line, eventually, watching_pid, write_code

#: Imported by every interpreter that has its directory on its path: the supervisor kills itself before the effect of
#: that number, counted from the beginning of a restart. Timers are its own affair: nobody else can see them.
CRASHES = """
import os, signal, sys
at = int(os.environ.get("CRASH_AT", "0"))
if at and "serve" in sys.orig_argv:
    from hotport.model import effects
    from hotport.supervisor.supervisor import Supervisor

    carry_out = Supervisor._carry_out
    passed = 0

    def crash(self, effect):
        global passed
        is_visible = not isinstance(effect, effects.StartTimer | effects.StopTimer | effects.ExtendTimer)
        if is_visible and (passed or self.service.restart is not None):
            passed += 1
            if passed == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return carry_out(self, effect)

    Supervisor._carry_out = crash
"""

#: In workers: the first word on their control sockets is of a later version.
OTHER_PROTOCOL = """
import sys
if "hotport.worker" in sys.orig_argv:
    import msgspec
    import hotport.wire.messages as messages
    encode = messages.encode
    def encode_later(message):
        if isinstance(message, messages.Hello):
            message = msgspec.structs.replace(message, protocol=messages.PROTOCOL + 1)
        return encode(message)
    messages.encode = encode_later
"""

#: What a program that knows nothing of hotport does with its descriptor, as sd_listen_fds(3) says.
FOREIGN = """
import os, select, signal, socket
told, tell = os.pipe()
signal.signal(signal.SIGTERM, lambda *_: os.write(tell, b"."))
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"])
notify.send(b"READY=1")
notify.close()
listener = socket.socket(fileno=3)
while told not in select.select([listener, told], [], [])[0]:  # never between an accept and its answer
    client, _ = listener.accept()
    with client:
        client.recv(100)
        client.send(f"v1 {os.environ['HOTPORT_GENERATION']} {os.getpid()}\\n".encode())
"""

BROKEN = "raise RuntimeError('broken')\n"


def die(service: Service) -> None:
    """SIGKILL the supervisor, and collect it."""
    service.process.kill()
    service.process.wait(service.timeout_s)


@contextmanager
def ending(directory: Path) -> Iterator[None]:
    """Whatever happens, no worker of the service outlives the test."""
    try:
        yield
    finally:
        for pid in started(directory):
            with watching_pid(pid) as gone:
                os.kill(pid, signal.SIGKILL)
                gone()
        for path in (directory / "run" / "svc").glob("*.sock"):
            path.unlink()


def started(directory: Path) -> list[int]:
    """Every worker of the service ``svc`` that lives, whoever supervises it."""
    found = procfs.leaders_with("NOTIFY_SOCKET", str(directory / "run" / "svc" / "notify.sock"), os.geteuid())
    return [pid for pid in found if not "".join(procfs.arguments(pid)[-1:]).endswith(".template")]


def assert_healthy(service: Service, workers: int) -> dict[str, Any]:
    """One generation serves, whole; and there is no process and no path besides, but for what outlives a supervisor."""

    def is_healthy() -> bool:
        found = service.status()["workers"]
        generations = {each["generation"] for each in found}
        return len(found) == workers and len(generations) == 1 and all(each["phase"] == "serving" for each in found)

    service.wait_until(is_healthy, "one generation serves")
    status: dict[str, Any] = service.status()
    pids = [worker["pid"] for worker in status["workers"]]
    eventually(lambda: sorted(started(service.directory)) == sorted(pids), "nobody else is left")
    sockets = {f"worker-{each['generation']}.{each['worker']}.sock" for each in status["workers"]}
    there = {"control.sock", "notify.sock", *sockets}
    eventually(lambda: service.paths() - {"load"} == there, "no path is left")
    return status


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "first"), [("done", 1), ("aborted", 3), ("phased", 5)])
def test_supervisor_is_killed_at_every_effect_of_a_restart(tmp_path: Path, kind: str, first: int) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASHES)
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    args = ("app:app", "--workers", "2", "--settle", "20ms")
    env = {"PYTHONPATH": str(tmp_path)}
    with ending(tmp_path), ExitStack() as stack:
        at, descriptors = first if STRIDE > 1 else 1, 0
        hammer: Hammer | None = None
        while True:
            with Service(tmp_path, *args, env={**env, "CRASH_AT": str(at)}) as service:
                service.wait_ready()
                assert_healthy(service, workers=2)
                descriptors = descriptors or service.descriptors()
                assert service.descriptors() <= descriptors + 1, service.log_tail()
                hammer = hammer or stack.enter_context(Hammer(service.port))
                hammer.wait_answers(2)
                if kind == "aborted":
                    write_code(tmp_path / "app.py", BROKEN)
                replies = service.ask(RestartRequest(phased=kind == "phased"))
                write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
                assert not hammer.failures
                if replies and isinstance(replies[-1], Report):
                    die(service)
                    break  # there is no such effect any more
                service.process.wait(service.timeout_s)
                at += STRIDE
                hammer.wait_answers(2)
        assert at > 8
        Service(tmp_path, *args, env=env).wait_ready().end()


@pytest.mark.usefixtures("either_start")
def test_connections_stay_open_while_the_supervisor_is_killed_and_replaced(tmp_path: Path) -> None:
    with ending(tmp_path):
        write_code(tmp_path / "app.py", HTTP_APP.format(fault=""))
        args = ("app:app", "--lifespan", "off", "--keep-alive", "1h", "--workers", "2")
        first = Service(tmp_path, *args).wait_ready()
        before = first.status()
        kept = [Kept(first.port) for _ in range(20)]
        assert [each.ask() for each in kept] == [(1, False)] * 20
        die(first)
        first.end()
        assert [each.ask() for each in kept] == [(1, False)] * 20
        with Service(tmp_path, *args) as second:
            after = assert_healthy(second.wait_ready(), workers=2)
            assert after["addresses"] == before["addresses"]
            assert {each["pid"] for each in after["workers"]} == {each["pid"] for each in before["workers"]}
            assert all(
                new["age_s"] > old["age_s"] for new, old in zip(after["workers"], before["workers"], strict=True)
            )
            assert second.restart()["connections"] == {"moved_http": 20}
            assert [each.ask() for each in kept] == [(2, False)] * 20
            for each in kept:
                each.sock.close()


def test_next_supervisor_remembers_how_many_workers_were_wanted(tmp_path: Path) -> None:
    with ending(tmp_path):
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        first = Service(tmp_path, "app:app", "--workers", "1").wait_ready()
        assert first.run("scale", "2", "svc").returncode == 0
        victim = first.worker_pids()[0]
        die(first)
        first.end()
        with watching_pid(victim) as gone:
            os.kill(victim, signal.SIGKILL)
            gone()
        with Service(tmp_path, "app:app", "--workers", "1") as second:
            status = assert_healthy(second.wait_ready(), workers=2)
            assert [each["worker"] for each in status["workers"]] == [2, 3]


@pytest.mark.measured
def test_worker_that_was_still_starting_is_found_and_goes_on(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with ending(tmp_path):
        write_code(tmp_path / "app.py", Gate.LINE + LINE_APP.format(version="v1"))
        first = Service(tmp_path, "app:app")
        first.wait_until(lambda: bool(started(tmp_path)), "the worker is started")
        (pid,) = started(tmp_path)
        die(first)
        first.end()
        with Service(tmp_path, "app:app") as second:
            second.wait_until(lambda: bool(second.log_events("service.adopted")), "it is adopted")
            gate.open()
            status = assert_healthy(second.wait_ready(), workers=1)
            assert status["workers"][0]["pid"] == pid
            assert ask_line(second.port).pid == pid


@pytest.mark.measured
def test_program_of_somebody_else_is_adopted_by_its_descriptors(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(FOREIGN)
    args = ("--ready", "notify", "--", sys.executable, "server.py")
    with ending(tmp_path):
        first = Service(tmp_path, *args).wait_ready()
        port, before = first.port, ask_line(first.port)
        die(first)
        first.end()
        with Hammer(port) as hammer:
            hammer.wait_answers(2)
            with Service(tmp_path, *args) as second:
                second.wait_ready()
                assert second.port == port
                assert second.worker_pids() == [before.pid]
                assert second.restart()["outcome"] == "done"
                assert ask_line(port).generation == "2"
                hammer.wait_answers(2)
                assert not hammer.failures


def test_socket_file_is_kept_and_removed_by_whoever_is_last(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    with ending(tmp_path):
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        first = Service(tmp_path, "app:app", "--bind", f"unix:{path}").wait_ready()
        inode = path.stat().st_ino
        die(first)
        first.end()
        with Service(tmp_path, "app:app", "--bind", f"unix:{path}") as second:
            second.wait_ready()
            assert path.stat().st_ino == inode
            third = Service(tmp_path, "app:app", "--bind", f"unix:{path}", "--take-over")
            assert second.wait() == 0
            with third:
                assert_healthy(third, workers=1)
                assert path.stat().st_ino == inode
        assert not path.exists()


@pytest.mark.measured
def test_workers_of_another_protocol_are_refused_and_serve_on(tmp_path: Path) -> None:
    with ending(tmp_path):
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        (tmp_path / "sitecustomize.py").write_text(OTHER_PROTOCOL)
        first = Service(tmp_path, "app:app", env={"PYTHONPATH": str(tmp_path)}).wait_ready()
        port = first.port
        die(first)
        first.end()
        second = Service(tmp_path, "app:app")
        assert second.wait() == 6
        assert "HP650 cannot supervise worker 1" in second.log()
        assert ask_line(port).version == "v1"
        second.end()


def test_what_a_killed_process_had_half_made_is_removed(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    place = tmp_path / "run" / "svc"
    place.mkdir(parents=True, mode=0o700)
    place.parent.chmod(0o700)
    (place / ".4c20bb").touch()
    with Service(tmp_path, "app:app") as service:
        assert_healthy(service.wait_ready(), workers=1)
