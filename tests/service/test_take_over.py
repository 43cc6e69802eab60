"""A service goes from one supervisor to another that is alive, and no connection notices; whichever of them dies."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.service.test_handoff_faults import APP as HTTP_APP
from tests.service.test_handoff_faults import Kept
from tests.service.test_recovery import BROKEN, assert_healthy, die, ending
from tests.support import (
    DEADLINE_S,
    LINE_APP,
    RESTARTS,
    Footprint,
    Gate,
    Hammer,
    Service,
    ask_line,
    assert_three_lines,
    eventually,
    watching_pid,
    write_code,
)

HTTP = ("app:app", "--lifespan", "off", "--keep-alive", "1h")


def take_over(directory: Path, *args: str, env: dict[str, str] | None = None) -> Service:
    return Service(directory, *args, "--take-over", env=env)


@pytest.mark.soak
def test_service_moves_from_one_supervisor_to_the_next_without_a_loss(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    warm: Footprint | None = None
    with ending(tmp_path), ExitStack() as stack:
        write_code(tmp_path / "app.py", HTTP_APP.format(fault=""))
        old = stack.enter_context(Service(tmp_path, *HTTP, "--workers", "2")).wait_ready()
        address = old.addresses[0]
        kept = [Kept(old.port) for _ in range(20)]
        for each in kept:
            stack.callback(each.sock.close)
        for number in range(1, 1 + RESTARTS):
            assert [each.ask() for each in kept] == [(number, False)] * 20
            new = stack.enter_context(take_over(tmp_path, *HTTP, "--workers", "2"))
            assert old.wait() == 0, new.log_tail()
            status = assert_healthy(new.wait_ready(), workers=2)
            assert status["generation"] == number + 1
            assert status["pid"] == new.process.pid
            assert status["addresses"] == (address,)
            warm = warm or new.footprint()
            old = new
        assert [each.ask() for each in kept] == [(RESTARTS + 1, False)] * 20
        assert warm is not None
        with capfd.disabled():
            warm.assert_kept(old.footprint(), RESTARTS)
        assert old.restart()["connections"] == {"moved_http": 20}


@pytest.mark.soak
def test_new_connections_are_answered_all_the_time(tmp_path: Path) -> None:
    with ending(tmp_path), ExitStack() as stack:
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        old = stack.enter_context(Service(tmp_path, "app:app")).wait_ready()
        hammer = stack.enter_context(Hammer(old.port))
        hammer.wait_answers(5)
        for number in range(2, 2 + RESTARTS):
            write_code(tmp_path / "app.py", LINE_APP.format(version=f"v{number}"))
            new = stack.enter_context(take_over(tmp_path, "app:app"))
            assert old.wait() == 0, new.log_tail()
            hammer.wait_answers(5, f"v{number}")
            old = new
        assert not hammer.failures
        assert_healthy(old, workers=1)


def test_newcomer_that_cannot_start_leaves_everything_as_it_was(tmp_path: Path) -> None:
    with ending(tmp_path), ExitStack() as stack:
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        old = stack.enter_context(Service(tmp_path, "app:app")).wait_ready()
        hammer = stack.enter_context(Hammer(old.port))
        write_code(tmp_path / "app.py", BROKEN)
        new = stack.enter_context(take_over(tmp_path, "app:app"))
        assert new.wait() == 3
        write_code(tmp_path / "app.py", LINE_APP.format(version="v2"))
        eventually(lambda: (old.runtime / "control.sock").exists(), "the old supervisor has its paths again")
        assert assert_healthy(old, workers=1)["pid"] == old.process.pid
        assert old.restart()["outcome"] == "done"
        hammer.wait_answers(2, "v2")
        assert not hammer.failures
        assert old.stop() == 0


@pytest.mark.measured
@pytest.mark.parametrize("who", ["newcomer", "old"])
def test_socket_file_stays_when_one_of_the_two_ends_before_the_newcomer_accepts(tmp_path: Path, who: str) -> None:
    gate = Gate(tmp_path)
    path, status_path = tmp_path / "app.sock", tmp_path / "status.sock"
    args = ("app:app", "--bind", f"unix:{path}", "--status-bind", f"unix:{status_path}")
    with ending(tmp_path), ExitStack() as stack:
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        old = stack.enter_context(Service(tmp_path, *args)).wait_ready()
        inodes = path.stat().st_ino, status_path.stat().st_ino
        write_code(tmp_path / "app.py", Gate.LINE + LINE_APP.format(version="v2"))
        new = stack.enter_context(take_over(tmp_path, *args))
        eventually(lambda: len(new.log_events("worker.spawned")) == 2, "its worker starts")
        leaving, staying = (new, old) if who == "newcomer" else (old, new)
        leaving.process.send_signal(signal.SIGTERM)
        assert leaving.wait() == 0, leaving.log_tail()
        if who == "old":
            gate.open()
        eventually(lambda: (old.runtime / "control.sock").exists(), "somebody supervises it")
        assert_healthy(staying, workers=1)
        assert (path.stat().st_ino, status_path.stat().st_ino) == inodes
        assert staying.stop() == 0
        assert not path.exists()
        assert not status_path.exists()


def test_newcomer_that_is_killed_before_it_accepts_leaves_everything_as_it_was(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with ending(tmp_path), ExitStack() as stack:
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        old = stack.enter_context(Service(tmp_path, "app:app", "--orphan-timeout", "1s")).wait_ready()
        hammer = stack.enter_context(Hammer(old.port))
        write_code(tmp_path / "app.py", Gate.LINE + LINE_APP.format(version="v2"))
        new = stack.enter_context(take_over(tmp_path, "app:app", "--orphan-timeout", "1s"))
        eventually(lambda: len(new.log_events("worker.spawned")) == 2, "its worker starts")
        stray = new.log_events("worker.spawned")[1]["worker_pid"]
        with watching_pid(stray) as gone:
            die(new)
            eventually(lambda: bool(old.log_events("take_over.failed")), "the old one goes on")
            gate.open()
            gone()  # nobody gives it orders: it is told to leave as soon as it says that it is ready
        write_code(tmp_path / "app.py", LINE_APP.format(version="v3"))
        assert old.restart()["outcome"] == "done"
        hammer.wait_answers(2, "v3")
        assert not hammer.failures
        assert_healthy(old, workers=1)


def test_workers_of_a_newcomer_that_died_are_seen_off_though_some_of_them_serve(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with ending(tmp_path), ExitStack() as stack:
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        old = stack.enter_context(Service(tmp_path, "app:app", "--workers", "2")).wait_ready()
        hammer = stack.enter_context(Hammer(old.port))
        code = "import os\ntry:\n    os.mkdir('first')\nexcept FileExistsError:\n    " + Gate.LINE
        write_code(tmp_path / "app.py", code + LINE_APP.format(version="v2"))
        new = stack.enter_context(take_over(tmp_path, "app:app", "--workers", "2"))
        hammer.wait_answers(1, "v2")
        strays = [event["worker_pid"] for event in new.log_events("worker.spawned") if event["generation"] == 2]
        with watching_pid(strays[0]) as gone, watching_pid(strays[1]) as also_gone:
            die(new)
            eventually(lambda: bool(old.log_events("take_over.failed")), "the old one goes on")
            gate.open()
            gone()
            also_gone()
        write_code(tmp_path / "app.py", LINE_APP.format(version="v3"))
        assert old.restart()["outcome"] == "done"
        hammer.wait_answers(2, "v3")
        assert not hammer.failures
        assert_healthy(old, workers=2)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_old_supervisor_that_is_killed_is_seen_off_by_the_newcomer(tmp_path: Path, moment: str) -> None:
    gate = Gate(tmp_path)
    with ending(tmp_path), ExitStack() as stack:
        write_code(tmp_path / "app.py", HTTP_APP.format(fault=""))
        old = stack.enter_context(Service(tmp_path, *HTTP)).wait_ready()
        kept = [Kept(old.port) for _ in range(10)]
        for each in kept:
            stack.callback(each.sock.close)
            assert each.ask() == (1, False)
        if moment == "before":
            write_code(tmp_path / "app.py", Gate.LINE + HTTP_APP.format(fault=""))
        (worker,) = old.worker_pids()
        with watching_pid(worker) as gone:
            new = stack.enter_context(take_over(tmp_path, *HTTP))
            if moment == "before":
                eventually(lambda: bool(old.log_events("take_over.began")), "it has given its listeners")
                die(old)
                assert [each.ask() for each in kept] == [(1, False)] * 10
                gate.open()
            else:
                eventually(lambda: bool(old.log_events("take_over.committed")), "the newcomer accepts")
                die(old)
            gone()
        assert [each.ask() for each in kept] == [(2, False)] * 10
        assert_healthy(new.wait_ready(), workers=1)
        write_code(tmp_path / "app.py", HTTP_APP.format(fault=""))
        assert new.restart()["outcome"] == "done"


@pytest.mark.measured
def test_addresses_are_kept_added_and_dropped(tmp_path: Path) -> None:
    unix = tmp_path / "a.sock"
    with ending(tmp_path), ExitStack() as stack:
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        dropped = ("--bind", "127.0.0.1:0", "--bind", f"unix:{unix}")
        old = stack.enter_context(Service(tmp_path, "app:app", *dropped)).wait_ready()
        tcp = old.addresses[0]
        new = stack.enter_context(take_over(tmp_path, "app:app", "--bind", tcp, "--bind", "127.0.0.2:0"))
        assert old.wait() == 0
        kept, added = new.wait_ready().addresses
        assert kept == tcp
        assert added.startswith("tcp://127.0.0.2:")
        assert ask_line(new.port).generation == "2"
        assert new.stop() == 0
        assert not unix.exists()


def test_old_supervisor_that_is_stopped_meanwhile_leaves_the_socket_file(tmp_path: Path) -> None:
    """It removed the file as it ended: nobody could connect to the newcomer, ever."""
    gate, unix = Gate(tmp_path), tmp_path / "a.sock"
    bind = ("--bind", f"unix:{unix}")
    with ending(tmp_path), ExitStack() as stack:
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        old = stack.enter_context(Service(tmp_path, "app:app", *bind)).wait_ready()
        write_code(tmp_path / "app.py", Gate.LINE + LINE_APP.format(version="v2"))
        new = stack.enter_context(take_over(tmp_path, "app:app", *bind))
        eventually(lambda: bool(old.log_events("take_over.began")), "it has given its listeners")
        old.process.send_signal(signal.SIGTERM)
        assert old.wait() == 0
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE_S)
            client.connect(str(unix))
            client.sendall(b"who\n")
            gate.open()
            assert client.recv(100).startswith(b"v2 ")
        assert_healthy(new.wait_ready(), workers=1)
        assert new.stop() == 0
        assert not unix.exists()


def test_without_anybody_there_it_starts_as_usual(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with take_over(tmp_path, "app:app") as service:
        assert assert_healthy(service.wait_ready(), workers=1)["generation"] == 1


def test_service_that_runs_is_not_started_twice_and_the_error_says_how(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app") as service:
        service.wait_ready()
        result = service.run("serve", "app:app", "--name", "svc")
        assert result.returncode == 2
        assert_three_lines(result.stderr, "HP630")
        assert "--take-over" in result.stderr


def test_take_over_is_refused_during_a_restart_and_while_another_is_under_way(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with ending(tmp_path), ExitStack() as stack:
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        old = stack.enter_context(Service(tmp_path, "app:app")).wait_ready()
        write_code(tmp_path / "app.py", Gate.LINE + LINE_APP.format(version="v2"))
        restart = old.start("restart", "svc", "--json")
        old.wait_until(lambda: bool(old.status()["restarting"]), "a restart is in progress")
        result = old.run("serve", "app:app", "--name", "svc", "--take-over")
        assert result.returncode == 4
        assert_three_lines(result.stderr, "HP655")
        gate.open()
        restart.communicate(timeout=old.timeout_s)
        assert restart.returncode == 0

        new = stack.enter_context(take_over(tmp_path, "app:app"))
        eventually(lambda: bool(old.log_events("take_over.began")), "it has given its listeners")
        old.process.send_signal(signal.SIGHUP)
        eventually(lambda: bool(old.log_events("request.failed")), "a restart is refused meanwhile")
        assert "another supervisor is taking over" in old.log_events("request.failed")[0]["error"]
        gate.open()
        assert old.wait() == 0
        assert_healthy(new, workers=1)


@pytest.mark.measured
def test_supervisor_of_another_protocol_is_refused(tmp_path: Path) -> None:
    with ending(tmp_path), ExitStack() as stack:
        write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
        old = stack.enter_context(Service(tmp_path, "app:app")).wait_ready()
        (tmp_path / "sitecustomize.py").write_text(
            "import os\n"
            "if os.environ.get('LATER'):\n"
            "    import msgspec, hotport.wire.messages as messages\n"
            "    encode = messages.encode\n"
            "    def encode_later(message):\n"
            "        if isinstance(message, messages.TakeOverRequest):\n"
            "            message = msgspec.structs.replace(message, protocol=messages.PROTOCOL + 1)\n"
            "        return encode(message)\n"
            "    messages.encode = encode_later\n"
        )
        new = stack.enter_context(take_over(tmp_path, "app:app", env={"PYTHONPATH": str(tmp_path), "LATER": "1"}))
        assert new.wait() == 4
        assert "HP654 cannot hand svc over to another supervisor" in new.log()
        assert assert_healthy(old, workers=1)["pid"] == old.process.pid
        assert os.path.exists(old.runtime / "control.sock")
