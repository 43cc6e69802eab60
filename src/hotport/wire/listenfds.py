"""Socket activation: tell a started program which descriptors are its listeners.

Descriptors are passed from `FIRST_FD` up, without a gap; three environment variables say how many, for whom
and what they are called. Sources: sd_listen_fds(3); systemd ``sd-daemon.c`` for what is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from hotport.errors import ConfigError

__all__ = ["FIRST_FD", "LISTEN_VARIABLES", "listen_environment", "parse_listen_environment"]

FIRST_FD: Final = 3
"""``SD_LISTEN_FDS_START``: the first descriptor after stdin, stdout and stderr."""

LISTEN_VARIABLES: Final = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDNAMES")
"""What to remove before another program is started: the variables were meant for one process only."""

_NAME_BYTES_MAX: Final = 255  # FDNAME_MAX
_COUNT_MAX: Final = 2**20  # far above any RLIMIT_NOFILE that a listener count can meet
_UNNAMED: Final = "unknown"  # what sd_listen_fds_with_names(3) calls a descriptor without a name


def listen_environment(names: Sequence[str], pid: int) -> dict[str, str]:
    """Make the variables that tell process `pid` it holds ``len(names)`` listeners from `FIRST_FD` up.

    Args:
        names: One for each listener, in order: printable ASCII without ``:``, 1 to 255 characters.
        pid: The process that will hold them, as it sees itself.

    Returns:
        The variables to set; empty when there is nothing to pass.

    Raises:
        ConfigError: If a name cannot be passed (HP321).
    """
    for name in names:
        if not 0 < len(name) <= _NAME_BYTES_MAX or not all(" " <= c <= "~" and c != ":" for c in name):
            raise ConfigError(
                "HP321",
                f"cannot name a listener {name!r}",
                cause="LISTEN_FDNAMES takes 1 to 255 printable ASCII characters, and ':' separates names",
                note="percent-encode the name (':' is %3A), or shorten it",
            )
    if not names:
        return {}
    return {
        "LISTEN_FDS": str(len(names)),
        "LISTEN_PID": str(pid),
        "LISTEN_FDNAMES": ":".join(names),
    }


def parse_listen_environment(environ: Mapping[str, str], pid: int) -> tuple[tuple[int, str], ...]:
    """Return the listeners that `environ` passes to process `pid`, as ``(descriptor, name)``.

    A descriptor without a name is called ``unknown``. ``LISTEN_PIDFDID`` is not looked at: telling processes
    apart by more than a pid takes a system call.

    Returns:
        Descriptors from `FIRST_FD` up; empty when nothing is passed, or when it is meant for another process.

    Raises:
        ConfigError: If the variables contradict each other or are no numbers (HP320).
    """
    if "LISTEN_PID" not in environ or "LISTEN_FDS" not in environ:
        return ()
    if _number(environ, "LISTEN_PID") != pid:
        return ()
    count = _number(environ, "LISTEN_FDS")
    if count > _COUNT_MAX:
        raise _garbage(environ, "LISTEN_FDS", f"not more than {_COUNT_MAX} descriptors can be passed")
    if "LISTEN_FDNAMES" not in environ or not count:
        return tuple((FIRST_FD + index, _UNNAMED) for index in range(count))
    names = environ["LISTEN_FDNAMES"].split(":")
    if len(names) != count:
        raise _garbage(environ, "LISTEN_FDNAMES", f"{len(names)} names for {count} descriptors")
    return tuple((FIRST_FD + index, name or _UNNAMED) for index, name in enumerate(names))


def _number(environ: Mapping[str, str], variable: str) -> int:
    text = environ[variable]
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise _garbage(environ, variable, "it must be a number")
    return int(text)


def _garbage(environ: Mapping[str, str], variable: str, cause: str) -> ConfigError:
    return ConfigError(
        "HP320",
        f"cannot take the passed listeners: {variable}={environ[variable][:80]!r}",
        cause=cause,
        fix=f"unset {' '.join(LISTEN_VARIABLES)}",
    )
