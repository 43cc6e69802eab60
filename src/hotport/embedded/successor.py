"""The predecessor's side of an embedded restart."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Final

from hotport.address import listener_name, parse_address
from hotport.channel import Channel
from hotport.embedded.program import Start
from hotport.errors import ControlError, HotportError, RestartError, in_one_line
from hotport.kernel.abstract import abstract_name, bind_abstract
from hotport.kernel.fork import withhold
from hotport.kernel.notify import receive_notification
from hotport.kernel.process import describe_exit, reap, send_signal
from hotport.kernel.spawn import Child, spawn
from hotport.model.lifecycle import MORE_TIME_MAX_S
from hotport.wire.messages import encode
from hotport.wire.sdnotify import Notification
from hotport.wire.succession import SUCCESSION_VARIABLE, CommitOrder, Committed, Succession

__all__ = ["Successor"]

#: From the order to accept to the answer: the successor has nothing else to do by then.
COMMIT_TIMEOUT_S: Final = 5.0


class Successor:
    """A child process that is to replace this one.

    Attributes:
        pid: Its process id.
        ended: It has ended, and has been waited for.
        leaves: It has ended, or will soon.
        has_left: It said ``STOPPING=1`` or was interrupted: it ended, or will end, on request.
        control: Where it takes connections: ``@name``.

    Descriptors: owns the pidfd and the notify socket.
    """

    def __init__(self, child: Child, notify_socket: socket.socket, control: str, generation: int) -> None:
        self.pid = child.pid
        self.ended = asyncio.Event()
        self.leaves = asyncio.Event()
        self.has_left = False
        self.control = control
        self._serving = generation - 1
        self._pidfd = child.pidfd
        self._notify_socket = notify_socket
        self._loop = asyncio.get_running_loop()
        self._status: int | None = None
        self._error = ""
        self._is_ready = False
        self._changed = asyncio.Event()
        self._timeout: asyncio.Timeout | None = None
        self._loop.add_reader(notify_socket, self._hear)
        self._loop.add_reader(self._pidfd, self._on_end)
        withhold(self)

    def descriptors(self) -> tuple[int]:
        """Descriptors that a forked child must not keep."""
        return (self._notify_socket.fileno(),)

    @classmethod
    def start(
        cls,
        start: Start,
        *,
        generation: int,
        manager: str,
        listeners: Sequence[socket.socket],
        addresses: Sequence[str],
        asked: Sequence[str],
        passed: Mapping[str, int] = MappingProxyType({}),
    ) -> Successor:
        """Start it; blocks during fork and exec.

        Args:
            generation: Its number.
            manager: ``NOTIFY_SOCKET`` of the service manager; empty without one.
            listeners: To pass; they stay open here.
            addresses: Where they are.
            asked: What was asked for.
            passed: Further descriptors by name; they stay open here.

        Raises:
            RestartError: It cannot be started (HP444); nothing is left of it.
        """
        name, control = abstract_name(), abstract_name()
        told = Succession(
            predecessor=os.getpid(),
            generation=generation,
            control=control,
            manager=manager,
            asked=tuple(asked),
            passed=tuple(passed),
        )
        environment = {
            **start.environment,
            "NOTIFY_SOCKET": name,
            SUCCESSION_VARIABLE: encode(told).decode(),
        }
        notify_socket: socket.socket | None = None
        try:
            notify_socket = bind_abstract(name, socket.SOCK_DGRAM)
            child = spawn(
                start.argv,
                environment=environment,
                cwd=start.directory,
                listeners=[*(listener.fileno() for listener in listeners), *passed.values()],
                listen_names=[
                    *(listener_name(parse_address(address)) for address in addresses),
                    *("passed",) * len(passed),
                ],
                is_successor=True,
                ignored=start.ignored,
                is_orphan=bool(manager),
            )
        except HotportError as error:
            if notify_socket is not None:
                notify_socket.close()
            raise RestartError(
                "HP444",
                f"the successor could not be started: {error.what}",
                cause=error.cause,
                fix=error.fix,
                note=error.note,
                phase="spawn",
                serving=generation - 1,
            ) from error
        return cls(child, notify_socket, control, generation)

    async def ready(self, timeout_s: float) -> Channel:
        """Wait until it is ready to accept; return the channel on which to order it.

        Args:
            timeout_s: It may extend that: ``EXTEND_TIMEOUT_USEC``.

        Raises:
            RestartError: It has ended (HP445), or has not become ready in time (HP446).
        """
        try:
            async with asyncio.timeout(timeout_s) as self._timeout:
                while not self.ended.is_set():
                    if self._is_ready and (channel := self._connect()) is not None:
                        return channel
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise self._failed(
                RestartError(
                    "HP446",
                    f"the successor was not ready in time; pid {os.getpid()} serves on",
                    cause=in_one_line(self._error) or f"pid {self.pid} did not accept within {timeout_s:g} s",
                    fix='ready_timeout = "2m"',
                    note="allow it more time, or look at what it does while it starts: py-spy dump --pid PID",
                    phase="start up",
                    serving=self._serving,
                )
            ) from None
        finally:
            self._timeout = None
        raise self._has_ended("start up")

    async def commit(self, channel: Channel, connections: int) -> Committed:
        """Order it to accept and to reserve room for `connections`, and wait until it does; closes `channel`.

        Raises:
            RestartError: It has ended (HP445), or does not answer (HP446): then it must be ended.
        """
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                answer = await channel.ask(CommitOrder(connections=connections), Committed)
            assert isinstance(answer, Committed)
            return answer
        except TimeoutError:
            raise RestartError(
                "HP446",
                f"the successor was not ready in time; pid {os.getpid()} serves on",
                cause=f"pid {self.pid} said that it was ready, and did not accept within {COMMIT_TIMEOUT_S:g} s",
                note="look at what keeps its event loop busy while it starts: py-spy dump --pid PID",
                phase="commit",
                serving=self._serving,
            ) from None
        except (OSError, EOFError, ControlError) as error:
            with suppress(TimeoutError):  # most likely it has ended, and that says more
                async with asyncio.timeout(COMMIT_TIMEOUT_S):
                    await self.ended.wait()
            raise self._has_ended("commit") from error
        finally:
            channel.close()

    async def abort(self, timeout_s: float) -> None:
        """End it by SIGTERM, and by SIGKILL after `timeout_s` seconds."""
        for number, wait_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, None)):
            if self.ended.is_set():
                break
            send_signal(self._pidfd, number)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.ended.wait()
        self.close()

    def close(self) -> None:
        """Release it: it runs on independently."""
        if not self.ended.is_set():
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._loop.remove_reader(self._notify_socket)
        self._notify_socket.close()

    # -- what it says --------------------------------------------------------------------------------------

    def _hear(self) -> None:
        while (heard := receive_notification(self._notify_socket)) is not None:
            pid, uid, payload = heard
            if uid != os.geteuid():
                continue
            said = Notification.parse(payload)
            if said.extend_timeout_s is not None and self._timeout is not None:
                until = self._loop.time() + min(said.extend_timeout_s, MORE_TIME_MAX_S)
                if until > (self._timeout.when() or 0):
                    self._timeout.reschedule(until)
            if pid == self.pid:  # what it has started itself does not speak for it
                self._is_ready |= said.ready
                if said.stopping:
                    self.has_left = True
                    self.leaves.set()
                self._error = said.error or self._error
        self._changed.set()

    def _on_end(self) -> None:
        self._hear()  # its last words
        self._loop.remove_reader(self._pidfd)
        self._status = reap(self.pid)
        self.has_left |= self._status in (-signal.SIGTERM, -signal.SIGINT)
        os.close(self._pidfd)
        self.ended.set()
        self.leaves.set()
        self._changed.set()

    @property
    def how_it_ended(self) -> str:
        """``exited 3`` or ``killed by SIGKILL``."""
        return describe_exit(self._status)

    def _connect(self) -> Channel | None:
        """Connect to its control socket; None if ``READY=1`` came from the application before hotport was listening."""
        self._is_ready = False
        try:
            return Channel.connect(self.control)
        except ConnectionRefusedError:
            return None
        except PermissionError as error:
            raise self._failed(
                RestartError(
                    "HP445",
                    f"the successor did not start to serve; pid {os.getpid()} serves on",
                    cause=f"its control socket cannot be reached: {error.strerror}",
                    fix="ss -lxp",
                    phase="start up",
                    serving=self._serving,
                )
            ) from error

    def _has_ended(self, phase: str) -> RestartError:
        cause = f"pid {self.pid} {self.how_it_ended}"
        if told := in_one_line(self._error):
            cause = f"{told} ({cause})"
        elif self._status is None or self._status >= 0:
            cause += "; what it has said about that is on stderr"
        return self._failed(
            RestartError(
                "HP445",
                f"the successor did not start to serve; pid {os.getpid()} serves on",
                cause=cause,
                note="correct the program, then restart again",
                phase=phase,
                serving=self._serving,
            )
        )

    def _failed(self, error: RestartError) -> RestartError:
        if self._error:
            error.add_note(f"pid {self.pid} said:\n{self._error}")
        return error
