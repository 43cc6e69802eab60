"""Users and groups: find them, become one, and try out what one may do."""

from __future__ import annotations

import gc
import json
import os
import signal
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NamedTuple

from hotport.errors import ConfigError
from hotport.kernel import procfs

__all__ = [
    "Closed",
    "Identity",
    "assume",
    "find_closed",
    "find_identity",
    "group_id",
    "identity_of",
    "missing_capabilities",
    "user_id",
]

_REPORT_BYTES_MAX: Final = 8192
_ID_MAX: Final = 2**32 - 2  # the last of 32 bits means none (chown(2))

#: What a process needs to start and supervise processes of another user. Sources: capabilities(7).
_CAPABILITIES: Final = {
    0: "CAP_CHOWN",
    1: "CAP_DAC_OVERRIDE",
    5: "CAP_KILL",
    6: "CAP_SETGID",
    7: "CAP_SETUID",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """A user, as a login or a service manager would start its processes.

    Attributes:
        groups: The supplementary groups.
        name: The user's name; the number where it has none.
        home: Empty if it is not known.
        shell: Empty if it is not known.
    """

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    name: str = ""
    home: str = ""
    shell: str = ""


class Closed(NamedTuple):
    """A path that a user may not use, and its first part that is closed to it."""

    path: str
    part: str

    @property
    def why(self) -> str:
        """The mode and the owner of the closed part."""
        try:
            found = os.stat(self.part)
        except OSError as error:
            return os.strerror(error.errno or 0).lower()
        return f"mode {stat.S_IMODE(found.st_mode):04o}, owner {procfs.user_name(found.st_uid)}"


def find_identity(user: str, group: str | None = None) -> Identity:
    """Find a user with its groups.

    Args:
        user: A name, or a number, which needs no entry in the user database: then its group has the same number.
        group: In place of the user's own group.

    Raises:
        ConfigError: There is no such user (HP430) or group (HP431).

    Sources: getpwnam(3); getgrouplist(3); systemd.exec(5) User= and Group=.
    """
    import pwd

    uid, entry = _number(user), None
    with suppress(KeyError):
        entry = pwd.getpwnam(user) if uid is None else pwd.getpwuid(uid)
    if entry is not None:
        gid = entry.pw_gid if group is None else group_id(group)
        groups = tuple(os.getgrouplist(entry.pw_name, gid))
        return Identity(entry.pw_uid, gid, groups, entry.pw_name, entry.pw_dir, entry.pw_shell)
    if uid is None:
        raise ConfigError(
            "HP430",
            f"there is no user {user}",
            cause="the user database of this machine (or container) has no such name",
            fix="getent passwd",
            note="or give its number",
        )
    gid = uid if group is None else group_id(group)
    return Identity(uid, gid, (gid,), str(uid))


def user_id(user: str) -> int:
    """The number of a user.

    Raises:
        ConfigError: There is none of this name (HP430).
    """
    return find_identity(user).uid


def group_id(group: str) -> int:
    """The number of a group.

    Raises:
        ConfigError: There is none of this name (HP431).
    """
    import grp

    if (number := _number(group)) is not None:
        return number
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(
            "HP431",
            f"there is no group {group}",
            cause="the group database of this machine (or container) has no such name",
            fix="getent group",
            note="or give its number",
        ) from None


def identity_of(pid: int) -> Identity | None:
    """The user that a process runs as, with its groups, by the kernel's word; None when it is gone.

    Also None of a process that can still change to another user.

    Sources: proc_pid_status(5) Uid, Gid, Groups.
    """
    found: dict[str, list[int]] = {}
    with suppress(OSError, ValueError), open(f"/proc/{pid}/status") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key in {"Uid", "Gid", "Groups"}:
                found[key] = [int(text) for text in value.split()]
    if len(found) < 3 or len({*found["Uid"]}) != 1:
        return None
    uid = found["Uid"][0]
    return Identity(uid, found["Gid"][0], tuple(found["Groups"]), procfs.user_name(uid))


def missing_capabilities() -> list[str]:
    """The capabilities that this process lacks in order to start and supervise processes of other users."""
    return [name for number, name in _CAPABILITIES.items() if not procfs.has_capability(number)]


def assume(identity: Identity) -> None:
    """Become a user for good, in a child process.

    Raises:
        OSError: EPERM: this process may not. It can have the user's groups already.

    Sources: setresuid(2): all three ids, so that nothing leads back; credentials(7); capabilities(7): the change from 0
        to other ids clears all capabilities.
    """
    os.setgroups(identity.groups)
    os.setresgid(identity.gid, identity.gid, identity.gid)
    os.setresuid(identity.uid, identity.uid, identity.uid)


def find_closed(identity: Identity, wants: Sequence[tuple[str, int]]) -> Closed | None:
    """Try in a child process which path a user may not use; None if it may use all.

    Args:
        wants: Paths that exist, absolute, each with what it is needed for: `os.R_OK`, `os.W_OK`, `os.X_OK`, as bits.

    Blocks for the time of a fork: a few milliseconds. Signals: all are blocked in the child, which runs only this.

    Raises:
        OSError: There is no process left for it, or this process may not become that user.

    Sources: access(2), of the real user, which the child has become.
    """
    tried = [(part, mode) for path, mode in wants for part, mode in _parts(path, mode)]
    heard, report = os.pipe()
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _try(identity, tried, report)
    except BaseException:
        os.close(report)
        os.close(heard)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    os.close(report)
    with open(heard, "rb") as file:
        text = file.read(_REPORT_BYTES_MAX)
    os.waitpid(pid, 0)
    number, failed = json.loads(text) if text else (0, 0)
    if failed:
        raise OSError(failed, os.strerror(failed))
    if number >= len(tried):
        return None
    part = tried[number][0]
    path = next(path for path, _ in wants if part in {each for each, _ in _parts(path, 0)})
    return Closed(path, part)


def _try(identity: Identity, tried: Sequence[tuple[str, int]], report: int) -> None:
    """Run in the child: report the number of the first path that is closed, and an errno."""
    try:
        gc.disable()  # a finaliser of ours must not run here
        failed, number = 0, 0
        try:
            assume(identity)
            number = next((n for n, (path, mode) in enumerate(tried) if not os.access(path, mode)), len(tried))
        except OSError as error:
            failed = error.errno or 1
        os.write(report, json.dumps([number, failed]).encode())
    finally:
        os._exit(0)


def _parts(path: str, mode: int) -> list[tuple[str, int]]:
    """The directories on the way to a path as it is named and as it is found, to be entered; and the path itself."""
    parts: dict[str, int] = {}
    for named in dict.fromkeys((path, os.path.realpath(path))):
        above = []
        while (parent := os.path.dirname(named)) != named:
            above.append(parent)
            named = parent
        parts |= dict.fromkeys(reversed(above), os.X_OK)
    parts[path] = mode
    return list(parts.items())


def _number(text: str) -> int | None:
    """The id that a text is; None for a name."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _ID_MAX else None
