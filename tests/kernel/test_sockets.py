from __future__ import annotations

import errno
import os
import re
import select
import signal
import socket
import stat
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hotport.address import (
    Address,
    FdAddress,
    SystemdAddress,
    TcpAddress,
    UdpAddress,
    UnixAddress,
    parse_address,
)
from hotport.errors import ConfigError, KernelError
from hotport.kernel.sockets import (
    Access,
    accept_queue_length,
    acknowledged_bytes,
    as_sockets,
    bind_control,
    bind_listener,
    bind_notify,
    bound_address,
    change_access,
    dropped,
    inherited_listener,
    passed_addresses,
    peer_credentials,
    set_access,
    take_waiting,
    unlink_if_ours,
)
from hotport.model.port import UnixName
from tests.support import DEADLINE_S

needs_ipv6 = pytest.mark.skipif(
    not Path("/proc/net/if_inet6").exists() or "0" * 31 + "1" not in Path("/proc/net/if_inet6").read_text(),
    reason="no ::1 on this machine",
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes its user id")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, so that socket paths stay short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bound(stack: ExitStack, address: Address | str, backlog: int = 16) -> socket.socket:
    parsed = parse_address(address) if isinstance(address, str) else address
    return stack.enter_context(bind_listener(parsed, backlog=backlog))


def refused(address: Address | str) -> KernelError:
    parsed = parse_address(address) if isinstance(address, str) else address
    with pytest.raises(KernelError, match=r"^HP101 cannot bind ") as raised:
        bind_listener(parsed, backlog=16)
    return raised.value


def refuse_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say EADDRINUSE of a port on which nothing is any more."""

    def bind(*_: object) -> None:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    monkeypatch.setattr(socket.socket, "bind", bind)


def as_nobody(look: Callable[[], None]) -> int:
    """Run `look` in a child, because a user id that was given up does not come back; 0 if it passes."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            look()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# TCP


def test_tcp_listener_accepts_and_is_ours_alone(stack: ExitStack) -> None:
    sock = bound(stack, "127.0.0.1:0")
    stack.enter_context(socket.create_connection(sock.getsockname()))
    assert not sock.getblocking()
    assert not sock.get_inheritable()
    assert sock.proto == socket.IPPROTO_TCP  # asyncio sets TCP_NODELAY only if it sees this


def test_accepted_sockets_inherit_nodelay(stack: ExitStack) -> None:
    """Without it every short answer waits for the client's delayed acknowledgement (40 ms)."""
    sock = bound(stack, "127.0.0.1:0")
    stack.enter_context(socket.create_connection(sock.getsockname()))
    accepted, _ = sock.accept()
    stack.enter_context(accepted)
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_time_wait_does_not_keep_the_port(stack: ExitStack) -> None:
    first = bind_listener(TcpAddress("127.0.0.1", 0), backlog=16)
    port = first.getsockname()[1]
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    accepted, _ = first.accept()
    accepted.close()  # the side that closes first keeps TIME_WAIT
    assert client.recv(1) == b""
    client.close()
    first.close()
    bound(stack, TcpAddress("127.0.0.1", port))


def test_backlog_is_the_given_one(stack: ExitStack) -> None:
    sock = bound(stack, "127.0.0.1:0", backlog=7)
    # tcpi_sacked of a listener is its backlog: kernel tcp_get_info, the sixth 32-bit word after eight bytes.
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    assert int.from_bytes(info[28:32], "little") == 7


def test_bytes_that_the_peer_has_taken_are_counted(stack: ExitStack) -> None:
    listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    client = stack.enter_context(socket.create_connection(listener.getsockname()))
    server = stack.enter_context(listener.accept()[0])
    before = acknowledged_bytes(server)
    server.sendall(bytes(1000))
    assert len(client.recv(1000, socket.MSG_WAITALL)) == 1000
    client.sendall(b"x")  # its acknowledgement comes with that, if it has not come before
    server.recv(1)
    assert acknowledged_bytes(server) - before == 1000
    server.close()
    assert acknowledged_bytes(server) == 0
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"x")
        assert acknowledged_bytes(ours) == 0


def test_drops_at_full_queues_are_counted(stack: ExitStack) -> None:
    tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
    udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # the kernel's minimum
    udp.bind(("127.0.0.1", 0))
    assert dropped(tcp) == dropped(udp) == 0
    for _ in range(4):
        client = stack.enter_context(socket.socket())
        client.setblocking(False)
        client.connect_ex(tcp.getsockname())
    assert dropped(tcp) >= 2
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(20):
            sender.sendto(bytes(1000), udp.getsockname())
    assert 0 < dropped(udp) < 20
    udp.close()
    assert dropped(udp) == 0


def test_accept_queue_is_counted(stack: ExitStack, run_dir: Path) -> None:
    sock = bound(stack, "127.0.0.1:0")
    assert accept_queue_length(sock) == 0
    for count in range(1, 4):
        stack.enter_context(socket.create_connection(sock.getsockname()))
        assert accept_queue_length(sock) == count
    sock.accept()[0].close()
    assert accept_queue_length(sock) == 2
    assert accept_queue_length(bound(stack, "unix:./app.sock")) == 0  # the kernel does not say


@needs_ipv6
def test_ipv4_and_ipv6_wildcards_stand_side_by_side(stack: ExitStack) -> None:
    port = bound(stack, "0.0.0.0:0").getsockname()[1]
    six = bound(stack, f"[::]:{port}")
    assert six.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def test_name_with_several_addresses_is_bound_on_ipv4(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    four = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", 0))
    six = (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", 0, 0, 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [six, four])
    assert bound(stack, "localhost:0").getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_taken_port_names_the_process_that_listens(stack: ExitStack, host: str) -> None:
    port = bound(stack, "127.0.0.1:0").getsockname()[1]
    error = refused(TcpAddress(host, port))
    assert error.errno == errno.EADDRINUSE
    assert error.cause.startswith(f"pid {os.getpid()} (")
    assert f") is listening on 127.0.0.1:{port}; a listener shares its port only if both" in error.cause
    assert f"--bind tcp://{host}:" in error.fix


@needs_ipv6
def test_taken_ipv6_port_names_the_process_that_listens(stack: ExitStack) -> None:
    port = bound(stack, "[::1]:0").getsockname()[1]
    assert f"pid {os.getpid()} (" in refused(TcpAddress("::", port)).cause


def test_port_that_is_bound_without_listening_is_not_blamed_on_a_listener(stack: ExitStack) -> None:
    sleeper = stack.enter_context(socket.socket())
    sleeper.bind(("127.0.0.1", 0))
    port = sleeper.getsockname()[1]
    error = refused(TcpAddress("127.0.0.1", port))
    assert error.errno == errno.EADDRINUSE
    assert f") is bound to 127.0.0.1:{port} without listening; it has set neither option" in error.cause
    assert error.note == f"or first: kill {os.getpid()}"


@needs_root
def test_port_of_a_process_that_we_may_not_look_at_is_said_to_be_that(stack: ExitStack) -> None:
    "localhost".encode("idna")  # the codec must be loaded by a user who may read it
    listener = bound(stack, "127.0.0.1:0")
    port = listener.getsockname()[1]

    def look() -> None:
        listener.close()  # the child's copy of it
        error = refused(TcpAddress("127.0.0.1", port))
        assert error.cause.startswith(
            f"a process of user root that we may not look at is listening on 127.0.0.1:{port}"
        )
        assert error.note == f"or first: sudo hotport why tcp://127.0.0.1:{port}"

    assert as_nobody(look) == 0


def test_leftovers_of_a_server_without_reuseaddr_are_blamed_with_the_seconds(stack: ExitStack) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""
    error = refused(TcpAddress("127.0.0.1", port))
    assert "in TIME_WAIT" in error.cause
    assert "the server that left it had not set SO_REUSEADDR" in error.cause
    assert re.search(r"the last one is gone in [56]\d s$", error.cause)


def test_port_that_is_free_again_is_not_blamed_on_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_bind(monkeypatch)
    error = refused("127.0.0.1:1")
    assert error.cause.startswith("its owner is gone by now")
    monkeypatch.setattr("hotport.kernel.procfs.kernel_version", lambda: (6, 7))
    assert "Linux 6.8 does" in refused("127.0.0.1:1").cause


def test_taken_port_is_an_error_too_where_netlink_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_bind(monkeypatch)
    monkeypatch.setattr("hotport.kernel.sockdiag.NETLINK_SOCK_DIAG", 99)
    error = refused("127.0.0.1:1")
    assert error.errno == errno.EADDRINUSE
    assert "forbids netlink" in error.cause


def test_address_of_another_machine_is_explained() -> None:
    error = refused("192.0.2.1:0")  # TEST-NET-1, RFC 5737
    assert error.errno == errno.EADDRNOTAVAIL
    assert "no interface of this machine has the address 192.0.2.1" in error.cause


def test_unknown_host_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^HP102 .*unknown host 'nowhere\.invalid'"):
        bind_listener(TcpAddress("nowhere.invalid", 80), backlog=16)  # RFC 6761: never resolves
    with pytest.raises(ConfigError, match="HP102"):
        bind_listener(TcpAddress("a..b", 80), backlog=16)


@needs_root
def test_low_port_without_permission_names_the_sysctl() -> None:
    "localhost".encode("idna")  # the codec must be loaded by a user who may read it

    def look() -> None:
        error = refused("127.0.0.1:80")
        assert error.errno == errno.EACCES
        assert "net.ipv4.ip_unprivileged_port_start" in error.cause
        assert "tcp://127.0.0.1:8000" in error.fix

    assert as_nobody(look) == 0


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.ENOBUFS])
def test_socket_that_cannot_be_made_is_an_error_too(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket, "socket", refuse)
    assert refused("127.0.0.1:0").errno == number


# UDP


def test_udp_socket_is_bound_and_not_shared(stack: ExitStack) -> None:
    sock = bound(stack, "udp://127.0.0.1:0")
    assert sock.type == socket.SOCK_DGRAM
    assert not sock.getblocking()
    assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    error = refused(UdpAddress("127.0.0.1", sock.getsockname()[1]))
    assert error.errno == errno.EADDRINUSE
    assert f"pid {os.getpid()} (" in error.cause


# Socket files


def test_socket_file_accepts_and_nothing_lies_beside_it(stack: ExitStack, run_dir: Path) -> None:
    sock = bound(stack, "unix:app.sock")
    stack.enter_context(socket.socket(socket.AF_UNIX)).connect("app.sock")
    assert not sock.getblocking()
    assert os.listdir() == ["app.sock"]


def test_stale_socket_file_is_replaced(stack: ExitStack, run_dir: Path) -> None:
    bind_listener(UnixAddress("app.sock"), backlog=16).close()  # as after a SIGKILL
    stale = os.stat("app.sock").st_ino
    bound(stack, "unix:app.sock")
    stack.enter_context(socket.socket(socket.AF_UNIX)).connect("app.sock")
    assert os.stat("app.sock").st_ino != stale
    assert os.listdir() == ["app.sock"]


def test_socket_file_on_which_somebody_listens_is_not_taken(stack: ExitStack, run_dir: Path) -> None:
    bound(stack, "unix:app.sock")
    before = os.stat("app.sock")
    error = refused("unix:app.sock")
    assert error.errno == errno.EADDRINUSE
    assert error.cause.startswith(f"pid {os.getpid()} (")
    assert os.stat("app.sock").st_ino == before.st_ino


def test_socket_file_whose_maker_is_gone_names_who_holds_it(run_dir: Path) -> None:
    """A pre-forked server's worker held the listener, and the error said to kill its dead master."""
    said, says = os.pipe()
    master = os.fork()
    if master == 0:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind("app.sock")
        sock.listen()
        worker = os.fork()
        if worker == 0:
            os.close(says)
            while True:
                signal.pause()
        os.write(says, f"{worker}\n".encode())
        os._exit(0)
    os.waitpid(master, 0)
    os.close(says)
    with open(said) as lines:
        worker = int(lines.readline())
    pidfd = os.pidfd_open(worker)
    try:
        error = refused("unix:app.sock")
        assert error.cause.startswith(f"pid {worker} (")
        assert (error.fix, error.note) == (f"kill {worker}", "or bind another path")
    finally:
        os.kill(worker, signal.SIGKILL)
        select.select([pidfd], [], [], DEADLINE_S)
        os.close(pidfd)
        os.unlink("app.sock")


def test_holder_that_cannot_be_seen_or_is_gone_is_no_dead_end(
    stack: ExitStack, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound(stack, "unix:app.sock")

    def gone(address: UnixAddress) -> UnixName:
        return UnixName(str(address), address.path)

    def forbidden(address: UnixAddress) -> UnixName:
        raise KernelError("HP130", "cannot ask", errno=1, cause="a sandbox forbids netlink", fix="ss -lx")

    monkeypatch.setattr("hotport.kernel.port.read_name", gone)
    assert refused("unix:app.sock").fix == "hotport why unix:app.sock"
    monkeypatch.setattr("hotport.kernel.port.read_name", forbidden)
    assert refused("unix:app.sock").fix == "ss -lx"


def test_socket_file_with_a_full_accept_queue_is_not_taken(stack: ExitStack, run_dir: Path) -> None:
    """A server that is only slow must not lose its path to us."""
    bound(stack, "unix:app.sock", backlog=0)
    stack.enter_context(socket.socket(socket.AF_UNIX)).connect("app.sock")
    assert refused("unix:app.sock").errno == errno.EADDRINUSE


def test_datagram_socket_file_is_not_taken(stack: ExitStack, run_dir: Path) -> None:
    stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).bind("app.sock")
    assert refused("unix:app.sock").errno == errno.EADDRINUSE


@pytest.mark.parametrize("make", ["file", "directory", "link"])
def test_path_that_is_no_socket_is_never_replaced(make: str, stack: ExitStack, run_dir: Path) -> None:
    path = Path("app.sock")
    match make:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case _:
            path.symlink_to("elsewhere")
    before = os.lstat(path)
    with pytest.raises(ConfigError, match="HP103"):
        bind_listener(UnixAddress("app.sock"), backlog=16)
    assert os.lstat(path) == before
    assert os.listdir() == ["app.sock"]


def test_socket_file_in_a_missing_directory_is_explained(run_dir: Path) -> None:
    error = refused("unix:run/app.sock")
    assert (error.errno, error.fix) == (errno.ENOENT, "mkdir -p run")


def test_socket_file_under_a_file_is_explained(run_dir: Path) -> None:
    Path("run").write_text("")
    assert refused("unix:run/app.sock").errno == errno.ENOTDIR


@needs_root
def test_socket_file_in_a_directory_of_others_is_explained(run_dir: Path) -> None:
    def look() -> None:
        error = refused("unix:app.sock")
        assert error.errno == errno.EACCES
        assert "uid 65534" in error.cause

    for mode in (0o755, 0o700):  # it may be entered, but not written; not even entered
        run_dir.chmod(mode)
        assert as_nobody(look) == 0


@needs_root
def test_socket_file_of_a_user_who_shuts_us_out_is_not_taken(stack: ExitStack, run_dir: Path) -> None:
    bound(stack, "unix:app.sock")
    Path("app.sock").chmod(0o600)
    run_dir.chmod(0o777)

    def look() -> None:
        assert refused("unix:app.sock").errno == errno.EADDRINUSE

    assert as_nobody(look) == 0


def test_too_long_path_is_an_error_before_anything_is_made(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"HP103.*\n.*107 bytes"):
        bind_listener(UnixAddress("x" * 108), backlog=16)
    assert os.listdir() == []


def test_longest_path_is_bound(stack: ExitStack, run_dir: Path) -> None:
    bound(stack, UnixAddress("x" * 107))
    stack.enter_context(socket.socket(socket.AF_UNIX)).connect("x" * 107)


def test_failure_to_listen_leaves_no_file(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", refuse)
    assert refused("unix:app.sock").errno == errno.ENOSPC
    assert os.listdir() == []


def test_abstract_socket_accepts_and_is_not_shared(stack: ExitStack, run_dir: Path) -> None:
    name = f"@hotport-test-{os.getpid()}"
    bound(stack, UnixAddress(name))
    stack.enter_context(socket.socket(socket.AF_UNIX)).connect("\0" + name[1:])
    error = refused(UnixAddress(name))
    assert error.errno == errno.EADDRINUSE
    assert error.cause.startswith(f"pid {os.getpid()} (")
    assert os.listdir() == []


def test_abstract_name_that_does_not_listen_is_taken_all_the_same(stack: ExitStack) -> None:
    name = f"hotport-sleeper-{os.getpid()}"
    stack.enter_context(socket.socket(socket.AF_UNIX)).bind("\0" + name)
    assert refused(UnixAddress("@" + name)).cause.endswith(f" is bound to @{name}")


def test_socket_file_of_ours_is_unlinked(stack: ExitStack, run_dir: Path) -> None:
    bound(stack, "unix:app.sock")
    found = os.stat("app.sock")
    assert unlink_if_ours("app.sock", (found.st_dev, found.st_ino))
    assert os.listdir() == []
    assert not unlink_if_ours("app.sock", (found.st_dev, found.st_ino))


def test_socket_file_of_a_successor_is_not_unlinked(stack: ExitStack, run_dir: Path) -> None:
    old = bound(stack, "unix:app.sock")
    found = os.stat("app.sock")
    old.close()
    bound(stack, "unix:app.sock")
    assert not unlink_if_ours("app.sock", (found.st_dev, found.st_ino))
    assert os.listdir() == ["app.sock"]


# Adopted sockets


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_inherited_socket_is_taken_over(kind: socket.SocketKind, stack: ExitStack) -> None:
    made = socket.socket(socket.AF_INET, kind)
    made.bind(("127.0.0.1", 0))
    if kind == socket.SOCK_STREAM:
        made.listen()
    made.set_inheritable(True)
    name, fd = made.getsockname(), made.detach()
    sock = stack.enter_context(inherited_listener(fd))
    assert (sock.fileno(), sock.getsockname()) == (fd, name)
    assert not sock.getblocking()
    assert not sock.get_inheritable()
    if kind == socket.SOCK_STREAM:
        assert sock.proto == socket.IPPROTO_TCP


def test_adopted_listener_gets_nodelay_and_keeps_its_queue(stack: ExitStack) -> None:
    made = socket.create_server(("127.0.0.1", 0), backlog=5)
    waiting = stack.enter_context(socket.create_connection(made.getsockname()))
    sock = bound(stack, FdAddress(made.detach()), backlog=4096)
    later = stack.enter_context(socket.create_connection(sock.getsockname()))
    for client in (waiting, later):
        accepted, peer = sock.accept()
        stack.enter_context(accepted)
        assert peer == client.getsockname()
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    assert int.from_bytes(info[28:32], "little") == 5


def test_adopted_unix_listener_needs_no_nodelay(stack: ExitStack, run_dir: Path) -> None:
    made = socket.socket(socket.AF_UNIX)
    made.bind("app.sock")
    made.listen()
    assert bound(stack, FdAddress(made.detach())).family == socket.AF_UNIX


def test_descriptor_that_is_no_listener_is_refused_and_left_open(stack: ExitStack) -> None:
    quiet = stack.enter_context(socket.socket())
    quiet.bind(("127.0.0.1", 0))
    with pytest.raises(ConfigError, match=r"HP104(.|\n)*does not listen"):
        inherited_listener(quiet.fileno())
    quiet.listen()  # still open

    read, write = os.pipe()
    with pytest.raises(ConfigError, match=r"HP104(.|\n)*is not a socket"):
        inherited_listener(read)
    os.close(read)
    os.close(write)

    with pytest.raises(ConfigError, match=r"HP104(.|\n)*not open"):
        bind_listener(FdAddress(read), backlog=16)


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "3")
    monkeypatch.setenv("LISTEN_FDNAMES", "web:twice:twice")


def test_systemd_name_stands_for_every_socket_that_has_it(activated: None) -> None:
    assert passed_addresses(SystemdAddress("web")) == (FdAddress(3),)
    assert passed_addresses(SystemdAddress("twice")) == (FdAddress(4), FdAddress(5))
    assert passed_addresses(TcpAddress("::", 80)) == (TcpAddress("::", 80),)


def test_systemd_name_that_was_not_passed_is_explained(activated: None) -> None:
    with pytest.raises(ConfigError, match="HP105") as raised:
        passed_addresses(SystemdAddress("other"))
    assert "passed twice, web" in raised.value.cause


def test_systemd_without_activation_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    with pytest.raises(ConfigError, match=r"HP105(.|\n)*LISTEN_FDS is not set"):
        passed_addresses(SystemdAddress("web"))


def test_bound_address_is_where_clients_connect(stack: ExitStack, run_dir: Path) -> None:
    tcp = bound(stack, "127.0.0.1:0")
    port = tcp.getsockname()[1]
    assert bound_address(TcpAddress("127.0.0.1", 0), tcp) == TcpAddress("127.0.0.1", port)
    assert bound_address(FdAddress(tcp.fileno()), tcp) == TcpAddress("127.0.0.1", port)
    udp = bound(stack, "udp://127.0.0.1:0")
    assert bound_address(UdpAddress("127.0.0.1", 0), udp) == UdpAddress("127.0.0.1", udp.getsockname()[1])
    unix = bound(stack, "unix:app.sock")
    assert bound_address(UnixAddress("app.sock"), unix) == UnixAddress("app.sock")
    passed = stack.enter_context(socket.socket(socket.AF_UNIX))
    passed.bind("passed.sock")
    assert bound_address(SystemdAddress("web"), passed) == UnixAddress("passed.sock")
    abstract = bound(stack, UnixAddress(f"@hotport-bound-{os.getpid()}"))
    assert bound_address(FdAddress(9), abstract) == UnixAddress(f"@hotport-bound-{os.getpid()}")


# Control sockets


def test_control_and_notify_sockets_are_ours_alone_from_the_start(
    stack: ExitStack, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    rename = os.rename

    def look_and_rename(source: str, target: str) -> None:
        modes.append(stat.S_IMODE(os.stat(source).st_mode))
        rename(source, target)

    monkeypatch.setattr(os, "rename", look_and_rename)
    umask = os.umask(0)
    try:
        control = stack.enter_context(bind_control("control.sock"))
        notify = stack.enter_context(bind_notify("notify.sock"))
    finally:
        os.umask(umask)
    assert modes == [0o600, 0o600]
    for sock in (control, notify):
        assert not sock.getblocking()
        assert not sock.get_inheritable()
    assert sorted(os.listdir()) == ["control.sock", "notify.sock"]


def test_control_socket_knows_its_peer(stack: ExitStack, run_dir: Path) -> None:
    control = stack.enter_context(bind_control("control.sock"))
    client = stack.enter_context(socket.socket(socket.AF_UNIX))
    client.connect("control.sock")
    accepted, _ = control.accept()
    stack.enter_context(accepted)
    assert peer_credentials(accepted) == (os.getpid(), os.geteuid(), os.getegid())
    assert peer_credentials(client) == (os.getpid(), os.geteuid(), os.getegid())


@pytest.mark.parametrize("bind", [bind_control, bind_notify])
def test_control_socket_of_a_dead_or_living_predecessor_is_replaced(
    bind: Callable[[str], socket.socket], stack: ExitStack, run_dir: Path
) -> None:
    predecessor = stack.enter_context(bind("it.sock"))
    successor = stack.enter_context(bind("it.sock"))
    client = stack.enter_context(socket.socket(socket.AF_UNIX, successor.type))
    client.connect("it.sock")
    client.send(b"hello")
    receiver = successor
    if successor.type == socket.SOCK_STREAM:
        receiver = stack.enter_context(successor.accept()[0])
    assert receiver.recv(10) == b"hello"
    with pytest.raises(BlockingIOError):
        predecessor.accept() if predecessor.type == socket.SOCK_STREAM else predecessor.recv(1)


def test_too_long_control_path_names_the_variable_to_set(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="HP603") as raised:
        bind_control(f"{run_dir}/{'x' * 108}")
    assert raised.value.fix.startswith("HOTPORT_RUNTIME_DIR=")
    assert os.listdir() == []


def test_control_socket_that_cannot_be_placed_is_an_error(run_dir: Path) -> None:
    with pytest.raises(KernelError, match="HP604") as raised:
        bind_control("missing/control.sock")
    assert raised.value.errno == errno.ENOENT
    Path("control.sock").mkdir()
    with pytest.raises(KernelError, match="HP604"):
        bind_control("control.sock")
    assert os.listdir() == ["control.sock"]


def test_descriptors_that_came_become_sockets_all_or_none() -> None:
    """One that was no socket left the others open for ever."""
    left, right = socket.socketpair()
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="socket"):
        as_sockets([left.detach(), writing, os.dup(right.fileno())])
    assert os.read(reading, 1) == b""
    right.setblocking(False)
    assert right.recv(1) == b""  # nobody has the other end
    (sock,) = as_sockets([right.detach()])
    assert sock.gettimeout() == 0.0
    sock.close()
    os.close(reading)


def test_all_that_waits_in_an_accept_queue_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(3)]
        taken = take_waiting(listener)
        assert sorted(sock.getpeername() for sock in taken) == sorted(sock.getsockname() for sock in clients)
        assert take_waiting(listener) == []
        for sock in (*clients, *taken):
            sock.close()


# Who may connect to socket files


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_socket_file_has_its_mode_whatever_the_umask(stack: ExitStack, run_dir: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        sock = bind_listener(UnixAddress("app.sock"), backlog=1, access=Access(0o660, -1, os.getegid()))
    finally:
        os.umask(before)
    stack.enter_context(sock)
    found = os.stat("app.sock")
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o660, os.geteuid(), os.getegid())
    change_access(UnixAddress("app.sock"), Access(0o600, -1, -1))
    assert stat.S_IMODE(os.stat("app.sock").st_mode) == 0o600


@pytest.mark.parametrize("what", ["file", "link", "second name"])
def test_nothing_but_a_socket_with_one_name_is_given_away(stack: ExitStack, run_dir: Path, what: str) -> None:
    """Another user may own the directory, and would get any file of root's."""
    target = Path("target")
    if what == "file":
        target.touch()
    else:
        bound(stack, "unix:other.sock")
        target.symlink_to("other.sock") if what == "link" else os.link("other.sock", target)
    with pytest.raises(OSError):  # noqa: PT011  ELOOP of a link, or EPERM
        set_access(str(target), Access(0o666, -1, -1))
    with pytest.raises(KernelError, match="HP108"):
        change_access(UnixAddress("target"), Access(0o666, -1, -1))


@needs_root
def test_who_may_not_give_a_file_to_another_user_is_told_so_and_leaves_nothing(run_dir: Path) -> None:
    run_dir.chmod(0o777)

    def look() -> None:
        with pytest.raises(KernelError, match="HP108") as raised:
            bind_listener(UnixAddress("app.sock"), backlog=1, access=Access(0o660, 0, -1))
        assert raised.value.errno == errno.EPERM
        bind_listener(UnixAddress("app.sock"), backlog=1, access=Access(0o660, 0, 0, is_wish=True)).close()
        assert stat.S_IMODE(os.stat("app.sock").st_mode) == 0o660
        assert os.listdir() == ["app.sock"]

    assert as_nobody(look) == 0


@needs_root
def test_notifications_of_another_user_come_to_a_socket_of_its_own(stack: ExitStack, run_dir: Path) -> None:
    sock = stack.enter_context(bind_notify("notify.sock", user=(65534, 65534)))
    found = os.stat("notify.sock")
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, 65534)
    run_dir.chmod(0o711)

    def tell() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"READY=1", "notify.sock")

    assert as_nobody(tell) == 0
    assert sock.recv(100) == b"READY=1"
