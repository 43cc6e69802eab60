"""Every way for a listener to reach the next generation: clients see what the table promises, and nothing else."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.support import (
    DEADLINE_S,
    LINE_APP,
    RESTARTS,
    Hammer,
    Service,
    ask_line,
    assert_three_lines,
    eventually,
    write_code,
)

STRATEGIES = ("inherit", "transfer", "overlap", "rebind")


def answer(sock: socket.socket) -> str:
    """What `LINE_APP` says, to the end of the connection."""
    sock.settimeout(DEADLINE_S)
    with sock:
        text = b""
        while data := sock.recv(4096):
            text += data
    return text.decode().split()[0]


def ask_unix(path: Path) -> str:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE_S)
    sock.connect(str(path))
    sock.sendall(b"who\n")
    return answer(sock)


@pytest.mark.soak
@pytest.mark.parametrize("strategy", ["transfer", "overlap"])
@pytest.mark.usefixtures("either_start")
def test_restarts_lose_nobody(tmp_path: Path, strategy: str) -> None:
    app = tmp_path / "app.py"
    write_code(app, LINE_APP.format(version="v0"))
    with Service(tmp_path, "--strategy", strategy, "--workers", "2", "--settle", "50ms", "app:app") as service:
        service.wait_ready()
        with Hammer(service.port) as clients:
            for number in range(1, RESTARTS + 1):
                write_code(app, LINE_APP.format(version=f"v{number}"))
                report = service.restart()
                assert (report["outcome"], report["strategy"]) == ("done", strategy)
                clients.wait_answers(20, f"v{number}")
        assert not clients.failures


@pytest.mark.soak
def test_rebind_counts_what_clients_saw(tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    write_code(app, LINE_APP.format(version="v0"))
    with Service(tmp_path, "--strategy", "rebind", "--workers", "2", "--settle", "50ms", "app:app") as service:
        service.wait_ready()
        refused = reset = 0
        with Hammer(service.port) as clients:
            for number in range(1, RESTARTS + 1):
                write_code(app, LINE_APP.format(version=f"v{number}"))
                report = service.restart()
                assert (report["outcome"], report["strategy"]) == ("done", "rebind")
                assert report["rebind_gap_us"] > 0
                refused += report["refused"]
                reset += report["reset"]
                clients.wait_answers(20, f"v{number}")
        assert clients.failures["ConnectionRefusedError"] <= refused  # others refuse connections here, too
        assert clients.failures["ConnectionResetError"] <= reset
        assert clients.failures.total() <= refused + reset


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_who_waits_in_the_queue_of_new_workers_that_die_is_served_by_the_old_ones(
    tmp_path: Path, strategy: str
) -> None:
    app = tmp_path / "app.py"
    write_code(app, LINE_APP.format(version="old"))
    with Service(tmp_path, "--strategy", strategy, "--settle", "5m", "app:app").wait_ready() as service:
        write_code(app, LINE_APP.format(version="new"))
        with service.start("restart", "--json") as command:
            eventually(lambda: bool(service.log_events("restart.quiesced")), "the old generation has stopped")
            assert ask_line(service.port).version == "new"
            (pid,) = [worker["pid"] for worker in service.status()["workers"] if worker["generation"] == 2]
            os.kill(pid, signal.SIGSTOP)
            clients = [socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) for _ in range(5)]
            for client in clients:
                client.sendall(b"who\n")
            os.kill(pid, signal.SIGKILL)
            assert [answer(client) for client in clients] == ["old"] * 5
            assert command.wait(DEADLINE_S) == 4
        assert ask_line(service.port).version == "old"
        assert not service.status()["lost"]


@pytest.mark.measured
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_restart_of_code_that_fails_leaves_the_listeners_as_they_were(tmp_path: Path, strategy: str) -> None:
    app = tmp_path / "app.py"
    write_code(app, LINE_APP.format(version="old"))
    with Service(tmp_path, "--strategy", strategy, "--settle", "50ms", "app:app").wait_ready() as service:
        before = service.descriptors()
        with Hammer(service.port) as clients:
            write_code(app, "raise RuntimeError('broken')")
            report = service.restart(expect=4)
            assert "broken" in report["error"]
            clients.wait_answers(20, "old")
            eventually(lambda: service.descriptors() == before, "nothing is left open")
            write_code(app, LINE_APP.format(version="new"))
            assert service.restart()["outcome"] == "done"
            clients.wait_answers(20, "new")
        if strategy != "rebind":
            assert not clients.failures


@pytest.mark.parametrize("strategy", ["inherit", "transfer"])
def test_addresses_change_with_a_restart(tmp_path: Path, strategy: str) -> None:
    app, options = tmp_path / "app.py", tmp_path / "hotport.toml"
    write_code(app, LINE_APP.format(version="one"))
    options.write_text("bind = ['127.0.0.1:0', 'unix:dropped.sock']")
    with Service(
        tmp_path, "--strategy", strategy, "--settle", "50ms", "app:app", default_bind=None
    ).wait_ready() as service:
        port = service.port
        with Hammer(port) as clients:
            assert ask_unix(tmp_path / "dropped.sock") == "one"
            write_code(app, LINE_APP.format(version="two"))
            options.write_text("bind = ['unix:added.sock', '127.0.0.1:0']")
            assert service.restart()["outcome"] == "done"
            assert service.addresses == ["unix:added.sock", f"tcp://127.0.0.1:{port}"]
            assert ask_unix(tmp_path / "added.sock") == "two"
            assert not (tmp_path / "dropped.sock").exists()
            clients.wait_answers(20, "two")
        assert not clients.failures


@pytest.mark.parametrize("strategy", ["overlap", "rebind"])
def test_addresses_come_and_go_with_sockets_of_each_generation(tmp_path: Path, strategy: str) -> None:
    app, options = tmp_path / "app.py", tmp_path / "hotport.toml"
    write_code(app, LINE_APP.format(version="one"))
    options.write_text("bind = ['127.0.0.1:0']")
    with Service(
        tmp_path, "--strategy", strategy, "--settle", "50ms", "app:app", default_bind=None
    ).wait_ready() as service:
        kept = service.port
        before = service.descriptors()
        for binds in ("['127.0.0.2:0', '127.0.0.1:0']", "['127.0.0.1:0']"):
            options.write_text(f"bind = {binds}")
            assert service.restart()["outcome"] == "done"
            assert len(service.addresses) == binds.count(":")
            assert service.addresses[-1] == f"tcp://127.0.0.1:{kept}"
            assert ask_line(kept).version == "one"
        eventually(lambda: service.descriptors() == before, "nothing is left open")


def test_who_waits_at_an_address_that_is_dropped_is_served(tmp_path: Path) -> None:
    app, options = tmp_path / "app.py", tmp_path / "hotport.toml"
    write_code(app, LINE_APP.format(version="one"))
    options.write_text("bind = ['127.0.0.1:0', 'unix:dropped.sock']")
    with Service(tmp_path, "--undo-window", "1h", "app:app", default_bind=None).wait_ready() as service:
        options.write_text("bind = ['127.0.0.1:0']")
        with service.start("restart", "--json") as command, socket.socket(socket.AF_UNIX) as client:
            eventually(lambda: bool(service.log_events("restart.quiesced")), "the old generation has stopped")
            client.connect(str(tmp_path / "dropped.sock"))
            client.sendall(b"who\n")
            service.wait_until(lambda: bool(service.status()["watch"]), "it can be undone")
            assert service.run("undo", "--keep").returncode == 0
            assert answer(client) == "one"
            assert command.wait(DEADLINE_S) == 0


def test_address_that_is_dropped_is_closed_while_its_worker_still_drains(tmp_path: Path) -> None:
    """Clients could connect there until the last connection of the old worker had ended, and waited for that long."""
    app, options = tmp_path / "app.py", tmp_path / "hotport.toml"
    write_code(app, LINE_APP.format(version="one"))
    options.write_text("bind = ['127.0.0.1:0', 'unix:dropped.sock']\nhandoff = 'off'")
    with Service(tmp_path, "--settle", "50ms", "app:app", default_bind=None).wait_ready() as service:
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as held:
            service.wait_until(lambda: any(each["connections"] for each in service.status()["workers"]), "it is there")
            options.write_text("bind = ['127.0.0.1:0']\nhandoff = 'off'")
            command = service.start("restart", "--json")
            eventually(lambda: not (tmp_path / "dropped.sock").exists(), "it is closed")
            assert "draining" in {worker["phase"] for worker in service.status()["workers"]}
            held.sendall(b"who\n")
            assert answer(held) == "one"
        command.communicate(timeout=DEADLINE_S)
        assert command.returncode == 0


def test_aborted_restart_closes_the_addresses_that_it_added(tmp_path: Path) -> None:
    app, options = tmp_path / "app.py", tmp_path / "hotport.toml"
    write_code(app, LINE_APP.format(version="one"))
    options.write_text("bind = ['127.0.0.1:0']")
    with Service(tmp_path, "app:app", default_bind=None).wait_ready() as service:
        before = service.descriptors()
        write_code(app, "raise RuntimeError('broken')")
        options.write_text("bind = ['127.0.0.1:0', 'unix:added.sock']")
        service.restart(expect=4)
        assert not (tmp_path / "added.sock").exists()
        assert len(service.addresses) == 1
        eventually(lambda: service.descriptors() == before, "nothing is left open")


def test_restart_is_refused_if_a_new_address_cannot_be_bound(tmp_path: Path) -> None:
    options = tmp_path / "hotport.toml"
    write_code(tmp_path / "app.py", LINE_APP.format(version="one"))
    options.write_text("bind = ['unix:app.sock']")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        Service(tmp_path, "app:app", default_bind=None).wait_ready() as service,
    ):
        before = service.descriptors()
        options.write_text(f"bind = ['unix:app.sock', 'unix:other.sock', '127.0.0.1:{taken.getsockname()[1]}']")
        result = service.run("restart")
        assert result.returncode == 4
        assert_three_lines(result.stderr, "HP101")
        assert f"pid {os.getpid()}" in result.stderr
        assert not (tmp_path / "other.sock").exists()
        assert ask_unix(tmp_path / "app.sock") == "one"
        eventually(lambda: service.descriptors() == before, "nothing is left open")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--bind", "unix:app.sock", "app:app"), "a unix address is a file"),
        (("--phased", "app:app"), "a phased restart"),
        (("--kind", "sockets", "app:app"), "kind sockets takes its sockets at its start"),
    ],
)
def test_strategy_that_cannot_work_is_refused_with_the_reason(tmp_path: Path, args: tuple[str, ...], why: str) -> None:
    sockets = "async def app(sockets, lifetime):\n    lifetime.started()\n    await lifetime.draining.wait()\n"
    write_code(tmp_path / "app.py", sockets if "sockets" in args else LINE_APP.format(version="one"))
    with Service(tmp_path, *args).wait_ready() as service:
        result = service.run("restart", "--strategy", "overlap")
        assert result.returncode == 4
        assert_three_lines(result.stderr, "HP420")
        assert why in result.stderr
        assert service.status()["strategy"] == "inherit"
        assert service.restart()["strategy"] == "inherit"
