"""The supervisor's side of one worker process."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import anyio

from hotport.channel import Channel
from hotport.errors import ControlError
from hotport.kernel.process import describe_exit, kill_group, reap, send_signal, send_signal_to_main_thread
from hotport.kernel.spawn import Child
from hotport.observe.logs import get_logger
from hotport.supervisor.lags import Lags
from hotport.wire.frames import encode_frame
from hotport.wire.messages import (
    Inspection,
    InspectOrder,
    Memory,
    Probed,
    Rebalanced,
    TlsReloaded,
    TransferOrder,
    Transferred,
    Welcome,
    Word,
    encode,
)

__all__ = ["Hang", "WorkerProcess"]

Answer = TypeVar("Answer", Inspection, TlsReloaded, Probed, Rebalanced)

#: Seconds from connecting to a worker to its acknowledgement of a transfer.
TRANSFER_TIMEOUT_S = 5.0

#: Seconds to wait for the last messages of a worker that has ended.
LAST_WORDS_S = 1.0


#: How many questions may wait for a worker's answer: a suspended worker answers none.
ASKED_MAX = 64

#: Seconds until a lost control connection to a live worker is made again.
RECONNECT_PAUSE_S = 0.1


class Hang(NamedTuple):
    """Where a worker hangs: the line, if it is known, and the stacks of its threads."""

    at: str
    stack: str


class WorkerProcess:
    """A worker that was started here, or was adopted.

    Attributes:
        error: Why it could not start, if it has reported that.
        status: Its last ``STATUS=``.
        control_path: The socket on which it takes orders, and connections of other workers.
        successors: The control sockets of the successors that it was told last.
        is_talking: Whether its control socket is connected, or being connected.
        memory: The state stored with it last, for the next supervisor.
        is_leaving: Whether it was told to drain.
        owes: Whether it serves connections, and has not reported their fates.
        has_expired: Whether it has asked to be replaced.
        has_cut: Whether it has reported that some of them were cut.
        expects: Names of workers for whose connections it reserves room.
        held: Listeners that it has, or is being given.
        releasing: Listeners that it was told to release, by address, until it reports them closed.
        stack_pipe: How to find its pipe for stacks; None if it has none.
        lags: The lag of its event loop.
        inspection: Its last answer about its state.
        slot: Its name in metrics; -1 before it was seen there.
        silent_s: For how long it has not answered.
        hang: What was found out about it; None if it does not hang.
        telling: Held while something about its hanging is being logged.
        is_watched: Whether a program of its own has said ``WATCHDOG=1`` at least once.
        was_fed: Whether it has said so since it was looked at last.
        has_failed: Whether it has said ``WATCHDOG=trigger`` after that.
        watchdog_s: Within how many seconds it wants to say so; 0: `hang_timeout`.
        released: Set when it has closed the listeners that it was told to release; None if it was not told to.

    Descriptors: owns ``child.pidfd`` and the control connection.
    """

    def __init__(
        self,
        worker: int,
        generation: int,
        child: Child,
        control_path: str,
        *,
        is_foreign: bool,
        age_s: float = 0.0,
    ) -> None:
        self.worker = worker
        self.generation = generation
        self.pid = child.pid
        self.started_at = time.monotonic() - age_s
        self.is_foreign = is_foreign
        self.error = ""
        self.status = ""
        self.successors: tuple[str, ...] = ()
        self.memory: Memory | None = None
        self.is_leaving = self.owes = self.has_cut = self.has_expired = False
        self.expects: set[str] = set()
        self.held: set[socket.socket] = set()
        self.releasing: dict[str, socket.socket] = {}
        self.released: anyio.Event | None = None
        self.stack_pipe: tuple[int, int] | None = None
        self.lags = Lags()
        self.inspection: Inspection | None = None
        self.silent_s = self.watchdog_s = 0.0
        self.slot = -1
        self.hang: Hang | None = None
        self.telling = anyio.Lock()
        self.is_watched = self.was_fed = self.has_failed = False
        self._pidfd = child.pidfd
        self.control_path = control_path
        self._orders: deque[bytes] = deque()
        self._has_orders = anyio.Event()
        self.is_talking = False
        self._has_said_all = anyio.Event()
        self._conversation: anyio.CancelScope | None = None
        self._has_ended = False
        self._asked: list[tuple[type[Any], anyio.Event, list[Any]]] = []
        self._log = get_logger("hotport.supervisor").bind(worker=worker, generation=generation)

    def order(self, message: Any) -> None:
        """Queue an order; it is sent once the worker's control socket is connected."""
        self._orders.append(encode_frame(encode(message)))
        self._has_orders.set()

    def signal(self, number: int) -> None:
        """Send a signal to exactly this process."""
        send_signal(self._pidfd, number)

    def signal_main_thread(self, number: int) -> None:
        """Send a signal to the main thread of exactly this process."""
        send_signal_to_main_thread(self.pid, self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL the process and everything in its group."""
        kill_group(self.pid)
        send_signal(self._pidfd, signal.SIGKILL)

    async def converse(self, hear: Callable[[int, Word], None]) -> None:
        """Connect to the worker, send orders and receive its messages, until it has ended.

        A live worker that closes the connection has failed at an order: connect again, since it would leave without a
        supervisor. If that fails, the timers that bound orders decide.
        """
        with anyio.CancelScope() as self._conversation:
            while not self._has_ended and await self._converse(hear):
                await anyio.sleep(RECONNECT_PAUSE_S)
                if not os.path.exists(self.control_path):  # noqa: ASYNC240  the worker leaves
                    return

    async def _converse(self, hear: Callable[[int, Word], None]) -> bool:
        """Serve one connection to its end; False if connecting failed."""
        self.is_talking = True
        self._has_said_all = anyio.Event()
        try:
            with Channel.connect(self.control_path) as channel:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._send_orders, channel)
                    await self._receive_words(channel, hear)
                    tasks.cancel_scope.cancel()
            return True
        except OSError as error:
            self._log.warning("worker.unreachable", error=str(error))
            return False
        finally:
            self.is_talking = False
            self._has_said_all.set()
            asked, self._asked = self._asked, []
            for _, event, _ in asked:
                event.set()

    async def ask(self, order: Any, kind: type[Answer], timeout_s: float) -> Answer | None:
        """Send an order and return the answer; None without one within `timeout_s` seconds, or if it cannot be sent.

        Concurrent inspections wait for the same answer, so that questions to a worker that never answers do not pile
        up.
        """
        if not self.is_talking or len(self._asked) >= ASKED_MAX:
            return None
        shared = (asked for asked in self._asked if isinstance(order, InspectOrder) and asked[0] is kind)
        owed = next(shared, None)
        if owed is None:
            owed = (kind, anyio.Event(), [])
            self._asked.append(owed)
            self.order(order)
        _, event, answer = owed
        with anyio.move_on_after(timeout_s):
            await event.wait()
        return answer[0] if answer else None

    async def transfer(self, listeners: Mapping[str, socket.socket], accepted: Sequence[socket.socket] = ()) -> None:
        """Give the worker listeners by address, and connections, and wait until it has them.

        Raises:
            OSError: It cannot be reached, or has not acknowledged them; it may still have them.
            TimeoutError: It has not answered within `TRANSFER_TIMEOUT_S`.

        Descriptors: all stay open here.
        Sources: unix(7) SCM_RIGHTS.
        """
        descriptors = [sock.fileno() for sock in (*listeners.values(), *accepted)]
        order = TransferOrder(addresses=tuple(listeners), connections=len(accepted))
        with anyio.fail_after(TRANSFER_TIMEOUT_S), Channel.connect(self.control_path) as channel:
            try:
                await channel.say(order)
                await _expect(channel, Welcome)
                await channel.send_descriptors(descriptors)
                await _expect(channel, Transferred)
            except (EOFError, ConnectionError, ControlError) as error:
                raise ConnectionError("the worker has not taken its listeners") from error

    async def _send_orders(self, channel: Channel) -> None:
        with suppress(ConnectionError):  # the receiving direction ends, too
            while True:
                while self._orders:
                    await channel.send(self._orders[0])
                    self._orders.popleft()
                self._has_orders = anyio.Event()
                await self._has_orders.wait()

    async def _receive_words(self, channel: Channel, hear: Callable[[int, Word], None]) -> None:
        while True:
            try:
                word = await channel.receive_word()
            except (EOFError, ConnectionError):
                return
            except ControlError as error:
                self._log.warning("worker.garbage", error=str(error))
                return
            if isinstance(word, Inspection):
                self.inspection = word
                self.lags.note(anyio.current_time(), word.lag_s)
            # A worker answers orders in sequence.
            asked = next((asked for asked in self._asked if asked[0] is type(word)), None)
            if asked is None:
                hear(self.worker, word)
                continue
            self._asked.remove(asked)
            _, event, answer = asked
            answer.append(word)
            event.set()

    async def wait_ended(self) -> None:
        """Wait for the worker's end and its last messages; may be called again."""
        await anyio.wait_readable(self._pidfd)
        if self.is_talking:
            with anyio.move_on_after(LAST_WORDS_S):
                await self._has_said_all.wait()

    def collect(self) -> str:
        """Reap a worker that has ended, release its resources, and describe its exit.

        Also ends the conversation, since a forked child may hold the connection's other end.
        """
        self._has_ended = True
        if self._conversation is not None:
            self._conversation.cancel()
        kill_group(self.pid)  # its descendants end with it; the zombie reserves the group's id
        status = reap(self.pid)
        os.close(self._pidfd)
        with suppress(OSError):  # a worker that was killed leaves its socket behind
            os.unlink(self.control_path)
        return describe_exit(status)


async def _expect(channel: Channel, kind: type[Any]) -> None:
    """Read messages until one of this kind has come; the others answer orders."""
    while not isinstance(await channel.receive_word(), kind):
        pass
