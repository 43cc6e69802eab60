"""The supervisor: carries out what `hotport.model.rules` decides, and tells it what has happened.

One task takes inputs from one queue, steps the model and carries out the effects, in order. Everything else
(a worker's end, its words, a signal, a command, a timer) only puts an input into that queue; so the supervisor is
never busy with a restart, it is only ever between two steps of one.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple, TypeVarTuple

import anyio
import anyio.abc
import anyio.lowlevel
from msgspec.structs import replace

from hotport.address import listener_name, parse_address
from hotport.errors import ExitCode, HotportError, RestartError, StartError
from hotport.kernel.notify import receive_notification
from hotport.kernel.process import is_stopped, numbers, send_signal
from hotport.kernel.procfs import age_s, environment, queue_overflows
from hotport.kernel.spawn import Child, spawn
from hotport.model import effects, inputs, rules, steps
from hotport.model.effects import Announce, News
from hotport.model.guarantee import Strategy
from hotport.model.inputs import Clock, Exited, Said, Timer
from hotport.model.lifecycle import Event, Phase
from hotport.model.service import Restart, Service
from hotport.model.signals import WORKER
from hotport.observe.logs import get_logger
from hotport.options import Options, format_duration
from hotport.supervisor.contain import Containing, contained, retried
from hotport.supervisor.foreign import find_unaware
from hotport.supervisor.health import watch_health
from hotport.supervisor.launch import Launch, Surroundings
from hotport.supervisor.listeners import Listener, Listeners
from hotport.supervisor.manager import Manager
from hotport.supervisor.process import Process
from hotport.supervisor.recovery import Found, Survivor
from hotport.supervisor.reports import Reports
from hotport.supervisor.timers import Timers
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
    Memory,
    Quiesced,
    QuiesceOrder,
    Released,
    ReleaseOrder,
    RememberOrder,
    Report,
    SuccessorsOrder,
    TlsReloaded,
    Word,
    worker_socket,
)
from hotport.wire.sdnotify import Notification

__all__ = ["StatusPort", "Supervisor"]

Arguments = TypeVarTuple("Arguments")

#: Bounds the answer to an order that a worker can carry out at once.
ANSWER_TIMEOUT_S: Final = 5.0

#: How long a worker that leaves may take to say how many connections it has, before others accept.
COUNT_TIMEOUT_S: Final = 1.0

#: So long without losing a worker, and the next loss counts as the first again.
STABLE_S: Final = 10.0


class Asked:
    """A request on its way through the model, and its answer.

    Args:
        launch: Of a restart: what the next generation is started from.
        plan: Of a restart: the listeners of the next generation.

    Attributes:
        error: Why the model could not even answer.
    """

    def __init__(self, launch: Launch | None = None, plan: list[Listener] | None = None) -> None:
        self.launch = launch
        self.plan = plan or []
        self.is_answered = anyio.Event()
        self.generation = 0
        self.refusal: effects.Refusal | None = None
        self.error: Exception | None = None


class StatusPort(NamedTuple):
    """Where health checks are answered: as the options name it, as it is, its listener, and its socket file."""

    bind: str
    address: str
    listener: socket.socket
    file: tuple[int, int] | None = None


class Supervisor:
    """One service, from its listeners to its end.

    Args:
        name: The service's name.
        directory: Its runtime directory, private, existing.
        notify_socket: Bound in `directory`; owned from here on.
        read_options: Reads the options again for each restart, from a directory; may raise ConfigError.
        manager: Hears of it, if this supervisor is itself supervised; the caller closes it.
        found: What is left of the service's last supervisor, and the listeners; these are owned from here on.

    Attributes:
        is_departing: It ends without its workers: this process becomes another supervisor of them.
        mend: Makes again what has disappeared of the runtime directory; called before a worker is started in it.
        has_departed: It takes no input any more; until then, it stays if somebody asks for the end of the service.
        begun: Set when there is a first worker, or what is left of a last supervisor's is known.
        is_succeeded: Another process has the listeners, and the paths in `directory`.
        heirs: Control sockets of that process's workers.
        status_port: Owned by whoever has set it first.
    """

    def __init__(
        self,
        name: str,
        directory: str,
        options: Options,
        notify_socket: socket.socket,
        surroundings: Surroundings,
        *,
        found: Found,
        read_options: Callable[[Path], Options],
        manager: Manager,
    ) -> None:
        self.name = name
        self.directory = directory
        self.options = options
        self.owned = Listeners(found.listeners, self._asked_of(found))
        self.service = Service(wanted=options.workers)
        self.processes: dict[int, Process] = {}
        self.reports = Reports(name, overflows=queue_overflows)
        self.status_port: StatusPort | None = None
        self.exit_code: int = ExitCode.DONE
        self.failure: HotportError | str | None = None
        self.notify_socket = notify_socket
        self.surroundings = surroundings
        self.read_options = read_options
        self.manager = manager
        self._found = found
        self.mend: Callable[[], object] = lambda: None
        self.is_departing = False
        self.has_departed = False
        self.is_succeeded = False
        self.heirs: tuple[str, ...] = ()
        self._launches: dict[int, Launch] = {}
        self._errors: dict[int, str] = {}
        self._loss = ""
        self._requests = 0
        self._asked: dict[int, Asked] = {}
        self._subscribers: list[Callable[[Announce | Report], None]] = []
        self._stepped = anyio.Event()
        self.begun = anyio.Event()
        self._has_cut = False
        self._left: list[socket.socket] = []  # connections that were taken from a queue, for the next who accepts
        self.finished = anyio.Event()
        self._inputs: deque[inputs.Input | None] = deque()
        self._has_inputs = anyio.Event()
        self._log = get_logger("hotport.supervisor")
        self.started_at = time.monotonic()
        self._tasks: anyio.abc.TaskGroup
        self._timers: Timers

    @property
    def listeners(self) -> Mapping[str, socket.socket]:
        """The listeners of the generation that serves, by canonical address."""
        return self.owned.sockets(self.service.generation)

    # -- life ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Boot or adopt, serve, and return when the last worker is gone; then look at `exit_code` and `failure`."""
        try:
            self._prepare_launches()
        except StartError as error:  # raised from here, task groups would wrap it
            self.failure, self.exit_code = error, error.exit_code
            self.finished.set()
            return
        async with anyio.create_task_group() as self._tasks:
            self._timers = Timers(self._tasks, lambda timer: self.input(inputs.Elapsed(timer)))
            self._tasks.start_soon(retried, "notifications", self._receive_notifications)
            self._tasks.start_soon(retried, "manager", self.manager.run)
            await retried("begin", anyio.lowlevel.checkpoint)  # signals are handled before anything is started
            self._adopt()
            await retried("inputs", self._take_inputs)
            self._tasks.cancel_scope.cancel()
        self.finished.set()

    def start(self, what: str, run: Callable[[*Arguments], Awaitable[None]], *args: *Arguments) -> None:
        """Start a task that ends with the supervisor; an unexpected error ends only this one."""
        self._tasks.start_soon(contained, what, run, *args)

    async def _take_inputs(self) -> None:
        """Step the model with each input, in order, until the last worker is gone or this supervisor departs."""
        while True:
            while self._inputs:
                event = self._inputs.popleft()
                if event is not None:
                    if self._step(event):
                        return
                elif self.is_departing and not (self.service.is_stopping or self.service.is_lame_duck):
                    self.has_departed = True
                    return
                else:
                    self.is_departing = False  # the end of the service was asked for first
            self._has_inputs = anyio.Event()
            await self._has_inputs.wait()

    def _step(self, event: inputs.Input) -> bool:
        """Step the model once and carry out its effects; True if the service has ended."""
        wanted: Sequence[effects.Effect] = ()
        with Containing("step", lambda error: self._give_up(event, error), input=str(event)):
            self.service, wanted = rules.step(self.service, event)
        for effect in wanted:
            with Containing("effect", effect=str(effect)):
                self._carry_out(effect)
        for follow in (self._redirect, self._deposit, self._close_listeners):
            with Containing("step", after=str(event)):
                follow()
        with Containing("manager"):
            self.manager.extend(self._timers)
        self.begun.set()
        self._stepped.set()
        self._stepped = anyio.Event()
        return any(isinstance(effect, effects.Finish) for effect in wanted)

    def _give_up(self, event: inputs.Input, error: Exception) -> None:
        """The model has failed at an input: the service is as it was, and a request gets the error for an answer."""
        if (asked := self._asked.pop(getattr(event, "request", 0), None)) is not None:
            asked.error = error
            asked.is_answered.set()

    def _asked_of(self, found: Found) -> dict[int, tuple[str, ...]]:
        """The addresses of each generation as its options name them."""
        asked = {each.generation: each.launch.options.bind for each in found.survivors if each.launch is not None}
        return {found.going: self.options.bind, **asked}

    def listen_on(self, notify_socket: socket.socket) -> None:
        """Hear workers on this socket from now on, bound to the path that they know; owned from here on."""
        self._read_notifications()
        before, self.notify_socket = self.notify_socket, notify_socket
        anyio.notify_closing(before)
        before.close()

    def _prepare_launches(self) -> None:
        found = self._found
        for survivor in found.survivors:
            if survivor.launch is not None:
                self._launches.setdefault(survivor.generation, survivor.launch)
        if found.going not in self._launches:
            self._launches[found.going] = Launch.resolve(self.options, self.surroundings)
        self.options = self._launches[found.going].options

    def _adopt(self) -> None:
        """Begin: with the first generation, or with what is left of the last supervisor's."""
        found = self._found
        phases = {worker.id: worker.phase for worker in found.workers}
        for survivor in found.survivors:
            with Containing("worker.adopt", worker=survivor.worker):
                self._adopt_worker(survivor, phases.get(survivor.worker))
        workers = tuple(worker for worker in found.workers if worker.id in self.processes)
        wanted = found.wanted or self.options.workers
        self.input(inputs.Adopt(workers, wanted, found.generations, found.spawned, found.favoured))

    def _adopt_worker(self, survivor: Survivor, phase: Phase | None) -> None:
        try:
            child = Child(survivor.pid, os.pidfd_open(survivor.pid))
        except ProcessLookupError:  # it has gone since, and may have been killed
            with suppress(OSError):
                os.unlink(survivor.control_path)
            return
        process = Process(
            survivor.worker,
            survivor.generation,
            child,
            survivor.control_path,
            is_foreign=survivor.is_foreign,
            age_s=age_s(survivor.pid),
        )
        process.held = set(survivor.listeners.values())
        process.owes = phase in (Phase.SERVING, Phase.QUIESCED, Phase.DRAINING)
        process.is_leaving = phase is Phase.DRAINING
        self.processes[survivor.worker] = process
        self.start("worker.watch", self._watch, process)
        if not process.is_foreign and os.path.exists(process.control_path):
            self._tasks.start_soon(retried, "worker.conversation", process.converse, self._hear_word)

    @property
    def memory(self) -> Memory:
        """What a next supervisor could not learn from the workers otherwise."""
        service = self.service
        return Memory(
            wanted=service.wanted,
            generations=service.generations,
            spawned=service.spawned,
            favoured=service.favoured,
        )

    @property
    def what_goes_on(self) -> str:
        """What has to be over before another supervisor can have the service; empty if nothing has."""
        service = self.service
        if self.is_succeeded or self.is_departing:
            return "another supervisor is taking over"
        if service.is_stopping:
            return effects.Refusal.STOPPING.value
        if service.restart is not None:
            return f"{effects.Refusal.IN_PROGRESS.value} (generation {service.restart.generation})"
        if service.generation == 0:
            return effects.Refusal.STARTING.value
        return f"another process has {', '.join(self.owned.lost)}" if self.owned.lost else ""

    def depart(self) -> None:
        """End `run` as soon as everything that has happened is dealt with; the workers serve on."""
        self.is_departing = True
        self._put(None)

    def descriptors(self) -> Iterator[int]:
        """What a forked child must not have."""
        sockets = (self.notify_socket, *self.owned.all_sockets(), *self._left)
        yield from (sock.fileno() for sock in sockets)
        if self.status_port is not None:
            yield self.status_port.listener.fileno()
        yield from (process.descriptor for process in self.processes.values())

    def close(self) -> None:
        """Close what `run` was given; unlinking paths is the caller's affair."""
        self.notify_socket.close()
        self.owned.close()
        for sock in self._left:
            sock.close()

    def input(self, event: inputs.Input) -> None:
        """Put an input at the end of the queue."""
        if isinstance(event, inputs.RequestStop):
            self.is_departing = self.has_departed
        self._put(event)

    def _put(self, event: inputs.Input | None) -> None:
        self._inputs.append(event)
        self._has_inputs.set()

    def stop(self, *, now: bool = False, lame_duck_s: float | None = None) -> None:
        """Ask for the end of the service; `lame_duck_s` None leaves that time to the options."""
        seconds = self.options.lame_duck_s if lame_duck_s is None else lame_duck_s
        self.input(inputs.RequestStop(now=now, lame_duck_s=seconds))

    @property
    def lame_duck_left_s(self) -> float | None:
        """Seconds for which a lame duck serves on; None if the service is none."""
        return self._timers.left_s(Timer(Clock.LAME_DUCK)) if self.service.is_lame_duck else None

    # -- effects -------------------------------------------------------------------------------------------

    def _carry_out(self, effect: effects.Effect) -> None:
        match effect:
            case effects.Spawn():
                self._spawn(effect.worker, effect.generation)
            case effects.Open(worker):
                if process := self.processes.get(worker):
                    process.successors = ()  # whatever it handed over, it stops
                self._open(worker)
            case effects.Quiesce(worker, empties):
                self._order(worker, QuiesceOrder(empties=empties), Event.QUIESCED)
            case effects.Release(worker):
                self._release(worker)
            case effects.Rebind(generation):
                self._rebind(generation)
            case effects.Regain():
                self.input(inputs.Bound(self.owned.regain(self.options)))
            case effects.Share(worker):
                if process := self.processes.get(worker):
                    self.start("transfer", self._give, process)
            case effects.Steer(generation) | effects.Unsteer(generation):
                self._steer(generation, 1 if isinstance(effect, effects.Steer) else 0)
            case effects.Drain(worker, is_last):
                self._drain(worker, is_last)
            case effects.Terminate(worker, is_hurried):
                self._terminate(worker, is_hurried)
            case effects.Kill(worker):
                if process := self.processes.get(worker):
                    process.kill()
            case effects.StartTimer(timer, seconds):
                self._timers.start(timer, self._duration(timer) if seconds is None else seconds)
            case effects.ExtendTimer(timer, seconds):
                self._timers.extend(timer, seconds)
            case effects.StopTimer(timer):
                self._timers.stop(timer)
            case effects.CloseListeners():
                self.owned.give_away([each for each in self.listeners if self.manager.keeps(each)])
                self.owned.close()
            case effects.Accept() | effects.Refuse():
                self._answer(effect)
            case Announce():
                self._publish(effect)
            case effects.Finish(has_failed):
                self._finish(has_failed)

    def _spawn(self, worker: int, generation: int) -> None:
        self.mend()
        launch = self._launches[generation]
        restart = self.service.restart
        # Others than inherit give them later.
        is_given = restart is not None and restart.generation == generation and restart.strategy is not Strategy.INHERIT
        listeners = {} if is_given else self.owned.sockets(generation)
        try:
            child = spawn(
                launch.argv(self.name, generation, worker),
                environment=launch.worker_environment(self.name, self.directory, generation, worker),
                cwd=launch.directory,
                listeners=[listener.fileno() for listener in listeners.values()],
                listen_names=[listener_name(parse_address(address)) for address in listeners],
                held=() if launch.options.command else numbers(WORKER.keys()),
            )
        except Exception as error:
            self._errors[worker] = str(error)
            self.input(Exited(worker, "could not be executed"))
            if not isinstance(error, HotportError | OSError | ValueError):
                raise
            return
        path = os.path.join(self.directory, worker_socket(generation, worker))
        is_foreign = bool(launch.options.command)
        process = Process(worker, generation, child, path, is_foreign=is_foreign)
        process.held = set(listeners.values())
        self.processes[worker] = process
        self._log.info("worker.spawned", worker=worker, generation=generation, worker_pid=child.pid)
        self.start("worker.watch", self._watch, process)
        if is_foreign and launch.options.ready == "exec":
            self.start("worker.examine", self._examine, process, launch.options.settle_s)
            self.input(Said(worker, Event.READY))

    async def _examine(self, process: Process, after_s: float = 0.0) -> None:
        """Say if a foreign program does not know of its listeners: clients would wait on them for ever."""
        await anyio.sleep(after_s)  # one that cannot say that it is ready has bound by then what it binds
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

    async def _watch(self, process: Process) -> None:
        await retried("worker.watch", process.wait_ended)
        with Containing("notifications"):
            self._read_notifications()  # while its pid is nobody else's
        why = "ended"
        with Containing("worker.collect", worker=process.worker):
            why = process.collect()
        del self.processes[process.worker]
        if process.released is not None:
            process.released.set()
        if process.error:
            self._errors[process.worker] = process.error
        # One that owes its account was killed, by whomever. An account may come before we know that the service stops.
        self._has_cut = self._has_cut or (self.service.is_stopping and (process.owes or process.has_cut))
        name = os.path.basename(process.control_path)
        for other in self.processes.values():
            if name in other.expects:
                other.expects.discard(name)
                other.order(ExpectOrder(connections={name: 0}))
        self.input(Exited(process.worker, why))

    def _open(self, worker: int) -> None:
        process = self.processes.get(worker)
        leaving = self._leaving(worker)
        is_whole = process is None or (not self._missing(process) and process.released is None)
        if process is None or process.is_foreign or (is_whole and not leaving):
            self._order(worker, AcceptOrder(), Event.ACCEPTING)
        else:
            self.start("transfer", self._give, process, AcceptOrder(), leaving)

    def _leaving(self, worker: int) -> list[Process]:
        """Workers whose connections move to one that is about to accept: it keeps room for them."""
        service, restart = self.service, self.service.restart
        if self.options.handoff == "off" or self.options.tls_cert or self.options.command or service.is_stopping:
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
        return [process for process in found if process is not None and process.is_talking]

    async def _announce(self, process: Process, leaving: Sequence[Process]) -> None:
        """Tell a worker for how many connections of others to keep room."""
        counts: dict[str, int] = {}

        async def ask(other: Process) -> None:
            found = await other.ask(InspectOrder(), Inspection, COUNT_TIMEOUT_S)
            if found is not None and found.connections:
                counts[os.path.basename(other.control_path)] = -(-found.connections // receivers)

        restart = self.service.restart
        is_new = restart is not None and process.worker in restart.new
        receivers = restart.wanted if restart is not None and is_new and not restart.is_phased else 1
        async with anyio.create_task_group() as tasks:
            for other in leaving:
                tasks.start_soon(ask, other)
        if counts:
            process.expects |= counts.keys()
            process.order(ExpectOrder(connections=counts))

    async def give_all(self) -> None:
        """Give every worker that accepts the listeners that it lacks, and wait until each has taken them or not."""
        async with anyio.create_task_group() as tasks:
            for number in self.service.ids(Phase.SERVING):
                process = self.processes.get(number)
                if process is not None and process.is_talking and self._missing(process):
                    tasks.start_soon(self._give, process)
        self._close_listeners()

    def _missing(self, process: Process) -> dict[str, socket.socket]:
        """The listeners of a worker's generation that it has not got."""
        sockets = self.owned.sockets(process.generation)
        return {address: sock for address, sock in sockets.items() if sock not in process.held}

    async def _give(self, process: Process, then: AcceptOrder | None = None, leaving: Sequence[Process] = ()) -> None:
        """Give a worker the listeners that it lacks, and connections that nobody has taken; then an order.

        If that fails there is no order, and the timer that bounds its answer decides.
        """
        await self._announce(process, leaving)
        if process.released is not None:  # it must not close what it is given now
            await process.released.wait()
            process.released = None
        accepted, self._left = self._left, []
        missing: dict[str, socket.socket] = {}
        try:
            self.owned.join(process.generation, self.options.backlog)
            missing = self._missing(process)
            process.held |= set(missing.values())
            if missing or accepted:
                await process.transfer(missing, accepted)
        except Exception as error:
            process.held -= set(missing.values())
            self.reports.lost(len(accepted))
            if not isinstance(error, OSError):
                raise
            self._log.warning("transfer.failed", worker=process.worker, error=str(error) or type(error).__name__)
        else:
            process.held -= self.owned.superseded(missing)
            if then is not None:
                process.order(then)
        finally:
            for sock in accepted:
                sock.close()

    def _release(self, worker: int) -> None:
        process, restart = self.processes.get(worker), self.service.restart
        if process is None or restart is None:
            return
        common = self.owned.common(process.generation, restart.generation)
        sockets = {each.address: each.sock for each in common if each.sock is not None}
        process.held -= set(sockets.values())
        process.releasing |= sockets
        process.released = anyio.Event()
        process.order(ReleaseOrder(addresses=tuple(sockets)))

    def _rebind(self, generation: int) -> None:
        old = self.service.generation
        leaving = {number: process.pid for number, process in self.processes.items() if process.generation <= old}
        if lingering := self.owned.lingering(leaving, old, generation):  # then to close ours would not free the port
            self.input(inputs.Bound(f"worker {lingering[0]} still has a listener open", is_kept=True))
            return
        result = self.owned.rebind(old, generation, self.options.backlog)
        self._left += result.accepted
        self.reports.rebound(generation, gap_s=result.gap_s, refused=result.refused, reset=result.reset)
        self._log.info("port.rebound", gap_us=round(result.gap_s * 1e6, 1), taken=len(result.accepted))
        self.input(inputs.Bound(result.why))

    def _steer(self, generation: int, index: int) -> None:
        try:
            self.owned.steer(generation, index)
        except OSError as error:  # what goes on coming to the old sockets is emptied before they are closed
            self._log.warning("port.not_steered", error=str(error))

    def _close_listeners(self) -> None:
        """Close what no generation needs any more; what waited there is for somebody who accepts."""
        if self.service.is_stopping or not self.service.generation:
            return
        wanted = {self.service.generation}
        if self.service.restart is not None:
            wanted.add(self.service.restart.generation)
        held = {sock for process in self.processes.values() for sock in process.held}
        self._left += self.owned.keep(wanted, held)
        if self._left and not (self.service.restart and self.service.restart.step is steps.Step.REBINDING):
            serving = (self.processes.get(number) for number in reversed(self.service.ids(Phase.SERVING)))
            if process := next((each for each in serving if each is not None and each.is_talking), None):
                self.start("transfer", self._give, process)

    def _order(self, worker: int, order: AcceptOrder | QuiesceOrder, answer: Event) -> None:
        process = self.processes.get(worker)
        if process is None:
            return  # its Exited is on the way
        if process.is_foreign:  # accepts from its start until it leaves, and cannot be told otherwise
            self.reports.note(self.service.restart, worker, answer, time.monotonic())
            self.input(Said(worker, answer))
        else:
            process.order(order)

    def _drain(self, worker: int, is_last: bool) -> None:
        process = self.processes.get(worker)
        if process is None:
            return
        if process.is_foreign or not process.is_talking:
            process.signal(signal.SIGTERM)  # ours drain on it, too
        else:
            process.is_leaving = True
            process.successors = () if is_last else self._successors(worker)
            if abandoned := self._abandoned(process):
                process.releasing |= abandoned
                process.order(ReleaseOrder(addresses=tuple(abandoned)))
            process.order(
                DrainOrder(timeout_s=self.options.drain_timeout_s, is_last=is_last, successors=process.successors)
            )

    def _terminate(self, worker: int, is_hurried: bool) -> None:
        process = self.processes.get(worker)
        if process is None:
            return
        if process.is_talking and (is_hurried or process.is_leaving):
            process.order(HurryOrder())
        elif process.is_talking:  # not by a signal: the worker counts those; and it may accept, after a recovery
            timeout_s = self.options.kill_timeout_s / 2  # it has to say what it has cut, before it is killed
            process.order(DrainOrder(timeout_s=timeout_s, successors=self._successors(worker)))
        elif is_hurried:
            process.kill()
        else:
            process.signal(signal.SIGTERM)

    def _abandoned(self, process: Process) -> dict[str, socket.socket]:
        """Listeners of a worker that leaves which nobody serves after it."""
        restart = self.service.restart
        generations = {self.service.generation, restart.generation if restart else 0} - {0}
        served = {sock for number in generations for sock in self.owned.sockets(number).values()}
        return self.owned.named(process.held - served)

    def _successors(self, leaving: int) -> tuple[str, ...]:
        """Control sockets of those that can go on with a worker's connections.

        They are of the generation that stays as far as anybody knows: not a canary, nor what is taken back, if there
        are others.
        """
        if self.service.is_stopping:
            return self.heirs
        serving = [self.service.workers[number] for number in self.service.ids(Phase.SERVING) if number != leaving]
        restart, generations = self.service.restart, {worker.generation for worker in serving}
        going = self.service.favoured
        if restart is not None and restart.is_phased and restart.step is not steps.Step.UNDOING:
            going = restart.generation
        if going not in generations:
            going = max(generations, default=0)
        processes = [self.processes.get(worker.id) for worker in serving if worker.generation == going]
        return tuple(process.control_path for process in processes if process is not None and process.is_talking)

    def _redirect(self) -> None:
        """Tell workers that drain, or may be taken back, who can go on with their connections, if that has changed."""
        restart = self.service.restart
        is_watching = restart is not None and restart.step is steps.Step.WATCHING
        for number in self.service.ids(Phase.DRAINING, *((Phase.QUIESCED,) if is_watching else ())):
            process = self.processes.get(number)
            if process is None or process.is_foreign or not process.is_talking:
                continue
            successors = self._successors(number)
            if successors and successors != process.successors:
                process.successors = successors
                process.order(SuccessorsOrder(successors=successors))

    def _deposit(self) -> None:
        memory = self.memory
        for process in self.processes.values():
            if process.is_talking and process.memory != memory:
                process.memory = memory
                process.order(RememberOrder(memory=memory))

    def _finish(self, has_failed: bool) -> None:
        if has_failed:
            self.exit_code = ExitCode.NOT_STARTED
            words = next((text for text in self._errors.values() if text), None)
            self.failure = words or StartError(
                "HP403",
                f"the service {self.name} did not start",
                cause=self._loss or "no worker said READY=1",
                fix="--log-level debug",
                note="if it needs longer to start, raise --ready-timeout",
            )
            self.manager.failed(str(self.failure))
        elif self._has_cut:
            self.exit_code = ExitCode.CUT

    def _duration(self, timer: Timer) -> float:
        options = self.options
        match timer.clock:
            case Clock.READY:
                return options.ready_timeout_s
            case Clock.DRAIN if self._is_stopped(timer.worker):
                return ANSWER_TIMEOUT_S
            case Clock.DRAIN:  # the worker keeps its own deadline; this is for one that cannot
                return options.drain_timeout_s + options.kill_timeout_s + ANSWER_TIMEOUT_S
            case Clock.KILL:
                return options.kill_timeout_s
            case Clock.SETTLE:
                return options.settle_s
            case Clock.STABLE:
                return STABLE_S
            case Clock.BAKE:
                return options.bake_s
            case Clock.WATCH:
                return options.undo_window_s
            case _:
                return ANSWER_TIMEOUT_S

    def _is_stopped(self, worker: int) -> bool:
        """Tell, and log, whether a worker is suspended by a signal: it finishes nothing until it is continued."""
        process = self.processes.get(worker)
        if process is None or not is_stopped(process.pid):
            return False
        self._log.warning(
            "worker.stopped",
            worker=worker,
            worker_pid=process.pid,
            why=f"it was stopped by a signal or a debugger; it is killed unless it answers in {ANSWER_TIMEOUT_S:g} s",
            fix=f"kill -CONT {process.pid}",
        )
        return True

    # -- what workers say ----------------------------------------------------------------------------------

    async def _receive_notifications(self) -> None:
        while True:
            with suppress(anyio.ClosedResourceError):  # replaced by another one
                await anyio.wait_readable(self.notify_socket)
                self._read_notifications()

    def _read_notifications(self) -> None:
        while (received := receive_notification(self.notify_socket)) is not None:
            pid, _, payload = received
            with Containing("notification", worker_pid=pid):
                process, said = self._process_of(pid), Notification.parse(payload)
                if process is not None:
                    self._hear_notification(process, said)
                elif said.ready:
                    self._dismiss(pid)

    def _dismiss(self, pid: int) -> None:
        """End a worker that a supervisor has started in its last moment, so that nobody knew of it."""
        with suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if "HOTPORT_WORKER" in environment(pid):
                    send_signal(pidfd, signal.SIGTERM)
                    self._log.warning("worker.dismissed", worker_pid=pid)
            finally:
                os.close(pidfd)

    def _process_of(self, pid: int) -> Process | None:
        """The worker that sent a notification: itself, or the leader of the sender's process group."""
        by_pid = {process.pid: process for process in self.processes.values()}
        if pid in by_pid:
            return by_pid[pid]
        with suppress(ProcessLookupError):
            return by_pid.get(os.getpgid(pid))
        return None

    def _hear_notification(self, process: Process, said: Notification) -> None:
        if said.status is not None:
            process.status = said.status
        if said.error is not None:
            process.error = said.error
        if said.extend_timeout_s is not None:
            self.input(inputs.MoreTime(process.worker, said.extend_timeout_s))
        if said.ready:
            if not process.is_foreign and not process.is_talking:
                self._tasks.start_soon(retried, "worker.conversation", process.converse, self._hear_word)
            if process.is_foreign and process.worker in self.service.ids(Phase.STARTING):
                self.start("worker.examine", self._examine, process)
            self.input(Said(process.worker, Event.READY))
        if said.stopping:
            self.input(Said(process.worker, Event.LEAVING))

    def _hear_word(self, worker: int, word: Word) -> None:
        match word:
            case Hello(phase=phase) if phase != "starting":  # what it has said before it could not reach us
                self.input(Said(worker, Event.READY))
            case Accepting(at_s=at_s, fates=fates):
                self.reports.taken_back(self.service.restart, worker, fates)
                self.reports.note(self.service.restart, worker, Event.ACCEPTING, at_s)
                if process := self.processes.get(worker):
                    process.owes = True
                self.input(Said(worker, Event.ACCEPTING))
            case Quiesced(at_s=at_s):
                self.reports.note(self.service.restart, worker, Event.QUIESCED, at_s)
                self.input(Said(worker, Event.QUIESCED))
            case Released(addresses=addresses, at_s=at_s):
                if process := self.processes.get(worker):
                    process.held -= {process.releasing.pop(each) for each in addresses if each in process.releasing}
                    if process.released is not None:
                        process.released.set()
                self.reports.note(self.service.restart, worker, Event.QUIESCED, at_s)
                self.input(Said(worker, Event.QUIESCED))
            case Expired():
                self.input(inputs.Expired(worker))
            case Drained(fates=fates):
                if process := self.processes.get(worker):
                    process.owes, process.has_cut = False, any(self._is_cut(fate) for fate in fates)
                self.reports.drained(worker, fates)
            case TlsReloaded(error=error) if error:  # nobody waits: it was told while it started
                self._log.warning("tls.kept", worker=worker, error=error)
            case _:
                pass

    def _is_cut(self, fate: str) -> bool:
        """Who waits in an accept queue that the service manager keeps is served by the next supervisor."""
        is_kept = fate == "cut_unaccepted" and all(map(self.manager.keeps, self.listeners))
        return fate.startswith("cut_") and not is_kept

    # -- news ----------------------------------------------------------------------------------------------

    def _publish(self, announcement: Announce) -> None:
        news = announcement.news
        if news in (News.BAKING, News.WATCHING):
            announcement = replace(announcement, why=self._until(Clock.BAKE if news is News.BAKING else Clock.WATCH))
        shown = {
            key: value
            for key, value in (
                ("generation", announcement.generation),
                ("worker", announcement.worker),
                ("why", announcement.why),
            )
            if value
        }
        is_stuck = news is News.WORKER_LOST and announcement.worker in self.processes
        if news is News.WORKER_LOST:
            bound = f"ready_timeout is {format_duration(self.options.ready_timeout_s)}"
            self._loss = f"worker {announcement.worker} {announcement.why}; " + (
                bound if is_stuck else "if it has written why, that is above"
            )
            if error := self._errors.get(announcement.worker):
                shown["exception"] = error  # the key under which renderers keep lines apart
        is_bad = news in (News.ABORTED, News.WORKER_LOST, News.BACKING_OFF, News.UNDOING, News.UNDONE)
        # A failure to boot is told once, at the end; but one that hangs may be a while in coming to it.
        if self.service.generation or not is_bad or is_stuck:
            (self._log.warning if is_bad else self._log.info)(news.value, **shown)
        if news in (News.ABORTED, News.UNDONE):
            self.options = self._launches[self.service.generation].options
        elif news is News.RESTART_BEGAN and self.service.restart is not None:
            is_tracked = not self.options.command
            self.reports.begin(self.service.restart, self.service.generation, is_tracked=is_tracked)
        elif news in (News.BAKING, News.WATCHING) and self.service.restart is not None:
            self._watch_health(self.service.restart)
        why = self._errors.get(announcement.worker, "")
        with Containing("manager"):
            if news is News.DONE:
                self.manager.follow(self.listeners)
            self.manager.hear(announcement, serving=self.service.generation, why=why)
        self._tell_subscribers(announcement)
        ended = self.reports.hear(
            announcement,
            serving=0 if self.service.is_stopping else self.service.generation,
            errors=self._errors,
        )
        for report in ended:
            self._log.info(
                "restart.report",
                generation=report.generation,
                outcome=report.outcome,
                accept_gap_ms=report.accept_gap_ms,
                connections=report.connections,
            )
            self._tell_subscribers(report)
        self._forget()

    def _until(self, clock: Clock) -> str:
        seconds = self._duration(Timer(clock))
        return f"{format_duration(seconds)}, until {datetime.now() + timedelta(seconds=seconds):%H:%M:%S}"

    def _tell_subscribers(self, news: Announce | Report) -> None:
        for subscriber in list(self._subscribers):
            with Containing("subscriber"):
                subscriber(news)

    def _forget(self) -> None:
        """Let go of what belongs to generations and workers that are over."""
        alive = {worker.generation for worker in self.service.workers.values()}
        wanted = alive | {self.service.generation} | self.reports.generations
        self._launches = {number: launch for number, launch in self._launches.items() if number in wanted}
        if self.service.generation and not self.reports.generations:
            self._errors.clear()

    # -- requests ------------------------------------------------------------------------------------------

    @contextmanager
    def subscribed(self, subscriber: Callable[[Announce | Report], None]) -> Iterator[None]:
        """Have `subscriber` called with all news and reports."""
        self._subscribers.append(subscriber)
        try:
            yield
        finally:
            self._subscribers.remove(subscriber)

    def replace_status_port(self, port: StatusPort) -> None:
        """Have another listener of the same address; wakes those who wait for a step, and closes the one before."""
        before, self.status_port = self.status_port, port
        if before is not None:
            before.listener.close()
        self._stepped.set()
        self._stepped = anyio.Event()

    async def wait_stepped(self) -> None:
        """Return after the next step of the model, or when the status port was replaced."""
        await self._stepped.wait()

    async def ask(self, asked: Asked, make: Callable[[int], inputs.Input]) -> None:
        """Put a request to the model and wait for its answer; raise RestartError if it is refused."""
        if self.is_succeeded or self.is_departing:
            self.owned.discard(asked.plan)
            raise RestartError(
                "HP410",
                f"{self.name} does not take this request now",
                cause=f"another supervisor is taking over; generation {self.service.generation} serves",
                fix=f"hotport status {self.name}",
                note="try again when that has ended",
                serving=self.service.generation,
            )
        self._requests += 1
        self._asked[self._requests] = asked
        self.input(make(self._requests))
        await asked.is_answered.wait()
        if asked.error is not None:
            self.owned.discard(asked.plan)
            raise asked.error
        if asked.refusal is not None:
            self.owned.discard(asked.plan)
            raise self.refused(asked.refusal, asked.generation)

    def _watch_health(self, restart: Restart) -> None:
        """Look at the new workers of a restart until it leaves its step."""

        def workers() -> list[Process]:
            now = self.service.restart
            if now is None or (now.generation, now.step, now.new) != (restart.generation, restart.step, restart.new):
                return []
            return [self.processes[number] for number in sorted(now.new) if number in self.processes]

        def tell(why: str, worker: int) -> None:
            self.input(inputs.Unhealthy(restart.generation, why, worker))

        self.start("health", watch_health, workers, self.options, tell)

    def refused(self, refusal: effects.Refusal, generation: int = 0) -> RestartError:
        """The error for a request that is not carried out."""
        last = self.reports.last_in_words() if refusal is effects.Refusal.NOTHING_TO_UNDO else ""
        number = f" (generation {generation})" if generation else ""
        fix, note = _advice(self.name, refusal)
        return RestartError(
            "HP410",
            f"{self.name} does not take this request now",
            cause=f"{refusal.value}{number}{last}; generation {self.service.generation} serves",
            fix=fix,
            note=note,
            serving=self.service.generation,
        )

    def watched_for_s(self) -> float:
        """Seconds left of a bake or an undo window; 0 outside of one."""
        return max(self._timers.left_s(Timer(clock)) or 0.0 for clock in (Clock.BAKE, Clock.WATCH))

    def _answer(self, answer: effects.Accept | effects.Refuse) -> None:
        asked = self._asked.pop(answer.request)
        asked.generation = answer.generation
        if isinstance(answer, effects.Refuse):
            asked.refusal = answer.why
        elif asked.launch is not None:
            self.owned.add(answer.generation, asked.plan)
            self._launches[answer.generation] = asked.launch
            self.options = asked.launch.options  # before the first of its timers starts
        asked.is_answered.set()


def _advice(name: str, refusal: effects.Refusal) -> tuple[str, str]:
    """Return the fix and the note of a refused request."""
    match refusal:
        case effects.Refusal.WATCHED:
            return f"hotport undo {name}", f"to keep the new generation instead: hotport undo --keep {name}"
        case effects.Refusal.NOTHING_TO_UNDO:
            return f"hotport restart {name}", "deploy the old code first; next time use --undo-window 30s"
        case _:
            return f"hotport status {name}", ""
