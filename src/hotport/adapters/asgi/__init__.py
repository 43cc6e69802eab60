"""ASGI 3 applications over HTTP/1.1 and WebSockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from hotport.adapters.asgi.access import AccessLog
from hotport.adapters.asgi.exchange import ClientLeft
from hotport.adapters.asgi.http import HttpConnection
from hotport.adapters.asgi.lifespan import Lifespan
from hotport.adapters.asgi.shared import LINGER_S, Shared
from hotport.adapters.asgi.spec import Application
from hotport.adapters.asgi.states import State
from hotport.adapters.base import Context, NotAdopted
from hotport.options import Options
from hotport.wire.envelope import Envelope, HttpState, WebSocketState

__all__ = ["AsgiAdapter", "ClientLeft", "State"]

log = logging.getLogger("hotport.error")

#: Seconds that cancelled applications have to end; short, because the lifespan shutdown still follows.
CANCEL_S: Final = 1.0


class AsgiAdapter:
    """Serves one ASGI application; implements `hotport.adapters.base.Adapter`."""

    def __init__(self, application: Application, context: Context, options: Options) -> None:
        self._application = application
        self._context = context
        self._options = options
        self._lifespan = Lifespan(application, context, options.lifespan)
        self._shared: Shared | None = None

    async def startup(self) -> None:
        """Run the application's lifespan startup.

        Raises:
            StartError: It failed (HP509), or the application lacks a required lifespan (HP510).
        """
        await self._lifespan.startup()
        options = self._options
        access = None
        if options.access_log != "off":
            access = AccessLog(options.access_log, asyncio.get_running_loop())
        self._shared = Shared(self._application, self._context, self._lifespan.state, options, access)

    def connection(self) -> HttpConnection:
        """Make and register an HTTP connection; `startup` must have returned."""
        assert self._shared is not None, "startup() comes first"
        return HttpConnection(self._shared)

    def adopt(self, envelope: Envelope) -> HttpConnection:
        """Make and register an HTTP connection or WebSocket that continues another process's.

        Raises:
            NotAdopted: It is of another kind, or a WebSocket that cannot be negotiated as before.
        """
        assert self._shared is not None, "startup() comes first"
        match envelope.state:
            case HttpState() as state:
                return HttpConnection(self._shared, state, envelope.unread)
            case WebSocketState() as state:
                return HttpConnection(self._shared, self._shared.handshakes.resume(state))
        raise NotAdopted("an ASGI application has no such connections")

    async def finish(self) -> None:
        """Wait for applications that run after their answer, or after their client has left (background tasks)."""
        while self._shared is not None and (tasks := self._running(self._shared)):
            await asyncio.wait(tasks)

    async def shutdown(self) -> None:
        """Cancel applications that `finish` has not waited for, then run the lifespan shutdown.

        Clients that were cut have `LINGER_S` to read their last answer.
        """
        if self._shared is not None:
            if tasks := self._running(self._shared):
                log.warning("%d request(s) still ran after the drain deadline; cancelled", len(tasks))
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=CANCEL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self._shared.deadlines.wait_empty()
            for connection in self._shared.deadlines.cancel():
                connection.abort()
            await asyncio.sleep(0)  # transports close their sockets in the next turn of the loop
            if self._shared.access is not None:
                self._shared.access.flush()
        await self._lifespan.shutdown()

    def _running(self, shared: Shared) -> set[asyncio.Task[None]]:
        return {each.task for each in shared.running if each.task is not None}
