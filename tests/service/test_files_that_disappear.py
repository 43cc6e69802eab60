"""A running service whose files are removed, as cleaners of /tmp do."""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path

import pytest

from tests.support import DEADLINE_S, HOTPORT, LINE_APP, Service, ask_line, assert_three_lines, eventually, write_code


def ask_unix(path: Path, question: str = "who") -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(str(path))
        sock.sendall(f"{question}\n".encode())
        return sock.makefile().readline()


@pytest.mark.measured
def test_service_lives_on_when_everything_that_it_has_made_is_removed(tmp_path: Path) -> None:
    """It served, and could never again be restarted, stopped by a command, or replace a worker."""
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    path = tmp_path / "app.sock"
    args = (
        "app:app",
        "--kind",
        "stream",
        "--bind",
        f"unix:{path}",
        "--bind",
        "127.0.0.1:0",
        "--status-bind",
        "unix:up",
    )
    with Service(tmp_path, *args) as service:
        service.wait_ready()
        with socket.socket(socket.AF_UNIX) as connected:
            connected.connect(str(path))
            shutil.rmtree(service.runtime, ignore_errors=True)
            path.unlink()
            (tmp_path / "up").unlink()
            files = {"control.sock", "notify.sock", "worker-1.1.sock"}
            eventually(lambda: files <= {each.name for each in service.runtime.glob("*")}, "its files are there again")
            # A file may come and go: no worker takes the listener before it has its own socket again.
            eventually(lambda: len(service.log_events("listener.remade")) == 2, "listeners are there again")
            assert ask_unix(tmp_path / "up", "agent") == "up ready\n"
            assert ask_unix(path).startswith("one 1 ")
            connected.sendall(b"who\n")
            assert connected.recv(100).startswith(b"one 1 ")
        assert not service.status()["gone"]
        second = service.run("serve", "app:app", "--bind", "127.0.0.1:0", "--name", service.name)
        assert "HP630" in second.stderr
        write_code(tmp_path / "app.py", LINE_APP.format(version="two"))
        assert service.restart()["outcome"] == "done"
        assert ask_unix(path).startswith("two 2 ")
        tcp = next(address for address in service.addresses if address.startswith("tcp:"))
        assert ask_line(int(tcp.rpartition(":")[2])).version == "two"
        assert service.run("stop", service.name).returncode == 0
        assert service.wait() == 0
        assert not service.paths()


@pytest.mark.measured
def test_workers_without_a_supervisor_are_found_by_the_next_one_though_their_directory_was_removed(
    tmp_path: Path,
) -> None:
    """The next supervisor took them for workers that were starting, and killed them."""
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app", "--kind", "stream", "--workers", "2") as service:
        pids, port = service.wait_ready().worker_pids(), service.port
        service.kill()
        shutil.rmtree(service.runtime.parent, ignore_errors=True)
        sockets = {"worker-1.1.sock", "worker-1.2.sock"}
        eventually(lambda: sockets <= {each.name for each in service.runtime.glob("*")}, "they listen again")
        with Service(tmp_path, "app:app", "--kind", "stream", "--workers", "2") as successor:
            assert successor.wait_ready().worker_pids() == pids
            assert ask_line(port).generation == "1"
            assert successor.stop() == 0


def test_second_supervisor_does_not_adopt_the_workers_of_one_that_lives(tmp_path: Path) -> None:
    """Its lock was gone with the directory, it could not look just then, and both ordered the same workers."""
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    with Service(tmp_path, "app:app", "--kind", "stream") as service:
        port, workers = service.wait_ready().port, service.worker_pids()
        service.process.send_signal(signal.SIGSTOP)
        shutil.rmtree(service.runtime)
        second = service.run("serve", "app:app", "--bind", "127.0.0.1:0", "--name", service.name)
        assert second.returncode == 2
        assert_three_lines(second.stderr.partition("HP630")[1] + second.stderr.partition("HP630")[2], "HP630")
        service.process.send_signal(signal.SIGCONT)
        eventually(lambda: (service.runtime / "control.sock").exists(), "its files are there again")
        assert service.worker_pids() == workers
        assert ask_line(port).version == "one"


def test_program_whose_socket_file_is_removed_has_it_again_after_a_restart(tmp_path: Path) -> None:
    """The restart was done, nobody could connect, and doctor found nothing."""
    (tmp_path / "server.py").write_text(
        "import os, socket\n"
        "listener = socket.socket(fileno=3)\n"
        "while True:\n"
        "    sock, _ = listener.accept()\n"
        "    sock.recv(100)\n"
        "    sock.sendall(f'one {os.environ[\"HOTPORT_GENERATION\"]} 1\\n'.encode())\n"
        "    sock.close()\n"
    )
    path = tmp_path / "app.sock"
    args = ("--ready", "exec", "--settle", "0.1s", "--bind", f"unix:{path}", "--", HOTPORT[0], "server.py")
    with Service(tmp_path, *args) as service:
        service.wait_ready()
        path.unlink()
        address = f"unix:{path}"
        eventually(lambda: bool(service.log_events("listener.gone")), "it is said")
        assert "takes listeners at its start" in service.status()["gone"][address]
        doctor = service.run("doctor", service.name)
        assert f"the socket file of {address} was removed or replaced" in doctor.stdout
        assert f"GONE {address}: " in service.run("status", service.name).stdout
        service.restart()
        assert ask_unix(path) == "one 2 1\n"
        assert not service.status()["gone"]
