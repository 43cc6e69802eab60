"""As whom the workers run, and who may connect to socket files, by the options of a service."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from hotport.errors import StartError
from hotport.kernel.sockets import Access
from hotport.kernel.users import (
    Identity,
    find_closed,
    find_identity,
    group_id,
    missing_capabilities,
    user_id,
)
from hotport.options import Options

__all__ = ["identity_for", "login_environment", "refuse_closed", "socket_access"]

#: The mode of socket files that belong to a user or group by the options: these two may connect.
SHARED_MODE: Final = 0o660

#: Variables that are about the user who has started the supervisor.
_PERSONAL: Final = ("HOME", "LOGNAME", "MAIL", "SHELL", "USER", "XDG_RUNTIME_DIR")


def identity_for(options: Options) -> Identity | None:
    """As whom workers with these options run; None as this process.

    Raises:
        ConfigError: There is no such user (HP430) or group (HP431).
        StartError: This process may not start processes of another user (HP432).
    """
    if options.user is None:
        return None
    found = find_identity(options.user, options.group)
    if (found.uid, found.gid) == (os.geteuid(), os.getegid()):
        return None
    if missing := missing_capabilities():
        me = find_identity(str(os.geteuid())).name
        raise StartError(
            "HP432",
            f"cannot run workers as {_named(found, options.group)}",
            cause=f"this process runs as {me} and has no {', '.join(missing)}",
            fix="sudo hotport serve",
            note=f"or leave user out: workers then run as {me}; under systemd, User= and AmbientCapabilities= do it",
        )
    return found


def _named(identity: Identity, group: str | None) -> str:
    return f"{identity.name} of group {group}" if group is not None else identity.name


def refuse_closed(identity: Identity, wants: Mapping[str, int]) -> None:
    """Check that a user may use some paths.

    Args:
        wants: For each path `os.R_OK`, `os.W_OK` and `os.X_OK`, as bits.

    Raises:
        StartError: It may not use one of them (HP433), or this process may not become that user (HP432).
    """
    try:
        closed = find_closed(identity, list(wants.items()))
    except OSError as error:
        raise StartError(
            "HP432",
            f"cannot run workers as {identity.name}",
            cause=f"this process may not become that user: {os.strerror(error.errno or 0).lower()}",
            fix="grep Cap /proc/self/status",
            note="a container or a unit may take capabilities from root: it needs CAP_SETUID and CAP_SETGID",
        ) from error
    if closed is None:
        return
    where = "" if closed.part == closed.path else f", on the way to {closed.path}"
    needs = "enter" if where or wants[closed.path] == os.X_OK else "read"
    raise StartError(
        "HP433",
        f"cannot run workers as {identity.name}: {closed.path} is closed to that user",
        cause=f"{identity.name} may not {needs} {closed.part} ({closed.why}){where}",
        fix=f"namei -l {closed.path}",
        note="open it to that user or one of its groups, or move it to a place that is open, such as /srv or /opt",
    )


def login_environment(environment: Mapping[str, str], identity: Identity) -> dict[str, str]:
    """Return an environment with the variables of a user, in place of those of another one.

    Sources: systemd.exec(5), "Environment Variables Set or Propagated by the Service Manager"; nologin(8).
    """
    found = {key: value for key, value in environment.items() if key not in _PERSONAL}
    found |= {"USER": identity.name, "LOGNAME": identity.name}
    if identity.home not in {"", "/"}:
        found["HOME"] = identity.home
    if identity.shell and os.path.basename(identity.shell) not in {"nologin", "false", "true"}:
        found["SHELL"] = identity.shell
    return found


def socket_access(options: Options) -> Access | None:
    """Who may connect to the socket files of a service, and whose they are; None leaves it to the umask.

    With `user`, they are that user's, for proxies of the same user or group.

    Raises:
        ConfigError: There is no such user (HP430) or group (HP431).
    """
    if (options.socket_mode, options.socket_user, options.socket_group, options.user) == (None,) * 4:
        return None
    uid = gid = -1
    if options.user is not None:
        workers = find_identity(options.user, options.group)
        uid, gid = workers.uid, workers.gid
    if options.socket_user is not None:
        uid = user_id(options.socket_user)
    if options.socket_group is not None:
        gid = group_id(options.socket_group)
    return Access(SHARED_MODE if options.socket_mode is None else int(options.socket_mode, 8), uid, gid)
