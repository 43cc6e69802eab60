"""Real sockets of this process, read and judged; and tried."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hotport.address import TcpAddress, UdpAddress, UnixAddress
from hotport.diagnose import diagnosis as module
from hotport.diagnose.diagnosis import diagnose
from hotport.kernel.port import ourselves
from hotport.model.bind import CHOICES, Can


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def left_in_time_wait(*options: int) -> int:
    """A port on which a server has left a connection."""
    with socket.socket() as server:
        for option in options:
            server.setsockopt(socket.SOL_SOCKET, option, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port: int = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""
    return port


def test_listener_makes_it_not_free(stack: ExitStack) -> None:
    port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
    found = diagnose(TcpAddress("127.0.0.1", port), ourselves())
    assert (found.free, found.usual, found.is_probed) == (Can.NO, "reuseaddr", False)
    assert found.remedies == (f"kill {os.getpid()}",)
    assert set(found.answers) == set(CHOICES)
    assert found.risks


def test_port_that_is_free_needs_no_remedy(stack: ExitStack) -> None:
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    assert diagnose(UdpAddress("127.0.0.1", port), ourselves()).free == Can.NO
    sock.close()
    found = diagnose(UdpAddress("127.0.0.1", port), ourselves(), probe=True)
    assert (found.free, found.remedies, found.usual) == (Can.YES, (), "none")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"none": "no", "reuseaddr": "no", "reuseport": "no", "both": "no"}),
        ((socket.SO_REUSEADDR,), {"none": "no", "reuseaddr": "yes", "reuseport": "no", "both": "yes"}),
        ((socket.SO_REUSEPORT,), {"none": "no", "reuseaddr": "no", "reuseport": "yes", "both": "yes"}),
    ],
    ids=["neither", "reuseaddr", "reuseport"],
)
def test_probe_tells_what_the_old_server_had_set(options: tuple[int, ...], expected: dict[str, str]) -> None:
    address = TcpAddress("127.0.0.1", left_in_time_wait(*options))
    judged = diagnose(address, ourselves())
    assert [answer.can for answer in judged.answers.values()] == ["no", "unknown", "unknown", "unknown"]
    found = diagnose(address, ourselves(), probe=True)
    assert {name: answer.can.value for name, answer in found.answers.items()} == expected
    assert found.is_probed
    assert "a bind has just worked" in {answer.rule for answer in found.answers.values()} or not options
    refused = found.answers["none"]
    assert (refused.error, refused.ends_in_s is not None) == ("EADDRINUSE", True)


def test_kernel_that_refuses_for_no_reason_that_is_seen_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_bind", lambda *_: 98)
    found = diagnose(TcpAddress("127.0.0.1", 1), ourselves(), probe=True)
    assert found.free == Can.NO
    assert "does not show who is in the way" in found.answers["reuseaddr"].rule


def test_probe_of_an_ipv6_address_leaves_ipv4_alone(stack: ExitStack) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    port = stack.enter_context(socket.create_server(("0.0.0.0", 0))).getsockname()[1]
    found = diagnose(TcpAddress("::", port), ourselves(), probe=True)
    assert found.free == Can.YES
    assert "for one that takes IPv4 as well (dual stack) it is no: pid" in found.risks[0]


def test_unix_socket_in_every_condition(stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = UnixAddress("a.sock")

    def says() -> tuple[str, str]:
        found = diagnose(address, ourselves())
        return found.free, found.answers["none"].because

    assert says() == ("yes", "nothing has that name")
    server = socket.socket(socket.AF_UNIX)
    with server:
        server.bind("a.sock")
        assert f"pid {os.getpid()}" in says()[1]
        assert "is bound to a.sock" in says()[1]
        server.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("a.sock")
            assert "is listening on a.sock" in says()[1]
    assert "left from a server that is gone" in says()[1]
    Path("a.sock").unlink()
    Path("a.sock").write_text("precious")
    assert "no socket" in says()[1]
    assert diagnose(UnixAddress("none/a.sock"), ourselves()).answers["none"].error == "ENOENT"
    assert diagnose(UnixAddress("a.sock/b"), ourselves()).answers["none"].error == "ENOTDIR"


def test_abstract_unix_name_is_found_while_somebody_has_it() -> None:
    name = f"hotport-test-{os.getpid()}"
    address = UnixAddress("@" + name)
    assert diagnose(address, ourselves()).free == Can.YES
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        assert diagnose(address, ourselves()).free == Can.NO


def test_directory_that_may_not_be_written_to_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    found = diagnose(UnixAddress(str(tmp_path / "a.sock")), ourselves())
    assert found.answers["none"].error == "EACCES"
