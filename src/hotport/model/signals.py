"""What each signal does, to the supervisor, to one worker, and to all of them at once: tables.

A service manager may signal every process of a service at the same moment (systemd's ``KillMode=control-group``), and
so may a tool that signals a process tree. So what a worker does about a signal never hinders what the supervisor does
about the same one. An order is no signal: a worker cuts its connections only at a second signal, or when the
supervisor was told to hurry.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

__all__ = ["ALL", "HELD", "NOTES", "SUPERVISOR", "SUSPENDING", "TERMINATING", "WORKER", "Does", "Moment"]


class Moment(enum.Enum):
    """What a process is doing when the signal comes; for all at once it is the supervisor that counts."""

    STARTING = "starting"
    SERVING = "serving"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPING = "stopping"


class Does(enum.Enum):
    """What a signal does, in the words of the reference."""

    STOP = "stops; connections finish first"
    STOP_DUCK = "stops after `lame_duck`; connections finish first"
    STOP_BOOT = "stops; workers that start are ended"
    STOP_RESTART = "gives up the restart and stops; connections finish first"
    STOP_RESTART_DUCK = "gives up the restart and stops, both after `lame_duck`; connections finish first"
    HURRY = "cuts open connections and counts them; one more kills"
    HURRY_NOW = "stops at once: cuts open connections and counts them; one more kills"
    RESTART = "restarts"
    REFUSE = "refuses, with the reason in the log"
    MORE = "starts one worker more"
    FEWER = "runs one worker less"
    UPGRADE = "upgrades the supervisor"
    LEAVE = "leaves at once"
    DRAIN = "hands over or finishes its connections and leaves; the supervisor replaces it"
    SECOND = "logs it; a second one cuts its connections and counts them"
    CUT = "cuts its connections, counts them and leaves"
    NOTE = "logs it, and nothing else"
    NOTHING = "nothing"


Row = Mapping[Moment, Does]


def _row(*does: Does) -> Row:
    return dict(zip(Moment, does, strict=True))


_NOTED: Final = dict.fromkeys(Moment, Does.NOTE)
_IGNORED: Final = dict.fromkeys(Moment, Does.NOTHING)


def _request(does: Does) -> Row:
    """A request that is refused unless the service serves and no other request runs."""
    return _row(Does.REFUSE, does, Does.REFUSE, does, Does.REFUSE)


#: What the supervisor does, by the names of signals. Draining means that the service serves, and older generations
#: still drain.
SUPERVISOR: Final[Mapping[str, Row]] = {
    "SIGTERM": _row(Does.STOP_BOOT, Does.STOP_DUCK, Does.STOP_RESTART_DUCK, Does.STOP_DUCK, Does.HURRY),
    "SIGINT": _row(Does.STOP_BOOT, Does.STOP, Does.STOP_RESTART, Does.STOP, Does.HURRY),
    "SIGQUIT": _row(*[Does.HURRY_NOW] * 4, Does.HURRY),
    "SIGHUP": _request(Does.RESTART),
    "SIGUSR1": _NOTED,
    "SIGUSR2": _request(Does.UPGRADE),
    "SIGTTIN": _request(Does.MORE),
    "SIGTTOU": _request(Does.FEWER),
    "SIGWINCH": _IGNORED,
    "SIGPIPE": _IGNORED,
}

#: What one worker does. Restarting means that it accepts no more and can be taken back; draining, that it was told to
#: leave; stopping, that it was told so as one of the last.
WORKER: Final[Mapping[str, Row]] = {
    **dict.fromkeys(("SIGTERM", "SIGINT"), _row(Does.LEAVE, Does.DRAIN, Does.DRAIN, Does.SECOND, Does.SECOND)),
    "SIGQUIT": _row(Does.LEAVE, *[Does.CUT] * 4),
    **dict.fromkeys(("SIGHUP", "SIGUSR1", "SIGUSR2"), _NOTED),
    **dict.fromkeys(("SIGTTIN", "SIGTTOU", "SIGWINCH", "SIGPIPE"), _IGNORED),
}

#: What happens if every process of the service gets it: the same as if the supervisor alone had got it.
ALL: Final = SUPERVISOR

#: What the log says about a signal that does nothing else.
NOTES: Final[Mapping[str, str]] = {
    "SIGUSR1": "logs go to stdout and stderr; nothing is reopened",
    "SIGHUP": "only the supervisor restarts on it",
    "SIGUSR2": "only the supervisor is upgraded on it",
}

#: They end a worker. It counts them: the supervisor's orders are none.
TERMINATING: Final = frozenset({"SIGTERM", "SIGINT", "SIGQUIT"})

#: By default they stop a process in the middle of whatever it does; a worker ignores them.
SUSPENDING: Final = frozenset({"SIGTTIN", "SIGTTOU"})

#: They wait until a supervisor can handle them; by default they would end or suspend it. Without TERM, INT and QUIT:
#: before it can handle those, a process that they end has nothing to lose. For a worker all of its signals wait.
HELD: Final = frozenset({"SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU"})
