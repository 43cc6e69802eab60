from __future__ import annotations

import array
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotport.kernel.notify import notify, notify_barrier, open_notify, receive_notification, send_notification
from hotport.kernel.process import open_descriptors
from hotport.kernel.sockets import bind_notify
from hotport.wire.sdnotify import NOTIFICATION_BYTES_MAX

OURS = (os.getpid(), os.geteuid())


@pytest.fixture
def receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.chdir(tmp_path)
    with bind_notify("notify.sock") as sock:
        yield sock


def test_notification_arrives_with_the_kernels_word_on_who_sent_it(receiver: socket.socket) -> None:
    assert notify("notify.sock", b"READY=1")
    assert receive_notification(receiver) == (*OURS, b"READY=1")


def test_nothing_waiting_is_none_and_does_not_block(receiver: socket.socket) -> None:
    assert receive_notification(receiver) is None


def test_each_datagram_is_one_message_in_order(receiver: socket.socket) -> None:
    for word in (b"STATUS=1", b"", b"STATUS=2"):
        assert notify("notify.sock", word)
    received = [receive_notification(receiver) for _ in range(4)]
    assert received == [(*OURS, b"STATUS=1"), (*OURS, b""), (*OURS, b"STATUS=2"), None]


def test_sender_of_another_process_is_named(receiver: socket.socket) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if notify("notify.sock", b"READY=1") else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert receive_notification(receiver) == (pid, os.geteuid(), b"READY=1")


@pytest.mark.parametrize("count", [1, 253])
def test_descriptors_that_come_along_are_closed(receiver: socket.socket, count: int) -> None:
    """FDSTORE=1 of a foreign program must not fill our descriptor table."""
    before = open_descriptors()
    fds = array.array("i", [0] * count)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect("notify.sock")
        sender.sendmsg([b"FDSTORE=1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    assert receive_notification(receiver) == (*OURS, b"FDSTORE=1")
    assert open_descriptors() == before


def test_control_data_that_does_not_fit_is_tolerated(receiver: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    monkeypatch.setattr("hotport.kernel.notify._CONTROL_BYTES", socket.CMSG_SPACE(12))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect("notify.sock")
        sender.sendmsg([b"FDSTORE=1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 0]))])
    assert receive_notification(receiver) == (*OURS, b"FDSTORE=1")
    assert open_descriptors() == before


def test_message_without_credentials_is_from_nobody(receiver: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotport.kernel.notify._CONTROL_BYTES", 0)
    assert notify("notify.sock", b"READY=1")
    assert receive_notification(receiver) == (0, -1, b"READY=1")


def test_longest_notification_arrives_and_a_longer_one_says_nothing(receiver: socket.socket) -> None:
    """Half a message could say the opposite: MAINPID=12, cut from MAINPID=1234."""
    assert notify("notify.sock", b"x" * NOTIFICATION_BYTES_MAX)
    assert receive_notification(receiver) == (*OURS, b"x" * NOTIFICATION_BYTES_MAX)
    assert notify("notify.sock", b"x" * (NOTIFICATION_BYTES_MAX + 1))
    assert receive_notification(receiver) == (*OURS, b"")


def test_abstract_socket_is_notified() -> None:
    name = f"hotport-notify-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        receiver.bind("\0" + name)
        assert notify(f"@{name}", b"READY=1")
        assert receive_notification(receiver) == (*OURS, b"READY=1")


@pytest.mark.parametrize("path", ["missing.sock", "@hotport-nobody", "", "x" * 200, "a\0b", "file"])
def test_notifying_nobody_is_false_and_no_error(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert not notify(path, b"READY=1")


def test_notifying_a_dead_supervisor_is_false(receiver: socket.socket) -> None:
    receiver.close()  # its file stays, as after a SIGKILL
    assert not notify("notify.sock", b"READY=1")


def fill(path: str) -> int:
    count = 0
    while notify(path, b"STATUS=full", timeout_s=0):
        count += 1
    return count


def test_full_queue_is_false_after_the_timeout(receiver: socket.socket) -> None:
    assert fill("notify.sock") > 0
    assert not notify("notify.sock", b"READY=1", timeout_s=0.01)


def test_full_queue_delays_a_notification_and_does_not_lose_it(receiver: socket.socket) -> None:
    """Twenty workers that become ready at once must not lose one READY to a queue of ten."""
    count = fill("notify.sock")
    taken: list[bool] = []
    sender = threading.Thread(target=lambda: taken.append(notify("notify.sock", b"READY=1", timeout_s=60)))
    sender.start()
    received = []
    for _ in range(count + 1):
        select.select([receiver], [], [])
        received.append(receive_notification(receiver))
    sender.join()
    assert taken == [True]
    assert received[-1] == (*OURS, b"READY=1")


def test_descriptors_go_with_a_notification(receiver: socket.socket) -> None:
    sender = open_notify("notify.sock")
    assert sender is not None
    with sender, socket.create_server(("127.0.0.1", 0)) as listener:
        assert send_notification(sender, b"FDSTORE=1", [listener.fileno()])
        payload, ancillary, _, _ = receiver.recvmsg(100, 100)
        assert payload == b"FDSTORE=1"
        (fd,) = array.array("i", {kind: data for _, kind, data in ancillary}[socket.SCM_RIGHTS])
        assert os.path.sameopenfile(fd, listener.fileno())
        os.close(fd)


def test_barrier_lasts_until_the_receiver_has_come_to_it(receiver: socket.socket) -> None:
    sender = open_notify("notify.sock")
    assert sender is not None

    def read() -> None:
        for _ in range(2):
            select.select([receiver], [], [])
            receive_notification(receiver)

    with sender:
        assert send_notification(sender, b"STATUS=first")
        reader = threading.Thread(target=read)
        reader.start()
        assert notify_barrier(sender, timeout_s=60)
        reader.join()
        assert receive_notification(receiver) is None


def test_barrier_of_nobody_is_none(receiver: socket.socket) -> None:
    sender = open_notify("notify.sock")
    assert sender is not None
    with sender:
        assert not notify_barrier(sender, timeout_s=0.01), "it does not read"
        while send_notification(sender, b"STATUS=full"):
            pass
        assert not notify_barrier(sender, timeout_s=0.01), "it cannot be told"
        receiver.close()
        assert not notify_barrier(sender, timeout_s=60), "it is gone"


def test_a_socket_for_nobody_is_none(tmp_path: Path) -> None:
    assert open_notify(str(tmp_path / "nobody")) is None
