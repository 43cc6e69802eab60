"""`hotport.run`: a script that serves itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import DEADLINE_S

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
            assert b"READY=1" in manager.recv(4096)
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


def test_an_application_without_a_name_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("import hotport\nhotport.run(lambda stream: None, bind='unix:s')\n")
    result = subprocess.run([sys.executable, "server.py"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "HP330 cannot name <function" in result.stderr
    assert 'pass a target: hotport.run("module:app")' in result.stderr
