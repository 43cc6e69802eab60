"""Read who started a process, and what manages it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any, Final

from hotport.errors import ConfigError
from hotport.kernel import procfs
from hotport.kernel.unit import unit_of
from hotport.model.process import Container, Origin, Process, container_in

__all__ = ["describe", "origin_of"]

PARENTS_MAX: Final = 16
_NAME_CHARS_MAX: Final = 40
_ANSWER_TIMEOUT_S: Final = 5.0

#: Where Docker keeps what it knows of its containers; for root.
_DOCKER: Final = "/var/lib/docker/containers"
_CONTAINERS_MAX: Final = 500

#: Of these, what they run says more than their own name.
_INTERPRETERS: Final = re.compile(r"(python|node|ruby|perl|java|php|sh|bun|deno|uv)[0-9.]*$")
#: A program that multiprocessing starts, by its command line.
_SPAWNED: Final = re.compile(r"multiprocessing\.(spawn|forkserver|resource_tracker)")


def describe(pid: int, *, port: int = 0) -> Process:
    """Describe a process that holds a socket; where something cannot be read, it is empty.

    Args:
        port: That it holds, to name the socket unit if it is systemd; 0 for none.
    """
    origin = origin_of(pid)
    generation = procfs.generation(pid)
    runtime = procfs.runtime_of(pid)
    command = procfs.command(pid)
    stop = _managed(pid, origin, port) or _stopping(runtime)
    suspended = procfs.is_suspended(pid)
    return Process(pid, command, procfs.owner(pid), procfs.unit_of(pid), generation, stop, suspended, origin)


def origin_of(pid: int) -> Origin:
    """Read how a process came to be.

    Sources: proc_pid_stat(5) ppid, pgrp, session, tty_nr; proc_pid_exe(5) and proc_pid_cwd(5): `` (deleted)``.
    """
    parent, group, session, terminal = procfs.relations(pid)
    words = procfs.arguments(pid)
    container, forwards = _container_of(pid), ""
    if os.path.basename(words[0] if words else "") == "docker-proxy":
        host, number = _flag(words, "-container-ip"), _flag(words, "-container-port")
        container, forwards = _docker_at(host) or container, f"{host}:{number}"
    is_orphan = parent <= 1 or session not in (0, procfs.relations(parent)[2])
    is_left = group not in (0, pid, session) and is_orphan and procfs.state_of(group) in ("", "Z")
    is_left = is_left or (parent <= 1 and any(_SPAWNED.search(word) for word in words))
    return Origin(
        tuple(f"{_short_name(each)} (pid {each})" for each in _parents(pid)),
        terminal,
        procfs.age_s(pid),
        container,
        forwards,
        is_left,
        tuple(_deleted(pid)),
    )


def _parents(pid: int) -> list[int]:
    found: list[int] = []
    while (pid := procfs.parent(pid)) > 1 and len(found) < PARENTS_MAX:
        found.append(pid)
    return found


def _short_name(pid: int) -> str:
    name = procfs.comm(pid)
    if not _INTERPRETERS.search(name):
        return name
    words = procfs.command(pid).split(" ")
    text = " ".join((os.path.basename(words[0]), *words[1:]))
    return text if len(text) <= _NAME_CHARS_MAX else text[: _NAME_CHARS_MAX - 3] + "..."


def _deleted(pid: int) -> list[str]:
    found = []
    for link, name in (("exe", "program file"), ("cwd", "working directory")):
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/{link}").endswith(" (deleted)"):
                found.append(name)
    return found


def _container_of(pid: int) -> Container | None:
    """The container that a process is in, and we are not: from inside, its engine cannot be asked."""
    path = procfs.group_path(pid)
    found = container_in(path)
    if found is None or found == container_in(procfs.group_path(os.getpid())):
        return None
    if found.engine == "docker":
        for each in Path(_DOCKER).glob(f"{found.name}*/config.v2.json"):
            return _docker_named(_json(each)) or found
    return found


def _docker_at(address: str) -> Container | None:
    """The running container of Docker with an address; None if its files are not readable."""
    with suppress(OSError):
        for path in islice(Path(_DOCKER).glob("*/config.v2.json"), _CONTAINERS_MAX):
            known = _json(path)
            networks = (known.get("NetworkSettings") or {}).get("Networks") or {}
            if any(address in (each.get("IPAddress"), each.get("GlobalIPv6Address")) for each in networks.values()):
                return _docker_named(known)
    return None


def _docker_named(known: dict[str, Any]) -> Container | None:
    name = str(known.get("Name", "")).removeprefix("/")
    return Container("docker", name) if name else None


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def _flag(words: list[str], name: str) -> str:
    return words[words.index(name) + 1] if name in words[:-1] else ""


def _managed(pid: int, origin: Origin, port: int) -> str:
    """The command by which what manages a process stops it; empty if nothing does."""
    if origin.forwards and origin.container is None:
        number = _flag(procfs.arguments(pid), "-host-port")
        return f"docker stop $(docker ps --quiet --filter publish={quote(number)})"
    if origin.container is not None:
        return origin.container.stop
    variables = procfs.environment(pid)
    program = variables.get("SUPERVISOR_PROCESS_NAME", "")
    if program and any(parent.startswith("supervisord") for parent in origin.parents):
        return f"supervisorctl stop {quote(':'.join((variables.get('SUPERVISOR_GROUP_NAME') or program, program)))}"
    if (number := variables.get("pm_id", "")).isdigit() and "PM2_HOME" in variables and not origin.is_left:
        return f"pm2 stop {number}"
    if procfs.comm(pid) == "systemd":
        return _stop_units(pid, [unit for unit in _sockets_of_systemd(pid, port) if unit])
    unit = unit_of(pid)
    if unit is None or unit == unit_of(os.getpid()) or _is_guest(pid):
        return ""
    return _stop_units(pid, [unit.name], is_users=unit.is_users)


def _stop_units(pid: int, units: list[str], *, is_users: bool | None = None) -> str:
    if not units:
        return ""
    is_users = pid != 1 if is_users is None else is_users
    manager = ""
    if is_users:
        is_mine = procfs.user_of(pid) == os.geteuid()
        manager = "--user " if is_mine else f"--user --machine={quote(procfs.owner(pid))}@ "
    return f"systemctl {manager}stop {' '.join(map(quote, units))}"


def _is_guest(pid: int) -> bool:
    """Whether a process is a job of its unit's server and not the server: of cron, of sshd, of a terminal's.

    Such jobs lead sessions of their own, and their unit must not be stopped because of one of them.
    """
    group, session = procfs.group_path(pid), procfs.relations(pid)[2]
    above = [each for each in _parents(pid) if procfs.group_path(each) == group]
    return bool(above) and procfs.relations(above[-1])[2] != session


def _sockets_of_systemd(pid: int, port: int) -> list[str]:
    """The socket units of a manager that listen on a port, with the services that they start.

    Sources: systemctl(1) list-sockets: LISTEN, UNIT, ACTIVATES.
    """
    manager = [] if pid == 1 else ["--user"]
    command = ["systemctl", *manager, "list-sockets", "--no-legend", "--no-pager", "--full", "--plain"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_ANSWER_TIMEOUT_S, check=False
        )
        rows = [line.split() for line in done.stdout.splitlines()]
        found = [row for row in rows if len(row) > 1 and row[0].endswith(f":{port}")]
        return list(dict.fromkeys([row[1] for row in found] + [unit for row in found for unit in row[2:]]))
    return []


def _stopping(directory: str) -> str:
    """Return the command that stops the service of hotport's with this runtime directory."""
    if not directory:
        return ""
    from hotport.options import runtime_root  # takes a tenth of the time of `hotport why` to load

    root, _, name = directory.rpartition("/")
    with suppress(ConfigError):
        if str(runtime_root(os.environ, os.geteuid(), Path(tempfile.gettempdir()))) == root:
            return f"hotport stop {quote(name)}"
    return f"HOTPORT_RUNTIME_DIR={quote(root)} hotport stop {quote(name)}"
