"""What goes wrong while connections move between workers of a generation costs no client that was not with the dead."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import websockets
from websockets.asyncio.client import connect

from tests.service.test_balance import shares
from tests.support import DEADLINE_S, Service, eventually, write_code

APP = """\
async def app(scope, receive, send):
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})
"""

CLIENTS = 60


class Talkers:
    """WebSocket clients in a thread, each of which sends one message after the other until its connection ends.

    Attributes:
        answered: How many messages of each were answered, as they should be.
        lost: Those whose connection has ended.
    """

    def __init__(self, port: int) -> None:
        self.answered = [0] * CLIENTS
        self.lost: set[int] = set()
        self._port = port
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Talkers:
        self._thread.start()
        self.assert_served()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(self._talk(number))

    async def _talk(self, number: int) -> None:
        try:
            async with connect(f"ws://127.0.0.1:{self._port}/", open_timeout=DEADLINE_S) as client:
                while not self._is_over.is_set():
                    text = f"{number}.{self.answered[number]}"
                    await client.send(text)
                    if await client.recv() != text:
                        return self.lost.add(number)
                    self.answered[number] += 1
                    await asyncio.sleep(0.1)  # load, but not so much that what is tested gets no processor
        except (OSError, websockets.WebSocketException):
            self.lost.add(number)

    def assert_served(self) -> None:
        """All that are not lost get two answers more: the second one is to a question that was asked later."""
        wanted = [count + 2 for count in self.answered]

        def has_all() -> bool:
            pairs = enumerate(zip(self.answered, wanted, strict=True))
            return all(count >= least or number in self.lost for number, (count, least) in pairs)

        eventually(has_all, "each is answered")


@contextmanager
def talking(tmp_path: Path, *options: str) -> Iterator[tuple[Service, Talkers]]:
    """A service with one worker, which has all connections."""
    write_code(tmp_path / "app.py", APP)
    args = ("app:app", "--lifespan", "off", "--handoff", "websocket", *options)
    with Service(tmp_path, *args) as service, Talkers(service.wait_ready().port) as talkers:
        yield service, talkers


def wait_moving(service: Service) -> None:
    eventually(lambda: sum(shares(service)[:-1]) > 0, "connections have begun to move")


def test_worker_that_is_killed_while_connections_move_to_it_costs_those_that_have_moved(tmp_path: Path) -> None:
    with talking(tmp_path) as (service, talkers):
        service.run("scale", "2")
        wait_moving(service)
        os.kill(max(service.status()["workers"], key=lambda worker: worker["worker"])["pid"], signal.SIGKILL)

        def moved() -> int:
            events = service.log_events("balance.moved")
            return sum(event["count"] for event in events if event["to"] == ["worker-1.2.sock"])

        eventually(lambda: 0 < moved() == len(talkers.lost), "those that had moved are lost")
        talkers.assert_served()
        service.wait_serving(2)
        service.run("rebalance")
        talkers.assert_served()
        assert len(talkers.lost) == moved() < CLIENTS


def test_worker_that_is_killed_while_it_hands_connections_over_costs_those_that_have_not_moved(tmp_path: Path) -> None:
    with talking(tmp_path) as (service, talkers):
        service.run("scale", "2")
        wait_moving(service)
        os.kill(min(service.status()["workers"], key=lambda worker: worker["worker"])["pid"], signal.SIGKILL)
        eventually(lambda: sum(shares(service)) == CLIENTS - len(talkers.lost) < CLIENTS, "the others are there")
        talkers.assert_served()
        assert 0 < sum(shares(service)) == CLIENTS - len(talkers.lost)


def test_workers_balance_under_the_next_supervisor_after_theirs_was_killed(tmp_path: Path) -> None:
    """A worker that the next one started did not know of those from before."""
    with talking(tmp_path) as (service, talkers):
        service.kill()
        talkers.assert_served()
        args = ("app:app", "--lifespan", "off", "--handoff", "websocket")
        with Service(tmp_path, *args) as successor:
            successor.wait_ready()
            assert successor.run("scale", "3").returncode == 0
            successor.wait_serving(3)
            eventually(lambda: shares(successor)[0] >= CLIENTS // 3 - 8, "they have begun to share")
            successor.run("rebalance")
            talkers.assert_served()
            assert sum(shares(successor)) == CLIENTS
            assert not successor.log_events("balance.off")
            assert not talkers.lost


def test_restart_while_connections_move_loses_none(tmp_path: Path) -> None:
    """Both sides leave: what is under way arrives, and moves on to the next generation."""
    with talking(tmp_path) as (service, talkers):
        service.run("scale", "2")
        wait_moving(service)
        report = service.restart()
        assert report["outcome"] == "done"
        eventually(lambda: sum(shares(service)) == CLIENTS and len(shares(service)) == 2, "all are there")
        talkers.assert_served()
        assert not talkers.lost


def test_worker_that_leaves_while_connections_move_to_it_gives_them_back(tmp_path: Path) -> None:
    with talking(tmp_path) as (service, talkers):
        service.run("scale", "3")
        wait_moving(service)
        service.run("scale", "1")
        eventually(lambda: shares(service) == [CLIENTS], "all are with the one that stays")
        talkers.assert_served()
        assert not talkers.lost


def test_full_worker_hands_connections_to_those_that_come(tmp_path: Path) -> None:
    """It did not see them, and stayed full: `hotport scale` and `hotport rebalance` changed nothing."""
    with talking(tmp_path, "--connections-max", str(CLIENTS)) as (service, talkers):
        service.run("scale", "3")
        service.wait_serving(3)
        eventually(lambda: shares(service)[0] >= CLIENTS // 3 - 8, "the new ones have begun to get their share")
        service.run("rebalance")
        talkers.assert_served()
        assert shares(service)[-1] <= CLIENTS // 3 + 4
        assert sum(shares(service)) == CLIENTS
        assert not talkers.lost
