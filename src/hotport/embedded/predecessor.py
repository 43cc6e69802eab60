"""The successor's side of an embedded restart."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import anyio
import msgspec

from hotport.address import UnixAddress, parse_address
from hotport.channel import Channel
from hotport.embedded.manager import Notifier
from hotport.errors import ControlError
from hotport.kernel.abstract import bind_abstract
from hotport.kernel.fork import withhold
from hotport.kernel.notify import notify, open_notify
from hotport.kernel.sockets import bound_address, inherited_listener, location, may_command, peer_credentials
from hotport.wire.listenfds import LISTEN_VARIABLES, parse_listen_environment
from hotport.wire.messages import OfferOrder, worker_socket
from hotport.wire.sdnotify import encode_notification
from hotport.wire.succession import SUCCESSION_VARIABLE, Ask, CommitOrder, Committed, Succession
from hotport.worker import background
from hotport.worker.server import ApplicationServer

__all__ = ["Predecessor"]

log = logging.getLogger("hotport.embedded")

#: How long READY=1 waits for room in the queue before it is looked whether the predecessor is there at all.
READY_TIMEOUT_S: Final = 1.0

#: How long to leave the socket alone when nothing can be accepted.
ACCEPT_PAUSE_S: Final = 0.1


class Predecessor:
    """The process that started this one as its successor.

    Attributes:
        spec: What it has told us.
        over: It is gone, and what it had handed over by then is served here.
        passed: Further descriptors that it has passed, by name: the program's.

    Descriptors: owns the listeners that were passed until they are adopted, the control socket and a pidfd.
    """

    def __init__(
        self, spec: Succession, listeners: dict[int, socket.socket], passed: Mapping[str, int], pidfd: int | None
    ) -> None:
        self.spec = spec
        self.passed = passed
        self.over = asyncio.Event()
        self.manager = Notifier(spec.manager)
        self._name = worker_socket(spec.generation - 1, 1)  # as it calls itself when it offers its connections
        self._listeners = listeners
        self._pidfd = pidfd
        self._notify_path = os.environ.get("NOTIFY_SOCKET", "")
        self._server: ApplicationServer | None = None
        self._control: socket.socket | None = None
        self._ordered = asyncio.Event()
        self._committed = asyncio.Event()
        self._order: Channel | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        withhold(self)

    def descriptors(self) -> tuple[int, ...]:
        """Descriptors that a forked child must not keep."""
        sockets = (*self._listeners.values(), *((self._control,) if self._control is not None else ()))
        return tuple(each.fileno() for each in sockets)

    @classmethod
    def claim(cls) -> Predecessor | None:
        """Take over what the predecessor has passed, once; None without a predecessor.

        The variables leave the environment, but for ``NOTIFY_SOCKET``: it stays the predecessor's until that is gone.
        """
        text = os.environ.get(SUCCESSION_VARIABLE)
        passed = parse_listen_environment(os.environ, os.getpid()) if text is not None else ()
        if text is None or not passed:  # or meant for the process that has started us
            return None
        spec = msgspec.json.decode(text, type=Succession)
        for name in (*LISTEN_VARIABLES, SUCCESSION_VARIABLE):
            os.environ.pop(name, None)
        pidfd: int | None = None
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(spec.predecessor)
            if not _listens(os.environ.get("NOTIFY_SOCKET", "")):  # gone, and somebody else may have its pid
                os.close(pidfd)
                pidfd = None
        descriptors = [fd for fd, _ in passed]
        listeners, others = descriptors[: len(spec.asked)], descriptors[len(spec.asked) :]
        for fd in others:
            os.set_inheritable(fd, False)
        by_number = {number: inherited_listener(fd) for number, fd in enumerate(listeners)}
        return cls(spec, by_number, dict(zip(spec.passed, others, strict=True)), pidfd)

    @property
    def has_ended(self) -> bool:
        """Whether its process has ended; the reaction to that may still be pending."""
        if self._pidfd is None:
            return True
        poll = select.poll()  # select(2) knows no descriptor above 1023
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def leads_session(self) -> bool:
        """Whether it leads our session: its end may then send SIGHUP to this process.

        The kernel sends SIGHUP to the foreground group of the terminal that the leader has, or had until that was gone;
        and does so before the leader can be waited for.

        Sources: setsid(2), NOTES; disassociate_ctty in drivers/tty/tty_jobctrl.c.
        """
        return os.getsid(0) == self.spec.predecessor

    def adopt(self, text: str) -> list[socket.socket]:
        """Return the passed listeners of an address; the caller owns them from here on.

        One, or none; ``systemd:NAME`` may have several.
        """
        place = str(location(text))
        found = [number for number in self._listeners if self.spec.asked[number] == place]
        if not found:  # port 0 is a number by now
            found = [number for number, each in self._listeners.items() if _is_at(each, place)]
        return [self._listeners.pop(number) for number in found]

    async def wait_for_order(self, server: ApplicationServer) -> None:
        """Report that this process is ready to accept; return when ordered to, or when the predecessor has ended.

        Raises:
            KernelError: The control socket cannot be made (HP212).
        """
        self._server = server
        self._control = bind_abstract(self.spec.control, socket.SOCK_STREAM)
        accepting = self._start(_accept_each(self._control, self._converse_with))
        self._start(self._watch(accepting))
        self._start(self._say_ready())
        await self._ordered.wait()

    async def accepting(self) -> None:
        """Report that connections are being accepted; close the passed listeners that were not adopted."""
        dropped = tuple(self._listeners)
        self._close_listeners()
        if self._order is not None:
            channel, self._order = self._order, None
            with suppress(OSError):  # it has ended meanwhile
                await channel.say(Committed(dropped=dropped))
            channel.close()
        self._committed.set()

    def failed(self, error: str) -> None:
        """Report why this process cannot serve."""
        notify(self._notify_path, encode_notification(status="failed to start", error=error))

    def leaving(self) -> None:
        """Report that this process ends on request."""
        if not self.over.is_set():
            notify(self._notify_path, encode_notification(stopping=True))

    async def close(self) -> None:
        """Close every connection to it."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._close_listeners()
        if self._order is not None:
            self._order.close()
        if self._control is not None:
            self._control.close()
        self._close_pidfd()

    # -- tasks ---------------------------------------------------------------------------------------------

    def _start(self, steps: Any) -> asyncio.Task[Any]:
        return background.start("succession", steps, self._tasks)

    async def _say_ready(self) -> None:
        said = encode_notification(ready=True, status="ready")
        while not await asyncio.to_thread(notify, self._notify_path, said, timeout_s=READY_TIMEOUT_S):
            if self._ordered.is_set():  # it is gone
                return

    async def _watch(self, accepting: asyncio.Task[Any]) -> None:
        """Become the main process of the service once the predecessor has ended, and tell the service manager."""
        if self._pidfd is not None:
            await anyio.wait_readable(self._pidfd)
            self._close_pidfd()
        self._ordered.set()
        await self._committed.wait()
        accepting.cancel()  # a connection that waits there has brought nothing yet
        await asyncio.wait({accepting})
        if self._control is not None:
            self._control.close()
            self._control = None
        if conversing := self._conversations():
            await asyncio.wait(conversing)
        if os.environ.get("NOTIFY_SOCKET") == self._notify_path:
            if self.spec.manager:
                os.environ["NOTIFY_SOCKET"] = self.spec.manager
            else:
                del os.environ["NOTIFY_SOCKET"]
        if self._server is not None:
            self._server.connections.keep(self._name, 0)
        self.over.set()
        await self.manager.say(ready=True, main_pid=os.getpid(), status=f"generation {self.spec.generation} serves")

    def _conversations(self) -> set[asyncio.Task[Any]]:
        return {task for task in self._tasks if task.get_name() == "conversation"}

    def _converse_with(self, sock: socket.socket) -> None:
        if not may_command(peer_credentials(sock)[1]):
            sock.close()
            return
        self._start(self._converse(Channel(sock))).set_name("conversation")

    async def _converse(self, channel: Channel) -> None:
        assert self._server is not None
        try:
            match await channel.receive_word(Ask):
                case OfferOrder(version=version, sender=sender):
                    await self._server.take(channel, version, sender)
                case CommitOrder(connections=connections) if self._order is None and not self._ordered.is_set():
                    self._server.connections.keep(self._name, connections)
                    self._order = channel
                    self._ordered.set()
                case _:
                    channel.close()
        except (EOFError, OSError):  # it has ended
            channel.close()
        except ControlError as error:
            log.warning("what came from the predecessor cannot be understood: %s", error)
            channel.close()
        except BaseException:
            channel.close()
            raise

    def _close_pidfd(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _close_listeners(self) -> None:
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()


def _listens(path: str) -> bool:
    sock = open_notify(path)
    if sock is None:
        return False
    sock.close()
    return True


async def _accept_each(control: socket.socket, converse: Callable[[socket.socket], None]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            sock, _ = await loop.sock_accept(control)
        except OSError as error:  # for want of descriptors or memory
            log.error("cannot accept what the predecessor hands over: %s", error)
            await asyncio.sleep(ACCEPT_PAUSE_S)
        else:
            converse(sock)


def _is_at(listener: socket.socket, place: str) -> bool:
    address = parse_address(place)
    if isinstance(address, UnixAddress) or listener.family == socket.AF_UNIX:
        return False  # the kernel knows it by the name under which it was first made
    return str(bound_address(address, listener)) == place
