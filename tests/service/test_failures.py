"""What becomes of a service when new code, or somebody's timing, is bad: the port comes first."""

from __future__ import annotations

import os
import pty
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from hotport.wire.messages import RestartRequest, StopRequest
from tests.support import (
    DEADLINE_S,
    LINE_APP,
    RESTARTS,
    SLOWNESS,
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

#: Code that never serves, and what the operator should read about it.
BROKEN = {
    "raises_on_import": ("raise RuntimeError('the new code is broken')", "RuntimeError: the new code is broken"),
    "cannot_be_parsed": ("def app(stream:", "SyntaxError"),
    "blocks_on_import": ("while True: pass", "did not say READY=1 in time"),
    "blocks_in_startup": (
        "async def app(sockets, lifetime):\n    while True: pass",
        "did not say READY=1 in time",
    ),
    "waits_in_startup": (
        "import asyncio\nasync def app(sockets, lifetime):\n    await asyncio.Event().wait()",
        "did not say READY=1 in time",
    ),
    "calls_sys_exit_on_import": ("import sys; sys.exit(0)", "it called sys.exit(0)"),
    "exits_0_on_import": ("import os; os._exit(0)", "exited 0"),
    "exits_after_it_said_ready": (
        "import asyncio, os\n"
        "async def app(sockets, lifetime):\n"
        "    lifetime.started()\n"
        "    await asyncio.sleep(0.02)\n"
        "    os._exit(0)\n",
        "exited 0",
    ),
    "dies_after_it_said_ready": (
        "import asyncio, os\n"
        "async def app(sockets, lifetime):\n"
        "    lifetime.started()\n"
        "    await asyncio.sleep(0.02)\n"
        "    os.abort()\n",
        "killed by SIGABRT",
    ),
}

#: The same for programs that are not ours; the first one serves.
FOREIGN = """\
import os, socket, sys

VERSION = {version!r}
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"])
if VERSION == "exits_after_it_said_ready":
    notify.send(b"READY=1")
    sys.exit(0)
if VERSION == "never_says_ready":
    import signal
    signal.pause()
if VERSION == "exits_at_once":
    sys.exit(9)
listener = socket.socket(fileno=3)
listener.settimeout(1)
notify.send(b"READY=1")
while True:
    try:
        connection, _ = listener.accept()
    except TimeoutError:
        continue
    connection.recv(100)
    connection.sendall(f"{{VERSION}} {{os.environ['HOTPORT_GENERATION']}} {{os.getpid()}}\\n".encode())
    connection.close()
"""

#: What such a program does, and the words for it.
BROKEN_FOREIGN = {
    "never_says_ready": "did not say READY=1 in time",
    "exits_at_once": "exited 9",
    "exits_after_it_said_ready": "exited 0",
}


def set_options(directory: Path, *, ready_timeout: str = "60s", **others: str) -> None:
    """The options that are read again for each restart."""
    options = {"ready_timeout": ready_timeout, "kill_timeout": "300ms", **others}
    (directory / "hotport.toml").write_text("".join(f'{key} = "{value}"\n' for key, value in options.items()))


def test_old_generation_serves_on_whatever_is_wrong_with_new_code(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    set_options(tmp_path)
    with Service(tmp_path, "app:app", "--workers", "2").wait_ready() as service, Hammer(service.port) as hammer:
        hammer.wait_answers()
        left = snapshot(service)
        for code, words in BROKEN.values():
            write_code(tmp_path / "app.py", code)
            set_options(tmp_path, ready_timeout=f"{1.0 * SLOWNESS:g}s" if "READY" in words else "60s", settle="1h")
            fail_to_restart(service, words, left)
            hammer.wait_answers()
            assert set(hammer.answers) == {"one"}

        write_code(tmp_path / "app.py", LINE_APP.format(version="two"))
        set_options(tmp_path)
        assert service.restart()["generation"] == 2 + len(BROKEN)
        hammer.wait_answers(version="two")
        assert ask_line(service.port).version == "two"
    assert not hammer.failures


def test_old_generation_serves_on_whatever_is_wrong_with_a_new_foreign_program(tmp_path: Path) -> None:
    write_code(tmp_path / "server.py", FOREIGN.format(version="one"))
    set_options(tmp_path)
    with (
        Service(tmp_path, "--", sys.executable, "server.py").wait_ready() as service,
        Hammer(service.port) as hammer,
    ):
        hammer.wait_answers()
        left = snapshot(service)
        for kind, words in BROKEN_FOREIGN.items():
            write_code(tmp_path / "server.py", FOREIGN.format(version=kind))
            set_options(tmp_path, ready_timeout="1s" if "READY" in words else "60s", settle="1h")
            fail_to_restart(service, words, left)
            hammer.wait_answers()
            assert set(hammer.answers) == {"one"}
        assert not hammer.failures


def fail_to_restart(service: Service, words: str, left: tuple[object, ...]) -> None:
    """Restart in vain; the answer has these words, and afterwards everything is as it was."""
    result = service.run("restart")
    assert result.returncode == 4, result.stderr
    assert words in result.stdout
    assert "generation 1 of svc serves on" in result.stdout
    eventually(lambda: snapshot(service) == left, f"{snapshot(service)} == {left}")


def snapshot(service: Service) -> tuple[object, ...]:
    """Whatever a failed restart could leave behind."""
    return (
        service.descriptors(),
        sorted(service.descendants()),
        service.paths(),
        psutil.Process(service.process.pid).num_threads(),
    )


def test_service_whose_every_worker_fails_exits_3_with_the_workers_traceback(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", "raise RuntimeError('broken from the start')")
    with Service(tmp_path, "app:app", "--workers", "2", "--bind", "unix:app.sock", "--bind", "127.0.0.1:0") as service:
        assert service.wait() == 3
        assert "RuntimeError: broken from the start" in service.log()
        assert "Traceback (most recent call last)" in service.log()
        assert not service.paths()
        assert not (tmp_path / "app.sock").exists()
        (starting,) = service.log_events("service.starting")
        port = int(starting["addresses"][1].rpartition(":")[2])
        with socket.create_server(("127.0.0.1", port)):
            pass  # nobody holds it


@pytest.mark.parametrize(
    ("code", "last"),
    [
        (b"def app(stream:\n", "SyntaxError: '(' was never closed"),
        (b"\xff", "SyntaxError: "),
    ],
    ids=["syntax", "encoding"],
)
def test_code_that_cannot_be_loaded_is_told_without_lines_of_ours(tmp_path: Path, code: bytes, last: str) -> None:
    (tmp_path / "app.py").write_bytes(code)
    with Service(tmp_path, "app:app") as service:
        assert service.wait() == 3
        told = [line for line in service.log().splitlines() if not line.startswith("{")]
    assert told[-1].startswith(last)
    assert not any("hotport" in line or "importlib" in line for line in told)


def test_service_that_hangs_at_its_start_says_for_how_long_it_may(tmp_path: Path) -> None:
    write_code(
        tmp_path / "app.py", "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: signal.pause()"
    )
    with Service(tmp_path, "app:app", "--ready-timeout", "1s", "--kill-timeout", "100ms") as service:
        assert service.wait() == 3
        error = "\n".join(line for line in service.log().splitlines() if not line.startswith("{"))
        assert_three_lines(error, "HP403")
        assert "worker 1 did not say READY=1 in time; ready_timeout is 1s" in error
        (lost,) = service.log_events("worker.lost")  # before it has been killed
        assert lost["why"] == "did not say READY=1 in time"


def test_service_that_ends_without_a_word_is_not_said_to_have_written_one(tmp_path: Path) -> None:
    """ "What it wrote is above", and there was nothing above."""
    write_code(tmp_path / "app.py", "import os; os._exit(7)")
    with Service(tmp_path, "app:app") as service:
        assert service.wait() == 3
        error = "\n".join(line for line in service.log().splitlines() if not line.startswith("{"))
        assert_three_lines(error, "HP403")
        assert "worker 1 exited 7; if it has written why, that is above" in error


def test_second_restart_is_told_that_one_is_in_progress(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app").wait_ready() as service, Hammer(service.port) as hammer:
        write_code(tmp_path / "app.py", Gate.LINE + LINE_APP.format(version="two"))
        with service.start("restart", "--json") as first:
            eventually(lambda: service.status()["restarting"] == 2, "the restart has begun")
            second = service.run("restart")
            scaling = service.run("scale", "3")
            gate.open()
            output, _ = first.communicate(timeout=30 * SLOWNESS)
        assert second.returncode == scaling.returncode == 4
        assert "in progress" in second.stderr
        assert "in progress" in scaling.stderr
        assert first.returncode == 0, output
        hammer.wait_answers(version="two")
    assert not hammer.failures


#: Each is found at another step.
UNUSABLE = {
    "HP301": "workers = ",
    "HP304": "workers = 0",
    "HP101": "bind = 'tcp://192.0.2.1:1'",
    "HP402": "python = 'gone/bin/python'",
}


def test_restart_with_options_that_cannot_be_used_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    (tmp_path / "hotport.toml").write_text("bind = 'unix:app.sock'\nworkers = 2\n")
    with Service(tmp_path, "app:app", default_bind=None).wait_ready() as service:
        left = snapshot(service)
        for code, options in UNUSABLE.items():
            (tmp_path / "hotport.toml").write_text(options)
            result = service.run("restart")
            assert result.returncode == 4
            assert_three_lines(result.stderr, code)
            assert service.status()["generation"] == 1
            assert service.status()["restarting"] == 0
            eventually(lambda: snapshot(service) == left, f"{snapshot(service)} == {left}")
        (tmp_path / "hotport.toml").write_text("bind = 'unix:app.sock'\nworkers = 1\n")
        assert service.restart()["outcome"] == "done"
        service.wait_serving(1)


def test_restart_goes_on_when_whoever_asked_for_it_leaves(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app").wait_ready() as service, Hammer(service.port) as hammer:
        write_code(tmp_path / "app.py", Gate.LINE + LINE_APP.format(version="two"))
        with service.start("restart") as command:
            eventually(lambda: service.status()["restarting"] == 2, "the restart has begun")
            command.kill()
        gate.open()
        hammer.wait_answers(version="two")
        eventually(lambda: bool(service.log_events("restart.report")), "the restart is over")
        assert service.status()["last_restart"]["outcome"] == "done"
    assert not hammer.failures


def test_stop_goes_on_when_whoever_asked_for_it_is_interrupted(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", HOLDING)
    with Service(tmp_path, "app:app", "--drain-timeout", "1h").wait_ready() as service, hold(service):
        asking = service.start("stop")
        eventually(lambda: bool(service.log_events("drain.began")), "it is stopping")
        asking.send_signal(signal.SIGINT)
        _, words = asking.communicate(timeout=DEADLINE_S)
        assert asking.returncode == 130
        assert words == "not waiting any longer; the stop continues: hotport status\n"
        assert service.process.poll() is None


def test_term_during_a_restart_stops_everything(tmp_path: Path) -> None:
    Gate(tmp_path)
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app", "--workers", "2", "--kill-timeout", "300ms").wait_ready() as service:
        write_code(tmp_path / "app.py", Gate.LINE + LINE_APP.format(version="two"))
        with service.start("restart") as command:
            eventually(lambda: service.status()["restarting"] == 2, "the restart has begun")
            eventually(lambda: len(service.descendants()) > 2, "a new worker is started, and maybe the other one")
            pids = service.descendants()
            service.process.send_signal(signal.SIGTERM)
            assert service.wait() == 0
            output, _ = command.communicate(timeout=30 * SLOWNESS)
        assert command.returncode == 4
        assert "the service is stopping" in output
        assert not any(map(psutil.pid_exists, pids))
        assert not service.paths()


HOLDING = """\
import anyio

async def app(stream):
    await stream.send(b"held\\n")
    await anyio.sleep_forever()
"""


def hold(service: Service) -> socket.socket:
    """A connection that its handler never lets go."""
    sock = socket.create_connection(("127.0.0.1", service.port), 30 * SLOWNESS)
    assert sock.recv(100) == b"held\n"
    return sock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(tmp_path: Path, number: signal.Signals) -> None:
    write_code(tmp_path / "app.py", HOLDING)
    with (
        Service(tmp_path, "app:app", "--drain-timeout", "1h").wait_ready() as service,
        hold(service) as sock,
        watching_pid(service.worker_pids()[0]) as wait_worker_ended,
    ):
        service.process.send_signal(number)
        eventually(lambda: bool(service.log_events("drain.began")), "the worker drains")
        assert service.process.poll() is None
        service.process.send_signal(number)
        wait_worker_ended()
        service.wait()
        with suppress(ConnectionResetError):
            assert sock.recv(100) == b""


def test_quit_stops_at_once(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", HOLDING)
    with Service(tmp_path, "app:app", "--drain-timeout", "1h").wait_ready() as service, hold(service):
        service.process.send_signal(signal.SIGQUIT)
        service.wait()


def test_hup_restarts(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app").wait_ready() as service, Hammer(service.port) as hammer:
        write_code(tmp_path / "app.py", LINE_APP.format(version="two"))
        service.process.send_signal(signal.SIGHUP)
        hammer.wait_answers(version="two")
        eventually(lambda: bool(service.log_events("restart.report")), "the restart is over")
    assert not hammer.failures


def test_hup_with_broken_code_tells_the_log(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app").wait_ready() as service, Hammer(service.port) as hammer:
        write_code(tmp_path / "app.py", "raise RuntimeError('nobody asked')")
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: bool(service.log_events("restart.aborted")), "the restart is aborted")
        (lost,) = service.log_events("worker.lost")
        assert "RuntimeError: nobody asked" in lost["exception"]
        hammer.wait_answers(version="one")
    assert not hammer.failures


#: Runs a command as the leader of a session on a terminal, as a terminal window does; perhaps as nohup(1) would.
ON_TERMINAL = """
import os, signal, sys
os.setsid()
os.open(sys.argv[1], os.O_RDWR)
if sys.argv[2] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execvp(sys.argv[3], sys.argv[3:])
"""


@contextmanager
def on_terminal(directory: Path, how: str) -> Iterator[tuple[Service, Callable[[], None]]]:
    """A service on a terminal of its own, and what closes that."""
    answering = (
        "async def app(stream):\n    await stream.send(b'held\\n')\n    await stream.send(await stream.receive())\n"
    )
    write_code(directory / "app.py", answering)
    window, terminal = pty.openpty()
    with ExitStack() as stack:
        close = stack.enter_context(open(window, "wb", buffering=0)).close  # closes once, whoever calls
        stack.callback(os.close, terminal)
        prefix = (sys.executable, "-c", ON_TERMINAL, os.ttyname(terminal), how)
        yield (
            stack.enter_context(Service(directory, "app:app", "--log-level", "debug", prefix=prefix)).wait_ready(),
            close,
        )


def test_hup_restarts_while_the_terminal_is_open_and_stops_when_it_is_closed(tmp_path: Path) -> None:
    """Closing the window in which ``hotport serve`` ran left a service behind that nobody saw any more."""
    with on_terminal(tmp_path, "foreground") as (service, close):
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: bool(service.log_events("restart.report")), "the restart is over")
        with hold(service) as client:
            close()
            eventually(lambda: bool(service.log_events("terminal.hung_up")), "it is told")
            service.process.send_signal(signal.SIGHUP)  # shells say it, too, and that is no second request to stop
            eventually(lambda: len(service.log_events("signal.received")) == 3, "that is heard")
            client.sendall(b"done")
            assert client.recv(100) == b"done"
        assert service.wait() == 0
        assert len(service.log_events("terminal.hung_up")) == 1


def test_hup_restarts_under_nohup_whatever_becomes_of_the_terminal(tmp_path: Path) -> None:
    with on_terminal(tmp_path, "nohup") as (service, close):
        close()
        eventually(lambda: bool(service.log_events("restart.report")), "the terminal's end restarts")
        service.process.send_signal(signal.SIGHUP)
        eventually(lambda: len(service.log_events("restart.report")) == 2, "somebody's signal restarts")
        assert service.status()["generation"] == 3


def test_ttin_and_ttou_mean_one_worker_more_or_less(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app").wait_ready() as service, Hammer(service.port) as hammer:
        for number, count in ((signal.SIGTTIN, 2), (signal.SIGTTIN, 3), (signal.SIGTTOU, 2), (signal.SIGTTOU, 1)):
            service.process.send_signal(number)
            service.wait_serving(count)
        service.process.send_signal(signal.SIGTTOU)  # the last one stays
        hammer.wait_answers()
        service.wait_serving(1)
    assert not hammer.failures


def test_stop_exits_0_when_nothing_was_cut(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app").wait_ready() as service:
        ask_line(service.port)
        result = service.run("stop")
        assert result.returncode == 0, result.stderr
        assert service.wait() == 0
        assert service.run("status").returncode == 6


def test_stop_exits_5_when_a_connection_was_cut(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", HOLDING)
    with Service(tmp_path, "app:app", "--drain-timeout", "200ms").wait_ready() as service, hold(service) as sock:
        result = service.run("stop")
        assert result.returncode == 5, result.stderr
        assert "cut" in result.stdout
        assert service.wait() == 5
        (ended,) = service.log_events("drain.ended")
        assert ended["cut_stream"] == 1
        assert sock.recv(100) == b""


def test_stop_now_does_not_wait_for_connections(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", HOLDING)
    with Service(tmp_path, "app:app", "--drain-timeout", "1h").wait_ready() as service, hold(service):
        assert service.ask(StopRequest(now=True))
        service.wait()


@pytest.mark.soak
@pytest.mark.timeout(60 * SLOWNESS + 10 * SLOWNESS * RESTARTS)
def test_many_restarts_leave_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    last = 10 * RESTARTS if RESTARTS >= 10 else 10
    warm = last // 2
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app", "--settle", "0").wait_ready() as service:
        found: dict[int, Footprint] = {}
        for number in range(1, last + 1):
            report = service.ask(RestartRequest())[-1]
            assert report.outcome == "done"
            assert ask_line(service.port).generation == str(number + 1)
            if number in (warm, last):
                eventually(lambda: len(service.descendants()) == 1, "one worker is left")
                found[number] = service.footprint()
        with capfd.disabled():
            found[warm].assert_kept(found[last], last - warm)
        assert found[last].files == 3  # control, notify, and one worker
        assert psutil.Process(service.process.pid).num_threads() == 1


def test_edits_of_one_size_in_one_second_are_all_served(tmp_path: Path) -> None:
    """A restart was done, and the old code answered: byte code is judged by the source's size and whole second."""
    as_users_have_it = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": ""}
    second = time.time() + 3600  # however slow this machine is, no worker starts after it

    def edit(version: str) -> None:
        (tmp_path / "app.py").write_text("import settled\n" + LINE_APP.format(version=version))
        os.utime(tmp_path / "app.py", (second, second))

    edit("one")
    write_code(tmp_path / "settled.py", "")
    with Service(tmp_path, "app:app", "--settle", "0", env=as_users_have_it).wait_ready() as service:
        for version in ("two", "six", "ten"):
            edit(version)
            service.ask(RestartRequest())
            assert ask_line(service.port).version == version
    # What has not changed lately is kept, as ever.
    assert [path.name.partition(".")[0] for path in (tmp_path / "__pycache__").iterdir()] == ["settled"]


def test_restart_names_a_worker_that_is_stopped_and_lets_it_finish_if_it_is_continued(tmp_path: Path) -> None:
    """A worker that was stopped cost each restart 50 s, and nothing said which one it was, or what helps."""
    write_code(tmp_path / "app.py", LINE_APP.format(version=1))
    with Service(tmp_path, "app:app", "--drain-timeout", "1h").wait_ready() as service:
        (old,) = service.status()["workers"]
        os.kill(old["pid"], signal.SIGSTOP)
        os.kill(service.process.pid, signal.SIGHUP)
        eventually(lambda: bool(service.log_events("worker.stopped")), "the log says so")
        (stopped,) = service.log_events("worker.stopped")
        assert (stopped["worker_pid"], stopped["fix"]) == (old["pid"], f"kill -CONT {old['pid']}")
        (quiesced,) = service.log_events("restart.quiesced")
        assert quiesced["why"] == f"no answer from worker {old['worker']}"
        os.kill(old["pid"], signal.SIGCONT)
        eventually(lambda: bool(service.log_events("restart.report")), "the restart is over")
        (report,) = service.log_events("restart.report")
        assert report["outcome"] == "done"
        assert "workers_killed" not in report["connections"]
