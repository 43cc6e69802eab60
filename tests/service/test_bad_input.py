"""Bad input is answered with one clear error, the right exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import struct
import subprocess
import tempfile
import termios
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support import (
    DEADLINE_S,
    HOTPORT,
    LINE_APP,
    Hammer,
    Service,
    ask_line,
    assert_three_lines,
    eventually,
    need,
    write_code,
)

NOBODY = 65534


def hotport(
    directory: Path, *args: str, env: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """``hotport ARGS`` to its end."""
    return subprocess.run(
        [*prefix, *HOTPORT, *args],
        cwd=directory,
        env={**os.environ, "HOTPORT_RUNTIME_DIR": str(directory / "run"), **(env or {})},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def the_error(text: str) -> str:
    """What is not a log line."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("{"))


def refused(
    directory: Path,
    *args: str,
    code: str,
    exit_code: int,
    env: dict[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> str:
    """Run ``hotport serve ARGS``, which must be refused with three lines and leave nothing."""
    result = hotport(directory, "serve", "--name", "svc", "--log-format", "json", *args, env=env, prefix=prefix)
    error = the_error(result.stderr)
    assert result.returncode == exit_code, result.stderr
    assert result.stdout == ""
    assert_three_lines(error, code)
    runtime = directory / "run" / "svc"
    assert not runtime.exists() or not list(runtime.iterdir())
    return error


@pytest.fixture
def line_app(tmp_path: Path) -> Path:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    return tmp_path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that bad input must not change; restarts may."""
    directory = tmp_path_factory.mktemp("running")
    write_code(directory / "app.py", LINE_APP.format(version="one"))
    # It outlives the test that happens to start it: that one must not be blamed.
    with Service(directory, "app:app", env={"PYTEST_CURRENT_TEST": ""}) as service:
        yield service.wait_ready()


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that another user can reach; tmp_path is private to ours."""
    with tempfile.TemporaryDirectory(prefix="hotport-") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def as_nobody() -> tuple[str, ...]:
    """The beginning of a command line that is run as another user.

    That user may read everything: the interpreter and the packages may lie where others cannot go.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    caps = "-all,+dac_read_search"
    ids = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    # Nobody may not write where coverage keeps its data.
    unmeasured = ("env", "--unset=COVERAGE_PROCESS_CONFIG", "--unset=COVERAGE_PROCESS_START")
    return (
        *unmeasured,
        need("setpriv"),
        *ids,
        f"--inh-caps={caps}",
        f"--ambient-caps={caps}",
        f"--bounding-set={caps}",
    )


# -- addresses ----------------------------------------------------------------------------------------------


def test_port_in_use_names_the_pid_and_the_command(line_app: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = refused(line_app, "app:app", "--bind", f"127.0.0.1:{port}", code="HP101", exit_code=3)
        assert "EADDRINUSE" in error
        assert f"pid {os.getpid()} (" in error


def test_port_in_use_by_a_service_of_ours_says_how_to_stop_it(line_app: Path) -> None:
    with Service(line_app, "app:app", name="other").wait_ready() as service:
        bind = f"127.0.0.1:{service.port}"
        error = refused(line_app, "app:app", "--bind", bind, code="HP101", exit_code=3)
        assert error.endswith("or first: hotport stop other"), "without the name it is refused where several run"


def test_second_address_in_use_gives_the_first_one_back(line_app: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        binds = ("--bind", "unix:app.sock", "--bind", f"127.0.0.1:{port}")
        refused(line_app, "app:app", *binds, code="HP101", exit_code=3)
        assert not (line_app / "app.sock").exists()


def test_low_port_without_permission_says_which_ports_are_low(open_dir: Path) -> None:
    prefix = as_nobody()
    write_code(open_dir / "app.py", LINE_APP.format(version="one"))
    start = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if start <= 80:
        pytest.skip(f"net.ipv4.ip_unprivileged_port_start is {start}")
    error = refused(open_dir, "app:app", "--bind", "127.0.0.1:80", code="HP101", exit_code=3, prefix=prefix)
    assert "EACCES" in error
    assert f"ports below {start}" in error


def test_unknown_host_is_named(line_app: Path) -> None:
    error = refused(line_app, "app:app", "--bind", "no-such-host.invalid:8000", code="HP102", exit_code=2)
    assert "no-such-host.invalid" in error


def test_address_of_no_interface_is_named(line_app: Path) -> None:
    error = refused(line_app, "app:app", "--bind", "192.0.2.1:8000", code="HP101", exit_code=3)  # RFC 5737
    assert "EADDRNOTAVAIL" in error


def test_file_in_the_place_of_a_socket_is_left_alone(line_app: Path) -> None:
    (line_app / "app.sock").write_text("precious")
    refused(line_app, "app:app", "--bind", "unix:app.sock", code="HP103", exit_code=2)
    assert (line_app / "app.sock").read_text() == "precious"


# -- the application ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "target", "options", "error_code", "words"),
    [
        ("async def app(stream): ...", "app:appp", (), "HP502", "nearest name is 'app'"),
        ("import sys; sys.exit(3)", "app:app", (), "HP508", "sys.exit(3)"),
        ("", "app:app", ("--app-dir", "nodir"), "HP405", "nodir does not exist"),
    ],
    ids=["attribute", "exits", "app_dir"],
)
def test_application_that_cannot_be_used(
    tmp_path: Path, code: str, target: str, options: tuple[str, ...], error_code: str, words: str
) -> None:
    write_code(tmp_path / "app.py", code)
    error = refused(tmp_path, target, "--bind", "127.0.0.1:0", *options, code=error_code, exit_code=3)
    assert words in error


def test_missing_extra_gives_the_pip_line(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", "async def app(scope, receive, send): ...")
    (tmp_path / "httptools.py").write_text("raise ModuleNotFoundError('no httptools', name='httptools')")
    error = refused(tmp_path, "app:app", "--bind", "127.0.0.1:0", code="HP505", exit_code=3)
    assert "httptools is not installed" in error
    assert "-m pip install 'hotport[asgi]'" in error


def test_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    error = refused(tmp_path, "--bind", "127.0.0.1:0", "--", "no-such-program", code="HP550", exit_code=3)
    assert "no-such-program" in error
    assert "PATH" in error


def test_interpreter_that_is_not_there_is_named(line_app: Path) -> None:
    error = refused(
        line_app, "app:app", "--bind", "127.0.0.1:0", "--python", "./nope/python", code="HP402", exit_code=3
    )
    assert "nope/python" in error


# -- options ------------------------------------------------------------------------------------------------


def test_unknown_variable_names_the_nearest(line_app: Path) -> None:
    error = refused(line_app, "app:app", env={"HOTPORT_WORKER_S": "2"}, code="HP303", exit_code=2)
    assert "HOTPORT_WORKERS" in error


def test_unknown_key_names_the_nearest_and_the_file(line_app: Path) -> None:
    (line_app / "hotport.toml").write_text("drain-timout = '3s'\n")
    error = refused(line_app, "app:app", code="HP302", exit_code=2)
    assert "hotport.toml" in error
    assert "drain_timeout" in error


def test_unknown_flag_names_the_nearest(line_app: Path) -> None:
    result = hotport(line_app, "serve", "app:app", "--drain-timout", "3s")
    assert result.returncode == 2
    assert "--drain-timeout" in result.stderr
    assert "Traceback" not in result.stderr


def test_every_command_says_in_one_line_what_it_does(tmp_path: Path) -> None:
    result = hotport(tmp_path, "--help", env={"COLUMNS": "80"})
    assert "..." not in result.stdout.partition("Commands:")[2]


def test_unknown_command_names_the_nearest(line_app: Path) -> None:
    result = hotport(line_app, "restrat")
    assert result.returncode == 2
    assert "'restart'" in result.stderr


@pytest.mark.parametrize(("word", "meant"), [("run", "serve"), ("start", "serve"), ("reload", "restart")])
def test_a_command_of_another_program_names_ours(tmp_path: Path, word: str, meant: str) -> None:
    result = hotport(tmp_path, word, "app:app")
    assert result.returncode == 2
    assert f"Did you mean '{meant}'?" in result.stderr


@pytest.mark.parametrize("args", [("--workers", "0"), ("--drain-timeout", "soon"), ("--max-memory", "much")])
def test_bad_value_shows_a_good_one(line_app: Path, args: tuple[str, str]) -> None:
    error = refused(line_app, "app:app", *args, code="HP304", exit_code=2)
    assert args[0] in error


def test_shown_options_are_data_in_json(line_app: Path) -> None:
    result = hotport(line_app, "serve", "app:app", "--workers", "2", "--show-config", "--json")
    shown = json.loads(result.stdout)
    assert shown["workers"] == {"value": 2, "origin": "--workers"}
    assert shown["bind"] == {"value": ["tcp://127.0.0.1:8000"], "origin": "default"}
    assert shown["watch"]["value"] is False
    assert shown["tls_client_ca"]["value"] is None


def test_nothing_to_serve(tmp_path: Path) -> None:
    refused(tmp_path, code="HP306", exit_code=2)


# -- the runtime directory ----------------------------------------------------------------------------------


def test_runtime_directory_that_is_too_long(line_app: Path) -> None:
    long = line_app / ("d" * 90)
    error = refused(
        line_app, "app:app", "--bind", "127.0.0.1:0", env={"HOTPORT_RUNTIME_DIR": str(long)}, code="HP603", exit_code=2
    )
    assert "HOTPORT_RUNTIME_DIR" in error
    assert not [path for path in long.rglob("*") if not path.is_dir()]


def test_runtime_directory_that_others_may_enter(line_app: Path) -> None:
    (line_app / "run").mkdir()
    (line_app / "run").chmod(0o755)
    error = refused(line_app, "app:app", code="HP622", exit_code=2)
    assert "chmod 700" in error


def test_relative_runtime_directory(line_app: Path) -> None:
    refused(line_app, "app:app", env={"HOTPORT_RUNTIME_DIR": "run"}, code="HP308", exit_code=2)


def test_service_that_runs_already(running: Service) -> None:
    result = running.run("serve", "app:app", "--name", "svc", "--bind", "127.0.0.1:0", "--log-format", "json")
    assert result.returncode == 2
    assert_three_lines(the_error(result.stderr), "HP630")
    assert ask_line(running.port).version == "one"  # and its control socket was not taken away
    assert running.run("status").returncode == 0


# -- commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["restart", "status", "stop"])
def test_command_without_a_service(tmp_path: Path, command: str) -> None:
    result = hotport(tmp_path, command)
    assert result.returncode == 6
    assert_three_lines(result.stderr, "HP605")


def test_command_for_a_misspelt_service_names_the_nearest(line_app: Path) -> None:
    with Service(line_app, "app:app", name="shop").wait_ready() as service:
        result = service.run("scale", "2", "shoop", "--json")
        assert result.returncode == 6
        assert_three_lines(result.stderr, "HP605")
        assert "try:   hotport scale 2 shop --json\n" in result.stderr


def test_command_without_a_name_when_several_services_run(line_app: Path) -> None:
    other = line_app / "other"
    other.mkdir()
    write_code(other / "app.py", LINE_APP.format(version="two"))
    runtime = {"HOTPORT_RUNTIME_DIR": str(line_app / "run")}
    with (
        Service(line_app, "app:app", name="one").wait_ready() as service,
        Service(other, "app:app", name="two", env=runtime).wait_ready(),
    ):
        result = service.run("restart")
        assert result.returncode == 2
        assert_three_lines(result.stderr, "HP331")
        assert "one, two" in result.stderr
        assert "try:   hotport restart one\n" in result.stderr
        assert service.run("restart", "two").returncode == 0


def test_stale_control_socket_is_told_and_then_replaced(line_app: Path) -> None:
    with Service(line_app, "app:app", "--orphan-timeout", "100ms").wait_ready() as service:
        workers = service.worker_pids()
        service.process.send_signal(signal.SIGKILL)
        service.process.wait(DEADLINE_S)
        assert service.run("status").returncode == 6
        result = service.run("status", "svc")
        assert result.returncode == 6
        assert_three_lines(result.stderr, "HP606")
        assert "supervisor is gone" in result.stderr
        eventually(lambda: not any(map(is_alive, workers)), "the orphans leave")
        with Service(line_app, "app:app").wait_ready() as successor:
            assert ask_line(successor.port).version == "one"


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_control_socket_of_another_user(open_dir: Path) -> None:
    prefix = as_nobody()
    write_code(open_dir / "app.py", LINE_APP.format(version="one"))
    with Service(open_dir, "app:app").wait_ready() as service:
        result = hotport(open_dir, "restart", "svc", prefix=prefix)
        assert result.returncode == 6
        assert_three_lines(result.stderr, "HP606")
        assert "another user" in result.stderr
        assert hotport(open_dir, "restart", prefix=prefix).returncode == 6
        assert service.status()["generation"] == 1


def test_supervisor_refuses_a_peer_of_another_user(open_dir: Path) -> None:
    """File modes keep others out; should somebody open them, the peer's credentials still do."""
    prefix = as_nobody()
    write_code(open_dir / "app.py", LINE_APP.format(version="one"))
    with Service(open_dir, "app:app").wait_ready() as service:
        for path in (open_dir / "run", service.runtime):
            path.chmod(0o755)
        (service.runtime / "control.sock").chmod(0o666)
        result = hotport(open_dir, "stop", "svc", prefix=prefix)
        assert result.returncode == 6
        assert_three_lines(result.stderr, "HP640")
        assert str(NOBODY) in result.stderr
        assert ask_line(service.port).version == "one"


# -- garbage on control sockets -----------------------------------------------------------------------------

GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "oversized": struct.pack(">I", 1 << 31) + b"x" * 4096,
    "not_json": struct.pack(">I", 4) + b"\xff\xfe{{",
    "unknown_request": struct.pack(">I", 16) + b'{"type":"erase"}',
    "wrong_type": struct.pack(">I", 33) + b'{"type":"scale","workers":"lots"}',
    "empty_frame": struct.pack(">I", 0),
    "half_a_frame": struct.pack(">I", 100) + b'{"type":',
    "half_a_header": b"\x00\x00",
    "nothing": b"",
}


def talk(path: Path, data: bytes) -> bytes:
    """Say something, and that it is all, on a control socket; what comes back until it is closed."""
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(str(path))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := sock.recv(65536):
                answer += part
        except ConnectionResetError:  # it closed without reading everything
            pass
        return answer


def test_garbage_on_the_supervisors_control_socket(running: Service) -> None:
    generation = running.status()["generation"]
    with Hammer(running.port, clients=1) as hammer:
        for kind, garbage in GARBAGE.items():
            answer = talk(running.runtime / "control.sock", garbage)
            if answer:
                failure = json.loads(answer[4:])
                assert failure["type"] == "failure", kind
                assert failure["exit_code"] == 6, kind
            else:
                assert kind in {"half_a_frame", "half_a_header", "nothing"}
            assert running.status()["generation"] == generation, kind
        hammer.wait_answers()
        assert "Traceback" not in running.log()
    assert not hammer.failures


def test_silent_client_does_not_keep_others_waiting(running: Service) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as silent:
        silent.connect(str(running.runtime / "control.sock"))
        silent.sendall(GARBAGE["half_a_frame"])
        assert running.restart()["outcome"] == "done"


def test_many_silent_clients_do_not_keep_others_waiting_for_ever(running: Service) -> None:
    silent = [socket.socket(socket.AF_UNIX) for _ in range(60)]
    try:
        for sock in silent:
            sock.connect(str(running.runtime / "control.sock"))
        assert running.status()["workers"][0]["phase"] == "serving"
    finally:
        for sock in silent:
            sock.close()


def test_garbage_on_a_workers_control_socket(running: Service) -> None:
    (path,) = running.runtime.glob("worker-*.sock")
    with Hammer(running.port, clients=1) as hammer:
        for garbage in GARBAGE.values():
            talk(path, garbage)
            # The supervisor's own connection to it still works. A busy worker is shown without figures.
            eventually(lambda: running.status()["workers"][0]["connections"] is not None, "it says how it is")
        hammer.wait_answers()
        assert running.restart()["outcome"] == "done"
        hammer.wait_answers()
        assert "Traceback" not in running.log()
    assert not hammer.failures


def test_garbage_on_the_notify_socket(running: Service) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(str(running.runtime / "notify.sock"))
        for data in (b"", b"\xff\xfe", b"READY=1", b"=", b"EXTEND_TIMEOUT_USEC=-1", b"x" * 3000):
            sock.send(data)
    assert running.restart()["outcome"] == "done"
    assert ask_line(running.port).version == "one"


# -- where output goes --------------------------------------------------------------------------------------


def test_readers_that_leave_do_not_change_the_outcome(line_app: Path) -> None:
    """``hotport restart | true`` exited 1 after a restart that was done."""

    def run(*args: str, unbuffered: str = "") -> int:
        """What cannot be written is noticed at the end, or when unbuffered at once."""
        reader, writer = os.pipe()
        os.close(reader)
        env = {**service.env, "PYTHONUNBUFFERED": unbuffered}
        try:
            return subprocess.run(
                [*HOTPORT, *args], cwd=line_app, env=env, stdout=writer, stderr=writer, timeout=DEADLINE_S
            ).returncode
        finally:
            os.close(writer)

    with Service(line_app, "app:app").wait_ready() as service:
        for args in (("restart",), ("status", "--json"), ("scale", "2"), ("serve", "--show-config")):
            assert run(*args) == 0, args
        for args in (("status",), ("status", "--json"), ("serve", "--show-config")):
            assert run(*args, unbuffered="1") == 0, args
        assert run("restart", "nobody") == run("restart", "nobody", unbuffered="1") == 6
        write_code(line_app / "app.py", "raise RuntimeError")
        assert run("restart") == 4
        assert service.status()["generation"] == 2
        assert run("stop") == 0


def test_output_may_be_closed(running: Service) -> None:
    generation = running.status()["generation"]
    result = hotport(running.directory, "restart", prefix=("sh", "-c", 'exec "$@" >&- 2>&-', "sh"))
    assert result.returncode == 0
    assert running.status()["generation"] == generation + 1


def test_status_is_whole_in_a_narrow_terminal(line_app: Path) -> None:
    """Headings and phases were cut in sixty columns; a terminal folds lines by itself."""
    with Service(line_app, "app:app").wait_ready() as service:
        ours, theirs = pty.openpty()
        try:
            termios.tcsetwinsize(theirs, (24, 40))
            env = {**service.env, "TERM": "dumb"}
            env.pop("COLUMNS", None)
            subprocess.run([*HOTPORT, "status"], env=env, stdin=theirs, stdout=theirs, check=True, timeout=DEADLINE_S)
            shown = os.read(ours, 65536).decode()
        finally:
            os.close(ours)
            os.close(theirs)
        assert "\u2026" not in shown
        heading, worker = shown.splitlines()[-2:]
        assert heading.split()[:4] == ["generation", "worker", "pid", "phase"]
        assert worker.split()[3] == "serving"
