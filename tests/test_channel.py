"""Messages and descriptors between two processes, and what is told when one of them ends."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from hotport.channel import Channel, DescriptorsLostError, exchange
from hotport.errors import ControlError
from hotport.kernel.scm import DESCRIPTORS_MAX
from hotport.kernel.sockets import bind_control
from hotport.wire.envelope import Envelope, Frame, HttpState, decode_batch, encode_frame
from hotport.wire.messages import AcceptOrder, Done, HurryOrder, Order, StatusRequest
from tests.support import DEADLINE_S, STRANGER

pytestmark = pytest.mark.anyio


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = (Channel(sock) for sock in socket.socketpair())
    with left, right:
        yield left, right


async def test_nothing_behind_a_message_is_read_with_it(pair: tuple[Channel, Channel]) -> None:
    """Connections of another worker follow its offer in frames of another kind."""
    left, right = pair
    await left.say(AcceptOrder())
    await left.say(HurryOrder())
    await left.send(encode_frame(Frame.REST, 7))
    assert await right.receive_word(Order) == AcceptOrder()
    assert await right.receive_word(Order) == HurryOrder()
    assert (await right.receive_frame())[0] is Frame.REST


async def test_message_brings_its_descriptors(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    reading, writing = os.pipe()
    await left.say(AcceptOrder(), [writing, writing])
    os.close(writing)
    await right.receive_word(Order)
    descriptors = right.take_descriptors()
    assert len(descriptors) == 2
    for fd in descriptors:
        assert not os.get_inheritable(fd)
        os.close(fd)
    assert os.read(reading, 1) == b""
    os.close(reading)


async def test_more_descriptors_than_travel_at_once_arrive(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    count = DESCRIPTORS_MAX + 1
    sending = asyncio.ensure_future(left.send_descriptors([left.fileno()] * count))
    descriptors = await right.receive_descriptors(count)
    await sending
    assert len(descriptors) == count
    for fd in descriptors:
        os.close(fd)


async def test_receiver_without_descriptors_is_told_and_keeps_none(pair: tuple[Channel, Channel]) -> None:
    """The kernel installs what it can, closes the rest, and reports a success."""
    left, right = pair
    before = set(os.listdir("/proc/self/fd"))
    await left.say(AcceptOrder(), [left.fileno()] * 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [fd for fd in range(len(before) + 11) if str(fd) not in before]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[9] + 1, hard))
    try:
        await right.receive_word(Order)
        with pytest.raises(DescriptorsLostError):
            right.take_descriptors()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    right.close()
    assert len(os.listdir("/proc/self/fd")) == len(before) - 1


async def test_message_that_is_too_long_is_refused_from_its_header_alone(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    await left.send(b"\0\0\0\x05")
    with anyio.fail_after(DEADLINE_S), pytest.raises(ControlError, match="HP610"):
        await right.receive_word(Order, frame_bytes_max=4)


async def test_peer_that_talks_without_a_pause_does_not_occupy_the_event_loop(pair: tuple[Channel, Channel]) -> None:
    """A deadline never came: there was always a message to be read."""
    left, right = pair

    async def talk() -> None:
        while True:
            await left.say(AcceptOrder())

    talking = asyncio.ensure_future(talk())
    with anyio.move_on_after(0.05) as scope:
        while True:
            await right.receive_word(Order)
    assert scope.cancelled_caught
    talking.cancel()
    await asyncio.wait({talking})


@pytest.mark.parametrize("says", [False, True])
async def test_end_of_the_peer_is_waited_for(pair: tuple[Channel, Channel], says: bool) -> None:
    left, right = pair
    waiting = asyncio.ensure_future(right.wait_closed())
    if says:
        await left.say(Done())
    await anyio.wait_all_tasks_blocked()
    left.close()
    assert await waiting is says
    with pytest.raises(EOFError):
        await right.receive_word()


async def test_peer_is_this_process_and_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "control.sock"
    with bind_control(str(path)):
        with Channel.connect(str(path)) as channel:
            assert channel.peer == (os.getpid(), os.geteuid())
        monkeypatch.setattr("hotport.kernel.sockets.peer_credentials", lambda sock: STRANGER)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(PermissionError, match="uid 65534"):
            Channel.connect(str(path))
        assert os.listdir("/proc/self/fd") == before
    path.unlink()


def test_channel_goes_from_one_event_loop_to_the_next(pair: tuple[Channel, Channel]) -> None:
    """A take-over begins before the supervisor's event loop."""
    left, right = pair

    async def talk() -> None:
        waiting = asyncio.ensure_future(right.receive_word(Order))
        await anyio.wait_all_tasks_blocked()
        await left.say(AcceptOrder())
        assert await waiting == AcceptOrder()

    anyio.run(talk)
    anyio.run(talk)


def test_supervisor_that_ends_without_an_answer_ends_the_exchange() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert list(exchange(ours, StatusRequest())) == []


async def test_channel_that_is_closed_closes_what_has_come_and_was_not_taken() -> None:
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    sender, receiver = Channel(left), Channel(right)
    reading, writing = os.pipe()
    await sender.send(b"\1\0\0", [writing])
    os.close(writing)
    sender.close()
    with pytest.raises(EOFError):
        await receiver.receive_frame()
    receiver.close()
    assert os.read(reading, 1) == b""  # nobody has the other end any more
    os.close(reading)


async def test_frame_that_is_larger_than_the_sockets_buffer_arrives_whole() -> None:
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    sender, receiver = Channel(left), Channel(right)
    envelope = Envelope(None, None, False, b"x" * (3 << 20), HttpState(True, 0.0))
    task = asyncio.ensure_future(sender.send(encode_frame(Frame.BATCH, [envelope])))
    kind, payload, _ = await receiver.receive_frame()
    await task
    assert (kind, decode_batch(payload)) == (Frame.BATCH, [envelope])
    sender.close()
    receiver.close()
