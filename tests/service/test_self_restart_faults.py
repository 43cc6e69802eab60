"""Whatever fails while a program restarts itself: as long as one process lives, no connection is refused."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.service.embedded_support import CRASH, LINES, Embedded, hello
from tests.support import DEADLINE_S, Answer, Gate, Hammer, assert_three_lines, eventually, watching_pid

#: Where the successor dies before it accepts, in order.
BEFORE_COMMIT = (
    "hotport.embedded.server:Predecessor.claim",
    "hotport.embedded.server:Predecessor.adopt",
    "hotport.embedded.server:make_server",
    "hotport.worker.server:ConnectionServer.startup",
    "hotport.embedded.server:Predecessor.wait_for_order",
    "hotport.embedded.predecessor:encode_notification",  # of READY=1
    "hotport.embedded.predecessor:Channel",  # of the order
    "hotport.worker.server:ConnectionServer.accept",
    "hotport.embedded.server:Predecessor.accepting",
)

#: And after that, before it could have answered for a connection.
BEFORE_HANDOFF = (
    "hotport.worker.server:ConnectionServer.take",
    "hotport.worker.handoff:_welcome",
    "hotport.worker.handoff:_adopt",
)

#: Where the process that restarts itself dies, once there is a successor.
OF_THE_OLD = (
    "hotport.embedded.server:Successor.ready",
    "hotport.embedded.successor:Channel.connect",
    "hotport.embedded.server:Successor.commit",
    "hotport.worker.server:ConnectionServer.quiesce",
    "hotport.worker.server:ConnectionServer.drain",
    "hotport.worker.handoff:Mover.follow",
    "hotport.worker.handoff:Mover._move",
    "hotport.worker.handoff:decode_ack",
    "hotport.embedded.server:Notifier.pass_to",
    "hotport.embedded.server:Restarted",
)


def ask(port: int) -> Answer:
    """Ask on a new connection; it is the client that closes."""
    with Embedded.connect_to(port) as client:
        version, pid = hello(client)
    return Answer(version, "", pid)


def lines(version: str, crash: str = "") -> str:
    return LINES.format(version=version) + (CRASH.format(where=crash) if crash else "")


def refused(hammer: Hammer) -> int:
    return hammer.failures["ConnectionRefusedError"]


def test_successor_dies_at_each_step(tmp_path: Path) -> None:
    with Embedded(tmp_path, lines("one"), env={"LOOP": "uvloop"}) as program, Hammer(program.port, ask=ask) as hammer:
        old = program.pid
        for step in BEFORE_COMMIT:
            with program.connect() as client:
                assert hello(client) == ("one", old)
                program.write(lines("two", step))
                said = program.fail()
                assert said["code"] == "HP445", step
                assert_three_lines(said["text"], "HP445")
                assert f"pid {old} serves on" in said["text"]
                assert "killed by SIGKILL" in said["text"]
                assert hello(client) == ("one", old), step
        assert hammer.failures == {}
        for step in BEFORE_HANDOFF:
            with program.connect() as client:
                assert hello(client) == ("one", old)
                program.write(lines("two", step))
                program.ask()
                said = program.wait("failed")
                assert said["code"] == "HP449", step
                assert_three_lines(said["text"], "HP449")
                assert f"pid {old} serves again" in said["text"]
                assert hello(client) == ("one", old), step
                program.pids = [old]
                hammer.wait_answers(2, "one")
        assert refused(hammer) == 0
        with program.connect() as client:  # in the end it works as if nothing had been
            assert hello(client) == ("one", old)
            program.write(lines("three"))
            assert program.restart()["handed_off"] >= 1
            assert hello(client) == ("three", program.pid)
        hammer.wait_answers(2, "three")
        assert refused(hammer) == 0


def test_old_one_dies_at_each_step(tmp_path: Path) -> None:
    steps = (*OF_THE_OLD, "")
    with Embedded(tmp_path, lines("0", steps[0])) as program, Hammer(program.port, ask=ask) as hammer:
        for number, step in enumerate(steps[1:], 1):
            with program.connect() as client, watching_pid(program.pid) as wait_ended:
                assert hello(client) == (str(number - 1), program.pid)
                program.write(lines(str(number), step))
                program.ask()
                assert program.wait("serving")["generation"] == number + 1
                wait_ended()
                hammer.wait_answers(2, str(number))
        assert refused(hammer) == 0
        assert program.process.wait(DEADLINE_S) == -signal.SIGKILL


def test_error_of_the_new_application_comes_back_with_its_traceback(tmp_path: Path) -> None:
    broken = """\
async def APP(scope, receive, send):
    raise RuntimeError("no database")
OPTIONS = {"lifespan": "on"}
"""
    with Embedded(tmp_path, lines("one")) as program:
        program.write(broken)
        said = program.fail()
        assert_three_lines(said["text"], "HP445")
        (note,) = said["notes"]
        assert "no database" in note
        assert said["serving"] == 1


def test_address_that_is_taken_is_told_by_the_one_who_has_tried(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, Embedded(tmp_path, lines("one")) as program:
        taken = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        program.write(lines("two") + f'OPTIONS = {{"bind": ["tcp://127.0.0.1:0", "{taken}"]}}')
        said = program.fail()
        assert f"HP101 cannot bind {taken}" in said["text"]
        assert "is listening on" in said["notes"][0]
        assert program.hello() == ("one", program.pid)


def test_successor_that_hangs_is_ended(tmp_path: Path) -> None:
    options = 'OPTIONS = {"ready_timeout": 1.5}\n'
    Gate(tmp_path)
    with Embedded(tmp_path, lines("one") + options) as program:
        program.write(Gate.LINE + lines("two"))
        said = program.fail()
        assert_three_lines(said["text"], "HP446")
        assert "within 1.5 s" in said["text"]
        assert program.hello() == ("one", program.pid)


def test_second_restart_is_refused_while_one_is_under_way(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with Embedded(tmp_path, lines("one")) as program:
        program.write("open('begun', 'w').close()\n" + Gate.LINE + lines("two"))
        program.ask()
        eventually((tmp_path / "begun").exists, "the successor has started")
        said = program.fail()
        assert_three_lines(said["text"], "HP448")
        assert "another restart" in said["text"]
        gate.open()
        program.wait("restarted")
        assert program.hello() == ("two", program.pid)


def test_server_that_is_closed_takes_a_successor_that_starts_along(tmp_path: Path) -> None:
    Gate(tmp_path)
    with Embedded(tmp_path, lines("one")) as program:
        program.write("open('begun', 'w').close()\n" + Gate.LINE)
        program.ask()
        eventually((tmp_path / "begun").exists, "the successor has started")
        program.stop()
        (said,) = (told.said for told in program.said if told.what == "failed")
        assert_three_lines(said["text"], "HP448")
        assert program.process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("how", ["signal", "close"])
def test_old_one_leaves_with_a_successor_that_was_stopped(tmp_path: Path, how: str) -> None:
    """Whoever ends the new one wants the service to end, not the old one to come back."""
    app = lines("one").replace("@hotport.restartable", "") + "OPTIONS = {'drain_timeout': 60}\n"
    with Embedded(tmp_path, app) as program, program.connect() as client:
        hello(client)
        program.ask()
        program.wait("serving")
        with watching_pid(program.pid) as wait_ended:
            os.kill(program.pid, signal.SIGTERM if how == "close" else signal.SIGINT)
            wait_ended()
        with pytest.raises(ConnectionRefusedError):
            program.connect()
        assert hello(client) == ("one", program.process.pid)
        client.close()
        assert program.wait("restarted")["finished"] == 1
        assert program.process.wait(DEADLINE_S) == 0
        program.has_stopped = True
