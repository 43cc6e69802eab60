"""Notify the service manager that runs this supervisor, if there is one (sd_notify(3)).

The supervisor reports events; this module decides what the manager must hear of them:

- ``READY=1`` when the first generation serves; ``RELOADING=1`` when a restart begins and ``READY=1`` when its outcome
  is known, whatever it is (``Type=notify-reload``, systemd.service(5)); ``STOPPING=1`` at the end.
- ``EXTEND_TIMEOUT_USEC`` while it waits for one of these, up to the last timer that bounds the wait.
- ``WATCHDOG=1`` after each half of ``WATCHDOG_USEC``, by a task in the supervisor's own event loop.
- ``FDSTORE=1`` for every listener that was bound here, so that its accept queue outlives all processes of the service.
"""

from __future__ import annotations

import enum
import os
import socket
import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import anyio

from hotport.errors import in_one_line
from hotport.kernel.notify import notify_barrier, open_notify, send_notification
from hotport.kernel.sockets import location
from hotport.model.effects import Announce, News
from hotport.model.inputs import Clock
from hotport.observe.logs import get_logger
from hotport.supervisor.contain import retried
from hotport.supervisor.timers import Timers
from hotport.wire.sdnotify import encode_notification, encode_store, encode_store_remove, store_name

__all__ = ["MANAGER_VARIABLES", "ServiceManager"]

#: Variables that a manager sets for the process that it watches, and for no other.
MANAGER_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE")

#: Seconds to wait for the manager to read when listeners are stored or removed; other messages never wait.
BLOCK_S: Final = 1.0

#: Seconds that it has to close listeners that are not needed any more.
BARRIER_S: Final = 5.0

#: Seconds added to the last timer, for the work after its end.
MARGIN_S: Final = 5.0

WATCHDOG: Final = encode_notification(watchdog=True)

#: Messages kept for a manager that does not read.
LATE_MAX: Final = 64


class _Waits(enum.Enum):
    """What the manager waits for, with its own timeout."""

    READY = "ready"
    RELOADED = "reloaded"
    STOPPED = "stopped"


#: Timers that do not bound what the manager waits for.
_OTHERS: Final = {
    _Waits.READY: {Clock.STABLE, Clock.BACKOFF},
    _Waits.RELOADED: {Clock.STABLE, Clock.BACKOFF, Clock.DRAIN, Clock.KILL},  # the last two are of earlier generations
    _Waits.STOPPED: {Clock.STABLE, Clock.BACKOFF},
}


class ServiceManager:
    """Sends notifications to the manager named in the environment; does nothing if there is none.

    Args:
        environ: ``NOTIFY_SOCKET``, ``WATCHDOG_USEC``, ``WATCHDOG_PID``, ``FDSTORE``.
        pid: This process; a watchdog for another one is ignored.

    Attributes:
        watchdog_s: Within how many seconds it must get ``WATCHDOG=1``; None without a watchdog.
        store_max: How many descriptors it stores for this service; 0 also before systemd 254, which does not tell.

    Descriptors: one socket, closed by `close`.
    """

    def __init__(self, environ: Mapping[str, str], pid: int) -> None:
        self._path = environ.get("NOTIFY_SOCKET", "")
        self._sock = open_notify(self._path) if self._path else None
        self._log = get_logger("hotport.manager")
        if self._path and self._sock is None:
            self._log.warning("manager.unreachable", path=self._path)
        is_watched = _number(environ, "WATCHDOG_PID", pid) == pid
        usec = _number(environ, "WATCHDOG_USEC", 0) if is_watched else 0
        self.watchdog_s = usec / 1e6 if usec else None
        self.store_max = _number(environ, "FDSTORE", 0) if self._sock is not None else 0
        self._parked: dict[str, int] = {}  # by address, the inode of the socket
        self._held: set[str] = set()
        self._waits: _Waits | None = _Waits.READY
        self._promised = 0.0
        self._late: deque[bytes] = deque(maxlen=LATE_MAX)
        self._is_late = anyio.Event()

    def close(self) -> None:
        """Stop notifying."""
        self._path = ""
        self._hang_up()

    async def run(self) -> None:
        """Feed the watchdog and deliver queued messages, until cancelled."""
        if not self._path:
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(retried, "manager.deliver", self._deliver)
            if self.watchdog_s is not None:
                tasks.start_soon(retried, "manager.watchdog", self._keep_watchdog, self.watchdog_s)

    # -- the store -----------------------------------------------------------------------------------------

    def park(self, listeners: Mapping[str, socket.socket], *, held: Collection[str] = ()) -> None:
        """Store duplicates of these listeners, by canonical address, with the manager; may block for `BLOCK_S` each.

        The manager stores a listener only once.

        Args:
            held: Addresses whose listeners came from a socket unit, which keeps them anyway.
        """
        if self._sock is not None:
            self._held.update(held)
        for address in [address for address in listeners if address not in held] if self.store_max else ():
            name = store_name(location(address))
            if name is None or len(self._parked) == self.store_max:
                why = "its name is too long" if name is None else f"FileDescriptorStoreMax is {self.store_max}"
                self._log.warning("listener.not_parked", address=address, why=why)
            elif self._say_now(encode_store(name), [listeners[address].fileno()]):
                self._parked[address] = _inode(listeners[address])

    def forget(self, names: Iterable[str]) -> None:
        """Remove these names from the store, and wait for the manager: their addresses are bound next."""
        removals = [encode_store_remove(name) for name in names]
        if self._sock is None or not removals:
            return
        for removal in removals:
            self._say_now(removal)
        if not notify_barrier(self._sock, timeout_s=BARRIER_S):
            self._log.warning("manager.silent", timeout_s=BARRIER_S)

    def follow(self, listeners: Mapping[str, socket.socket]) -> None:
        """Update the store to the service's current listeners."""
        kept = {(address, _inode(sock)) for address, sock in listeners.items()}
        for address, _ in self._parked.items() - kept:
            del self._parked[address]
            self._say_now(encode_store_remove(str(store_name(location(address)))))
        self.park({address: sock for address, sock in listeners.items() if not self.keeps(address)})

    def keeps(self, address: str) -> bool:
        """Whether an address's listener, with its accept queue, outlives this process."""
        return address in self._parked or address in self._held

    # -- notifications -------------------------------------------------------------------------------------

    def hear(self, announcement: Announce, *, serving: int, why: str = "") -> None:
        """Notify the manager of an announcement, if needed.

        Args:
            serving: The generation that serves.
            why: The detailed reason of an abort.
        """
        serves, generation = f"generation {serving} serves", announcement.generation
        match announcement.news:
            case News.STARTED:
                self._wait_no_more(serves)
            case News.ADOPTED if serving:
                self._wait_no_more(serves)
            case News.RESTART_BEGAN:
                self._reload(f"{serves}, generation {generation} starts")
            case News.DONE:
                self._wait_no_more(serves)
            case (News.ABORTED | News.UNDONE) as news if self._waits is _Waits.RELOADED:
                reason = in_one_line(why or announcement.why)
                outcome = "aborted" if news is News.ABORTED else "undone"
                self._wait_no_more(f"{serves}, the restart to generation {generation} was {outcome}: {reason}")
            case News.LAME_DUCK:
                if self._waits is None:  # the manager has asked for the stop, and its timeout runs
                    self._wait_for(_Waits.STOPPED)
                self._say(encode_notification(status=f"{serves} as a lame duck for {announcement.why}, then stops"))
            case News.STOPPING:
                self._wait_for(_Waits.STOPPED)
                self._say(encode_notification(stopping=True, status="stopping"))
            case _:
                pass

    def refused(self, why: str) -> None:
        """Answer a reload that the manager may have asked for, when the restart is refused.

        The answer is a reload that ends at once; or, during a restart, another RELOADING=1, which ends with it.
        """
        match self._waits:
            case None:
                self._reload(None)
                self._wait_no_more(in_one_line(why))
            case _Waits.RELOADED:
                self._reload(None)
            case _:
                pass

    def failed(self, why: str) -> None:
        """Report that the service ends without having served."""
        self._say(encode_notification(status=in_one_line(why)))

    def extend(self, timers: Timers) -> None:
        """Extend the manager's timeout to the last of `timers`; call it whenever they have changed."""
        if self._waits is None:
            return
        latest = timers.latest(_OTHERS[self._waits])
        if latest is not None and latest > self._promised:
            self._promised = latest
            self._say(encode_notification(extend_timeout_s=latest - anyio.current_time() + MARGIN_S))

    def _reload(self, status: str | None) -> None:
        self._wait_for(_Waits.RELOADED)
        self._say(encode_notification(reloading=True, monotonic_s=time.monotonic(), status=status))

    def _wait_for(self, what: _Waits) -> None:
        self._waits, self._promised = what, 0.0

    def _wait_no_more(self, status: str) -> None:
        self._waits = None
        self._say(encode_notification(ready=True, status=status))

    # -- sending -------------------------------------------------------------------------------------------

    def _say(self, payload: bytes) -> None:
        """Send a message now, or as soon as the manager has read the earlier ones."""
        if self._path and (self._late or not self._try(payload)):
            self._late.append(payload)
            self._is_late.set()

    def _say_now(self, payload: bytes, descriptors: Sequence[int] = ()) -> bool:
        """Send a message, waiting up to `BLOCK_S` for room; False if it was not sent."""
        if self._sock is None:
            return False
        self._sock.settimeout(BLOCK_S)
        try:
            return send_notification(self._sock, payload, descriptors)
        except OSError:
            return False
        finally:
            self._sock.setblocking(False)

    def _try(self, payload: bytes) -> bool:
        """Try to send a message; False if the manager must read first, True also without a manager."""
        for _ in range(2):  # a restarted manager listens on the same path
            self._sock = self._sock or open_notify(self._path)
            if self._sock is None:
                break
            try:
                return send_notification(self._sock, payload)
            except OSError:
                self._hang_up()
        return True

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    async def _deliver(self) -> None:
        while True:
            while self._late and self._sock is not None:
                await anyio.wait_writable(self._sock)
                while self._late and self._try(self._late[0]):
                    self._late.popleft()
            self._late.clear()
            self._is_late = anyio.Event()
            await self._is_late.wait()

    async def _keep_watchdog(self, watchdog_s: float) -> None:
        while True:
            if not self._late:  # else it does not read, and would not get the message in time
                self._try(WATCHDOG)
            await anyio.sleep(watchdog_s / 2)


def _number(environ: Mapping[str, str], variable: str, default: int) -> int:
    """Parse a variable as a number; 0 if it is none."""
    text = environ.get(variable)
    if text is None:
        return default
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else 0


def _inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino
