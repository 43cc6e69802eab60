"""Listeners that come back from the service manager are the ones that the options ask for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hotport.address import Address, UnixAddress, parse_address
from hotport.kernel.sockets import bind_listener, bound_address, location
from hotport.supervisor.store import TakenBack, take_back
from hotport.wire.sdnotify import store_name

#: Where passed descriptors begin in these tests; 3 is somebody else's here.
FIRST = 200

Pass = Callable[..., dict[str, str]]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Pass:
    """Pass descriptors under names, as the service manager does; `take_back` owns them."""
    monkeypatch.setattr("hotport.wire.listenfds.FIRST_FD", FIRST)

    def give(*held: tuple[str, int]) -> dict[str, str]:
        for number, (_, fd) in enumerate(held):
            os.dup2(fd, FIRST + number)
        names = ":".join(name for name, _ in held)
        return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(held)), "LISTEN_FDNAMES": names}

    return give


def stored(stack: ExitStack, text: str) -> tuple[str, int, Address]:
    """A listener as an earlier supervisor has bound it: its name in the store, its descriptor, its address."""
    address = parse_address(text)
    sock = stack.enter_context(bind_listener(address, backlog=16))
    where = bound_address(address, sock)
    name = store_name(location(str(where)))
    assert name is not None
    return name, sock.fileno(), where


def closed(taken: TakenBack) -> list[str]:
    """Close them; the addresses for which there was one."""
    for sock in taken.listeners.values():
        sock.close()
    return list(taken.listeners)


@pytest.mark.parametrize("text", ["127.0.0.1:0", "udp://127.0.0.1:0", "unix:@hotport-test"])
def test_listener_comes_back_for_its_address(stack: ExitStack, passed: Pass, text: str) -> None:
    name, fd, where = stored(stack, text)
    taken = take_back([str(where)], passed((name, fd)), backlog=16)
    assert taken.unfit == ()
    sock = taken.listeners[str(where)]
    assert os.path.sameopenfile(sock.fileno(), fd)
    assert not sock.getblocking()
    assert not sock.get_inheritable()
    closed(taken)


def test_host_name_and_any_port_find_where_they_were(stack: ExitStack, passed: Pass) -> None:
    name, fd, _ = stored(stack, "localhost:0")
    texts = ["tcp://localhost:0"]
    assert closed(take_back(texts, passed((name, fd)), backlog=16)) == texts


def test_any_port_leaves_a_named_one_to_its_address(stack: ExitStack, passed: Pass) -> None:
    first, second = stored(stack, "127.0.0.1:0"), stored(stack, "127.0.0.1:0")
    texts = ["tcp://127.0.0.1:0", str(first[2])]
    taken = take_back(texts, passed(first[:2], second[:2]), backlog=16)
    assert os.path.sameopenfile(taken.listeners[texts[0]].fileno(), second[1])
    assert os.path.sameopenfile(taken.listeners[texts[1]].fileno(), first[1])
    closed(taken)


def test_backlog_is_the_one_that_options_say_now(stack: ExitStack, passed: Pass) -> None:
    name, fd, where = stored(stack, "127.0.0.1:0")
    taken = take_back([str(where)], passed((name, fd)), backlog=1)
    sock = taken.listeners[str(where)]
    clients = [stack.enter_context(socket.socket()) for _ in range(4)]
    for client in clients:
        client.setblocking(False)
        client.connect_ex(sock.getsockname())
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    assert int.from_bytes(info[28:32], "little") == 1, "tcpi_sacked of a listener is its backlog"
    closed(taken)


@pytest.mark.parametrize("other", ["tcp://127.0.0.2:{port}", "udp://127.0.0.1:{port}", "unix:s", "fd://{fd}"])
def test_listener_of_another_address_is_given_up(stack: ExitStack, passed: Pass, other: str) -> None:
    name, fd, where = stored(stack, "127.0.0.1:0")
    port = str(where).rpartition(":")[2]
    taken = take_back([other.format(port=port, fd=FIRST + 1)], passed((name, fd)), backlog=16)
    assert closed(taken) == []
    assert taken.unfit == (name,)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(FIRST)


def test_what_does_not_listen_is_given_up(stack: ExitStack, passed: Pass) -> None:
    sock = stack.enter_context(socket.socket())
    sock.bind(("127.0.0.1", 0))
    address = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
    name = str(store_name(parse_address(address)))
    taken = take_back([address], passed((name, sock.fileno()), (name, sock.fileno())), backlog=16)
    assert (closed(taken), taken.unfit) == ([], (name,))


def test_a_name_without_a_descriptor_is_given_up(passed: Pass) -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "hotport+unix%3A@x"}
    assert take_back(["unix:@x"], environ, backlog=16).unfit == ("hotport+unix%3A@x",)


def test_descriptors_of_others_are_left_alone(stack: ExitStack, passed: Pass) -> None:
    _, fd, where = stored(stack, "127.0.0.1:0")
    taken = take_back([str(where)], passed(("web", fd)), backlog=16)
    assert (closed(taken), taken.unfit) == ([], ())
    os.close(FIRST)
    assert take_back([str(where)], {}, backlog=16) == TakenBack({}, ())


def test_socket_file_is_known_by_its_inode(
    stack: ExitStack, passed: Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener whose file is gone, or somebody else's now, is reached by nobody."""
    monkeypatch.chdir(tmp_path)
    name, fd, _ = stored(stack, "unix:s")
    assert name == store_name(UnixAddress(str(tmp_path / "s")))
    assert closed(take_back(["unix:s"], passed((name, fd)), backlog=16)) == ["unix:s"]
    Path("other").mkdir()
    monkeypatch.chdir("other")
    assert closed(take_back(["unix:../s"], passed((name, fd)), backlog=16)) == ["unix:../s"]
    assert take_back(["unix:s"], passed((name, fd)), backlog=16).unfit == (name,)
    Path("../s").unlink()
    assert take_back(["unix:../s"], passed((name, fd)), backlog=16).unfit == (name,)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind("../s")
        assert take_back(["unix:../s"], passed((name, fd)), backlog=16).unfit == (name,)
    Path("../s").unlink()
