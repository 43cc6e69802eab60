"""What the service manager hears, byte for byte."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from trio.testing import MockClock

from hotport.model.effects import Announce, News
from hotport.model.inputs import Clock, Timer
from hotport.supervisor import manager as manager_module
from hotport.supervisor.manager import LATE_MAX, ServiceManager
from hotport.supervisor.timers import Timers

US = os.getpid()


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "trio", {"clock": MockClock(autojump_threshold=0)}


class Receiver:
    """The manager's end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listen()

    def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(self.path))
        self.sock.setblocking(False)

    def heard(self) -> list[bytes]:
        """Everything that has been said."""
        words = []
        while True:
            try:
                words.append(self.sock.recv(65536))
            except BlockingIOError:
                return words

    def manager(self, **environ: str) -> ServiceManager:
        return ServiceManager({"NOTIFY_SOCKET": str(self.path), **environ}, US)


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    made = Receiver(tmp_path / "notify")
    yield made
    made.sock.close()
    made.path.unlink()


@pytest.fixture
def said(receiver: Receiver) -> Iterator[tuple[ServiceManager, Receiver]]:
    """A manager that has heard that the first generation serves."""
    manager = receiver.manager()
    manager.hear(Announce(News.STARTED, generation=1), serving=1)
    assert receiver.heard() == [b"READY=1\nSTATUS=generation 1 serves"]
    yield manager, receiver
    manager.close()


def reloading(datagram: bytes, status: bytes = b"") -> bool:
    """Whether it begins a reload, at the time that it says."""
    found = re.fullmatch(rb"RELOADING=1\nSTATUS=(.*)\nMONOTONIC_USEC=(\d+)|RELOADING=1\nMONOTONIC_USEC=(\d+)", datagram)
    assert found is not None, datagram
    assert (found[1] or b"") == status
    age_s = time.monotonic() - int(found[2] or found[3]) / 1e6
    return -0.001 <= age_s < 60


def test_a_restart_is_a_reload_that_ends(said: tuple[ServiceManager, Receiver]) -> None:
    manager, receiver = said
    manager.hear(Announce(News.RESTART_BEGAN, generation=2), serving=1)
    manager.hear(Announce(News.READY, generation=2), serving=1)
    manager.hear(Announce(News.DONE, generation=2), serving=2)
    began, ended = receiver.heard()
    assert reloading(began, b"generation 1 serves, generation 2 starts")
    assert ended == b"READY=1\nSTATUS=generation 2 serves"


@pytest.mark.parametrize(
    ("why", "shown"),
    [
        ("", b"worker 3 exited 1"),
        ("HP501 cannot import app\n  cause: it is not there\n  try:   ls", b"HP501 cannot import app"),
        ("Traceback\n  File x\nSyntaxError: invalid syntax\n", b"SyntaxError: invalid syntax"),
    ],
)
def test_an_aborted_restart_is_over_too_and_says_why(
    said: tuple[ServiceManager, Receiver], why: str, shown: bytes
) -> None:
    manager, receiver = said
    manager.hear(Announce(News.RESTART_BEGAN, generation=2), serving=1)
    manager.hear(Announce(News.ABORTED, generation=2, worker=3, why="worker 3 exited 1"), serving=1, why=why)
    assert receiver.heard()[1] == (
        b"READY=1\nSTATUS=generation 1 serves, the restart to generation 2 was aborted: " + shown
    )


def test_a_reload_that_was_refused_is_answered_all_the_same(said: tuple[ServiceManager, Receiver]) -> None:
    """systemctl reload waited until its timeout for a restart that was never begun."""
    manager, receiver = said
    manager.refused("HP300 cannot read hotport.toml\n  cause: it is not TOML")
    began, ended = receiver.heard()
    assert reloading(began)
    assert ended == b"READY=1\nSTATUS=HP300 cannot read hotport.toml"


def test_a_reload_during_a_restart_ends_with_it(said: tuple[ServiceManager, Receiver]) -> None:
    manager, receiver = said
    manager.hear(Announce(News.RESTART_BEGAN, generation=2), serving=1)
    receiver.heard()
    manager.refused("HP410 in progress")
    (again,) = receiver.heard()
    assert reloading(again)
    manager.hear(Announce(News.DONE, generation=2), serving=2)
    assert receiver.heard() == [b"READY=1\nSTATUS=generation 2 serves"]


def test_ready_is_no_answer_before_the_start_and_after_the_end(receiver: Receiver) -> None:
    manager = receiver.manager()
    manager.refused("HP410 still starting")
    manager.hear(Announce(News.STARTED, generation=1), serving=1)
    manager.hear(Announce(News.RESTART_BEGAN, generation=2), serving=1)
    receiver.heard()
    manager.hear(Announce(News.STOPPING), serving=1)
    manager.hear(Announce(News.ABORTED, generation=2, why="the service is stopping"), serving=1)
    manager.refused("HP410 stopping")
    assert receiver.heard() == [b"STOPPING=1\nSTATUS=stopping"]
    manager.close()


def test_a_service_that_never_served_says_why(receiver: Receiver) -> None:
    manager = receiver.manager()
    manager.failed("Traceback\nValueError: no")
    manager.close()
    manager.failed("not any more")
    assert receiver.heard() == [b"STATUS=ValueError: no"]


@pytest.mark.anyio
async def test_timeouts_are_extended_as_long_as_timers_bound_the_wait(receiver: Receiver) -> None:
    manager = receiver.manager()

    def extended_s() -> list[float]:
        words = [word.partition(b"=") for word in receiver.heard()]
        return [int(usec) / 1e6 for key, _, usec in words if key == b"EXTEND_TIMEOUT_USEC"]

    async with anyio.create_task_group() as tasks:
        timers = Timers(tasks, lambda timer: None)
        manager.extend(timers)
        assert extended_s() == [], "nothing bounds it"
        timers.start(Timer(Clock.READY, 1), 60)
        manager.extend(timers)
        manager.extend(timers)
        timers.start(Timer(Clock.OPEN, 2), 5)
        manager.extend(timers)
        assert extended_s() == [65], "once, and with a margin"
        timers.extend(Timer(Clock.READY, 1), 90)
        manager.extend(timers)
        assert extended_s() == [95], "a worker has asked for more time"
        manager.hear(Announce(News.STARTED, generation=1), serving=1)
        timers.start(Timer(Clock.DRAIN, 3), 3600)
        manager.extend(timers)
        assert extended_s() == [], "it does not wait for that"
        manager.hear(Announce(News.RESTART_BEGAN, generation=2), serving=1)
        manager.extend(timers)
        assert extended_s() == [95], "the drain is another generation's"
        manager.hear(Announce(News.STOPPING), serving=1)
        manager.extend(timers)
        assert extended_s() == [3605]
        tasks.cancel_scope.cancel()
    manager.close()


@pytest.mark.anyio
async def test_the_time_of_a_lame_duck_is_added_to_the_timeout_of_a_stop(receiver: Receiver) -> None:
    manager = receiver.manager()
    async with anyio.create_task_group() as tasks:
        timers = Timers(tasks, lambda timer: None)
        manager.hear(Announce(News.STARTED, generation=1), serving=1)
        receiver.heard()
        manager.hear(Announce(News.LAME_DUCK, why="60 s"), serving=1)
        timers.start(Timer(Clock.LAME_DUCK), 60)
        manager.extend(timers)
        status, extension = receiver.heard()
        assert status == b"STATUS=generation 1 serves as a lame duck for 60 s, then stops"
        assert extension == b"EXTEND_TIMEOUT_USEC=65000000"
        manager.hear(Announce(News.STOPPING), serving=1)
        timers.start(Timer(Clock.DRAIN, 1), 90)
        manager.extend(timers)
        assert receiver.heard()[-1] == b"EXTEND_TIMEOUT_USEC=95000000"
        tasks.cancel_scope.cancel()
    manager.close()


@pytest.mark.anyio
@pytest.mark.parametrize("pid", [None, US], ids=["anybody", "us"])
async def test_watchdog_is_fed_twice_as_often_as_it_asks(receiver: Receiver, pid: int | None) -> None:
    environ = {"WATCHDOG_USEC": "3000000"} | ({} if pid is None else {"WATCHDOG_PID": str(pid)})
    manager = receiver.manager(**environ)
    assert manager.watchdog_s == 3
    with anyio.move_on_after(5):
        await manager.run()
    assert receiver.heard() == [b"WATCHDOG=1"] * 4  # after 0, 1.5, 3 and 4.5 seconds
    manager.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(US + 1)},
        {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "us"},
    ],
)
async def test_a_watchdog_that_is_not_ours_is_not_fed(receiver: Receiver, environ: dict[str, str]) -> None:
    manager = receiver.manager(**environ)
    with anyio.move_on_after(60):
        await manager.run()
    assert receiver.heard() == []
    manager.close()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nowhere/notify"}])
def test_without_a_manager_nothing_is_said(environ: dict[str, str]) -> None:
    manager = ServiceManager({**environ, "FDSTORE": "8"}, US)
    manager.hear(Announce(News.STARTED, generation=1), serving=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        manager.park({"tcp://127.0.0.1:1": listener, "tcp://127.0.0.1:2": listener}, held=["tcp://127.0.0.1:2"])
    manager.forget(["hotport+x"])
    assert not manager.keeps("tcp://127.0.0.1:1")
    assert not manager.keeps("tcp://127.0.0.1:2"), "who has started us does not hold what it passed"
    manager.close()


def test_a_manager_that_begins_to_listen_later_hears(receiver: Receiver) -> None:
    manager = receiver.manager()
    receiver.sock.close()
    manager.hear(Announce(News.STARTED, generation=1), serving=1)
    receiver.listen()
    manager.hear(Announce(News.DONE, generation=2), serving=2)
    assert receiver.heard() == [b"READY=1\nSTATUS=generation 2 serves"]
    manager.close()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_manager_that_does_not_read_hears_it_later_and_in_order(receiver: Receiver, anyio_backend: str) -> None:
    """The kernel queues ten datagrams on many machines; the eleventh would be lost, or would stop the supervisor."""
    manager = receiver.manager(WATCHDOG_USEC="3600000000")
    count = LATE_MAX - 10  # more than the kernel takes, where it takes few
    for number in range(count):
        manager.hear(Announce(News.DONE, generation=number), serving=number)
    heard: list[bytes] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(manager.run)
        with anyio.fail_after(60):
            while len(heard) < count:
                await anyio.wait_readable(receiver.sock)
                heard += [word for word in receiver.heard() if word != b"WATCHDOG=1"]
        tasks.cancel_scope.cancel()
    assert heard == [b"READY=1\nSTATUS=generation %d serves" % number for number in range(count)]
    manager.close()


def test_what_is_kept_for_a_manager_that_does_not_read_is_bounded(receiver: Receiver) -> None:
    manager = receiver.manager()
    for number in range(5000):
        manager.hear(Announce(News.DONE, generation=number), serving=number)
    assert len(manager._late) <= LATE_MAX
    manager.close()


# -- the store ----------------------------------------------------------------------------------------------


def receive_stored(receiver: Receiver) -> list[tuple[bytes, tuple[int, int]]]:
    """What came with descriptors, and of each descriptor what tells its socket from others."""
    received: list[tuple[bytes, tuple[int, int]]] = []
    while True:
        try:
            payload, fds, _, _ = socket.recv_fds(receiver.sock, 4096, 8)
        except BlockingIOError:
            return received
        (fd,) = fds
        found = os.fstat(fd)
        received.append((payload, (found.st_dev, found.st_ino)))
        os.close(fd)


def test_every_listener_is_parked_under_its_address(receiver: Receiver, tmp_path: Path) -> None:
    manager = receiver.manager(FDSTORE="2")
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
        socket.create_server(("127.0.0.1", 0)) as three,
        socket.create_server(("127.0.0.1", 0)) as four,
    ):
        listeners = {
            "unix:/" + "\u65e5" * 30: four,
            "tcp://127.0.0.1:1": one,
            "tcp://127.0.0.1:2": two,
            "udp://127.0.0.1:3": three,
            "tcp://127.0.0.1:4": four,
        }
        manager.park(listeners, held=["tcp://127.0.0.1:1"])
        told = [os.fstat(listener.fileno()) for listener in (two, three)]
        assert receive_stored(receiver) == [
            (b"FDSTORE=1\nFDNAME=hotport+tcp%3A//127.0.0.1%3A2\nFDPOLL=0", (told[0].st_dev, told[0].st_ino)),
            (b"FDSTORE=1\nFDNAME=hotport+udp%3A//127.0.0.1%3A3\nFDPOLL=0", (told[1].st_dev, told[1].st_ino)),
        ]
        kept = [address for address in listeners if manager.keeps(address)]
    assert kept == ["tcp://127.0.0.1:1", "tcp://127.0.0.1:2", "udp://127.0.0.1:3"]
    manager.close()


def test_a_socket_that_took_the_place_of_another_is_parked_in_its_place(receiver: Receiver) -> None:
    """The manager kept a socket whose file had been removed, and the next start listened where nobody could find it."""
    manager = receiver.manager(FDSTORE="2")
    with socket.create_server(("127.0.0.1", 0)) as old, socket.create_server(("127.0.0.1", 0)) as new:
        manager.park({"unix:/a": old})
        manager.follow({"unix:/a": old})
        assert len(receive_stored(receiver)) == 1
        manager.follow({"unix:/a": new})
        assert receiver.sock.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=hotport+unix%3A/a"
        found = os.fstat(new.fileno())
        assert receive_stored(receiver) == [
            (b"FDSTORE=1\nFDNAME=hotport+unix%3A/a\nFDPOLL=0", (found.st_dev, found.st_ino))
        ]
    assert manager.keeps("unix:/a")
    manager.close()


@pytest.mark.parametrize("environ", [{}, {"FDSTORE": "0"}, {"FDSTORE": "much"}, {"FDSTORE": "-1"}])
def test_nothing_is_parked_where_there_is_no_store(receiver: Receiver, environ: dict[str, str]) -> None:
    manager = receiver.manager(**environ)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        manager.park({"tcp://127.0.0.1:1": listener})
    assert receiver.heard() == []
    assert not manager.keeps("tcp://127.0.0.1:1")
    manager.close()


def test_a_listener_that_the_manager_does_not_take_is_not_counted_on(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager_module, "BLOCK_S", 0.01)
    manager = receiver.manager(FDSTORE="8")
    for number in range(1000):
        manager.hear(Announce(News.DONE, generation=number), serving=number)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        manager.park({"tcp://127.0.0.1:1": listener})
        receiver.sock.close()
        manager.park({"tcp://127.0.0.1:2": listener})
    assert not manager.keeps("tcp://127.0.0.1:1")
    assert not manager.keeps("tcp://127.0.0.1:2")
    manager.close()
    receiver.listen()


def test_forgetting_waits_until_the_manager_has_forgotten(receiver: Receiver) -> None:
    manager = receiver.manager(FDSTORE="8")
    heard: list[bytes] = []

    def read() -> None:
        receiver.sock.settimeout(60)
        while len(heard) < 3:
            payload, fds, _, _ = socket.recv_fds(receiver.sock, 4096, 8)
            heard.append(payload)
            for fd in fds:
                os.close(fd)

    reader = threading.Thread(target=read)
    reader.start()
    manager.forget(["hotport+a", "hotport+b"])
    assert heard == [b"FDSTOREREMOVE=1\nFDNAME=hotport+a", b"FDSTOREREMOVE=1\nFDNAME=hotport+b", b"BARRIER=1"]
    reader.join()
    manager.close()


def test_forgetting_ends_even_if_the_manager_is_silent(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "BARRIER_S", 0.01)
    manager = receiver.manager(FDSTORE="8")
    manager.forget([])
    assert receiver.heard() == []
    manager.forget(["hotport+a"])
    assert receiver.heard() == [b"FDSTOREREMOVE=1\nFDNAME=hotport+a", b"BARRIER=1"]
    manager.close()
