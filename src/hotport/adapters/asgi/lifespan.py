"""The ASGI lifespan protocol: an application's startup, its shutdown, and its state."""

from __future__ import annotations

import asyncio
import logging
import traceback
from typing import Any, Final, Literal

from hotport.adapters.asgi.spec import Application, Message
from hotport.adapters.base import Context
from hotport.errors import StartError

__all__ = ["Lifespan"]

log = logging.getLogger("hotport.error")

#: How many last lines of an application's message or traceback are shown as the cause.
CAUSE_LINES_MAX: Final = 8


class Lifespan:
    """The application's lifespan task, from before its first request until after its last.

    Args:
        mode: ``on`` requires that the application supports lifespan, ``auto`` serves it also if it does not, ``off``
            sends no lifespan events.
    """

    def __init__(self, application: Application, context: Context, mode: Literal["auto", "on", "off"]) -> None:
        #: The application's state; every request gets a shallow copy.
        self.state: dict[str, Any] = {}
        self._application = application
        self._context = context
        self._mode = mode
        self._task: asyncio.Task[None] | None = None
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._asked = ""
        self._answer: asyncio.Future[Message] | None = None
        self._has_received = False

    async def startup(self) -> None:
        """Run the application's startup.

        Raises:
            StartError: It failed (HP509), or the application lacks a required lifespan (HP510).

        Cancellation: safe; ends the application's task.
        """
        if self._mode == "off":
            return
        self._task = asyncio.create_task(self._run(), name="hotport.lifespan")
        answer = await self._ask(self._task, "lifespan.startup")
        if answer is None:
            self._do_without(self._task)
        elif answer["type"] == "lifespan.startup.failed":
            await self._end(self._task)
            raise StartError(
                "HP509",
                "the application did not start",
                cause=_last_lines(str(answer.get("message") or "")) or "it gave no reason",
                note="correct its lifespan startup, then start it again",
            )

    async def shutdown(self) -> None:
        """Run the application's shutdown, after its last request.

        Cancellation: safe; ends the application's task.
        """
        task = self._task
        if task is None:
            return
        if not task.done():
            answer = await self._ask(task, "lifespan.shutdown")
            if answer is not None and answer["type"] == "lifespan.shutdown.failed":
                log.error("the application failed to shut down: %s", answer.get("message") or "it gave no reason")
                await self._end(task)
                return
            await self._wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the application raised in its lifespan", exc_info=error)

    async def _run(self) -> None:
        scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self.state,
            "extensions": {"hotport": self._context.extension},
        }
        await self._application(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        self._has_received = True
        return await self._inbox.get()

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if self._answer is None or kind not in (f"{self._asked}.complete", f"{self._asked}.failed"):
            raise RuntimeError(f"{kind!r} does not answer {self._asked!r}")
        answer, self._answer = self._answer, None
        if not answer.done():
            answer.set_result(message)

    async def _ask(self, task: asyncio.Task[None], kind: str) -> Message | None:
        """Send an event; return the application's answer, or None if its task ended without one."""
        self._asked = kind
        self._answer = answer = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait({"type": kind})
        await self._wait({task, answer})
        return answer.result() if answer.done() else None

    async def _wait(self, outcomes: set[asyncio.Future[Any]]) -> None:
        try:
            await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if self._task is not None:
                self._task.cancel()
            raise

    async def _end(self, task: asyncio.Task[None]) -> None:
        """Cancel a task whose outcome is already known."""
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._task = None

    def _do_without(self, task: asyncio.Task[None]) -> None:
        """Serve without lifespan, or refuse to, when the application ended its task instead of answering.

        "If an exception is raised [...] the server must continue but not send any lifespan events." (lifespan 2.0)
        """
        self._task = None
        error = None if task.cancelled() else task.exception()
        if self._mode == "auto":
            if error is not None and self._has_received:
                log.warning("the application raised in its lifespan; it is served without", exc_info=error)
            return
        raise StartError(
            "HP510",
            "the application takes no part in the lifespan protocol",
            cause="it returned before it had started up"
            if error is None
            else _last_lines("".join(traceback.format_exception(error))),
            fix="--lifespan off",
            note="if the application needs its lifespan startup, correct that instead",
        )


def _last_lines(text: str) -> str:
    """Return the last lines of `text`, indented to follow ``cause:``."""
    return "\n         ".join(text.strip().splitlines()[-CAUSE_LINES_MAX:])
