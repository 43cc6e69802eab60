"""Under a service manager: what it hears, and what it keeps while nobody serves."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.manager import FakeManager, Heard
from tests.service.test_foreign import write_perl
from tests.support import (
    DEADLINE_S,
    HOTPORT,
    LINE_APP,
    RESTARTS,
    Gate,
    Hammer,
    ask_line,
    assert_three_lines,
    eventually,
    need,
    write_code,
)

DATAGRAMS = """
class Echo:
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.transport.sendto(data, address)

    def connection_lost(self, error):
        pass

def app():
    return Echo()
"""

#: After the first answer no descriptor is left for a connection.
FULL = """
import resource

async def app(stream):
    await stream.receive()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    await stream.send(b"full 1 1")
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    return tmp_path


def write_options(directory: Path, *binds: str) -> None:
    (directory / "hotport.toml").write_text(f"bind = {list(binds)}\n")


def wait_in_queue(port: int, count: int) -> list[socket.socket]:
    """Clients that have connected and asked, while nobody serves; nobody is refused."""
    clients = []
    for _ in range(count):
        clients.append(socket.create_connection(("127.0.0.1", port), DEADLINE_S))
        clients[-1].sendall(b"who\n")
    return clients


def answers(clients: list[socket.socket]) -> set[str]:
    """Which versions have answered all of them."""
    versions = set()
    for client in clients:
        with client, client.makefile() as file:
            versions.add(file.read().split()[0])
    return versions


@pytest.mark.soak
def test_accept_queue_outlives_a_stop_and_a_start(directory: Path) -> None:
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0", "--workers", "2") as manager:
        port = manager.start_unit().port
        with Hammer(port) as hammer:
            hammer.wait_answers(20)
            for version in range(-(-RESTARTS // 3)):
                assert manager.stop_unit() == 0
                clients = wait_in_queue(port, 20)
                write_code(directory / "app.py", LINE_APP.format(version=f"v{version}"))
                manager.start_unit()
                assert answers(clients) == {f"v{version}"}
                hammer.wait_answers(20, f"v{version}")
        assert manager.port == port
        assert not hammer.failures


def test_accept_queue_outlives_the_death_of_everything(directory: Path) -> None:
    """After a crash of the supervisor systemd kills its workers, and starts the service again."""
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0", "--workers", "2") as manager:
        port = manager.start_unit().port
        manager.kill_everything()
        clients = wait_in_queue(port, 20)
        manager.start_unit()
        assert answers(clients) == {"one"}
        assert manager.port == port


def test_every_kind_of_listener_is_kept(directory: Path) -> None:
    binds = [word for bind in ("127.0.0.1:0", "unix:s", "unix:@hotport-kept") for word in ("--bind", bind)]
    with FakeManager(directory, "app:app", *binds) as manager:
        port = manager.start_unit().port
        assert sorted(manager.store) == sorted(
            [
                "hotport+tcp%3A//127.0.0.1%3A" + str(port),
                f"hotport+unix%3A{directory}/s",
                "hotport+unix%3A@hotport-kept",
            ]
        )
        inode = (directory / "s").stat().st_ino
        assert manager.stop_unit() == 0
        clients = wait_in_queue(port, 1)
        for path in (str(directory / "s"), "\0hotport-kept"):
            clients.append(socket.socket(socket.AF_UNIX))
            clients[-1].connect(path)
            clients[-1].sendall(b"who\n")
        manager.start_unit()
        assert answers(clients) == {"one"}
        assert (directory / "s").stat().st_ino == inode
    (directory / "s").unlink()


def test_datagrams_wait_too(directory: Path) -> None:
    write_code(directory / "udp.py", DATAGRAMS)
    with FakeManager(directory, "udp:app", "--kind", "datagram", "--bind", "udp://127.0.0.1:0") as manager:
        port = manager.start_unit().port
        assert manager.stop_unit() == 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(DEADLINE_S)
            client.sendto(b"kept", ("127.0.0.1", port))
            manager.start_unit()
            assert client.recv(100) == b"kept"


def test_what_is_not_wanted_any_more_leaves_the_store_before_its_place_is_taken(directory: Path) -> None:
    """A listener of all interfaces in the store would keep a new one of the loopback interface from the port."""
    with FakeManager(directory, "app:app", "--bind", "0.0.0.0:0") as manager:
        port = manager.start_unit().port
        assert manager.stop_unit() == 0
        assert [*manager.store] == [f"hotport+tcp%3A//0.0.0.0%3A{port}"]
        manager.args = ("app:app", "--bind", f"127.0.0.1:{port}")
        manager.start_unit()
        assert [*manager.store] == [f"hotport+tcp%3A//127.0.0.1%3A{port}"]
        assert ask_line(port).version == "one"


@pytest.mark.measured
def test_store_follows_a_restart_that_changes_addresses(directory: Path) -> None:
    write_options(directory, "127.0.0.1:0", "unix:@hotport-old")
    with FakeManager(directory, "app:app") as manager:
        manager.start_unit()
        kept, _ = manager.store
        assert manager.restart("--strategy", "overlap", expect=4) == {}, "the store would listen beside the new one"
        write_options(directory, "127.0.0.1:0", "unix:@hotport-new")
        manager.restart()
        manager.hear_now()
        assert [*manager.store] == [kept, "hotport+unix%3A@hotport-new"]
        write_options(directory, "127.0.0.1:0", "systemd:web")
        assert manager.restart(expect=4) == {}, "nobody passes sockets to a process that runs"


def test_a_supervisor_that_was_upgraded_goes_on_talking(directory: Path) -> None:
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0") as manager:
        port = manager.start_unit().port
        pid = manager.process.pid
        assert manager.run("upgrade", manager.name).returncode == 0
        write_code(directory / "app.py", "import nothing_of_that_name")
        assert "was aborted" in manager.reload_unit()[-1].lines["STATUS"]
        assert manager.process.pid == pid
        assert len(manager.store) == 1
        assert manager.stop_unit() == 0
        (client,) = wait_in_queue(port, 1)
        write_code(directory / "app.py", LINE_APP.format(version="two"))
        manager.start_unit()
        assert answers([client]) == {"two"}


def test_without_a_store_the_last_worker_empties_the_queue_and_the_port_closes(directory: Path) -> None:
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0", store_max=0) as manager:
        port = manager.start_unit().port
        assert manager.stop_unit() == 0
        assert not manager.store
        with pytest.raises(ConnectionRefusedError):
            ask_line(port)


@pytest.mark.measured
def test_a_foreign_program_gets_the_kept_listener(directory: Path) -> None:
    with FakeManager(directory, "--bind", "127.0.0.1:0", "--", *write_perl(directory, "old")) as manager:
        port = manager.start_unit().port
        assert manager.stop_unit() == 0
        clients = wait_in_queue(port, 3)
        write_perl(directory, "new")
        manager.start_unit()
        assert answers(clients) == {"new"}


# -- reload and watchdog ------------------------------------------------------------------------------------


@pytest.mark.soak
def test_reload_under_load_is_told_from_its_beginning_to_its_end(directory: Path) -> None:
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0", "--workers", "2") as manager:
        port = manager.start_unit().port
        with Hammer(port) as hammer:
            hammer.wait_answers(20)
            for version in range(RESTARTS):
                write_code(directory / "app.py", LINE_APP.format(version=f"v{version}"))
                heard = manager.reload_unit()
                assert heard[-1].lines["STATUS"] == f"generation {version + 2} serves"
                hammer.wait_answers(20, f"v{version}")
        assert not hammer.failures
        assert all(heard.pid == manager.process.pid for heard in manager.heard), "NotifyAccess=main"


def test_a_reload_that_fails_is_over_and_says_why(directory: Path) -> None:
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0") as manager:
        port = manager.start_unit().port
        with Hammer(port) as hammer:
            hammer.wait_answers(20)
            write_code(directory / "app.py", "import nothing_of_that_name")
            aborted = manager.reload_unit()[-1].lines["STATUS"]
            (directory / "hotport.toml").write_text("workers = 0\n")
            refused = manager.reload_unit()[-1].lines["STATUS"]
            hammer.wait_answers(20, "one")
        assert not hammer.failures
        assert aborted.startswith("generation 1 serves, the restart to generation 2 was aborted: ")
        assert aborted.endswith("ModuleNotFoundError: No module named 'nothing_of_that_name'")
        assert re.match(r"HP\d+ .*generation 1 serves", refused)


def test_a_start_that_fails_leaves_a_status_and_the_listener(directory: Path) -> None:
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0") as manager:
        port = manager.start_unit().port
        manager.stop_unit()
        (client,) = wait_in_queue(port, 1)
        write_code(directory / "app.py", "import nothing_of_that_name")
        manager.launch()
        assert manager.wait() == 3
        manager.hear_now()
        assert manager.said("STATUS")[-1].endswith("No module named 'nothing_of_that_name'")
        assert "1" not in manager.said("READY")
        write_code(directory / "app.py", LINE_APP.format(version="mended"))
        manager.start_unit()
        assert answers([client]) == {"mended"}


def test_a_slow_start_is_given_the_time_that_its_options_allow(directory: Path) -> None:
    gate = Gate(directory)
    write_code(directory / "app.py", Gate.LINE + LINE_APP.format(version="slow"))
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0", "--ready-timeout", "5m") as manager:
        manager.launch()
        heard = manager.hear_until(lambda heard: "EXTEND_TIMEOUT_USEC" in heard.lines, "more time")
        assert 300 <= int(heard.lines["EXTEND_TIMEOUT_USEC"]) / 1e6 <= 310
        gate.open()
        manager.hear_until(lambda heard: heard.lines.get("READY") == "1", "READY=1")


def test_a_stop_is_given_the_time_that_connections_may_take(directory: Path) -> None:
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0", "--drain-timeout", "5m") as manager:
        port = manager.start_unit().port
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
            eventually(lambda: manager.accepted() == 1, "the connection is accepted")
            manager.process.send_signal(signal.SIGTERM)
            manager.hear_until(lambda heard: "STOPPING" in heard.lines, "STOPPING=1")
            heard = manager.hear_until(lambda heard: "EXTEND_TIMEOUT_USEC" in heard.lines, "more time")
            assert int(heard.lines["EXTEND_TIMEOUT_USEC"]) / 1e6 >= 300
            client.sendall(b"who\n")
            assert client.recv(100).startswith(b"one ")
        assert manager.wait() == 0


def test_a_supervisor_that_stands_still_lets_its_watchdog_bark(directory: Path) -> None:
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0", watchdog_s=0.2) as manager:
        port = manager.start_unit().port
        for _ in range(3):
            manager.hear_until(is_fed, "WATCHDOG=1")
        manager.process.send_signal(signal.SIGSTOP)
        eventually(lambda: psutil.Process(manager.process.pid).status() == psutil.STATUS_STOPPED, "it is stopped")
        manager.hear_now()
        assert ask_line(port).version == "one"
        assert not manager.is_heard_within(0.6), "it is not fed by anybody else"
        manager.process.send_signal(signal.SIGCONT)
        manager.hear_until(is_fed, "WATCHDOG=1")


def is_fed(heard: Heard) -> bool:
    return heard.text == "WATCHDOG=1"


# -- sockets of a socket unit -------------------------------------------------------------------------------


def test_sockets_of_a_unit_are_taken_by_their_names_and_not_stored(directory: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        passed = [("web", one), ("admin", other), ("web", two)]
        binds = ("--bind", "systemd:web", "--bind", "127.0.0.1:0")
        ports = [sock.getsockname()[1] for sock in (one, two)]
        with FakeManager(directory, "app:app", *binds, passed=passed) as manager:
            addresses = manager.start_unit().addresses
            assert addresses[:2] == [f"tcp://127.0.0.1:{port}" for port in ports]
            own = int(addresses[2].rpartition(":")[2])
            assert [*manager.store] == [f"hotport+tcp%3A//127.0.0.1%3A{own}"]
            manager.restart()
            for port in (*ports, own):
                assert ask_line(port).generation == "2"
            assert manager.stop_unit() == 0
            clients = [client for port in (*ports, own) for client in wait_in_queue(port, 2)]
            manager.start_unit()
            assert answers(clients) == {"one"}


def test_connections_that_a_unit_keeps_are_not_cut_by_a_stop(directory: Path) -> None:
    """Without a descriptor none can be accepted: they wait for the next start, and the exit code says so."""
    write_code(directory / "app.py", FULL)
    with FakeManager(directory, "app:app", "--bind", "127.0.0.1:0", "--drain-timeout", "1s") as manager:
        port = manager.start_unit().port
        assert ask_line(port).version == "full"
        clients = wait_in_queue(port, 3)
        assert manager.stop_unit() == 0
        write_code(directory / "app.py", LINE_APP.format(version="free"))
        manager.start_unit()
        assert answers(clients) == {"free"}


def test_socket_activate_passes_named_sockets(directory: Path) -> None:
    activate = [need("systemd-socket-activate"), "-l", str(directory / "a"), "-l", str(directory / "b")]
    environment = ["--fdname=web:web", "-E", f"HOTPORT_RUNTIME_DIR={directory / 'run'}"]
    serve = [*HOTPORT, "serve", "app:app", "--bind", "systemd:web"]
    with subprocess.Popen(
        [*activate, *environment, *serve], cwd=directory, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            for _ in range(2):
                assert process.stderr.readline().startswith("Listening on")
            for name in "aba":
                with socket.socket(socket.AF_UNIX) as client, client.makefile() as file:
                    client.settimeout(DEADLINE_S)
                    client.connect(str(directory / name))
                    client.sendall(b"who\n")
                    assert file.read().startswith("one ")
        finally:
            process.send_signal(signal.SIGTERM)
            _, words = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, words
    for name in "ab":
        (directory / name).unlink()


def test_socket_activate_passes_datagrams(directory: Path) -> None:
    write_code(directory / "udp.py", DATAGRAMS)
    activate = [need("systemd-socket-activate"), "--datagram", "-l", str(directory / "d"), "--fdname=dns"]
    environment = ["-E", f"HOTPORT_RUNTIME_DIR={directory / 'run'}"]
    serve = [*HOTPORT, "serve", "udp:app", "--kind", "datagram", "--bind", "systemd:dns"]
    with subprocess.Popen(
        [*activate, *environment, *serve], cwd=directory, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline().startswith("Listening on")
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
                client.bind(str(directory / "client"))
                client.settimeout(DEADLINE_S)
                client.connect(str(directory / "d"))
                client.send(b"to a name")
                assert client.recv(100) == b"to a name"
        finally:
            process.send_signal(signal.SIGTERM)
            _, words = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, words
    for name in ("client", "d"):
        (directory / name).unlink()


def test_a_unit_that_accepts_by_itself_is_explained(directory: Path) -> None:
    ours, theirs = socket.socketpair()
    with (
        ours,
        theirs,
        FakeManager(directory, "app:app", "--bind", "systemd:connection", passed=[("connection", ours)]) as manager,
    ):
        manager.launch()
        assert manager.wait() == 2
        assert_three_lines(manager.log(), "HP104")
        assert "Accept=no" in manager.log()


@pytest.mark.measured
def test_one_socket_by_two_names_is_refused(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        binds = ("--bind", "systemd:web", "--bind", "fd://3")
        with FakeManager(directory, "app:app", *binds, passed=[("web", passed)]) as manager:
            manager.launch()
            assert manager.wait() == 2
            assert_three_lines(manager.log(), "HP106")
