"""Talk to a running service."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from hotport.channel import exchange
from hotport.errors import ConfigError, ControlError, nearest
from hotport.kernel.procfs import user_name
from hotport.kernel.sockets import may_command, peer_credentials
from hotport.options import runtime_root
from hotport.wire.messages import Failure

__all__ = ["ask", "ask_service", "find_service", "is_elsewhere", "name_argument", "raise_failure"]


_Function = TypeVar("_Function", bound=Callable[..., Any])

_ELSEWHERE: Final = "if it runs with another HOTPORT_RUNTIME_DIR, set the same one here"


def ask(name: str | None, request: Any) -> Iterator[Any]:
    """Send one request to a service and yield its replies; the last one ends the conversation.

    Raises:
        ControlError: There is no such service (HP605, HP606), or it left in the middle (HP607).
        ConfigError: Several services run, and none was named (HP331).
    """
    yield from ask_service(find_service(name), request)


def ask_service(service: Path, request: Any) -> Iterator[Any]:
    """Send one request to the service with this runtime directory, as `ask` does."""
    with _connect(service) as sock:
        has_answer = False
        for reply in exchange(sock, request):
            has_answer = True
            yield reply
        if not has_answer:
            raise ControlError(
                "HP607",
                f"{service.name} did not answer",
                cause="its supervisor closed the connection",
                fix=f"hotport status {service.name}",
            )


def raise_failure(reply: Any) -> None:
    """Raise the error of a refusal; do nothing for any other reply."""
    if isinstance(reply, Failure):
        raise reply.error()


def name_argument(function: _Function) -> _Function:
    """Give a command the argument NAME, a running service; a shell completes it."""
    return click.argument("name", required=False, shell_complete=_complete_name)(function)


def _complete_name(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    root = runtime_root(os.environ, os.geteuid(), Path(tempfile.gettempdir()))
    return [name for name in _running(root) if name.startswith(begun)]


def _running(root: Path) -> list[str]:
    """The services that have a control socket, whether or not a supervisor answers there."""
    return sorted(path.parent.name for path in root.glob("*/control.sock")) if root.is_dir() else []


def find_service(name: str | None) -> Path:
    """Find the runtime directory of a running service: the named one, or the only one."""
    root = runtime_root(os.environ, os.geteuid(), Path(tempfile.gettempdir()))
    running = _running(root)
    if name is not None:
        if name not in running:
            near = nearest(name, running)
            raise ControlError(
                "HP605",
                f"no service {name} runs here",
                cause=f"there is no {root / name}/control.sock" + (f"; the nearest is {near!r}" if near else ""),
                fix=_again(near, instead_of=name) if near else f"ls {root}",
                note="" if near else _ELSEWHERE,
            )
        return root / name
    answers = {service: _answer_of(root / service) for service in running}
    alive = [service for service, error in answers.items() if error is None]
    if not alive:
        for error in answers.values():
            if error is not None and error.code == "HP608":
                raise error
        raise ControlError(
            "HP605",
            "no service runs here",
            cause=f"no supervisor answers in {root}",
            fix="hotport serve app:app",
            note=_ELSEWHERE,
        )
    if len(alive) > 1:
        raise ConfigError(
            "HP331",
            "several services run here",
            cause=f"they are {', '.join(alive)}",
            fix=_again(alive[0]),
        )
    return root / alive[0]


def _again(name: str, *, instead_of: str | None = None) -> str:
    """Return the current command line, for the service `name`."""
    given = sys.argv[1:]
    words = [name if word == instead_of else word for word in given] if instead_of else [*given, name]
    return shlex.join(["hotport", *words])


def is_elsewhere(service: Path) -> bool:
    """Whether the supervisor of a service runs in another pid namespace, such as a container.

    Sources: unix(7) SO_PEERCRED; pid_namespaces(7): a process that cannot be seen from here has the pid 0.
    """
    with _connect(service) as sock:
        return peer_credentials(sock)[0] == 0


def _answer_of(service: Path) -> ControlError | None:
    """Return the error of connecting to a service; None if it works."""
    try:
        _connect(service).close()
    except ControlError as error:
        return error
    return None


def _connect(service: Path) -> socket.socket:
    path = service / "control.sock"
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        cause, note = {
            ConnectionRefusedError: (
                "its supervisor is gone and has left its socket behind",
                "start the service again: it adopts the workers that still run",
            ),
            PermissionError: (f"{path} belongs to another user", "run the command as the service's user"),
        }.get(type(error), (os.strerror(error.errno or 0).lower(), ""))
        raise ControlError(
            "HP606",
            f"cannot reach the supervisor of {service.name}",
            cause=cause,
            fix=f"ls -l {shlex.quote(str(path))}",
            note=note,
        ) from None
    pid, uid, _ = peer_credentials(sock)
    if not _may_answer(uid, service):
        sock.close()
        raise ControlError(
            "HP608",
            f"refused to talk to {service.name}",
            cause=f"{path} is another user's: pid {pid} of {user_name(uid)} (uid {uid}) answers there",
            fix=f"ls -ld {shlex.join(map(str, (service.parent, service, path)))}",
        )
    return sock


def _may_answer(uid: int, service: Path) -> bool:
    """Whether a process of this user may be a service of ours; root also commands those of a directory's owner."""
    return may_command(uid) or (os.geteuid() == 0 and uid == service.stat().st_uid)
