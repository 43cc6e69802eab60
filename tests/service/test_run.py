"""`hotport.run`: a script that serves itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import hotport
from tests.support import DEADLINE_S, assert_three_lines

ECHO = """
import hotport

async def echo(stream):
    async for chunk in stream:
        await stream.send(b"run:" + chunk)
"""


def serve_until_answered(tmp_path: Path, *command: str) -> tuple[bytes, int, str]:
    """Run a script that listens on unix:s, send it one line, stop it; the answer, exit code and stderr."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "manager"))
        manager.settimeout(DEADLINE_S)
        env = {**os.environ, "HOTPORT_RUNTIME_DIR": str(tmp_path / "run"), "NOTIFY_SOCKET": str(tmp_path / "manager")}
        with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
            while b"READY=1" not in manager.recv(4096):
                pass
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(DEADLINE_S)
                client.connect(str(tmp_path / "s"))
                client.sendall(b"hello")
                answer = client.recv(100)
            process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=DEADLINE_S)
        (tmp_path / "manager").unlink()
        return answer, process.returncode, stderr


@pytest.mark.parametrize("guard", ["if __name__ == '__main__': ", ""], ids=["guarded", "unguarded"])
def test_a_script_serves_what_it_defines(tmp_path: Path, guard: str) -> None:
    (tmp_path / "server.py").write_text(f"{ECHO}\n{guard}hotport.run(echo, bind='unix:s')\n")
    answer, code, stderr = serve_until_answered(tmp_path, sys.executable, "server.py")
    assert answer == b"run:hello"
    assert code == 0, stderr
    assert not (tmp_path / "s").exists()


def test_a_module_serves_what_it_defines(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").touch()
    (tmp_path / "pkg" / "server.py").write_text(
        f"{ECHO}\nif __name__ == '__main__': hotport.run(echo, bind='unix:s')\n"
    )
    answer, code, stderr = serve_until_answered(tmp_path, sys.executable, "-m", "pkg.server")
    assert answer == b"run:hello"
    assert code == 0, stderr


@pytest.mark.measured
def test_an_upgrade_changes_neither_the_name_nor_what_comes_after_the_service(tmp_path: Path) -> None:
    (tmp_path / "hotport.toml").write_text("name = 'first'\n")
    (tmp_path / "server.py").write_text(
        f"import os, pathlib, signal\n{ECHO}\n"
        "if 'HOTPORT_UPGRADE' in os.environ:\n"
        "    pathlib.Path('hangup').write_text(str(signal.getsignal(signal.SIGHUP)))\n"
        "if __name__ == '__main__':\n"
        "    hotport.run(echo, bind='unix:s')\n"
        "    with open('after', 'a') as file: file.write('x')\n"
    )
    env = {**os.environ, "HOTPORT_RUNTIME_DIR": str(tmp_path / "run")}
    command = ["nohup", sys.executable, "server.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            next(line for line in process.stderr if "service.started" in line)
            (tmp_path / "hotport.toml").write_text("name = 'second'\n")
            process.send_signal(signal.SIGUSR2)
            next(line for line in process.stderr if "supervisor.upgraded" in line)
            assert not (tmp_path / "after").exists()
            assert [path.name for path in (tmp_path / "run").iterdir()] == ["first"]
            assert (tmp_path / "hangup").read_text() == str(signal.SIG_IGN)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    assert (tmp_path / "after").read_text() == "x"


@pytest.mark.measured
@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ("hotport.run(lambda stream: None, bind='unix:s')", 2, 'HP330 hotport.run("module:app")'),
        ("hotport.run(echo, wrkers=2)", 2, "HP302 workers = 2"),
        ("hotport.run(echo, bind='unix:server.py')", 2, "HP103 server.py"),
        ("hello = echo; hotport.run('server.py:hello', bind='unix:s')", 3, "HP502 move 'hello'"),
        ("hotport.run('server:ecko', bind='unix:s')", 3, "HP502 'echo'"),
    ],
    ids=["no_name", "option", "address", "guarded", "target"],
)
def test_what_cannot_be_run_ends_the_program_with_three_lines(tmp_path: Path, call: str, code: int, words: str) -> None:
    (tmp_path / "server.py").write_text(f"{ECHO}\nif __name__ == '__main__': {call}\n")
    env = {**os.environ, "HOTPORT_RUNTIME_DIR": str(tmp_path / "run"), "HOTPORT_LOG_LEVEL": "error"}
    result = subprocess.run([sys.executable, "server.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == code
    assert_three_lines(result.stderr, words.split()[0])
    assert words.partition(" ")[2] in result.stderr


def test_whoever_calls_run_can_ask_what_was_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        hotport.run("app:app", wrkers=2)  # type: ignore[call-arg]
    assert isinstance(caught.value.__cause__, hotport.ConfigError)
    assert caught.value.code == 2
    assert_three_lines(capsys.readouterr().err, "HP302")


FORKING = """
if __name__ == "__main__":
    import os, signal, threading

    def fork():
        open("go").read()
        pid = os.fork()
        if pid == 0:
            with open("ready", "w") as ready:
                ready.write(str(os.getpid()))
            signal.pause()

    threading.Thread(target=fork, daemon=True).start()
    hotport.run(echo, bind="unix:s")
"""


def test_child_that_a_script_forks_has_nothing_of_the_supervisor(tmp_path: Path) -> None:
    """It held the service's lock and its sockets, so that no other supervisor could be started."""
    (tmp_path / "server.py").write_text(ECHO + FORKING)
    for name in ("go", "ready"):
        os.mkfifo(tmp_path / name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "manager"))
        manager.settimeout(DEADLINE_S)
        env = {**os.environ, "HOTPORT_RUNTIME_DIR": str(tmp_path / "run"), "NOTIFY_SOCKET": str(tmp_path / "manager")}
        with subprocess.Popen([sys.executable, "server.py"], cwd=tmp_path, env=env) as process:
            while b"READY=1" not in manager.recv(4096):
                pass
            (tmp_path / "go").write_text("go")
            child = int((tmp_path / "ready").read_text())
            try:
                of_supervisor, of_child = open_in(process.pid), open_in(child)
                assert str(tmp_path / "run" / "server") in of_supervisor - of_child  # its lock
                shared = {each for each in of_supervisor & of_child if each.startswith("socket:")}
                assert len(shared) <= 3  # by which asyncio wakes itself up, and what is told to the service manager
                os.kill(child, signal.SIGTERM)
                process.send_signal(signal.SIGTERM)
                assert process.wait(DEADLINE_S) == 0
            finally:
                process.kill()
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        (tmp_path / "manager").unlink()


def open_in(pid: int) -> set[str]:
    """What a process has open."""
    return {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
