"""Find where a service has more rights than it needs, or gives them to others: users, groups, modes of files."""

from __future__ import annotations

import grp
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

import hotport
from hotport.address import UnixAddress, parse_address
from hotport.diagnose.doctor import Finding
from hotport.kernel import procfs
from hotport.kernel.sockets import file_path
from hotport.kernel.users import Identity, identity_of
from hotport.options import Options
from hotport.wire.messages import Status

__all__ = ["Rights", "SocketFile", "examine_rights", "read_rights"]

#: What is shown of the workers that are root's.
_NAMED_MAX: Final = 4


class SocketFile(msgspec.Struct, frozen=True):
    """A unix listener.

    Attributes:
        mode: Of its file; None for a name in the abstract namespace, which has none.
        group: Its group, by name.
        is_reachable: Whether every user can enter the directories on the way to it.
        closed_to_group: The first of these directories that its group cannot enter.
    """

    address: str
    mode: int | None = None
    group: str = ""
    is_reachable: bool = True
    closed_to_group: str = ""


class Rights(msgspec.Struct, frozen=True):
    """Who may do what in a running service.

    Attributes:
        root: Its workers that are root's, by name.
        sockets: Its unix listeners.
        user: The workers' user, if the supervisor is root and they are not.
        loose: What the supervisor executes or obeys, and that user may change.
    """

    root: tuple[str, ...] = ()
    sockets: tuple[SocketFile, ...] = ()
    user: str = ""
    loose: tuple[str, ...] = ()


def read_rights(status: Status) -> Rights:
    """Look at the processes and socket files of a running service; what cannot be read is left out."""
    found = [(f"worker {each.generation}.{each.worker}", identity_of(each.pid)) for each in status.workers]
    root = tuple(name for name, who in found if who is not None and who.uid == 0)
    sockets = tuple(_socket_file(text) for text in status.addresses if isinstance(parse_address(text), UnixAddress))
    user = next((who for _, who in found if who is not None and who.uid), None)
    if user is None or procfs.user_of(status.pid) != 0:
        return Rights(root, sockets)
    return Rights(root, sockets, user.name, tuple(_changeable(status.pid, user)))


def examine_rights(rights: Rights, options: Options) -> Iterator[Finding]:
    """Find problems; a pure function."""
    if rights.root:
        more = f" and {len(rights.root) - _NAMED_MAX} more" if len(rights.root) > _NAMED_MAX else ""
        yield Finding(
            f"{', '.join(rights.root[:_NAMED_MAX])}{more} of this service run as root",
            "whoever finds a hole in the application, or in a package that it uses, has the whole machine",
            fix='user = "www-data"',
            note="and restart: ports stay bound; or User= in the unit, and AmbientCapabilities=CAP_NET_BIND_SERVICE",
        )
    for path in rights.loose:
        yield Finding(
            f"{rights.user} may change {path}, and the supervisor, which is root, executes or obeys it",
            "whoever breaks into the application becomes root when the service is started, restarted or upgraded",
            fix=f"chown -h root:root {path}",
            note="and take away the right of others to write; or run the whole service as that user, without root",
        )
    is_trusted = any(peer in {"unix", "*"} for peer in options.trusted_proxy)
    for each in rights.sockets:
        if is_trusted and each.mode is None:
            yield Finding(
                f"every user may connect to {each.address}, and trusted_proxy names the peers of unix sockets",
                "any process of this machine can claim to be any client (X-Forwarded-For, PROXY header)",
                fix=f"--bind unix:/run/{each.address.partition('@')[2]}.sock",
                note="names with @ have neither mode nor owner; or leave unix out of trusted_proxy",
            )
        elif is_trusted and each.mode is not None and each.mode & 0o002 and each.is_reachable:
            yield Finding(
                f"every user may connect to {each.address} (mode {each.mode:04o}), "
                "and trusted_proxy names the peers of unix sockets",
                "any process of this machine can claim to be any client (X-Forwarded-For, PROXY header)",
                fix='socket_mode = "0660"',
                note="with socket_group for the proxy's; SocketMode= in a socket unit; or no unix in trusted_proxy",
            )
        if each.mode is not None and each.mode & 0o020 and each.closed_to_group:
            yield Finding(
                f"the group {each.group} may connect to {each.address}, but cannot enter {each.closed_to_group}",
                "a proxy of that group gets EACCES (permission denied), and answers 502",
                fix=f"chmod o+x {each.closed_to_group}",
                note="or bind the socket file in a directory that it can enter; RuntimeDirectoryMode=0711 in a unit",
            )


def _socket_file(text: str) -> SocketFile:
    address = parse_address(text)
    path = file_path(address)
    if not path:
        return SocketFile(text)
    try:
        found = os.stat(path)
    except OSError:
        return SocketFile(text, 0)
    parents = [(str(each), os.stat(each)) for each in reversed(Path(path).parents)]
    closed = [each for each, seen in parents if not seen.st_mode & stat.S_IXOTH]
    closed_to_group = [
        each
        for each, seen in parents
        if not seen.st_mode & (stat.S_IXGRP if seen.st_gid == found.st_gid else stat.S_IXOTH)
    ]
    group = str(found.st_gid)
    with suppress(KeyError):
        group = grp.getgrgid(found.st_gid).gr_name
    mode = stat.S_IMODE(found.st_mode)
    return SocketFile(text, mode, group, not closed, next(iter(closed_to_group), ""))


def _changeable(supervisor: int, user: Identity) -> Iterator[str]:
    """What a supervisor executes or obeys, and the user may change, or replace in its directory."""
    arguments = [each for each in procfs.arguments(supervisor)[:2] if each.startswith("/")]
    paths = {os.path.dirname(os.path.realpath(hotport.__file__)), *map(os.path.dirname, arguments), *arguments}
    with suppress(OSError):
        directory = os.readlink(f"/proc/{supervisor}/cwd")
        paths |= {path for name in ("hotport.toml", "pyproject.toml") if os.path.exists(path := f"{directory}/{name}")}
    for path in sorted(paths):
        with suppress(OSError):
            if _may_write(os.stat(path), user):
                yield path


def _may_write(found: os.stat_result, user: Identity) -> bool:
    if found.st_uid == user.uid:
        return True  # it may also change the mode
    groups = {user.gid, *user.groups}
    return bool(found.st_mode & (stat.S_IWGRP if found.st_gid in groups else stat.S_IWOTH))
