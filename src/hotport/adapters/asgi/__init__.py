"""ASGI 3 applications over HTTP/1.1 and WebSockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final, Literal

from hotport.adapters.asgi.exchange import ClientLeft
from hotport.adapters.asgi.http import LINGER_S, HttpConnection, Shared, State
from hotport.adapters.asgi.lifespan import Lifespan
from hotport.adapters.asgi.spec import Application
from hotport.adapters.asgi.websocket import WebSocketSettings
from hotport.adapters.base import Context

__all__ = ["AsgiAdapter", "ClientLeft", "State", "WebSocketSettings"]

log = logging.getLogger("hotport.error")

#: For applications that are cancelled. Short, because the lifespan shutdown still has to follow.
CANCEL_S: Final = 1.0


class AsgiAdapter:
    """Serves one ASGI application; implements `hotport.adapters.base.Adapter`.

    Args:
        keep_alive_s: Seconds for which a connection without a request stays open after an answer.
        lifespan: Whether the application takes part in the lifespan protocol; ``auto`` tries it.
        websocket: How WebSockets are served.
    """

    def __init__(
        self,
        application: Application,
        context: Context,
        *,
        keep_alive_s: float,
        lifespan: Literal["auto", "on", "off"],
        websocket: WebSocketSettings | None = None,
    ) -> None:
        self._application = application
        self._context = context
        self._keep_alive_s = keep_alive_s
        self._websocket = websocket or WebSocketSettings()
        self._lifespan = Lifespan(application, context, lifespan)
        self._shared: Shared | None = None

    async def startup(self) -> None:
        """Run the application's lifespan startup.

        Raises:
            StartError: It failed (HP509), or takes no part although it must (HP510).
        """
        await self._lifespan.startup()
        self._shared = Shared(
            self._application,
            self._context,
            self._lifespan.state,
            keep_alive_s=self._keep_alive_s,
            websocket=self._websocket,
        )

    def connection(self) -> HttpConnection:
        """One HTTP connection, registered; `startup` must have returned."""
        assert self._shared is not None, "startup() comes first"
        return HttpConnection(self._shared)

    async def finish(self) -> None:
        """Return when no application runs on after its answer, or after its client has left (background tasks)."""
        while self._shared is not None and (tasks := self._running(self._shared)):
            await asyncio.wait(tasks)

    async def shutdown(self) -> None:
        """Cancel what `finish` was not waited for, then run the application's lifespan shutdown.

        Clients that were cut have `LINGER_S` to read why.
        """
        if self._shared is not None:
            if tasks := self._running(self._shared):
                log.warning("%d request(s) still ran after the drain deadline; cancelled", len(tasks))
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=CANCEL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self._shared.lingering.wait_empty()
            self._shared.idle.cancel()
            self._shared.lingering.cancel()
            self._shared.websockets.cancel()
        await self._lifespan.shutdown()

    def _running(self, shared: Shared) -> set[asyncio.Task[None]]:
        return {each.task for each in shared.running if each.task is not None}
