"""Bind, adopt and replace sockets; an error names what prevents it."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import shlex
import socket
import stat
import struct
import sys
import termios
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from hotport.address import Address, FdAddress, SystemdAddress, TcpAddress, UdpAddress, UnixAddress, parse_address
from hotport.errors import ConfigError, KernelError
from hotport.kernel import procfs
from hotport.kernel.resolve import resolve
from hotport.wire.listenfds import parse_listen_environment

__all__ = [
    "Access",
    "accept_queue_length",
    "access_of",
    "acknowledged_bytes",
    "bind_control",
    "bind_guard",
    "bind_listener",
    "bind_notify",
    "bound_address",
    "change_access",
    "check_peer",
    "dropped",
    "end",
    "ended_by_peer",
    "file_path",
    "inherited_listener",
    "location",
    "may_command",
    "passed_addresses",
    "peer_credentials",
    "rebind",
    "reset",
    "set_access",
    "socket_file",
    "unlink_if_ours",
    "unsent_bytes",
]

_CONTROL_BACKLOG: Final = 64
_UNIX_PATH_BYTES_MAX: Final = 107  # sun_path is 108 bytes with its NUL

#: What a TCP listener of ours has that its successor needs before it is bound.
_KEPT: Final[dict[int, tuple[tuple[int, int], ...]]] = {
    socket.AF_INET: (
        (socket.SOL_SOCKET, socket.SO_REUSEADDR),
        (socket.SOL_SOCKET, socket.SO_REUSEPORT),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    ),
}
_KEPT[socket.AF_INET6] = (*_KEPT[socket.AF_INET], (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
_UCRED: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid
_LINGER_0: Final = struct.pack("ii", 1, 0)
_SO_MEMINFO: Final = 55
_MEMINFO_DROPS: Final = 32  # SK_MEMINFO_DROPS (linux/sock_diag.h), of 32-bit numbers
_BYTES_ACKED: Final = 120  # offsetof(struct tcp_info, tcpi_bytes_acked)


class Access(NamedTuple):
    """Who may connect to a socket file: its mode, owner and group; -1 leaves an id as it is.

    Attributes:
        is_wish: What is not permitted is left out, and no error.
    """

    mode: int
    uid: int
    gid: int
    is_wish: bool = False


def bind_listener(
    address: Address,
    *,
    backlog: int,
    shares_port: bool = False,
    listens: bool = True,
    access: Access | None = None,
) -> socket.socket:
    """Make, or adopt, the one socket of an address; from now on it accepts.

    ``listen`` is called exactly once. Calling it again replaces the backlog, and asyncio's
    ``create_server(sock=...)`` does so with 100 unless it is told otherwise.

    - TCP: SO_REUSEADDR, so that TIME_WAIT does not keep the port; TCP_NODELAY, which accepted sockets inherit
      on every event loop; an IPv6 address takes IPv6 only, so that ``0.0.0.0`` can stand beside ``[::]``.
      Of a name with several addresses the first IPv4 one is taken.
    - UDP: no SO_REUSEADDR, which would let a stranger share the port; nothing to wait for without TIME_WAIT.
    - A socket file is bound under another name and renamed, so that no client finds it missing; what is found
      there is replaced only if it is a socket that is not listening.
    - ``fd://`` sockets keep their backlog and options; TCP_NODELAY is added.

    Args:
        address: Not a ``systemd:`` one, which stands for several (`passed_addresses`).
        backlog: Length of the accept queue; the kernel caps it at ``net.core.somaxconn``.
        shares_port: TCP: SO_REUSEPORT as well, so that other sockets of this user can listen on the same address.
        listens: False leaves ``listen`` of a TCP socket to the caller: until then no client can connect to it.
        access: Of the socket file, before it gets its name; None leaves it to the umask.

    Returns:
        A non-blocking, close-on-exec socket, that the caller closes.

    Raises:
        KernelError: If the kernel refuses (HP101), or does not give the socket file this access (HP108); ``errno`` says
            why, and the cause who.
        ConfigError: If a host is unknown (HP102), a path is too long or taken by something that is no
            socket (HP103), or a descriptor is no listener (HP104).

    Sources: socket(7) SO_REUSEADDR, SO_ACCEPTCONN; tcp(7); ipv6(7) IPV6_V6ONLY; unix(7); rename(2).
    """
    match address:
        case TcpAddress() | UdpAddress():
            return _bind_inet(address, backlog, shares_port=shares_port, listens=listens)
        case UnixAddress(path=path) if address.is_abstract:
            return _bind_abstract(address, path, backlog)
        case UnixAddress(path=path):
            return _bind_unix(address, path, backlog, access)
        case FdAddress(fd=fd):
            return _with_nodelay(inherited_listener(fd))
        case SystemdAddress():
            raise AssertionError(f"{address} stands for several")


def passed_addresses(address: Address) -> tuple[Address, ...]:
    """The descriptors of an address under which the service manager has passed several sockets; others stay one.

    A name may stand for many: all sockets of a unit have its ``FileDescriptorName=``.

    Raises:
        ConfigError: There is none (HP105), or the variables by which they are passed contradict each other (HP320).

    Sources: systemd.socket(5) FileDescriptorName; sd_listen_fds_with_names(3).
    """
    if not isinstance(address, SystemdAddress):
        return (address,)
    passed = parse_listen_environment(os.environ, os.getpid())
    found = tuple(FdAddress(fd) for fd, name in passed if name == address.name)
    if not found:
        raise _not_passed(address, [name for _, name in passed])
    return found


def inherited_listener(fd: int, *, is_in_use: bool = False) -> socket.socket:
    """Take over a listening stream or a datagram socket that this process was started with.

    Args:
        is_in_use: Another process accepts from it, and has chosen whether that blocks: the choice is the socket's.

    Returns:
        The socket that owns `fd` from now on: close-on-exec, and non-blocking unless it is in use.

    Raises:
        ConfigError: If `fd` is not open, or is something else (HP104); it is left as it was.

    Sources: socket(7) SO_TYPE, SO_ACCEPTCONN; fcntl(2): O_NONBLOCK belongs to the open file description.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        cause = "it is not open here" if error.errno == errno.EBADF else "it is open, but is not a socket"
        raise _not_a_listener(fd, cause) from error
    listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not (sock.type == socket.SOCK_STREAM and listening) and sock.type != socket.SOCK_DGRAM:
        sock.detach()
        raise _not_a_listener(fd, "it is a socket that does not listen; a socket unit must have Accept=no")
    if not is_in_use:
        sock.setblocking(False)
    sock.set_inheritable(False)
    return sock


def as_sockets(descriptors: Sequence[int]) -> list[socket.socket]:
    """Make non-blocking sockets of descriptors that another process has sent.

    Raises:
        OSError: One of them is no socket (ENOTSOCK).

    Descriptors: owned by the sockets; if this raises, all are closed.
    """
    sockets: list[socket.socket] = []
    try:
        for fd in descriptors:
            sockets.append(socket.socket(fileno=fd))  # noqa: PERF401  those before one that is none are closed below
    except OSError:
        for sock in sockets:
            sock.close()
        for fd in descriptors[len(sockets) :]:
            os.close(fd)
        raise
    for sock in sockets:
        sock.setblocking(False)
    return sockets


def bound_address(address: Address, listener: socket.socket) -> Address:
    """Return where the listener of an address really is: port 0 becomes its number, ``fd://`` its address."""
    if isinstance(address, UnixAddress):
        return address  # the kernel knows it by the name under which it was first made
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        path = os.fsdecode(name)
        return UnixAddress("@" + path[1:] if path.startswith("\0") else path)
    kind = TcpAddress if listener.type == socket.SOCK_STREAM else UdpAddress
    return kind(name[0], name[1])


def file_path(address: Address) -> str:
    """The absolute path of an address's socket file; empty if it has none."""
    return os.path.abspath(address.path) if isinstance(address, UnixAddress) and not address.is_abstract else ""


def location(text: str) -> Address:
    """Make an address independent of the working directory."""
    address = parse_address(text)
    path = file_path(address)
    return UnixAddress(path) if path else address


def accept_queue_length(listener: socket.socket) -> int:
    """Count the connections in a TCP listener's accept queue; 0 for other sockets.

    Sources: tcp(7) TCP_INFO; of a listener, ``tcpi_unacked`` is the length of its queue (kernel ``tcp_get_info``).
    """
    if listener.family not in {socket.AF_INET, socket.AF_INET6} or listener.type != socket.SOCK_STREAM:
        return 0
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
    return int.from_bytes(info[24:28], sys.byteorder)


def dropped(sock: socket.socket) -> int:
    """Count what the kernel has dropped at a listener (SYNs, when its queue was full) or a UDP socket (datagrams).

    A dropped client tries again after a second. 0 if the socket is closed, or where the kernel does not say.

    Sources: socket(7); SO_MEMINFO of asm-generic/socket.h, since Linux 4.12; kernel ``tcp_listendrop``, ``sk_drops``.
    """
    try:
        info = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO_DROPS + 4)
    except OSError:
        return 0
    return int.from_bytes(info[_MEMINFO_DROPS : _MEMINFO_DROPS + 4], sys.byteorder)


def acknowledged_bytes(sock: socket.socket) -> int:
    """Count the bytes the peer's kernel has acknowledged since the connection began; 0 if closed or not TCP.

    Sources: tcp(7) TCP_INFO; ``tcpi_bytes_acked`` of struct tcp_info (linux/tcp.h), since Linux 4.1.
    """
    if sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return 0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
    except OSError:
        return 0
    return int.from_bytes(info[_BYTES_ACKED : _BYTES_ACKED + 8], sys.byteorder)


def end(sock: socket.socket) -> None:
    """Shut a connection down even if other processes hold duplicates: what was written still arrives, then FIN.

    close(2) does that only to the last duplicate. Nothing happens to a socket that is closed or not connected.

    Sources: shutdown(2) SHUT_RDWR.
    """
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def reset(sock: socket.socket, *, is_shared: bool) -> None:
    """Make a connection end with a reset on close, or now if others have duplicates; unix sockets have no reset.

    Sources: socket(7), SO_LINGER with a time of 0; connect(2), AF_UNSPEC: kernel ``tcp_disconnect``.
    """
    if sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    with suppress(OSError):  # the peer was quicker
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
    if is_shared:
        import ctypes  # 10 ms, and seldom needed

        ctypes.CDLL(None).connect(sock.fileno(), bytes(16), 16)


def ended_by_peer(descriptors: Iterable[int]) -> dict[int, bool]:
    """Find the connections whose peer has stopped sending, even before its data is read; True if it is gone.

    Sources: poll(2) POLLRDHUP; POLLHUP and POLLERR are reported without being asked for.
    """
    poll = select.poll()
    for fd in descriptors:
        poll.register(fd, select.POLLRDHUP)
    return {fd: bool(events & (select.POLLHUP | select.POLLERR)) for fd, events in poll.poll(0)}


def unsent_bytes(sock: socket.socket) -> int:
    """Count the bytes written to a connection and not yet acknowledged, or not sent; 0 if it is closed.

    Sources: tcp(7) SIOCOUTQ; unix(7) has it too.
    """
    try:
        return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (OSError, ValueError):
        return 0


def take_waiting(listener: socket.socket) -> list[socket.socket]:
    """Accept the connections in an accept queue, as far as there are descriptors for them.

    The listener does not block any more.

    Sources: accept(2): EMFILE, and EAGAIN at the end.
    """
    accepted = []
    listener.setblocking(False)  # programs get it blocking
    with suppress(OSError):
        while True:
            accepted.append(listener.accept()[0])
    return accepted


def bind_control(path: str) -> socket.socket:
    """Listen on a socket file for our own user only; replaces whatever socket was there.

    The caller owns the directory (see `hotport.kernel.fds`), so an older socket in it is our own leftover.

    Returns:
        A non-blocking AF_UNIX stream listener with mode 0600.

    Raises:
        ConfigError: If the path is too long for the kernel (HP603).
        KernelError: If it cannot be bound (HP604).

    Sources: unix(7); kernel ``unix_bind``: a socket file gets the mode of its socket, less the umask.
    """
    return _bind_private(path, socket.SOCK_STREAM)


def bind_notify(path: str, *, user: tuple[int, int] | None = None) -> socket.socket:
    """Receive notifications on a socket file for our own user only, or for another one; as `bind_control`.

    Args:
        user: The uid and gid of the other user. Nobody but this process's user may make files in the directory.

    Returns:
        A non-blocking AF_UNIX datagram socket on which the kernel says who sent what (SO_PASSCRED).
    """
    return _bind_private(path, socket.SOCK_DGRAM, None if user is None else Access(0o600, *user))


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """The pid, uid and gid of the process that connected (or, to its clients, that listened).

    As they were at that moment; pid 0 is a process that this pid namespace cannot see.

    Sources: unix(7) SO_PEERCRED.
    """
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid


def socket_file(path: str) -> tuple[int, int] | None:
    """Identify a socket file for `unlink_if_ours` by device and inode; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_peer(sock: socket.socket, user: int | None = None) -> None:
    """Check that the process that `sock` is connected to belongs to this user or root; or to `user`, and no other.

    Raises:
        PermissionError: Another user did, and may have put the socket there for us to find.
    """
    pid, uid, _ = peer_credentials(sock)
    if uid != user if user is not None else not may_command(uid):
        raise PermissionError(errno.EPERM, f"another user listens (pid {pid} of uid {uid})")


def access_of(path: str) -> Access | None:
    """Read the access of a socket file, to restore it as far as permitted; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return Access(stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, is_wish=True)


def set_access(path: str, access: Access) -> None:
    """Set the mode, owner and group of a socket file.

    Its directory may belong to another user, who could put something else there: this acts on what was found to be a
    socket with one name, and on nothing else.

    Raises:
        OSError: It is no such socket, or this is not permitted.

    Sources: open(2) O_PATH, O_NOFOLLOW; proc_pid_fd(5): the link leads to the file that is open.
    """
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISSOCK(found.st_mode) or found.st_nlink != 1:
            raise PermissionError(errno.EPERM, "it is no socket, or has another name")
        forgiven: tuple[type[OSError], ...] = (OSError,) if access.is_wish else ()
        with suppress(*forgiven):
            os.chmod(f"/proc/self/fd/{fd}", access.mode)
        with suppress(*forgiven):
            os.chown(f"/proc/self/fd/{fd}", access.uid, access.gid)
    finally:
        os.close(fd)


def may_command(uid: int) -> bool:
    """Whether a user may control this process: its own, and root."""
    return uid in (os.geteuid(), 0)


def unlink_if_ours(path: str, file: tuple[int, int] | None) -> bool:
    """Remove a socket file, unless another process has replaced it.

    Args:
        file: What `socket_file` said when it was made.

    Returns:
        Whether it was there, was ours, and is gone now.
    """
    try:
        found = os.lstat(path)
        if (found.st_dev, found.st_ino) != file:
            return False
        os.unlink(path)
    except OSError:
        return False
    return True


def bind_guard(address: TcpAddress) -> socket.socket:
    """Hold a TCP port without listening: other users cannot bind it, whatever options they set.

    Sockets of our user with SO_REUSEPORT can be bound beside it. It must not have SO_REUSEADDR, which has no rule
    about users. No connection ever comes to it.

    Raises:
        KernelError: If the kernel refuses (HP101), for example as long as there are connections in TIME_WAIT whose
            listener had no SO_REUSEPORT.

    Sources: socket(7) SO_REUSEPORT; kernel ``inet_bind_conflict``.
    """
    family, protocol, sockaddr = resolve(address, socket.SOCK_STREAM)
    sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(sockaddr)
    except OSError as error:
        sock.close()
        raise _refused(address, error, _explain_inet(address, error, sockaddr)) from error
    return sock


def rebind(listener: socket.socket, *, backlog: int) -> tuple[socket.socket, float]:
    """Close a TCP listener and listen on its address again, with the same options, as soon as that is possible.

    Args:
        listener: The last descriptor of it, or the address is still taken; it is closed, whatever happens.

    Returns:
        The new listener, and how long the address was not listening, in seconds.

    Raises:
        KernelError: Another process was quicker, or the kernel refuses for another reason (HP101).

    Sources: socket(7) SO_REUSEADDR; kernel ``inet_csk_get_port``.
    """
    name = listener.getsockname()
    address = TcpAddress(name[0], name[1])
    sock = socket.socket(listener.family, listener.type, listener.proto)
    try:
        sock.setblocking(False)
        for level, option in _KEPT[listener.family]:
            sock.setsockopt(level, option, listener.getsockopt(level, option))
        began = time.monotonic()
        listener.close()
        sock.bind(name)
        sock.listen(backlog)
        return sock, time.monotonic() - began
    except OSError as error:
        listener.close()
        sock.close()
        raise _refused(address, error, _explain_inet(address, error, name)) from error


def _bind_inet(
    address: TcpAddress | UdpAddress, backlog: int, *, shares_port: bool = False, listens: bool = True
) -> socket.socket:
    kind = socket.SOCK_STREAM if isinstance(address, TcpAddress) else socket.SOCK_DGRAM
    family, protocol, sockaddr = resolve(address, kind)
    sock: socket.socket | None = None
    try:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shares_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            _with_nodelay(sock)
        sock.bind(sockaddr)
        if kind == socket.SOCK_STREAM and listens:
            sock.listen(backlog)  # may say EADDRINUSE too: another socket listened between bind and here
    except OSError as error:
        if sock is not None:
            sock.close()
        raise _refused(address, error, _explain_inet(address, error, sockaddr)) from error
    return sock


class _Why(NamedTuple):
    """Why an address cannot be bound, and what to do."""

    cause: str
    fix: str
    note: str = ""


def _explain_inet(address: TcpAddress | UdpAddress, error: OSError, sockaddr: tuple[Any, ...]) -> _Why:
    another = type(address)(address.host, address.port + 1 if 1023 < address.port < 65535 else 8000)
    match error.errno:
        case errno.EADDRINUSE:
            cause, remedy = _explain_in_use(address, sockaddr)
            return _Why(cause, f"--bind {another}", f"or first: {remedy}")
        case errno.EACCES:
            sysctl = "net.ipv4.ip_unprivileged_port_start"
            cause = f"ports below {procfs.sysctl(sysctl)} need CAP_NET_BIND_SERVICE ({sysctl})"
            return _Why(cause, f"--bind {another}", f"or as root: sysctl -w {sysctl}={address.port}")
        case errno.EADDRNOTAVAIL:
            return _Why(f"no interface of this machine has the address {sockaddr[0]}", "ip -brief address")
        case errno.EAFNOSUPPORT:
            return _Why("the kernel does not support this address family", "ip -brief address")
        case _:
            return _Why(f"the kernel does not say more for {sockaddr[0]}", "ip -brief address")


def _explain_in_use(address: TcpAddress | UdpAddress, sockaddr: tuple[Any, ...]) -> tuple[str, str]:
    """Name the process that has the port, the rule that excludes us, and a remedy."""
    from hotport.kernel.port import ourselves, read_port  # most binds succeed
    from hotport.model.bind import Can, blame, remedies, usual

    try:
        port = read_port(address, sockaddr)
    except KernelError as error:
        return f"it is in use, and its owner cannot be seen: {error.cause}", error.note
    asker = ourselves()
    answer = blame(port, asker, usual(port))
    if answer.can == Can.YES:
        unread = f" ({'; '.join(port.unread)})" if port.unread else ""
        return f"its owner is gone by now, or cannot be seen{unread}", f"hotport why {address}"
    until = f"; {answer.until}" if answer.ends_in_s is not None else ""
    return f"{answer.because}{until}", next(remedies(port, answer))


def _bind_abstract(address: UnixAddress, path: str, backlog: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind("\0" + path[1:])
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise _refused(address, error, _explain_unix(error, address)) from error
    return sock


def _bind_unix(address: UnixAddress, path: str, backlog: int, access: Access | None) -> socket.socket:
    """Bind beside the path, listen, and only then take its place: a client finds the old or the new one."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        mode = 0  # nothing there; or bind says what is wrong
    if mode and not stat.S_ISSOCK(mode):
        raise ConfigError(
            "HP103",
            f"cannot bind {address}",
            cause=f"{path} is a file, a directory or a link, and not a socket that could be replaced",
            fix=f"ls -ld {path}",
        )
    if mode and _is_answered(path):
        error = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        raise _refused(address, error, _explain_unix(error, address))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        _place(sock, path, backlog=backlog, access=access)
    except ValueError:
        sock.close()
        raise ConfigError(
            "HP103",
            f"cannot bind {address}",
            cause=f"its path, or the name that it is first made under, has over {_UNIX_PATH_BYTES_MAX} bytes",
            fix="--bind unix:run/app.sock",
            note="a path relative to the working directory is shorter",
        ) from None
    except _NoAccess as error:
        sock.close()
        raise _not_given(address, error) from error
    except OSError as error:
        sock.close()
        raise _refused(address, error, _explain_unix(error, address)) from error
    return sock


class _NoAccess(OSError):
    """The kernel does not give a socket file the access that it shall have."""


def _not_given(address: UnixAddress, error: OSError) -> KernelError:
    return KernelError(
        "HP108",
        f"cannot set mode, owner and group of {address}",
        errno=error.errno or 0,
        cause="only root may give a file to another user, or to a group that this process is not in",
        fix="id",
        note="leave socket_user and socket_group out, or start the service as root",
    )


def change_access(address: UnixAddress, access: Access) -> None:
    """Set the mode, owner and group of the socket file of an address, to which clients may connect meanwhile.

    Raises:
        KernelError: That is not permitted, or the file is not there (HP108).
    """
    try:
        set_access(address.path, access)
    except OSError as error:
        raise _not_given(address, error) from error


def _explain_unix(error: OSError, address: UnixAddress) -> _Why:
    path = address.path
    directory = os.path.dirname(path) or "."
    match error.errno:
        case errno.EADDRINUSE:
            return _explain_name_in_use(address)
        case errno.ENOENT:
            return _Why(f"there is no directory {directory}", f"mkdir -p {directory}")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return _Why(f"nothing can be made in {directory} by uid {os.geteuid()}", f"ls -ld {directory}")
        case _:
            return _Why(f"the kernel does not say more for {path}", f"ls -ld {directory} {path}")


def _explain_name_in_use(address: UnixAddress) -> _Why:
    """Name the process that holds a socket of that name, and a remedy.

    It need not be the one that called listen: a worker can hold what it inherited from a master that is gone.
    """
    from hotport.kernel.port import read_name  # most binds succeed
    from hotport.model.bind import Can, judge_name, remedies_of_name

    try:
        name = read_name(address)
    except KernelError as error:
        return _Why(f"it is in use, and its owner cannot be seen: {error.cause}", error.fix, error.note)
    answer = judge_name(name)
    if answer.can == Can.YES or not name.is_held:
        return _Why("its owner is gone by now", f"hotport why {shlex.quote(str(address))}")
    return _Why(answer.who, next(remedies_of_name(name, answer)), "or bind another path")


def _is_answered(path: str) -> bool:
    """Tell whether a socket is bound to this address.

    Sources: connect(2): ECONNREFUSED and ENOENT mean none; EAGAIN is a full queue, EPROTOTYPE a datagram
        socket, EACCES another user's: all of them bound, or not ours to judge.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except OSError as error:
            # Any other error comes back from bind, in its own words.
            return error.errno in {errno.EAGAIN, errno.EPROTOTYPE, errno.EACCES}
        return True


def _bind_private(path: str, kind: socket.SocketKind, access: Access | None = None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        sock.setblocking(False)
        if kind == socket.SOCK_DGRAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # before anybody can send
        os.fchmod(sock.fileno(), 0o600)  # before bind: the file is never open to others
        _place(sock, path, backlog=_CONTROL_BACKLOG if kind == socket.SOCK_STREAM else None, access=access)
    except ValueError:
        sock.close()
        raise ConfigError(
            "HP603",
            f"cannot make the control socket {path}",
            cause=f"its path has over {_UNIX_PATH_BYTES_MAX} bytes, more than the kernel takes",
            fix="HOTPORT_RUNTIME_DIR=/run/user/$(id -u)/hp hotport serve",
            note="any directory with a shorter path will do",
        ) from None
    except OSError as error:
        sock.close()
        raise KernelError(
            "HP604",
            f"cannot make the control socket {path}",
            errno=error.errno or 0,
            cause="nothing can be made in its directory, or something else has that name",
            fix=f"ls -ld {os.path.dirname(path)} {path}",
        ) from error
    return sock


def _place(sock: socket.socket, path: str, *, backlog: int | None = None, access: Access | None = None) -> None:
    """Bind `sock` beside `path`, listen, and rename: the path never disappears and is never half ready.

    Raises:
        ValueError: If a path is longer than the kernel allows.
        _NoAccess: If the file cannot have that access.
    """
    beside = os.path.join(os.path.dirname(path), f".{os.urandom(3).hex()}")
    if max(len(os.fsencode(path)), len(os.fsencode(beside))) > _UNIX_PATH_BYTES_MAX:
        raise ValueError(path)
    if access is not None:
        os.fchmod(sock.fileno(), 0o600)  # until it has the access that it shall have
    sock.bind(beside)
    try:
        if access is not None:
            try:
                set_access(beside, access)
            except OSError as error:
                raise _NoAccess(error.errno, error.strerror) from error
        if backlog is not None:
            sock.listen(backlog)
        os.rename(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _not_passed(address: SystemdAddress, passed: Sequence[str]) -> ConfigError:
    if passed:
        cause = f"the service manager passed {', '.join(sorted(set(passed)))}"
    else:
        cause = "no service manager passed a socket to this process (LISTEN_FDS is not set for it)"
    return ConfigError(
        "HP105",
        f"cannot take {address}",
        cause=cause,
        fix="systemctl list-sockets --all",
        note="a socket has the name in FileDescriptorName= of its unit",
    )


def _with_nodelay(sock: socket.socket) -> socket.socket:
    if sock.family in {socket.AF_INET, socket.AF_INET6} and sock.type == socket.SOCK_STREAM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _not_a_listener(fd: int, cause: str) -> ConfigError:
    return ConfigError(
        "HP104",
        f"cannot take descriptor {fd} as a listener",
        cause=cause,
        fix="ls -l /proc/self/fd",
    )


def _refused(address: Address, error: OSError, why: _Why) -> KernelError:
    number = error.errno or 0
    return KernelError("HP101", f"cannot bind {address}", errno=number, cause=why.cause, fix=why.fix, note=why.note)
