"""A program that embeds a server and restarts itself: what its clients, its user and its service manager see."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from websockets.sync.client import connect as connect_websocket

from tests.service.embedded_support import LINES, Embedded, hello
from tests.support import DEADLINE_S, HOTPORT, LIFESPAN_AND_ECHO, RESTARTS, SLOWNESS, assert_three_lines
from tests.tls_support import Pki
from tests.tls_support import connect as connect_tls


def lines(version: str) -> str:
    return LINES.format(version=version)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_new_code_answers_on_old_connections(tmp_path: Path, loop: str) -> None:
    with Embedded(tmp_path, lines("one"), env={"LOOP": loop}) as program, program.connect() as client:
        assert hello(client) == ("one", program.pid)
        program.write(lines("two"))
        report = program.restart()
        assert hello(client) == ("two", program.pid)
        assert program.hello() == ("two", program.pid)
        assert report["successor"] == program.pid
        assert report["generation"] == 2
        assert (report["handed_off"], report["finished"], report["cut"]) == (1, 0, 0)
        assert report["connections"] == {"moved_stream": 1}
        assert report["is_ordered"]
    assert program.stderr() == ""


def test_an_import_that_fails_leaves_the_old_one_serving(tmp_path: Path) -> None:
    with Embedded(tmp_path, lines("one")) as program:
        program.write("raise RuntimeError('broken')\n")
        said = program.fail()
        assert said["code"] == "HP445"
        assert_three_lines(said["text"], "HP445")
        assert program.hello() == ("one", program.pid)
        program.write(lines("two"))
        program.restart()
        assert program.hello() == ("two", program.pid)


#: The first generation passes a memory file and one end of a pair of sockets; each answers with what it finds there.
PASSING = """
import os, socket
import hotport

STATE = SOCK = None

def BEGUN(server):
    global STATE, SOCK
    if server.passed:
        STATE, SOCK = server.passed["state"], socket.socket(fileno=server.passed["peer"])
    else:
        STATE, (SOCK, own) = os.memfd_create("state"), socket.socketpair()
        own.send(b"from the first")
        own.close()
    assert sorted(server.passed) == (["peer", "state"] if server.generation > 1 else [])
    assert not os.get_inheritable(STATE) and not SOCK.get_inheritable()
    os.pwrite(STATE, b"seen by %d" % server.generation, 0) if server.generation == 1 else None
    server.pass_on("state", STATE)
    server.pass_on("peer", SOCK)

async def APP(stream):
    async for line in stream:
        if line == b"peer\\n":
            await stream.send(SOCK.recv(99) + b"\\n")
        else:
            await stream.send(os.pread(STATE, 99, 0) + b"\\n")
"""


def test_descriptors_and_state_go_to_every_successor(tmp_path: Path) -> None:
    def ask(line: bytes) -> bytes:
        with program.connect() as client:
            client.sendall(line)
            return client.recv(99)

    with Embedded(tmp_path, PASSING) as program:
        assert ask(b"state\n") == b"seen by 1\n"
        program.restart()
        assert ask(b"state\n") == b"seen by 1\n"
        program.restart()
        assert ask(b"state\n") == b"seen by 1\n"
        assert ask(b"peer\n") == b"from the first\n"


def test_restart_with_a_closed_descriptor_is_refused(tmp_path: Path) -> None:
    closed = "\ndef BEGUN(server):\n    with open('app.py') as file:\n        server.pass_on('gone', file)\n"
    with Embedded(tmp_path, lines("one") + closed) as program:
        said = program.fail()
        assert_three_lines(said["text"], "HP444")
        assert program.hello() == ("one", program.pid)


def test_full_program_with_a_queue_closes_nobody(tmp_path: Path) -> None:
    """Its successor filled up from the accept queue, and had no room for what came from the old process."""
    options = "OPTIONS = {'connections_max': 3}\n"
    with Embedded(tmp_path, lines("one") + options) as program, ExitStack() as stack:
        clients = [stack.enter_context(program.connect()) for _ in range(3)]
        assert [hello(client) for client in clients] == [("one", program.pid)] * 3
        queued = [stack.enter_context(program.connect()) for _ in range(3)]
        program.write(lines("two") + options)
        assert program.restart()["connections"] == {"moved_stream": 3}
        for client in clients:
            assert hello(client) == ("two", program.pid)
            client.close()
        assert [hello(client) for client in queued] == [("two", program.pid)] * 3


# -- under load ---------------------------------------------------------------------------------------------

#: Echoes WebSockets, which move without its help, and answers requests.
WEB = (
    """\
import asyncio, os

OPTIONS = {"handoff": "websocket", "restart_on_hup": True}

async def APP(scope, receive, send):
"""
    + LIFESPAN_AND_ECHO
    + """\
    if scope["path"] == "/slow":
        await asyncio.sleep(0.3)
    head = [(b"content-length", b"5"), (b"x-generation", str(os.getpid()).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": b"hello"})
"""
)

WEB_CLIENTS = (
    *("--connect", "10/s", "--keepalive", "5", "--late", "4/s", "--halfhead", "4/s", "--slow", "4/s"),
    *("--websocket", "5", "--slow-time", "300ms"),
)

ECHO = """\
import hotport

OPTIONS = {"restart_on_hup": True}

@hotport.restartable
async def APP(stream):
    async for chunk in stream:
        await stream.send(chunk)
"""


#: Restarts whoever serves, and returns when that one has ended.
RESTART = """\
import os, select, signal
pid = int(open("pid").read())
pidfd = os.pidfd_open(pid)
os.kill(pid, signal.SIGHUP)
select.select([pidfd], [], [])
assert int(open("pid").read()) != pid
"""


@pytest.mark.measured
@pytest.mark.soak
@pytest.mark.timeout(60 * SLOWNESS + 15 * SLOWNESS * RESTARTS)
@pytest.mark.parametrize(
    ("app", "loop", "url", "clients"),
    [
        (WEB, "uvloop", "http://127.0.0.1:{}/", WEB_CLIENTS),
        (ECHO, "asyncio", "tcp://127.0.0.1:{}", ("--stream", "20")),
    ],
)
def test_restarts_lose_nothing_and_no_connection(
    tmp_path: Path, app: str, loop: str, url: str, clients: tuple[str, ...]
) -> None:
    (tmp_path / "restart.py").write_text(RESTART)
    with Embedded(tmp_path, app, env={"LOOP": loop}) as program:
        result = subprocess.run(
            [
                *(*HOTPORT, "churn", url.format(program.port), *clients, "--engines", "1", "--seed", "7"),
                *("--restart", f"{sys.executable} -S restart.py", "--after", "300ms", "--every", "1s"),
                *("--times", str(RESTARTS), "--json", "run.json"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE_S + 10 * SLOWNESS * RESTARTS,
        )
        found = json.loads((tmp_path / "run.json").read_text())
        assert [incident for incident in found["incidents"] if incident["fate"] != "late"] == []
        assert result.returncode == 0 or not found["verdict"]["is_valid"], result.stdout + result.stderr
        assert [mark["outcome"] for mark in found["restarts"]] == ["done"] * RESTARTS
        while len(program.pids) <= RESTARTS:
            program.wait("serving")
        for load in found["loads"]:
            if load["count"]:
                seen = found["totals"][load["kind"]]
                assert seen["connected"] == load["count"]
                assert set(seen) <= {"answered", "late", "connected"}, "nothing was closed, and nobody has reconnected"
        print(result.stdout)
    generations = [told.said["generation"] for told in program.said if told.what == "serving"]
    assert generations == list(range(1, RESTARTS + 2))
    assert [line for line in program.stderr().splitlines() if "was resumed by" not in line] == []


# -- what moves, and what finishes --------------------------------------------------------------------------

COUNTER = """\
async def APP(scope, receive, send):
    if scope["type"] != "websocket":
        return
    hotport = scope["extensions"]["hotport"]
    count = hotport["state"] or 0
    hotport["movable"](lambda: count)
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        count += 1
        await send({"type": "websocket.send", "text": f"{count} {hotport['generation']}"})
"""


def test_websocket_moves_with_what_the_application_knows(tmp_path: Path) -> None:
    with Embedded(tmp_path, COUNTER) as program, connect_websocket(f"ws://127.0.0.1:{program.port}/") as client:
        for generation in (1, 2, 3):
            client.send("hello")
            assert client.recv(DEADLINE_S) == f"{generation} {generation}"
            if generation < 3:
                assert program.restart()["connections"] == {"moved_websocket": 1}


def test_tls_connections_finish(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    options = f"\nOPTIONS = {{'tls_cert': {pki.issue('cert.pem', 'localhost')!r}}}\n"
    app = (
        lines("VERSION")
        .replace("@hotport.restartable", "")
        .replace("async for _ in stream:", "if await stream.receive():")
    )
    with Embedded(tmp_path, app.replace("VERSION", "one") + options) as program:
        with connect_tls(program.port, pki.client()) as client:
            program.write(app.replace("VERSION", "two") + options)
            program.ask()
            program.wait("serving")
            assert hello(client) == ("one", program.pids[0])
        report = program.wait("restarted")
        assert (report["handed_off"], report["finished"], report["cut"]) == (0, 1, 0)
        with connect_tls(program.port, pki.client()) as client:
            assert hello(client) == ("two", program.pid)


def test_tls_connections_move_if_they_may(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    options = f"\nOPTIONS = {{'tls_cert': {pki.issue('cert.pem', 'localhost')!r}, 'tls_handoff': 'on'}}\n"
    with (
        Embedded(tmp_path, lines("one") + options) as program,
        connect_tls(program.port, pki.client()) as client,
    ):
        for version in ("two", "three"):
            hello(client)
            program.write(lines(version) + options)
            assert program.restart()["connections"] == {"moved_stream": 1}
            assert hello(client) == (version, program.pid)


def test_what_does_not_finish_is_cut_and_counted(tmp_path: Path) -> None:
    app = lines("one").replace("@hotport.restartable", "") + "OPTIONS = {'drain_timeout': 0.1}\n"
    with Embedded(tmp_path, app) as program, program.connect() as client:
        hello(client)
        report = program.restart()
        assert (report["handed_off"], report["finished"], report["cut"]) == (0, 0, 1)
        assert client.recv(100) == b""
