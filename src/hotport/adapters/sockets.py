"""Applications that run a server of their own on the listening sockets.

::

    async def main(sockets, lifetime):
        runner = aiohttp.web.AppRunner(app)
        await runner.setup()
        for sock in sockets:
            await aiohttp.web.SockSite(runner, sock, backlog=4096).start()
        lifetime.started()
        await lifetime.draining.wait()
        await runner.cleanup()
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from hotport.adapters.base import Context, Draining
from hotport.errors import StartError

__all__ = ["Lifetime", "SocketsAdapter", "SocketsApp"]

#: Seconds that a cancelled application has to return.
ABORT_TIMEOUT_S: Final = 1.0


class Lifetime:
    """The signals between a sockets application and its worker.

    Attributes:
        draining: Set when the application should finish its connections and return.
    """

    def __init__(self, draining: Draining) -> None:
        self.draining = draining
        self._started = asyncio.Event()

    def started(self) -> None:
        """Say that connections are being accepted: the generation is ready."""
        self._started.set()


SocketsApp = Callable[[list[socket.socket], Lifetime], Awaitable[None]]


class SocketsAdapter:
    """Runs a `SocketsApp` as a task from start-up to the end of the drain."""

    def __init__(self, app: SocketsApp, context: Context) -> None:
        self._app = app
        self._lifetime = Lifetime(context.connections.draining)
        self._task: asyncio.Future[None] | None = None

    async def startup(self, listeners: Sequence[socket.socket]) -> None:
        """Start the application and wait until it calls ``lifetime.started()``.

        Descriptors: the application gets duplicates, and closes them itself.

        Raises:
            StartError: It returned or raised before that (HP506).
        """
        self._task = asyncio.ensure_future(self._app([listener.dup() for listener in listeners], self._lifetime))
        started = asyncio.ensure_future(self._lifetime._started.wait())
        await asyncio.wait({self._task, started}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            started.cancel()
            self._task.result()  # the application's own exception, if any, is more specific
            raise StartError(
                "HP506",
                "the application returned before it called lifetime.started()",
                cause="a `sockets` application serves until lifetime.draining is set",
                note="call lifetime.started() once it accepts, then await lifetime.draining.wait()",
            )

    async def finish(self) -> None:
        """Wait for the application to return. Cancellation: safe; the application continues to run."""
        assert self._task is not None
        await asyncio.wait({self._task})

    async def abort(self) -> None:
        """Cancel the application, and wait up to `ABORT_TIMEOUT_S` for its end."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=ABORT_TIMEOUT_S)
