"""The worker processes of a service: start and adopt them, send orders and listeners, receive their messages."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final

import anyio

from hotport.kernel.notify import receive_notification
from hotport.kernel.process import cpu_s, send_signal, set_niceness
from hotport.kernel.procfs import age_s, environment
from hotport.kernel.spawn import Child
from hotport.model import inputs, steps
from hotport.model.fates import Fate, names_cut
from hotport.model.inputs import Exited, Said
from hotport.model.lifecycle import Event, Phase
from hotport.model.service import Service
from hotport.observe.logs import get_logger
from hotport.options import Options
from hotport.options.definition import LogLevel
from hotport.supervisor.appmetrics import AppMetrics
from hotport.supervisor.contain import Containing, retried
from hotport.supervisor.counters import Counters
from hotport.supervisor.foreign import find_unaware
from hotport.supervisor.listeners import Listeners
from hotport.supervisor.loop import Loop
from hotport.supervisor.news import Publisher
from hotport.supervisor.process import WorkerProcess
from hotport.supervisor.recovery import Orphan
from hotport.supervisor.starter import Starter
from hotport.wire.messages import (
    Accepting,
    AcceptOrder,
    Drained,
    DrainOrder,
    ExpectOrder,
    Expired,
    Hello,
    HurryOrder,
    Inspection,
    InspectOrder,
    LogLevelOrder,
    Memory,
    Quiesced,
    QuiesceOrder,
    Released,
    ReleaseOrder,
    RememberOrder,
    SuccessorsOrder,
    TlsReloaded,
    Word,
    may_hand_to,
)
from hotport.wire.sdnotify import Notification

__all__ = ["Fleet"]

#: Seconds that a leaving worker has to report its number of connections, before others accept.
COUNT_TIMEOUT_S: Final = 1.0


class Fleet:
    """The processes of one service, by worker number.

    Args:
        name: The service's name.
        directory: Its runtime directory.
        notify_socket: Bound in `directory`.
        owned: The service's listeners; the caller closes them.
        mend: Restores missing files of the runtime directory; called before a worker is started.
        pages: The load pages of adopted workers: see `Found`.
        counters: Where workers count; the caller closes them.
        app_metrics: Where their applications count.

    Attributes:
        has_cut: Whether a worker has cut connections, or was killed with some, while the service stopped.

    Descriptors: owns the notify sockets, the processes, the template and the load page of each generation, and accepted
    connections that no worker has got yet.
    """

    def __init__(
        self,
        name: str,
        directory: str,
        notify_socket: socket.socket,
        loop: Loop,
        owned: Listeners,
        news: Publisher,
        mend: Callable[[], object],
        *,
        pages: Mapping[int, int],
        counters: Counters,
        app_metrics: AppMetrics,
    ) -> None:
        self.processes: dict[int, WorkerProcess] = {}
        self._notify: dict[int | None, socket.socket] = {None: notify_socket}
        self.has_cut = False
        self._loop = loop
        self._owned = owned
        self._news = news
        self._counters = counters
        self._app_metrics = app_metrics
        self.starter = Starter(
            name,
            directory,
            loop,
            owned,
            news,
            self.processes,
            self._begin,
            mend,
            pages=pages,
            counters=counters,
            app_metrics=app_metrics,
        )
        self._remote_successors: tuple[str, ...] = ()
        self._unclaimed: list[socket.socket] = []  # accepted from a queue, for the next worker that accepts
        self._log = get_logger("hotport.supervisor")

    @property
    def _service(self) -> Service:
        return self._loop.service

    @property
    def _options(self) -> Options:
        return self._loop.options

    @property
    def notify_socket(self) -> socket.socket:
        """The socket that workers of the supervisor's own user notify."""
        return self._notify[None]

    def descriptors(self) -> Iterator[int]:
        """The descriptors that a forked child must not have."""
        yield from (sock.fileno() for sock in (*self._notify.values(), *self._unclaimed))
        yield from self.starter.descriptors()

    def pids(self) -> set[int]:
        """The processes that are waited for here."""
        return {each.pid for each in self.processes.values()} | self.starter.pids()

    def close(self) -> None:
        """End templates; close the notify sockets, load pages, and connections that no worker has taken."""
        self.starter.close()
        for sock in self._notify.values():
            sock.close()
        for sock in self._unclaimed:
            sock.close()

    # -- processes -----------------------------------------------------------------------------------------

    def _begin(self, process: WorkerProcess, options: Options) -> None:
        """Watch a worker that was started."""
        self.processes[process.worker] = process
        self._news.reports.spawned(process)
        self._loop.start("worker.watch", self._watch, process)
        if process.is_foreign and options.ready == "exec":
            self._loop.start("worker.examine", self._examine, process, options.settle_s)
            self._loop.input(Said(process.worker, Event.READY))

    def adopt(self, orphan: Orphan, phase: Phase | None) -> None:
        """Supervise a worker of an earlier supervisor; do nothing if it has ended."""
        try:
            child = Child(orphan.pid, os.pidfd_open(orphan.pid))
        except ProcessLookupError:  # it has ended meanwhile; if it was killed, its socket file remains
            with suppress(OSError):
                os.unlink(orphan.control_path)
            return
        process = WorkerProcess(
            orphan.worker,
            orphan.generation,
            child,
            orphan.control_path,
            is_foreign=orphan.is_foreign,
            age_s=age_s(orphan.pid),
        )
        set_niceness(child.pid, 0)  # its supervisor may have ended while it started
        process.held = set(orphan.listeners.values())
        process.owes = phase in (Phase.SERVING, Phase.QUIESCED, Phase.DRAINING)
        process.is_leaving = phase is Phase.DRAINING
        self.processes[orphan.worker] = process
        self._loop.start("worker.watch", self._watch, process)
        if not process.is_foreign and os.path.exists(process.control_path):
            self._loop.keep("worker.conversation", process.converse, self._hear_word)

    async def _examine(self, process: WorkerProcess, after_s: float = 0.0) -> None:
        """Warn if a foreign program ignores its listeners, on which clients would wait for ever."""
        await anyio.sleep(after_s)  # a program that does not report readiness has bound its own listeners by then
        if self.processes.get(process.worker) is not process:
            return
        if (unaware := find_unaware(process.pid, process.held)) is not None:
            self._log.warning(
                "worker.binds_itself",
                worker=process.worker,
                program=unaware.command,
                program_pid=unaware.pid,
                addresses=unaware.addresses,
                why=f"LISTEN_PID is {process.pid}, the wrapper's, so the program takes no listener from hotport",
                note="start the program in place of its wrapper: -- sh -c 'exec PROGRAM ...'",
            )

    async def _watch(self, process: WorkerProcess) -> None:
        await retried("worker.watch", process.wait_ended)
        with Containing("notifications"):
            self._read_notifications()  # before its pid can be reused
        why = "ended"
        with Containing("worker.collect", worker=process.worker):
            why = process.collect()
        del self.processes[process.worker]
        self.starter.let_go(process.generation)
        self._counters.fold()
        self._app_metrics.ended(process.pid)
        if process.released is not None:
            process.released.set()
        if process.error:
            self._news.note_error(process.worker, process.error)
        # A worker that still owes its fates was killed. The fates may come before the service is known to stop.
        self.has_cut = self.has_cut or (self._service.is_stopping and (process.owes or process.has_cut))
        name = os.path.basename(process.control_path)
        for other in self.processes.values():
            if name in other.expects:
                other.expects.discard(name)
                other.order(ExpectOrder(connections={name: 0}))
        self._loop.input(Exited(process.worker, why))

    # -- listeners -----------------------------------------------------------------------------------------

    def share(self, worker: int) -> None:
        """Give a worker its missing listeners."""
        if process := self.processes.get(worker):
            self._loop.start("transfer", self._give, process)

    def open(self, worker: int) -> None:
        """Tell a worker to accept, once it has its generation's listeners."""
        process = self.processes.get(worker)
        if process is not None:
            process.successors = ()  # a worker that accepts stops handing off
        leaving = self._leaving(worker)
        is_whole = process is None or (not self._missing(process) and process.released is None)
        if process is None or process.is_foreign or (is_whole and not leaving):
            self._order(worker, AcceptOrder(), Event.ACCEPTING)
        else:
            self._loop.start("transfer", self._give, process, AcceptOrder(), leaving)

    def _leaving(self, worker: int) -> list[WorkerProcess]:
        """The workers whose connections move to a worker that is about to accept, and that reserves room for them."""
        service, restart = self._service, self._service.restart
        if not self._options.moves_connections or self._options.command or service.is_stopping:
            return []
        numbers: set[int | None] = {*service.ids(Phase.QUIESCING, Phase.QUIESCED, Phase.DRAINING)}
        if this := service.workers.get(worker):
            numbers.add(this.replaces)
        if restart is not None and worker in restart.new:
            old = [each.id for each in service.current if each.generation != restart.generation]
            numbers.update(old[: len(restart.new)] if restart.is_phased else old)
        elif restart is not None and restart.step is steps.Step.UNDOING:
            numbers |= restart.new
        found = (self.processes.get(number) for number in numbers - {worker, None} if number is not None)
        new = self.processes.get(worker)
        if new is None:
            return []
        talking = [each for each in found if each is not None and each.is_talking]
        return [each for each in talking if may_hand_to(each.control_path, new.control_path)]

    async def _announce(self, process: WorkerProcess, leaving: Sequence[WorkerProcess]) -> None:
        """Tell a worker for how many connections of leaving workers to reserve room."""
        counts: dict[str, int] = {}

        async def ask(other: WorkerProcess) -> None:
            found = await other.ask(InspectOrder(), Inspection, COUNT_TIMEOUT_S)
            if found is not None and found.connections:
                counts[os.path.basename(other.control_path)] = -(-found.connections // receivers)

        restart = self._service.restart
        is_new = restart is not None and process.worker in restart.new
        receivers = restart.wanted if restart is not None and is_new and not restart.is_phased else 1
        async with anyio.create_task_group() as tasks:
            for other in leaving:
                tasks.start_soon(ask, other)
        if counts:
            process.expects |= counts.keys()
            process.order(ExpectOrder(connections=counts))

    async def give_all(self) -> None:
        """Give all accepting workers their missing listeners, and wait until each has taken or refused them."""
        async with anyio.create_task_group() as tasks:
            for number in self._service.ids(Phase.SERVING):
                process = self.processes.get(number)
                if process is not None and process.is_talking and self._missing(process):
                    tasks.start_soon(self._give, process)
        self.close_unused()

    def _missing(self, process: WorkerProcess) -> dict[str, socket.socket]:
        """The listeners of its generation that a worker lacks."""
        sockets = self._owned.sockets(process.generation)
        return {address: sock for address, sock in sockets.items() if sock not in process.held}

    async def _give(
        self, process: WorkerProcess, then: AcceptOrder | None = None, leaving: Sequence[WorkerProcess] = ()
    ) -> None:
        """Give a worker its missing listeners and all unclaimed connections; then send an order.

        Sends no order if that fails; then the timer that bounds its answer decides.
        """
        await self._announce(process, leaving)
        if process.released is not None:  # else it could close the listeners that it is given now
            await process.released.wait()
            process.released = None
        accepted, self._unclaimed = self._unclaimed, []
        missing: dict[str, socket.socket] = {}
        try:
            self._owned.join(process.generation, self._options.backlog)
            missing = self._missing(process)
            process.held |= set(missing.values())
            if missing or accepted:
                await process.transfer(missing, accepted)
        except Exception as error:
            process.held -= set(missing.values())
            self._news.reports.lost(len(accepted))
            if not isinstance(error, OSError):
                raise
            self._log.warning("transfer.failed", worker=process.worker, error=str(error) or type(error).__name__)
        else:
            process.held -= self._owned.superseded(missing)
            if then is not None:
                process.order(then)
        finally:
            for sock in accepted:
                sock.close()

    def release(self, worker: int) -> None:
        """Tell a worker to close the listeners that its generation shares with the next one."""
        process, restart = self.processes.get(worker), self._service.restart
        if process is None or restart is None:
            return
        common = self._owned.common(process.generation, restart.generation)
        sockets = {each.address: each.sock for each in common if each.sock is not None}
        process.held -= set(sockets.values())
        process.releasing |= sockets
        process.released = anyio.Event()
        process.order(ReleaseOrder(addresses=tuple(sockets)))

    def rebind(self, generation: int) -> None:
        """Close the listeners that a generation shares with the one before it, and bind them again."""
        old = self._service.generation
        leaving = {number: process.pid for number, process in self.processes.items() if process.generation <= old}
        if lingering := self._owned.lingering(leaving, old, generation):  # closing ours would not free the port
            self._loop.input(inputs.Bound(f"worker {lingering[0]} still has a listener open", is_kept=True))
            return
        result = self._owned.rebind(old, generation, self._options.backlog)
        self._unclaimed += result.accepted
        self._news.reports.rebound(generation, gap_s=result.gap_s, refused=result.refused, reset=result.reset)
        self._log.info("port.rebound", gap_us=round(result.gap_s * 1e6, 1), taken=len(result.accepted))
        self._loop.input(inputs.Bound(result.why))

    def regain(self) -> None:
        """Try again to bind addresses that were lost to another process."""
        self._loop.input(inputs.Bound(self._owned.regain(self._options)))

    def steer(self, generation: int, index: int) -> None:
        """Steer new connections to a generation's sockets (index 1), or to their predecessors (index 0)."""
        try:
            self._owned.steer(generation, index)
        except OSError as error:  # the queues of the old sockets are emptied before they are closed
            self._log.warning("port.not_steered", error=str(error))

    def close_unused(self) -> None:
        """Close the listeners that no generation needs; give their queued connections to an accepting worker."""
        if self._service.is_stopping or not self._service.generation:
            return
        wanted = {self._service.generation}
        if self._service.restart is not None:
            wanted.add(self._service.restart.generation)
        held = {sock for process in self.processes.values() for sock in process.held}
        self._unclaimed += self._owned.keep(wanted, held)
        if self._unclaimed and not (self._service.restart and self._service.restart.step is steps.Step.REBINDING):
            serving = (self.processes.get(number) for number in reversed(self._service.ids(Phase.SERVING)))
            if process := next((each for each in serving if each is not None and each.is_talking), None):
                self._loop.start("transfer", self._give, process)

    # -- orders --------------------------------------------------------------------------------------------

    def quiesce(self, worker: int, *, empties: bool) -> None:
        """Tell a worker to stop accepting."""
        self._order(worker, QuiesceOrder(empties=empties), Event.QUIESCED)

    def set_log_level(self, level: LogLevel) -> None:
        """Tell all workers to log this level and those above it; programs that are not hotport's have no such order."""
        for process in self.processes.values():
            if not process.is_foreign:  # one that starts gets the order when it listens
                process.order(LogLevelOrder(level=level))

    def kill(self, worker: int) -> None:
        """SIGKILL a worker and its process group."""
        if process := self.processes.get(worker):
            process.kill()
        else:
            self.starter.call_off(worker)

    def _order(self, worker: int, order: AcceptOrder | QuiesceOrder, answer: Event) -> None:
        process = self.processes.get(worker)
        if process is None:
            return  # its `Exited` is queued
        if process.is_foreign:  # accepts from its start until it leaves, and takes no orders
            self._news.reports.note(self._service.restart, process, answer, time.monotonic())
            self._loop.input(Said(worker, answer))
        else:
            process.order(order)

    def drain(self, worker: int, *, is_last: bool) -> None:
        """Tell a worker to hand off its connections, finish the others, and leave."""
        process = self.processes.get(worker)
        if process is None:
            self.starter.call_off(worker)
        elif process.is_foreign or not process.is_talking:
            process.signal(signal.SIGTERM)  # on which hotport's workers drain, too
        else:
            process.is_leaving = True
            process.successors = () if is_last else self._successors(worker)
            if abandoned := self._abandoned(process):
                process.releasing |= abandoned
                process.order(ReleaseOrder(addresses=tuple(abandoned)))
            process.order(
                DrainOrder(timeout_s=self._options.drain_timeout_s, is_last=is_last, successors=process.successors)
            )

    def terminate(self, worker: int, *, is_hurried: bool) -> None:
        """End a worker within `kill_timeout`, or at once."""
        process = self.processes.get(worker)
        if process is None:
            self.starter.call_off(worker)
        elif process.is_talking and (is_hurried or process.is_leaving):
            process.order(HurryOrder())
        elif process.is_talking:  # no signal, which the worker would count; after a recovery it may accept
            timeout_s = self._options.kill_timeout_s / 2  # leaves time to report its fates before it is killed
            process.order(DrainOrder(timeout_s=timeout_s, successors=self._successors(worker)))
        elif is_hurried:
            process.kill()
        else:
            process.signal(signal.SIGTERM)

    def _abandoned(self, process: WorkerProcess) -> dict[str, socket.socket]:
        """The listeners of a leaving worker from which no later generation accepts."""
        restart = self._service.restart
        generations = {self._service.generation, restart.generation if restart else 0} - {0}
        served = {sock for number in generations for sock in self._owned.sockets(number).values()}
        return self._owned.named(process.held - served)

    def _successors(self, leaving: int) -> tuple[str, ...]:
        """The control sockets of a leaving worker's successors.

        They are workers of the generation that is expected to stay: neither a canary nor a generation that is being
        taken back, unless there is no other.
        """
        old = self.processes.get(leaving)
        if self._service.is_stopping:
            return _reachable(old, self._remote_successors)
        serving = [self._service.workers[number] for number in self._service.ids(Phase.SERVING) if number != leaving]
        restart, generations = self._service.restart, {worker.generation for worker in serving}
        going = self._service.favoured
        if restart is not None and restart.is_phased and restart.step is not steps.Step.UNDOING:
            going = restart.generation
        if going not in generations:
            going = max(generations, default=0)
        processes = [self.processes.get(worker.id) for worker in serving if worker.generation == going]
        return _reachable(old, [each.control_path for each in processes if each is not None and each.is_talking])

    def redirect(self) -> None:
        """Send workers that drain, or may be taken back, their successors if these have changed."""
        restart = self._service.restart
        is_watching = restart is not None and restart.step is steps.Step.WATCHING
        for number in self._service.ids(Phase.DRAINING, *((Phase.QUIESCED,) if is_watching else ())):
            process = self.processes.get(number)
            if process is None or process.is_foreign or not process.is_talking:
                continue
            successors = self._successors(number)
            if successors and successors != process.successors:
                process.successors = successors
                process.order(SuccessorsOrder(successors=successors))

    def deposit(self) -> None:
        """Store with the workers the state that the next supervisor needs."""
        memory = self.memory
        for process in self.processes.values():
            if process.is_talking and process.memory != memory:
                process.memory = memory
                process.order(RememberOrder(memory=memory))

    def name_successors(self, paths: Sequence[str]) -> None:
        """Set the workers of another supervisor, by control socket, as successors for the stop of the service."""
        self._remote_successors = tuple(paths)

    @property
    def memory(self) -> Memory:
        """The state that the next supervisor could not learn from the workers otherwise."""
        service = self._service
        return Memory(
            wanted=service.wanted,
            generations=service.generations,
            spawned=service.spawned,
            favoured=service.favoured,
        )

    # -- workers' messages ---------------------------------------------------------------------------------

    def listen_on(self, notify_socket: socket.socket, uid: int | None = None) -> None:
        """Receive notifications on another socket, bound to the path that workers know; owned from here on.

        Args:
            uid: Whose workers know that path, if they are another user's.
        """
        self._read_notifications()
        before = self._notify.get(uid)
        self._notify[uid] = notify_socket
        if before is None:
            self._loop.keep("notifications", self.receive_notifications, uid)
        else:
            anyio.notify_closing(before)
            before.close()

    async def receive_notifications(self, uid: int | None = None) -> None:
        """Receive notifications until cancelled; `uid` as in `listen_on`."""
        while True:
            with suppress(anyio.ClosedResourceError):  # `listen_on` has replaced the socket
                await anyio.wait_readable(self._notify[uid])
                self._read_notifications()

    def _read_notifications(self) -> None:
        for sock in list(self._notify.values()):
            while (received := receive_notification(sock)) is not None:
                pid, _, payload = received
                with Containing("notification", worker_pid=pid):
                    process, said = self._process_of(pid), Notification.parse(payload)
                    if process is not None:
                        self._hear_notification(process, said)
                    elif said.ready:
                        self._dismiss(pid)

    def _dismiss(self, pid: int) -> None:
        """Terminate a worker that the previous supervisor started just before its end, and did not record."""
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if "HOTPORT_WORKER" in environment(pid):
                    send_signal(pidfd, signal.SIGTERM)
                    self._log.warning("worker.dismissed", worker_pid=pid)
            finally:
                os.close(pidfd)

    def _process_of(self, pid: int) -> WorkerProcess | None:
        """Return the worker that sent a notification: the sender itself, or the leader of its process group."""
        by_pid = {process.pid: process for process in self.processes.values()}
        if pid in by_pid:
            return by_pid[pid]
        with suppress(ProcessLookupError):
            return by_pid.get(os.getpgid(pid))
        return None

    def _hear_notification(self, process: WorkerProcess, said: Notification) -> None:
        if said.status is not None:
            process.status = said.status
        if said.error is not None:
            process.error = said.error
        if said.watchdog:
            process.is_watched = process.was_fed = True
            process.has_failed = False
        if said.has_failed:
            process.is_watched = process.has_failed = True
        if said.watchdog_s is not None:
            process.watchdog_s = said.watchdog_s
        if said.extend_timeout_s is not None:
            self._loop.input(inputs.MoreTime(process.worker, said.extend_timeout_s))
        if said.ready:
            if not process.is_foreign and not process.is_talking:
                self._loop.keep("worker.conversation", process.converse, self._hear_word)
            if process.is_foreign and process.worker in self._service.ids(Phase.STARTING):
                self._loop.start("worker.examine", self._examine, process)
            if process.worker in self._service.ids(Phase.STARTING):
                set_niceness(process.pid, 0)
                self._news.reports.started(process.generation, cpu_s(process.pid), process.worker)
            self._loop.input(Said(process.worker, Event.READY))
        if said.stopping:
            self._loop.input(Said(process.worker, Event.LEAVING))

    def _hear_word(self, worker: int, word: Word) -> None:
        match word:
            case Hello(phase=phase, stack=stack, imports=imports):
                self._news.reports.imported(worker, imports)
                if process := self.processes.get(worker):
                    process.stack_pipe = stack
                if phase != "starting":  # its earlier notification was lost
                    self._loop.input(Said(worker, Event.READY))
            case Accepting(at_s=at_s, fates=fates):
                self._news.reports.taken_back(self._service.restart, worker, fates)
                self._note(worker, Event.ACCEPTING, at_s)
                if process := self.processes.get(worker):
                    process.owes = True
                self._loop.input(Said(worker, Event.ACCEPTING))
            case Quiesced(at_s=at_s):
                self._note(worker, Event.QUIESCED, at_s)
                self._loop.input(Said(worker, Event.QUIESCED))
            case Released(addresses=addresses, at_s=at_s):
                if process := self.processes.get(worker):
                    process.held -= {process.releasing.pop(each) for each in addresses if each in process.releasing}
                    if process.released is not None:
                        process.released.set()
                self._note(worker, Event.QUIESCED, at_s)
                self._loop.input(Said(worker, Event.QUIESCED))
            case Expired():
                if (process := self.processes.get(worker)) and not process.has_expired:
                    process.has_expired = True
                    self._counters.count("expired")
                self._loop.input(inputs.RecycleDue(worker))
            case Drained(fates=fates, moves=moves):
                if process := self.processes.get(worker):
                    process.owes, process.has_cut = False, any(self._is_cut(fate) for fate in fates)
                self._news.reports.drained(worker, fates, moves)
            case TlsReloaded(error=error) if error:  # no request waits: the order came during the start
                self._log.warning("tls.kept", worker=worker, error=error)
            case _:
                pass

    def _note(self, worker: int, event: Event, at_s: float) -> None:
        if process := self.processes.get(worker):
            self._news.reports.note(self._service.restart, process, event, at_s)

    def _is_cut(self, fate: str) -> bool:
        """Whether a fate is a loss: the next supervisor serves accept queues that the service manager keeps."""
        addresses = self._owned.sockets(self._service.generation)
        is_kept = fate == Fate.CUT_UNACCEPTED and all(map(self._news.manager.keeps, addresses))
        return names_cut(fate) and not is_kept


def _reachable(old: WorkerProcess | None, paths: Sequence[str]) -> tuple[str, ...]:
    """The control sockets to which a leaving worker can hand connections."""
    return tuple(path for path in paths if old is None or may_hand_to(old.control_path, path))
