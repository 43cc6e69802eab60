"""The best-known complaints about busy ports, each as it happens: the page's first three lines have cause and remedy.

The remedy is run as it stands there, and then the address is free.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.netns import fill, isolated, sysctl
from hotport.kernel.procfs import user_name
from tests.net.cells import STRANGER
from tests.net.test_why import AS_STRANGER, PORT, why
from tests.support import DEADLINE_S, HOTPORT, need

HERE = f"127.0.0.1:{PORT}"
TOLD = "print(flush=True); "
LISTEN = f"import os, signal, socket, sys, time; s = socket.create_server(('127.0.0.1', {PORT})); "
STAY = f"{TOLD}signal.pause()"


@contextmanager
def program(code: str, *, prefix: tuple[str, ...] = (), **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Python code, from the moment on that it prints a line; whatever it leaves in its process group is ended."""
    command = [*prefix, sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0, **options
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    with process:
        try:
            yield process
        finally:
            process.kill()


# -- the complaints --------------------------------------------------------------------------------------------------
# Each yields the address that is asked for, with the environment in which the remedy is run.


@contextmanager
def suspended() -> Iterator[str]:
    with program(f"{LISTEN}{STAY}") as process:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        yield HERE


@contextmanager
def leaked_child() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", PORT)) as server:
        child = subprocess.Popen(["sleep", "1000"], pass_fds=[server.fileno()])
    with ending(child):
        yield HERE


@contextmanager
def docker_proxy() -> Iterator[str]:
    """What Docker shows of itself: its proxy for a published port, whose end Docker alone brings about."""
    with tempfile.TemporaryDirectory() as directory:
        os.symlink(sys.executable, f"{directory}/docker-proxy")
        words = f"-proto tcp -host-ip 127.0.0.1 -host-port {PORT} -container-ip 172.17.0.2 -container-port 80"
        command = ["docker-proxy", "-c", f"{LISTEN}{STAY}", *words.split()]
        with ending(subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE)) as proxy:
            assert proxy.stdout is not None
            proxy.stdout.readline()
            docker = Path(directory, "docker")
            docker.write_text(
                "#!/bin/sh\n"
                f'[ "$*" = "ps --quiet --filter publish={PORT}" ] && exec echo 0123456789ab\n'
                f'[ "$*" = "stop 0123456789ab" ] && exec kill {proxy.pid}\nexit 1\n'
            )
            docker.chmod(0o755)
            os.environ["PATH"] = f"{directory}:{os.environ['PATH']}"
            yield HERE


@contextmanager
def orphan_of_a_reloader() -> Iterator[str]:
    code = f"{LISTEN}\nif os.fork() == 0:\n  {STAY}\nsignal.pause()"
    with program(code) as reloader:
        reloader.kill()
        reloader.wait(DEADLINE_S)
        yield HERE


@contextmanager
def reloader_and_its_child() -> Iterator[str]:
    with program(f"{LISTEN}\nif os.fork() == 0:\n  {STAY}\nsignal.pause()"):
        yield HERE


@contextmanager
def dual_stack() -> Iterator[str]:
    code = "import signal, socket; s = socket.create_server(('::', %d), family=socket.AF_INET6, dualstack_ipv6=True); "
    with program(code % PORT + STAY):
        yield str(PORT)


@contextmanager
def other_users() -> Iterator[str]:
    os.environ.pop("COVERAGE_PROCESS_START", None)
    with program(f"{LISTEN}{STAY}", prefix=AS_STRANGER):
        yield HERE


@contextmanager
def abstract_name() -> Iterator[str]:
    code = "import signal, socket; s = socket.socket(socket.AF_UNIX); s.bind('\\0hotport-busy'); s.listen(); "
    with program(code + STAY):
        yield "unix:@hotport-busy"


@contextmanager
def child_of_a_zombie() -> Iterator[str]:
    """Its parent has ended and nobody has waited for that."""
    with program(f"{LISTEN}\nif os.fork() == 0:\n  {STAY}\ntime.sleep(0)") as parent:
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
        yield HERE


@contextmanager
def moved_to_another_network() -> Iterator[str]:
    code = "import ctypes; ctypes.CDLL(None).unshare(0x40000000); "
    with program(f"{LISTEN}{code}{STAY}"):
        yield HERE


@contextmanager
def sleeper() -> Iterator[str]:
    code = f"import signal, socket; s = socket.socket(); s.bind(('127.0.0.1', {PORT})); "
    with program(code + STAY):
        yield HERE


@contextmanager
def leak_of_connections() -> Iterator[str]:
    """The listener is closed; a connection that its client has closed is not."""
    code = f"{LISTEN}{TOLD}c = s.accept()[0]; s.close(); c.recv(1); print(flush=True); signal.pause()"
    code = code.replace("s = socket.create_server", "socket.has_ipv6 = False; s = socket.create_server")
    code = code.replace(
        "c = s.accept()[0]", "c = s.accept()[0]; c.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)"
    )
    with program(code) as process:
        socket.create_connection(("127.0.0.1", PORT), DEADLINE_S).close()
        assert process.stdout is not None
        process.stdout.readline()
        yield HERE


@contextmanager
def socket_file_left() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"{directory}/a.sock")
        yield f"unix:{directory}/a.sock"


@contextmanager
def socket_file_held() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        code = f"import signal, socket; s = socket.socket(socket.AF_UNIX); s.bind('{directory}/a.sock'); s.listen(); "
        with program(code + STAY):
            yield f"unix:{directory}/a.sock"


@contextmanager
def outgoing_connection() -> Iterator[str]:
    """A client was given the port, from those for outgoing connections."""
    assert sysctl("net.ipv4.ip_local_port_range", f"{PORT} {PORT}")
    code = "import signal, socket; s = socket.create_connection(('127.0.0.1', 80)); "
    with socket.create_server(("127.0.0.1", 80)) as server, program(code + STAY):
        peer = server.accept()[0]
        with peer:
            yield HERE


@contextmanager
def reader_that_does_not_read() -> Iterator[str]:
    """Its server has ended, and the kernel still has bytes for a client that does not take them."""
    with ExitStack() as stack:
        server = socket.create_server(("127.0.0.1", PORT))
        client = stack.enter_context(socket.create_connection(("127.0.0.1", PORT)))
        accepted = server.accept()[0]
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        accepted.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                accepted.send(bytes(65536))
        accepted.close()
        server.close()
        yield HERE
        client.close()


@contextmanager
def datagrams() -> Iterator[str]:
    code = f"import signal, socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('127.0.0.1', {PORT})); "
    with program(code + STAY):
        yield f"udp://{HERE}"


@contextmanager
def program_was_replaced() -> Iterator[str]:
    """A package manager has put a new file in the place of the one that runs."""
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", PORT)) as server:
        path = shutil.copy(shutil.which("sleep") or "/bin/sleep", f"{directory}/old-server")
        with ending(subprocess.Popen([path, "1000"], pass_fds=[server.fileno()])):
            server.close()
            os.unlink(path)
            yield HERE


@contextmanager
def in_a_terminal() -> Iterator[str]:
    ours, theirs = os.openpty()
    with program(f"{LISTEN}{STAY}", prefix=("setsid", "--ctty"), stdin=theirs):
        yield HERE
    os.close(ours)
    os.close(theirs)


@contextmanager
def fin_wait() -> Iterator[str]:
    """What a server without SO_REUSEADDR has closed and its client has not."""
    sysctl("net.ipv4.tcp_fin_timeout", "2")
    with ExitStack() as stack:
        server = socket.socket()
        server.bind(("127.0.0.1", PORT))
        server.listen()
        stack.enter_context(socket.create_connection(("127.0.0.1", PORT)))
        server.accept()[0].close()
        server.close()
        yield HERE


@contextmanager
def time_wait() -> Iterator[str]:
    """What a server without SO_REUSEADDR has closed; the kernel forgets it after a minute."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", PORT))
        server.listen()
        fill(server, 3)
    yield HERE


@contextmanager
def privileged_port() -> Iterator[str]:
    yield "127.0.0.1:80"


@contextmanager
def unprivileged_ports_start_late() -> Iterator[str]:
    assert sysctl("net.ipv4.ip_unprivileged_port_start", "30000")
    yield HERE


COMPLAINTS: dict[str, tuple[Callable[[], Any], str]] = {
    "suspended": (suspended, r"suspended\) is listening on"),
    "leaked-child": (leaked_child, r"\(sleep 1000, .* is listening on"),
    "docker-proxy": (docker_proxy, r"\(docker-proxy .* is listening on"),
    "orphan-of-a-reloader": (orphan_of_a_reloader, r"left behind\) is listening on"),
    "reloader-and-child": (reloader_and_its_child, r"\) with 1 more is listening on"),
    "dual-stack": (dual_stack, r"is listening on \[::\]:20000"),
    "another-user": (other_users, rf"user {re.escape(user_name(STRANGER))}.*\) is listening on"),
    "abstract-unix": (abstract_name, r"is listening on @hotport-busy"),
    "child-of-a-zombie": (child_of_a_zombie, r"left behind\) is listening on"),
    "another-network": (moved_to_another_network, r"is listening on"),
    "sleeper": (sleeper, r"is bound to .* without listening"),
    "leak-of-connections": (leak_of_connections, r"has not closed a connection .*CLOSE_WAIT"),
    "socket-file-left": (socket_file_left, r"left from a server that is gone"),
    "outgoing-connection": (outgoing_connection, r"has an outgoing connection to 127\.0\.0\.1:80"),
    "peer-does-not-read": (reader_that_does_not_read, r"without a process \(orphan\).*does not read"),
    "fin-wait": (fin_wait, r"that this side has closed is in FIN_WAIT2"),
    "udp": (datagrams, r"is bound to"),
    "program-replaced": (program_was_replaced, r"old-server 1000, .* is listening on"),
    "in-a-terminal": (in_a_terminal, r"is listening on"),
    "privileged-port": (privileged_port, r"ports below 1024 need CAP_NET_BIND_SERVICE"),
    "unprivileged-port-start": (unprivileged_ports_start_late, r"ports below 30000 need CAP_NET_BIND_SERVICE"),
}
PROBED = {"peer-does-not-read", "fin-wait", "time-wait"}  # what cannot be read is asked for
AS_SOMEBODY_ELSE = {"privileged-port", "unprivileged-port-start"}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_cause_and_working_remedy_are_in_the_first_three_lines(name: str) -> None:
    need("setpriv")
    need("ss")
    complaint, cause = COMPLAINTS[name]
    found = isolated(solved, complaint, AS_STRANGER if name in AS_SOMEBODY_ELSE else (), name)
    verdict, because, *_ = found["lines"]
    assert "is not free" in verdict
    assert re.search(cause, because), found["lines"]
    assert found["remedy"], found["lines"]
    assert (found["ran"], found["after"]) == (0, 0), found


def solved(complaint: Callable[[], Any], prefix: tuple[str, ...], name: str) -> dict[str, Any]:
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    with complaint() as address:
        code, text = why(address, *["--probe"] * (name in PROBED), prefix=prefix)
        lines = text.splitlines()[:3]
        remedy = next((line.split(maxsplit=1)[1] for line in lines if line.startswith("  try ")), "")
        ran = subprocess.run(["sh", "-c", remedy], capture_output=True, timeout=DEADLINE_S, check=False)
        # Processes end when they do: --watch returns as soon as they have.
        watching = [*prefix, *HOTPORT, "why", address, "--watch"]
        done = subprocess.run(watching, capture_output=True, timeout=DEADLINE_S, cwd="/", check=False)
        return {"lines": lines, "remedy": remedy, "ran": ran.returncode, "after": done.returncode, "code": code}


def test_connections_in_time_wait_need_a_minute_or_are_forgotten_at_once() -> None:
    found = isolated(forgotten)
    assert found["lines"][1].endswith("in TIME_WAIT on 127.0.0.1:20000"), found
    assert re.fullmatch(r"  try      sleep \d+", found["lines"][2])
    assert found["remedy"].startswith("ss -K state time-wait sport = :20000")
    assert (found["ran"], found["after"]) == (0, 0), found


def forgotten() -> dict[str, Any]:
    with time_wait() as address:
        lines = why(address, "--probe")[1].splitlines()
        ran = subprocess.run(["sh", "-c", lines[3]], capture_output=True, timeout=DEADLINE_S, check=False)
        return {"lines": lines[:3], "remedy": lines[3].strip(), "ran": ran.returncode, "after": why(address)[0]}
