"""Kernel behaviour that strategies rely on: who gets a connection, and what a deaf listener does."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from hotport.address import TcpAddress
from hotport.errors import KernelError
from hotport.kernel.sockets import accept_queue_length, bind_guard, bind_listener, rebind
from hotport.kernel.steer import can_steer, deafen, share_port, steer, unsteer
from tests.support import assert_three_lines

HERE = TcpAddress("127.0.0.1", 0)

Keep = Callable[[socket.socket], socket.socket]


@pytest.fixture
def keep() -> Iterator[Keep]:
    kept: list[socket.socket] = []

    def keep(sock: socket.socket) -> socket.socket:
        kept.append(sock)
        return sock

    yield keep
    for sock in kept:
        sock.close()


def address_of(listener: socket.socket) -> TcpAddress:
    return TcpAddress(*listener.getsockname())


def connect(keep: Keep, listener: socket.socket, count: int) -> None:
    for _ in range(count):
        keep(socket.create_connection(listener.getsockname(), 5))


def drained(keep: Keep, listener: socket.socket) -> int:
    count = 0
    while accept_queue_length(listener):
        keep(listener.accept()[0])
        count += 1
    return count


@pytest.mark.parametrize("shares_port", [True, False], ids=["from its start", "later"])
def test_every_connection_is_steered_to_the_newcomer_and_back(keep: Keep, shares_port: bool) -> None:
    old = keep(bind_listener(HERE, backlog=64, shares_port=shares_port))
    share_port(old)
    new = keep(bind_listener(address_of(old), backlog=64, shares_port=True, listens=False))
    connect(keep, old, 10)
    assert (drained(keep, old), drained(keep, new)) == (10, 0)  # it does not listen yet
    new.listen(64)
    steer(new, 1)
    connect(keep, old, 10)
    assert (drained(keep, old), drained(keep, new)) == (0, 10)
    steer(new, 0)
    connect(keep, old, 10)
    assert (drained(keep, old), drained(keep, new)) == (10, 0)
    steer(new, 1)
    old.close()  # the group has shrunk: the index is of nobody
    connect(keep, new, 10)
    assert drained(keep, new) == 10
    unsteer(new)
    unsteer(new)


def test_group_that_is_steered_to_its_first_socket_is_no_burden_for_one_that_joins(keep: Keep) -> None:
    old = keep(bind_listener(HERE, backlog=64, shares_port=True))
    steer(old, 0)
    new = keep(bind_listener(address_of(old), backlog=64, shares_port=True))
    connect(keep, old, 10)
    assert (drained(keep, old), drained(keep, new)) == (10, 0)


def test_this_kernel_can_steer() -> None:
    assert can_steer()


def test_kernel_that_cannot_steer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(listener: socket.socket, index: int) -> None:
        raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))

    monkeypatch.setattr("hotport.kernel.steer.steer", refuse)
    assert not can_steer.__wrapped__()


def test_deaf_listener_keeps_what_it_has_heard_and_hears_nothing_new(keep: Keep) -> None:
    listener = keep(bind_listener(HERE, backlog=64))
    connect(keep, listener, 3)
    deafen(listener)
    late = keep(socket.socket())
    late.setblocking(False)
    assert late.connect_ex(listener.getsockname()) == errno.EINPROGRESS  # neither accepted nor refused
    assert drained(keep, listener) == 3


def test_port_is_bound_again_with_the_same_options_over_open_connections(keep: Keep) -> None:
    listener = keep(bind_listener(HERE, backlog=64, shares_port=True))
    connect(keep, listener, 3)
    drained(keep, listener)
    name = listener.getsockname()
    again, gap_s = rebind(listener, backlog=64)
    keep(again)
    assert listener.fileno() == -1
    assert again.getsockname() == name
    assert gap_s > 0
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        assert again.getsockopt(socket.SOL_SOCKET, option)
    assert again.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert not again.getblocking()
    connect(keep, again, 1)


def test_port_that_cannot_be_bound_again_is_explained(keep: Keep) -> None:
    listener = keep(bind_listener(HERE, backlog=64))
    keep(listener.dup())  # so it still listens
    with pytest.raises(KernelError) as caught:
        rebind(listener, backlog=64)
    assert_three_lines(str(caught.value), "HP101")
    assert caught.value.errno == errno.EADDRINUSE
    assert f"pid {os.getpid()}" in caught.value.cause


def test_guarded_port_is_bound_by_sockets_that_share_it_and_by_no_other(keep: Keep) -> None:
    listener = keep(bind_listener(HERE, backlog=64, shares_port=True))
    guard = keep(bind_guard(address_of(listener)))
    connect(keep, listener, 5)
    assert drained(keep, listener) == 5
    again, _ = rebind(listener, backlog=64)
    again.close()
    with pytest.raises(KernelError):
        keep(bind_listener(address_of(guard), backlog=64))
    keep(bind_listener(address_of(guard), backlog=64, shares_port=True))


def test_port_that_others_listen_on_cannot_be_guarded(keep: Keep) -> None:
    listener = keep(bind_listener(HERE, backlog=64))
    with pytest.raises(KernelError) as caught:
        bind_guard(address_of(listener))
    assert_three_lines(str(caught.value), "HP101")


def test_ipv6_port_is_guarded(keep: Keep) -> None:
    try:
        listener = keep(bind_listener(TcpAddress("::1", 0), backlog=64, shares_port=True))
    except KernelError:
        pytest.skip("no IPv6 here")
    keep(bind_guard(TcpAddress("::1", listener.getsockname()[1])))
    again, _ = rebind(listener, backlog=64)
    keep(again)
    assert again.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
