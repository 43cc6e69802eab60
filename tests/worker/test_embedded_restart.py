"""`Server.restart` from inside the process that restarts: what is refused, and what is undone."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import psutil
import pytest

import hotport
from hotport.address import parse_address
from hotport.embedded import successor
from hotport.embedded.predecessor import Predecessor
from hotport.embedded.program import Start
from hotport.embedded.server import _restarting_on_hup
from hotport.errors import ConfigError, RestartError
from hotport.kernel.abstract import abstract_name, bind_abstract
from hotport.kernel.notify import notify
from hotport.kernel.spawn import Child
from hotport.wire.sdnotify import encode_notification
from tests.support import DEADLINE_S, STRANGER, assert_three_lines

pytestmark = pytest.mark.anyio

FOREVER = ["sleep", "1000"]


@hotport.restartable
async def echo(stream: hotport.Stream) -> None:
    async for chunk in stream:
        await stream.send(chunk)


async def test_successor_that_is_another_users_is_given_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name in the abstract namespace is free again when it has died, for anybody to take."""
    name = abstract_name()
    child = Child(os.getpid(), os.pidfd_open(os.getpid()))
    made = successor.Successor(child, bind_abstract(abstract_name(), socket.SOCK_DGRAM), name, 2)
    monkeypatch.setattr("hotport.kernel.sockets.peer_credentials", lambda sock: STRANGER)
    with bind_abstract(name, socket.SOCK_STREAM), pytest.raises(RestartError, match="HP445") as refused:
        made._is_ready = True
        await made.ready(DEADLINE_S)
    assert "another user listens" in refused.value.cause
    made.close()


class Datagrams(asyncio.DatagramProtocol):
    """Leaves when it is told so, and not before."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.transport.sendto(data, address)

    def drain_started(self, draining: hotport.Draining) -> None:
        pass


async def sockets(listeners: list[socket.socket], lifetime: hotport.Lifetime) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(100))
        writer.close()

    servers = [await asyncio.start_server(serve, sock=each) for each in listeners]
    lifetime.started()
    try:
        await asyncio.Event().wait()  # until it is cancelled
    finally:
        for server in servers:
            server.close()


#: Serves the same, and is killed once it does.
DIES = """\
import asyncio, os, signal, sys
import hotport
from tests.worker import test_embedded_restart as app

async def main():
    async with hotport.serve(getattr(app, sys.argv[1]), bind=sys.argv[2:]):
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""

#: Serves the same, until it is killed.
STAYS = DIES.replace("os.kill(os.getpid(), signal.SIGKILL)", "await asyncio.Event().wait()")

#: Says that it is ready, and is no server of ours.
FOREIGN = """\
import os, time
from hotport.kernel.notify import notify
notify(os.environ["NOTIFY_SOCKET"], b"READY=1")
time.sleep(1000)
"""

#: Is ready, and does not do what it is told to.
DEAF = """\
import json, os, socket, time
from hotport.kernel.abstract import bind_abstract
from hotport.kernel.notify import notify
bound = bind_abstract(json.loads(os.environ["HOTPORT_SUCCESSION"])["control"], socket.SOCK_STREAM)
notify(os.environ["NOTIFY_SOCKET"], b"READY=1")
time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Successors import this module, and have the environment from before the monkey."""
    for name, text in {"dies": DIES, "stays": STAYS, "foreign": FOREIGN, "deaf": DEAF}.items():
        root = repr(str(Path(__file__).parent.parent.parent))
        (tmp_path / f"{name}.py").write_text(f"import sys\nsys.path.insert(0, {root})\n{text}")


def port_of(server: hotport.Server) -> int:
    return int(parse_address(server.addresses[0]).port)  # type: ignore[union-attr]


async def answers(server: hotport.Server) -> bool:
    async with await anyio.connect_tcp("127.0.0.1", port_of(server)) as client:
        await client.send(b"hello")
        return await client.receive() == b"hello"


async def refusal(server: hotport.Server, code: str, argv: list[str] | None = None) -> RestartError:
    with pytest.raises(RestartError) as caught:
        await server.restart(argv)
    assert_three_lines(str(caught.value), code)
    assert caught.value.serving == server.generation == 1
    return caught.value


async def test_tests_are_not_started_again() -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0") as server:
        error = await refusal(server, "HP442")
        assert "pytest" in error.cause
        assert error.phase == "refused"


async def test_one_of_several_servers_is_not_restarted() -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0") as server:
        async with hotport.serve(echo, bind="127.0.0.1:0"):
            assert "2 open blocks" in (await refusal(server, "HP447", FOREVER)).cause
        await refusal(server, "HP442")


async def test_closed_server_is_not_restarted() -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0") as server:
        server.close()
        await refusal(server, "HP448", FOREVER)


async def test_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("no program\n")
    text.chmod(0o755)
    async with hotport.serve(echo, bind="127.0.0.1:0") as server:
        assert "/no/such" in (await refusal(server, "HP443", ["/no/such"])).cause
        assert "no-such-program" in (await refusal(server, "HP444", ["no-such-program"])).what
        await refusal(server, "HP444", [str(text)])
        assert await answers(server)


async def test_restart_that_is_given_up_leaves_no_process() -> None:
    children = psutil.Process().children()
    async with hotport.serve(echo, bind="127.0.0.1:0") as server:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await server.restart(FOREVER)
        assert psutil.Process().children() == children
        assert await answers(server)


async def test_block_that_fails_takes_the_successor_along() -> None:
    async def restart(server: hotport.Server) -> None:
        await refusal(server, "HP448", FOREVER)

    async with anyio.create_task_group() as tasks:
        with pytest.raises(ZeroDivisionError):
            async with hotport.serve(echo, bind="127.0.0.1:0") as server:
                tasks.start_soon(restart, server)
                await anyio.wait_all_tasks_blocked()
                raise ZeroDivisionError


async def test_ready_of_somebody_else_is_not_enough(tmp_path: Path) -> None:
    async with hotport.serve(echo, bind="127.0.0.1:0", ready_timeout=1.5) as server:
        error = await refusal(server, "HP446", [sys.executable, str(tmp_path / "foreign.py")])
        assert error.phase == "start up"
        assert await answers(server)


async def test_successor_may_ask_for_more_time() -> None:
    """Also by the word of a process that it has started."""
    start = Start(tuple(FOREVER), "/", {"PATH": os.defpath}, frozenset())
    child = successor.Successor.start(start, generation=2, manager="", listeners=[], addresses=[], asked=[])
    waiting = asyncio.create_task(child.ready(DEADLINE_S))
    try:
        await anyio.wait_all_tasks_blocked()
        timeout = child._timeout
        assert timeout is not None
        before_s = timeout.when()
        assert before_s is not None
        name = "@" + child._notify_socket.getsockname()[1:].decode()
        for extension_s in (1, 2 * DEADLINE_S):  # the first one would be shorter
            assert notify(name, encode_notification(extend_timeout_s=extension_s))
        with anyio.fail_after(DEADLINE_S):
            while timeout.when() == before_s:
                await anyio.lowlevel.checkpoint()
        assert before_s + DEADLINE_S <= (timeout.when() or 0)
    finally:
        waiting.cancel()
        await asyncio.wait({waiting})
        await child.abort(DEADLINE_S)


async def test_successor_that_does_not_accept_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(successor, "COMMIT_TIMEOUT_S", 0.2)
    async with hotport.serve(echo, bind="127.0.0.1:0", ready_timeout=DEADLINE_S) as server:
        error = await refusal(server, "HP446", [sys.executable, str(tmp_path / "deaf.py")])
        assert error.phase == "commit"
        assert await answers(server)


@pytest.mark.parametrize(("kind", "bind"), [("echo", "tcp"), ("sockets", "tcp"), ("Datagrams", "udp")])
async def test_each_kind_of_application_serves_again_if_its_successor_dies(
    tmp_path: Path, kind: str, bind: str
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with hotport.serve(globals()[kind], bind=f"{bind}://127.0.0.1:0", drain_timeout=60) as server:
            address = ("127.0.0.1", port_of(server))
            held = socket.socket(type=socket.SOCK_DGRAM if bind == "udp" else socket.SOCK_STREAM)
            held.connect(address)
            if kind == "echo":  # the old one does not leave before it
                held.sendall(b"first")
                assert await anyio.to_thread.run_sync(held.recv, 5) == b"first"
            argv = [sys.executable, str(tmp_path / "dies.py"), kind, server.addresses[0]]
            error = await refusal(server, "HP449", argv)
            assert "killed by SIGKILL" in error.cause
            assert not server.connections.draining.is_set()
            for _ in range(2):
                with socket.socket(type=held.type) as client:
                    client.settimeout(DEADLINE_S)
                    client.connect(address)
                    client.sendall(b"again")
                    assert await anyio.to_thread.run_sync(client.recv, 5) == b"again"
            held.close()
            raise ZeroDivisionError  # this cuts at once


async def test_drain_that_fails_does_not_take_the_service_back_from_the_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """It drained again as if it still served, and removed the socket file on which its successor listened."""
    path = tmp_path / "app.sock"

    async def fail() -> None:
        raise LookupError("a bug of ours")

    async with hotport.serve(echo, bind=f"unix:{path}") as server:
        monkeypatch.setattr(server._inner.connections, "wait_empty", fail)
        done = await server.restart([sys.executable, str(tmp_path / "stays.py"), "echo", server.addresses[0]])
    try:
        assert "a bug of ours" in log.text
        assert path.exists()
        async with await anyio.connect_unix(path) as client:
            await client.send(b"hello")
            assert await client.receive() == b"hello"
    finally:
        os.kill(done.pid, signal.SIGKILL)
        os.waitpid(done.pid, 0)  # noqa: ASYNC222
        path.unlink()


async def test_restart_on_hup_that_fails_unexpectedly_is_logged(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    async def fail(_: hotport.Server) -> None:
        raise LookupError("a bug of ours")

    monkeypatch.setattr(hotport.Server, "restart", fail)
    async with hotport.serve(echo, bind="127.0.0.1:0", restart_on_hup=True) as server:
        os.kill(os.getpid(), signal.SIGHUP)
        while "restart.failed" not in log.text:
            await anyio.lowlevel.checkpoint()
        assert "a bug of ours" in log.text
        assert await answers(server)


async def test_hup_restarts_and_the_log_says_why_not(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGHUP)
    async with hotport.serve(echo, bind="127.0.0.1:0", restart_on_hup=True):
        os.kill(os.getpid(), signal.SIGHUP)
        while "HP442" not in caplog.text:
            await anyio.lowlevel.checkpoint()
    assert signal.getsignal(signal.SIGHUP) is before


async def test_hup_is_no_request_before_the_leader_of_the_session_has_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Under nohup the successor of such a leader took the hangup at its end for a request, and restarted once more."""
    leader = SimpleNamespace(leads_session=True, over=asyncio.Event())
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        async with hotport.serve(echo, bind="127.0.0.1:0") as server:
            with _restarting_on_hup(server, cast("Predecessor", leader)):
                os.kill(os.getpid(), signal.SIGHUP)
                await anyio.wait_all_tasks_blocked()
                assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
                leader.over.set()
                await anyio.wait_all_tasks_blocked()
                assert "HP442" not in caplog.text
                os.kill(os.getpid(), signal.SIGHUP)
                while "HP442" not in caplog.text:
                    await anyio.lowlevel.checkpoint()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_signals_are_for_the_main_thread() -> None:
    async def main() -> None:
        with pytest.raises(ConfigError) as caught:
            async with hotport.serve(echo, bind="127.0.0.1:0", restart_on_hup=True):
                pass
        assert_three_lines(str(caught.value), "HP450")

    await anyio.to_thread.run_sync(asyncio.run, main())
