"""``hotport report``: what the flight recorder has kept, whoever the supervisor is by now."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.service.test_handoff_faults import APP as HTTP_APP
from tests.service.test_handoff_faults import Kept
from tests.service.test_recovery import die
from tests.support import DEADLINE_S, LINE_APP, Service, assert_three_lines, write_code
from tests.wire.test_trace import check

#: Reads a request's body before it answers.
READS = """
async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})
"""

FLAGS = ("app:app", "--lifespan", "off", "--keep-alive", "1h")


def last_report(service: Service) -> Any:
    """The last report in its status, as JSON has it."""
    return json.loads(json.dumps(service.status()["last_restart"]))


def recordings(service: Service, *args: str) -> list[dict[str, Any]]:
    result = service.run("report", "svc", "--json", *args)
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


@pytest.mark.measured
def test_restart_is_kept_whole_and_its_trace_adds_up_to_the_report(tmp_path: Path) -> None:
    write_code(tmp_path / "slow.py", "sum(range(300000))\n")
    write_code(tmp_path / "app.py", "import slow\n" + HTTP_APP.format(fault=""))
    with Service(tmp_path, *FLAGS, "--workers", "2") as service, ExitStack() as stack:
        port = service.wait_ready().port
        kept = [Kept(port) for _ in range(20)]
        for each in kept:
            stack.enter_context(each.sock)
        assert [each.ask()[0] for each in kept] == [1] * 20
        report = service.restart()
        (recording,) = recordings(service)
        assert recording["report"] == report
        assert (recording["is_over"], recording["supervisor"]) == (True, service.process.pid)
        lanes = {lane["worker"]: lane for lane in recording["lanes"]}
        assert [(lanes[number]["generation"], len(lanes)) for number in (1, 3)] == [(1, 4), (2, 4)]
        moves = [span for number in (1, 2) for span in lanes[number]["spans"] if span["name"] == "moving"]
        assert sum(span["facts"]["connections"] for span in moves) == report["connections"]["moved_http"] == 20
        for number in (3, 4):
            assert "slow" in [span["name"] for span in lanes[number]["imports"]]
            assert [span["name"] for span in lanes[number]["spans"]] == ["starting", "opening", "accepting"]
        result = service.run("report", "svc", "--trace", "trace.json")
        assert (result.returncode, result.stdout) == (0, "")
        spans = check(json.loads((tmp_path / "trace.json").read_bytes()))
        whole, *steps = (span for span in spans if span["cat"] == "restart")
        assert whole["dur"] == sum(step["dur"] for step in steps) == round(report["phases"][-1]["ms"] * 1000)
        assert {span["pid"] for span in spans if span["cat"] == "worker"} == {lane["pid"] for lane in lanes.values()}


@pytest.mark.soak
def test_restarts_are_shown_after_upgrade_sigkill_and_the_end_of_the_service(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--workers", "2") as service:
        service.wait_ready()
        assert_three_lines(service.run("report", "svc").stderr, "HP609")
        first = service.restart()
        assert service.run("upgrade", "svc").returncode == 0
        assert last_report(service) == first
        second = service.restart()
        die(service)
        assert [each["report"] for each in recordings(service, "--last", "9")] == [first, second]
        with Service(tmp_path, "app:app", "--workers", "2") as next_one:
            next_one.wait_ready()
            assert last_report(next_one) == second
            third = next_one.restart()
            assert [each["report"] for each in recordings(next_one, "--last", "2")] == [second, third]
            assert next_one.stop() == 0
        result = service.run("report", "--last", "3")
        assert [line.partition("  ")[2] for line in result.stdout.splitlines() if " UTC " in line] == [
            *("from generation 1 to 2", "from generation 2 to 3", "from generation 3 to 4")
        ]
        assert result.stdout.endswith("done: generation 4 of svc serves\n")


@pytest.mark.parametrize("how", ["upgrade", "killed"])
def test_next_supervisor_completes_a_restart_whose_old_worker_still_leaves(tmp_path: Path, how: str) -> None:
    """The report had been lost, with what became of the connections."""
    write_code(tmp_path / "app.py", READS)
    with ExitStack() as stack:
        service = stack.enter_context(Service(tmp_path, *FLAGS))
        client = stack.enter_context(socket.create_connection(("127.0.0.1", service.wait_ready().port), DEADLINE_S))
        client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100")  # the application reads
        command = service.start("restart", "svc", "--json")
        service.wait_until(lambda: bool(service.log_events("restart.done")), "the new worker has taken over")
        if how == "upgrade":
            assert service.run("upgrade", "svc").returncode == 0
        else:
            die(service)
            assert [each["leaving"] for each in recordings(service)] == [[1]]
            service = stack.enter_context(Service(tmp_path, *FLAGS))
            service.wait_until(lambda: bool(service.log_events("service.adopted")), "the workers are adopted")
        command.communicate()
        (recording,) = recordings(service)
        assert (recording["report"]["outcome"], recording["leaving"], recording["is_over"]) == ("done", [1], False)
        client.sendall(b"ab")
        assert b"200" in client.recv(1000)
        service.wait_until(lambda: recordings(service)[0]["is_over"], "the old worker has left")
        report = last_report(service)
        assert report == recordings(service)[0]["report"]
        assert sum(report["connections"].values()) == 1
        assert (report["error"], report["phases"][-1]["name"]) == ("", "retired")
        client.close()  # idle, it would be kept open for a next request
        assert service.stop() == 0


def test_status_is_watched_while_the_supervisor_is_replaced(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app") as service:
        service.wait_ready()
        watching = service.start("status", "svc", "--watch")
        assert watching.stdout is not None
        assert "svc: ready, generation 1;" in str(watching.stdout.readline())
        assert service.restart()["outcome"] == "done"
        assert service.run("upgrade", "svc").returncode == 0
        assert any("generation 2; 0 connections" in str(line) for line in watching.stdout)
        watching.send_signal(signal.SIGINT)
        watching.communicate(timeout=DEADLINE_S)
        assert watching.returncode == 0
