from __future__ import annotations

import os
import resource
import socket

import pytest

from hotport.errors import KernelError
from hotport.kernel.abstract import abstract_name, bind_abstract, sockaddr
from hotport.kernel.notify import notify, receive_notification
from hotport.kernel.sockets import peer_credentials
from tests.support import assert_three_lines


def test_names_are_never_the_same() -> None:
    assert len({abstract_name() for _ in range(100)}) == 100
    assert all(name.startswith("@hotport-") for name in (abstract_name(), abstract_name()))


def test_path_stays_a_path_and_a_name_begins_with_nul() -> None:
    assert sockaddr("run/notify") == "run/notify"
    assert sockaddr("@name") == "\0name"


def test_listener_is_found_by_its_name_and_nothing_is_left_of_it() -> None:
    name = abstract_name()
    with bind_abstract(name, socket.SOCK_STREAM) as listener, socket.socket(socket.AF_UNIX) as client:
        assert not listener.get_inheritable()
        assert not listener.getblocking()
        client.connect(sockaddr(name))
        accepted, _ = listener.accept()
        with accepted:
            assert peer_credentials(accepted)[:2] == (os.getpid(), os.geteuid())
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(sockaddr(name))


def test_notifications_come_with_the_kernels_word_on_who_sent_them() -> None:
    name = abstract_name()
    with bind_abstract(name, socket.SOCK_DGRAM) as receiver:
        assert notify(name, b"READY=1")
        assert receive_notification(receiver) == (os.getpid(), os.geteuid(), b"READY=1")


def test_name_that_is_taken_and_a_lack_of_descriptors_are_clear_errors() -> None:
    name = abstract_name()
    with bind_abstract(name, socket.SOCK_STREAM):
        with pytest.raises(KernelError) as caught:
            bind_abstract(name, socket.SOCK_STREAM)
        assert_three_lines(str(caught.value), "HP212")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(KernelError) as caught:
            bind_abstract(name, socket.SOCK_STREAM)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_three_lines(str(caught.value), "HP212")
