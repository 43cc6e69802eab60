"""Descriptors between processes: what the kernel promises, and where it does not say that something is lost."""

from __future__ import annotations

import array
import os
import resource
import socket
from collections.abc import Iterator

import pytest

from hotport.kernel.process import descriptors_left
from hotport.kernel.scm import (
    DESCRIPTORS_MAX,
    receive_descriptors,
    send_descriptors,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        yield left, right


def test_descriptors_come_with_the_first_byte_and_close_on_exec(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    reading, writing = os.pipe()
    assert send_descriptors(left, b"hello", [writing]) == 5
    os.close(writing)
    data, (received,), _ = receive_descriptors(right, 2)
    assert data == b"he"
    assert not os.get_inheritable(received)
    os.write(received, b"x")
    assert os.read(reading, 1) == b"x"
    assert receive_descriptors(right, 100) == (b"llo", [], True)
    os.close(received)
    os.close(reading)


def test_as_many_as_the_kernel_takes_travel_at_once_and_one_more_does_not(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    left, right = pair
    send_descriptors(left, b"x", [left.fileno()] * DESCRIPTORS_MAX)
    _, received, _ = receive_descriptors(right, 1)
    assert len(received) == DESCRIPTORS_MAX
    for fd in received:
        os.close(fd)
    with pytest.raises(OSError, match="Invalid argument"):
        send_descriptors(left, b"x", [left.fileno()] * (DESCRIPTORS_MAX + 1))


def test_messages_with_descriptors_are_never_merged(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    for byte in (b"a", b"b"):
        send_descriptors(left, byte, [left.fileno()])
    for byte in (b"a", b"b"):
        data, (received,), _ = receive_descriptors(right, 100)
        assert data == byte
        os.close(received)


def test_end_of_the_stream_is_no_bytes_and_an_empty_queue_is_not(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    with pytest.raises(BlockingIOError):
        receive_descriptors(right, 1)
    left.close()
    assert receive_descriptors(right, 1) == (b"", [], True)


def test_other_ancillary_data_is_not_taken_for_descriptors() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [left.fileno()]))])
        _, (received,), _ = receive_descriptors(right, 1)
        os.close(received)


def test_first_descriptors_of_a_message_are_received_if_not_all_fit(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    try:
        send_descriptors(left, b"x", files)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - descriptors_left() + 3, hard))
        assert descriptors_left() == 3
        data, received, is_whole = receive_descriptors(right, 1)
        assert descriptors_left() == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (data, len(received), is_whole) == (b"x", 3, False)
    for fd in (*files, *received):
        os.close(fd)
