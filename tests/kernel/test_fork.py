"""What a forked child has of a process that withholds descriptors: with real forks."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest

from hotport.kernel import fork
from hotport.kernel.fork import has_forked, withheld, withhold
from hotport.kernel.spawn import spawn
from tests.support import DEADLINE_S

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Pair:
    """Owns one end of a socket pair."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()

    def descriptors(self) -> Iterable[int]:
        return (self.ours.fileno(), -1)


class Careless:
    def descriptors(self) -> Iterable[int]:
        raise RuntimeError("a bug")


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    with pair.ours, pair.theirs:
        yield pair


@pytest.fixture(autouse=True)
def unforked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork._withheld, "has_forked", False)


def in_child(claim: str, names: dict[str, object]) -> bool:
    """Whether the expression is true in a forked child."""
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            code = 0 if eval(claim, globals() | names) else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 1)
    return status == 0


def test_child_finds_a_peer_that_has_hung_up_in_place_of_each_descriptor(pair: Pair) -> None:
    withhold(pair)
    pair.theirs.sendall(b"for the parent")
    assert in_child("os.read(pair.ours.fileno(), 100) == b''", {"pair": pair})
    assert in_child("not os.get_inheritable(pair.ours.fileno())", {"pair": pair})
    assert pair.ours.recv(100) == b"for the parent"
    pair.ours.close()
    assert pair.theirs.recv(1) == b""  # the child that is gone could not have kept it open, nor could a live one


def test_single_socket_is_withheld_while_it_lives(pair: Pair) -> None:
    pair.theirs.sendall(b"for the parent")
    assert withheld(pair.ours) is pair.ours
    assert in_child("os.read(pair.ours.fileno(), 100) == b''", {"pair": pair})


def test_number_stays_taken_so_that_nothing_else_can_be_closed_by_it(pair: Pair) -> None:
    withhold(pair)
    assert in_child("os.open('/dev/null', os.O_RDONLY) != pair.ours.fileno()", {"pair": pair})


def test_one_owner_that_fails_costs_the_others_nothing(pair: Pair) -> None:
    careless = Careless()
    withhold(careless)
    withhold(pair)
    assert in_child("os.read(pair.ours.fileno(), 1) == b''", {"pair": pair})


def test_owner_that_is_gone_withholds_nothing() -> None:
    left, right = socket.socketpair()
    with left, right:
        owner = Pair()
        for end in (owner.ours, owner.theirs):
            end.close()
        owner.ours = left
        withhold(owner)
        del owner
        right.sendall(b"x")
        assert in_child("os.read(fd, 1) == b'x'", {"fd": left.fileno()})


def test_child_without_a_free_descriptor_closes_what_it_must_not_have(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def socketpair() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    withhold(pair)
    monkeypatch.setattr(socket, "socketpair", socketpair)
    assert in_child("is_closed(fd)", {"fd": pair.ours.fileno()})


def test_parent_knows_that_it_has_forked(pair: Pair) -> None:
    withhold(pair)
    assert not has_forked()
    assert in_child("not has_forked()", {})
    assert has_forked()


def test_program_that_is_spawned_gets_what_it_is_given(pair: Pair) -> None:
    withhold(pair)
    child = spawn(
        [sys.executable, "-c", "import os; os.write(3, b'here')"],
        environment=dict(os.environ),
        cwd="/",
        listeners=[pair.ours.fileno()],
        listen_names=["pair"],
    )
    try:
        assert pair.theirs.recv(10) == b"here"
    finally:
        os.waitpid(child.pid, 0)
        os.close(child.pidfd)
    assert not has_forked()


@pytest.mark.anyio
async def test_program_that_the_event_loop_starts_gets_what_it_is_given(pair: Pair) -> None:
    """As inetd does it: a connection is the program's standard input and output."""
    withhold(pair)
    pair.theirs.sendall(b"through a program")
    pair.theirs.shutdown(socket.SHUT_WR)
    process = await asyncio.create_subprocess_exec("cat", stdin=pair.ours.fileno(), stdout=pair.ours.fileno())
    assert await asyncio.wait_for(process.wait(), DEADLINE_S) == 0
    assert pair.theirs.recv(100) == b"through a program"


@pytest.mark.anyio
async def test_signal_to_a_child_is_the_childs(pair: Pair) -> None:
    """`multiprocessing.Process.terminate()`: the child lived on, and the parent's handler was called."""
    withhold(pair)
    loop = asyncio.get_running_loop()
    heard = loop.create_future()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        loop.add_signal_handler(number, heard.set_result, number)
    try:
        for _ in range(20):  # also one that comes before the child has run anything
            pid = os.fork()
            if pid == 0:
                while True:
                    signal.pause()
            os.kill(pid, signal.SIGTERM)
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM  # noqa: ASYNC222  it ends at once
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
        assert in_child("signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask", {"mask": mask})
        assert in_child("signal.getsignal(signal.SIGINT) is signal.default_int_handler", {})
        assert in_child("signal.set_wakeup_fd(-1) == -1", {})
        os.kill(os.getpid(), signal.SIGINT)
        assert await asyncio.wait_for(heard, DEADLINE_S) == signal.SIGINT
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


@pytest.mark.anyio
async def test_child_cannot_change_what_the_parents_loop_waits_for(pair: Pair) -> None:
    """epoll watches open file descriptions: what a child removes was removed from the parent's instance."""
    withhold(pair)
    loop = asyncio.get_running_loop()
    is_readable = asyncio.Event()
    other, others = socket.socketpair()  # of the application: it stays open in the child
    with other, others:
        loop.add_reader(other, is_readable.set)
        await asyncio.sleep(0)  # into epoll
        assert in_child("loop.remove_reader(other) or loop._run_once_for_test()", {"loop": Once(loop), "other": other})
        others.sendall(b"x")
        await asyncio.wait_for(is_readable.wait(), DEADLINE_S)
        loop.remove_reader(other)


def is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False


class Once:
    """A loop, as far as a child may touch it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def remove_reader(self, sock: socket.socket) -> None:
        self._loop.remove_reader(sock)

    def _run_once_for_test(self) -> bool:
        return select.epoll.fromfd(fork._poll_descriptor(self._loop)).poll(0) == []


COMES_BACK = """
import asyncio, logging, os, sys
from hotport.kernel.fork import withhold

class Owner:
    def descriptors(self):
        return ()

def leave():
    os._exit(4)

def fail():
    raise RuntimeError

async def handler(end):
    pid = os.fork()
    if pid == 0:
        end()
    return pid

async def main():
    owner = Owner()
    withhold(owner)
    for end in (int, fail, sys.exit, leave):
        pid = await asyncio.create_task(handler(end))
        _, status = await asyncio.to_thread(os.waitpid, pid, 0)
        print(os.waitstatus_to_exitcode(status), os.getpid() == parent)

parent = os.getpid()
logging.basicConfig(format="%(message)s")
with asyncio.Runner(loop_factory=FACTORY) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("factory", ["asyncio.new_event_loop", "__import__('uvloop').new_event_loop"])
def test_child_that_comes_back_into_the_event_loop_ends(factory: str) -> None:
    """It ran the parent's tasks a second time, on the parent's descriptors."""
    program = COMES_BACK.replace("FACTORY", factory)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.stdout == "1 True\n1 True\n1 True\n4 True\n"
    assert done.stderr.count("has come back into its parent's event loop") == 3
