"""Contain unexpected errors: each ends only the task or block in which it is raised.

Expected errors are handled where they are raised. Any other error is logged with its traceback, and one thing is given
up: a conversation, a report, a step. Tasks that the service needs (its inputs, its timers, the watch over a worker) are
`retried` instead.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Final, TypeVarTuple, final

import anyio

from hotport.observe.logs import get_logger

__all__ = ["Containing", "contained", "retried"]

Arguments = TypeVarTuple("Arguments")

#: Seconds from an unexpected error to the next attempt: a permanent error must not load the processor or the disk.
RETRY_PAUSE_S: Final = 0.1

log = get_logger("hotport.supervisor")


@final
class Containing:
    """A block whose unexpected errors are logged and suppressed; cancellation passes.

    Args:
        what: The block's name in the log event ``WHAT.failed``.
        give_up: Called with the error; must not raise.
        about: Fields for the log line.
    """

    def __init__(self, what: str, give_up: Callable[[Exception], object] | None = None, **about: object) -> None:
        self._what = what
        self._give_up = give_up
        self._about = about

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        log.error(f"{self._what}.failed", exc_info=error, **self._about)
        if self._give_up is not None:
            self._give_up(error)
        return True


async def contained(what: str, run: Callable[[*Arguments], Awaitable[Any]], *args: *Arguments) -> None:
    """Await `run`; log an unexpected error, and return."""
    with Containing(what):
        await run(*args)


async def retried(what: str, run: Callable[[*Arguments], Awaitable[Any]], *args: *Arguments) -> None:
    """Await `run`; log an unexpected error and await it again, until it returns."""
    while True:
        with Containing(what):
            await run(*args)
            return
        await anyio.sleep(RETRY_PAUSE_S)
