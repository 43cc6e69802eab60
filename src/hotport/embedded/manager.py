"""Notify the service manager, if there is one: systemd, or a hotport supervisor."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any, Final

from hotport.kernel.notify import notify, notify_barrier, open_notify
from hotport.wire.sdnotify import encode_notification

__all__ = ["Notifier"]

log = logging.getLogger("hotport.embedded")

#: How long a process that leaves waits for the manager to know its successor.
BARRIER_TIMEOUT_S: Final = 5.0


class Notifier:
    """The service manager behind ``NOTIFY_SOCKET``; every call does nothing if `path` is empty.

    Datagrams are sent from a thread: a manager that is busy for a while must not stop the event loop.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    async def say(self, **said: Any) -> None:
        """Send one notification; see `hotport.wire.sdnotify.encode_notification`."""
        if self.path and not await asyncio.to_thread(notify, self.path, encode_notification(**said)):
            log.warning("the service manager did not take %s", said)

    async def pass_to(self, pid: int) -> None:
        """Make `pid` the main process of the service, and wait until the manager has read that.

        A manager that learns it after our end takes that for the end of the service.
        """
        if not self.path:
            return
        await self.say(main_pid=pid, status=f"pid {pid} has taken over from pid {os.getpid()}")
        if not await asyncio.to_thread(self._wait_heard):
            log.warning("the service manager has not read MAINPID=%d within %g s", pid, BARRIER_TIMEOUT_S)

    def _wait_heard(self) -> bool:
        sock = open_notify(self.path)
        if sock is None:
            return False
        with sock:
            return notify_barrier(sock, timeout_s=BARRIER_TIMEOUT_S)
