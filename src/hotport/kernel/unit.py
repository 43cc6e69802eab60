"""The systemd unit that a process belongs to, and how systemd ends that unit."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import Final, NamedTuple

__all__ = ["Unit", "kill_mode", "unit_of"]

#: The manager answers at once, or is busy with something else than us.
ANSWER_TIMEOUT_S: Final = 5.0


class Unit(NamedTuple):
    """A service unit; `is_users` if a user's own manager runs it."""

    name: str
    is_users: bool


def unit_of(pid: int) -> Unit | None:
    """The service unit whose control group a process is in; None if it is in none, or is gone.

    Sources: proc_pid_cgroup(5); systemd.slice(5): a user's manager is ``user@UID.service``, and its units are below it.
    """
    with suppress(OSError), open(f"/proc/{pid}/cgroup") as file:
        for line in file:
            number, controllers, path = line.rstrip("\n").split(":", 2)
            # Where both hierarchies exist, one of them may be left empty.
            if (number == "0" or controllers == "name=systemd") and (found := _parse(path)):
                return found
    return None


def _parse(path: str) -> Unit | None:
    groups = path.split("/")
    units = [group for group in groups if group.endswith((".service", ".scope"))]
    if not units or not units[-1].endswith(".service") or units[-1].startswith("user@"):
        return None
    return Unit(units[-1], any(group.startswith("user@") for group in units[:-1]))


def kill_mode(unit: Unit) -> str:
    """``control-group``, ``mixed``, ``process`` or ``none``; empty if systemd does not say.

    Sources: systemctl(1) show; systemd.kill(5).
    """
    command = ["systemctl", *(["--user"] if unit.is_users else []), "show", "--property=KillMode", "--value"]
    try:
        done = subprocess.run(
            [*command, "--", unit.name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
