"""The status port: true whatever happens to workers, and bounded whatever clients do."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from hotport.supervisor.statusport import CLIENTS_MAX
from tests.support import (
    DEADLINE_S,
    LINE_APP,
    Answer,
    Gate,
    Hammer,
    Service,
    assert_three_lines,
    eventually,
    http_get,
    write_code,
)

CUT = (b"", b"(reset)")


class StatusPort:
    """Asks the status port of a service."""

    def __init__(self, service: Service) -> None:
        self._address = service.status()["status_address"]

    def connect(self) -> socket.socket:
        if self._address.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(DEADLINE_S)
            sock.connect(self._address.removeprefix("unix:"))
            return sock
        host, _, port = self._address.removeprefix("tcp://").rpartition(":")
        return socket.create_connection((host, int(port)), DEADLINE_S)

    def say(self, question: bytes, *, is_whole: bool = False) -> bytes:
        """Everything that is answered; `is_whole` ends our side after it."""
        with self.connect() as sock:
            with suppress(ConnectionError):  # refused in the middle of too much
                sock.sendall(question)
            if is_whole:
                sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    def get(self, path: str, method: str = "GET") -> tuple[int, bytes, bytes]:
        """Status, head and body."""
        head, _, body = self.say(f"{method} {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()).partition(b"\r\n\r\n")
        return int(head.split()[1]), head, body

    def agent(self) -> bytes:
        return self.say(b"agent\n")


def read_all(sock: socket.socket) -> bytes:
    answer = b""
    try:
        while data := sock.recv(65536):
            answer += data
    except ConnectionResetError:
        answer += b"(reset)"
    return answer


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StatusPort]:
    """The status port of a service at which nothing changes."""
    directory = tmp_path_factory.mktemp("port")
    write_code(directory / "app.py", LINE_APP.format(version="v1"))
    # It outlives the test that happens to start it: that one must not be blamed.
    env = {"PYTEST_CURRENT_TEST": ""}
    with Service(directory, "app:app", "--status-bind", "127.0.0.1:0", env=env) as service:
        yield StatusPort(service.wait_ready())


def test_a_service_that_serves_is_ready_and_alive(port: StatusPort) -> None:
    assert port.get("/ready")[::2] == (200, b"ready\n")
    assert port.get("/ready?probe=1")[0] == 200
    assert port.get("/live")[::2] == (200, b"ready\n")
    assert port.agent() == b"up ready\n"
    status, head, body = port.get("/ready", "HEAD")
    assert (status, body) == (200, b"")
    assert b"Content-Length: 6" in head


#: What may not be asked, and the status of the answer.
QUESTIONS = {
    b"GET /else HTTP/1.1\r\n\r\n": 404,
    b"OPTIONS / HTTP/1.0\r\n\r\n": 405,  # what haproxy asks if it is not told what
    b"POST /live HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc": 405,
    b"GET /ready HTTP/2.0\r\n\r\n": 400,
    b"GET http://host/ready HTTP/1.1\r\n\r\n": 400,
    b"GET  /ready HTTP/1.1\r\n\r\n": 400,
    b"\n": 400,
    b"AGENT\n": 400,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n": 400,
    b"x" * 20_000: 400,
    b"GET /ready HTTP/1.1\r\n" + b"A: b\r\n" * 5_000: 400,
}


def test_what_cannot_be_answered_gets_an_error(port: StatusPort) -> None:
    for question, status in QUESTIONS.items():
        answer = port.say(question)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), (question[:30], answer)
        assert b"Connection: close" in answer
        assert (b"Allow: GET, HEAD" in answer) is (status == 405)
    assert port.say(b"agent", is_whole=True) == b"up ready\n"  # a question that ends early is taken as it is
    assert port.say(b"", is_whole=True).startswith(b"HTTP/1.1 400 ")


def test_a_slow_client_is_left_after_its_time(port: StatusPort) -> None:
    with port.connect() as silent, port.connect() as slow:
        slow.sendall(b"GET /ready HTTP/1.1\r\n")
        assert read_all(silent) in CUT
        assert read_all(slow) in CUT


def test_clients_that_say_nothing_keep_nobody_out(port: StatusPort) -> None:
    """The oldest make room: otherwise they would fill the port for as long as each may stay."""
    with ExitStack() as stack:
        silent = [stack.enter_context(port.connect()) for _ in range(3 * CLIENTS_MAX)]
        assert port.get("/ready")[0] == 200
        assert all(read_all(sock) in CUT for sock in silent)


def test_the_status_says_nothing_that_may_be_secret(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--status-bind", "127.0.0.1:0") as service:
        port = StatusPort(service.wait_ready())
        write_code(tmp_path / "app.py", "raise ValueError('password=hunter2')\n")
        service.restart(expect=4)
        assert "hunter2" in json.dumps(service.status())
        status, _, body = port.get("/status")
        assert status == 200
        assert b"hunter2" not in body
        told, known = json.loads(body), service.status()
        assert told.keys() == known.keys()
        assert told["last_restart"]["outcome"] == "aborted"
        assert told["last_restart"]["error"] == "see hotport status svc"


PROGRAM = """
import os, socket, sys
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.sendto(b"READY=1\\nSTATUS=token swordfish", os.environ["NOTIFY_SOCKET"])
socket.socket(fileno=3).accept()
"""


def test_arguments_and_words_of_a_program_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = ("--", "python3", "program.py", "--password", "hunter2")
    with Service(tmp_path, "--status-bind", "127.0.0.1:0", *command) as service:
        service.wait_ready()
        known = json.dumps(service.status())
        assert "hunter2" in known
        assert "swordfish" in known
        body = StatusPort(service).get("/status")[2]
        assert b"hunter2" not in body
        assert b"swordfish" not in body
        assert json.loads(body)["target"] == "python3"


def test_a_lame_duck_serves_on_and_says_that_it_leaves(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    where = f"unix:{tmp_path}/status.sock"
    with Service(tmp_path, "app:app", "--status-bind", where, "--lame-duck", "1h") as service:
        port = StatusPort(service.wait_ready())
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: port.agent() == b"drain\n", "it is a lame duck")
        assert port.get("/ready")[::2] == (503, b"lame duck\n")
        assert port.get("/live")[0] == 200
        assert b"lame duck, stops in 60 m" in service.run("status").stdout.encode()
        assert service.run("status", "--ready").returncode == 7
        assert 3000 < service.status()["lame_duck_left_s"] <= 3600
        (worker,) = service.worker_pids()
        refused = service.run("restart")
        assert refused.returncode == 4
        assert_three_lines(refused.stderr, "HP410")
        assert "lame duck" in refused.stderr
        refused = service.run("upgrade", "svc")
        assert refused.returncode == 4
        assert_three_lines(refused.stderr, "HP657")
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as client:
            client.sendall(b"who\n")
            assert client.recv(100).endswith(f"{worker}\n".encode())
        service.process.send_signal(signal.SIGTERM)  # enough of it
        assert service.wait() == 0
        assert len(service.log_events("service.lame_duck")) == 1
    assert not (tmp_path / "status.sock").exists()


def test_a_flag_of_stop_is_stronger_than_the_option(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--lame-duck", "1h") as service:
        service.wait_ready()
        wrong = service.run("stop", "--lame-duck", "soon")
        assert wrong.returncode == 2
        assert_three_lines(wrong.stderr, "HP304")
        assert service.run("status", "--ready").returncode == 0
        assert service.run("stop", "--lame-duck", "0").returncode == 0
        assert service.wait() == 0
        assert not service.log_events("service.lame_duck")


def test_a_person_at_a_terminal_does_not_wait_for_load_balancers(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--lame-duck", "1h") as service:
        service.wait_ready().process.send_signal(signal.SIGINT)
        assert service.wait() == 0


def test_a_service_is_not_ready_before_it_serves_and_while_it_drains(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    write_code(tmp_path / "app.py", Gate.LINE + LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--status-bind", "127.0.0.1:0") as service:
        eventually(lambda: (service.runtime / "control.sock").exists(), "it can be asked")
        port = StatusPort(service)
        assert port.get("/ready")[::2] == (503, b"starting\n")
        assert port.get("/live")[0] == 200
        assert port.agent() == b"down#starting\n"
        gate.open()
        service.wait_ready()
        assert port.agent() == b"up ready\n"
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as client:
            eventually(lambda: service.status()["workers"][0]["connections"] == 1, "the connection is there")
            service.process.send_signal(signal.SIGTERM)
            eventually(lambda: port.agent() == b"stopped#stopping\n", "it is stopping")
            assert port.get("/ready")[0] == 503
            client.sendall(b"who\n")
            assert client.recv(100).startswith(b"v1 ")
        assert service.wait() == 0


def test_a_worker_that_hangs_makes_no_probe_wait(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--status-bind", "127.0.0.1:0") as service:
        port = StatusPort(service.wait_ready())
        worker = psutil.Process(service.worker_pids()[0])
        worker.suspend()
        try:
            assert port.get("/ready")[0] == 200
            for _ in range(3):
                (told,) = json.loads(port.get("/status")[2])["workers"]
                assert told["requests"] is None
        finally:
            worker.resume()
        eventually(lambda: json.loads(port.get("/status")[2])["workers"][0]["requests"] == 0, "it answers again")


def test_a_status_port_that_cannot_be_bound_stops_the_start(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Service(tmp_path, "app:app", "--status-bind", address) as service:
            assert service.wait() == 3
        assert_three_lines(service.log(), "HP101")


def probe(port: int) -> Answer:
    """A health check that fails unless the service is ready."""
    status, body = http_get(port, "/ready")
    if status != 200:
        raise ValueError(f"{status} {body!r}")
    return Answer("ready", "", 0)


def test_probes_notice_neither_a_restart_nor_an_upgrade(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--status-bind", "127.0.0.1:0") as service:
        address = service.wait_ready().status()["status_address"]
        with Hammer(int(address.rpartition(":")[2]), ask=probe) as hammer:
            hammer.wait_answers()
            service.restart()
            hammer.wait_answers()
            assert service.run("upgrade", "svc").returncode == 0
            hammer.wait_answers()
        assert service.status()["status_address"] == address
    assert set(hammer.failures) <= {"ConnectionResetError", "IndexError"}, "an exec cuts who is being answered, once"
    assert hammer.failures.total() <= 2


def test_a_status_port_is_taken_over_with_the_service(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    where = f"unix:{tmp_path}/status.sock"
    with ExitStack() as stack:
        old = stack.enter_context(Service(tmp_path, "app:app", "--status-bind", where)).wait_ready()
        port = StatusPort(old)
        args = ("app:app", "--status-bind", where, "--take-over")
        new = stack.enter_context(Service(tmp_path, *args))
        eventually(lambda: b'"take_over.began"' in old.log().encode(), "the new one has the listeners")
        while old.process.poll() is None:  # each answers in its time, and both mean the same service
            assert port.get("/ready")[::2] == (200, b"ready\n")
        new.wait_ready()
        assert port.get("/ready")[0] == 200
        assert json.loads(port.get("/status")[2])["generation"] == 2
        assert new.run("stop", "svc").returncode == 0
        assert new.wait() == 0
    assert not (tmp_path / "status.sock").exists()


def test_an_upgrade_moves_the_status_port_and_a_restart_does_not(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    config = tmp_path / "hotport.toml"
    config.write_text('status_bind = "127.0.0.1:0"\n')
    with Service(tmp_path, "app:app") as service:
        service.wait_ready()
        before = StatusPort(service)
        config.write_text('status_bind = "unix:moved.sock"\n')
        refused = service.run("restart")
        assert refused.returncode == 4
        assert_three_lines(refused.stderr, "HP411")
        assert "moved.sock" in refused.stderr
        assert before.get("/ready")[0] == 200
        assert service.run("upgrade", "svc").returncode == 0
        assert service.status()["status_address"] == "unix:moved.sock"
        with pytest.raises(ConnectionRefusedError):
            before.connect()
        service.restart()
        assert service.run("stop", "svc").returncode == 0
        assert service.wait() == 0
    assert not (tmp_path / "moved.sock").exists()
