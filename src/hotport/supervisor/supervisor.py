"""The supervisor: carries out what `hotport.model.service` decides, and tells it what has happened.

One task takes inputs from one queue, steps the model and carries out the effects, in order. Everything else
(a worker's end, its words, a signal, a command, a timer) only puts an input into that queue; so the supervisor is
never busy with a restart, it is only ever between two steps of one.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import anyio
import anyio.abc

from hotport import __version__
from hotport.address import listener_name, parse_address
from hotport.errors import ExitCode, HotportError, RestartError, StartError
from hotport.kernel.notify import notify, receive_notification
from hotport.kernel.process import rss_bytes
from hotport.kernel.procfs import queue_overflows
from hotport.kernel.spawn import spawn
from hotport.model import service as model
from hotport.model.lifecycle import Event, Phase
from hotport.model.service import Announce, Clock, Exited, News, Said, Service, Timer
from hotport.observe.logs import get_logger
from hotport.options import Options
from hotport.supervisor.launch import Launch, Surroundings
from hotport.supervisor.process import Process
from hotport.supervisor.reports import RestartRecord
from hotport.wire.messages import (
    Accepting,
    AcceptOrder,
    Drained,
    DrainOrder,
    Expired,
    Inspection,
    Quiesced,
    QuiesceOrder,
    Report,
    Status,
    Word,
    WorkerStatus,
)
from hotport.wire.sdnotify import Notification, encode_notification

__all__ = ["Supervisor"]

#: Bounds the answer to an order that a worker can carry out at once.
ANSWER_TIMEOUT_S: Final = 5.0
INSPECT_TIMEOUT_S: Final = 0.5

#: So long without losing a worker, and the next loss counts as the first again.
STABLE_S: Final = 10.0


class _Asked:
    """A request on its way through the model, and its answer."""

    def __init__(self, launch: Launch | None = None) -> None:
        self.launch = launch
        self.is_answered = anyio.Event()
        self.generation = 0
        self.refusal: model.Refusal | None = None


class Supervisor:
    """One service, from its listeners to its end.

    Args:
        name: The service's name.
        directory: Its runtime directory, private, existing.
        listeners: Bound listeners by canonical address; owned from here on.
        notify_socket: Bound in `directory`; owned from here on.
        read_options: Reads the options again for each restart, from a directory; may raise ConfigError.
        own_notify_path: The service manager's ``NOTIFY_SOCKET``, if this supervisor is itself supervised.
    """

    def __init__(
        self,
        name: str,
        directory: str,
        options: Options,
        listeners: Mapping[str, socket.socket],
        notify_socket: socket.socket,
        surroundings: Surroundings,
        *,
        read_options: Callable[[Path], Options],
        own_notify_path: str | None = None,
    ) -> None:
        self.name = name
        self.directory = directory
        self.options = options
        self.listeners = listeners
        self.service = Service(wanted=options.workers)
        self.processes: dict[int, Process] = {}
        self.last_restart: Report | None = None
        self.exit_code: int = ExitCode.DONE
        self.failure: HotportError | str | None = None
        self._names = [listener_name(parse_address(address)) for address in listeners]
        self._notify_socket = notify_socket
        self._surroundings = surroundings
        self._read_options = read_options
        self._own_notify_path = own_notify_path
        self._launches: dict[int, Launch] = {}
        self._records: dict[int, RestartRecord] = {}
        self._errors: dict[int, str] = {}
        self._requests = 0
        self._asked: dict[int, _Asked] = {}
        self._subscribers: list[Callable[[Announce | Report], None]] = []
        self._stepped = anyio.Event()
        self._has_cut = False
        self.finished = anyio.Event()
        self._timers: dict[Timer, anyio.CancelScope] = {}
        self._put, self._inputs = anyio.create_memory_object_stream[model.Input](math.inf)
        self._log = get_logger("hotport.supervisor")
        self._started_at = time.monotonic()
        self._tasks: anyio.abc.TaskGroup

    # -- life ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Boot, serve, and return when the last worker is gone; then look at `exit_code` and `failure`.

        Raises:
            StartError: The surroundings of the first generation are not there (HP401, HP402).
        """
        self._launches[1] = Launch.resolve(self.options, self._surroundings)
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._receive_notifications)
            self._put.send_nowait(model.Boot())
            async for event in self._inputs:
                self.service, effects = model.step(self.service, event)
                is_finished = False
                for effect in effects:
                    is_finished = self._carry_out(effect) or is_finished
                self._stepped.set()
                self._stepped = anyio.Event()
                if is_finished:
                    break
            self._tasks.cancel_scope.cancel()
        self.finished.set()

    def close(self) -> None:
        """Close what `run` was given; unlinking paths is the caller's affair."""
        self._notify_socket.close()
        for listener in self.listeners.values():
            listener.close()

    def input(self, event: model.Input) -> None:
        """Put an input at the end of the queue."""
        self._put.send_nowait(event)

    # -- effects -------------------------------------------------------------------------------------------

    def _carry_out(self, effect: model.Effect) -> bool:
        """Carry out one effect; True if it was the last."""
        match effect:
            case model.Spawn():
                self._spawn(effect.worker, effect.generation)
            case model.Open(worker):
                self._order(worker, AcceptOrder(), Event.ACCEPTING)
            case model.Quiesce(worker):
                self._order(worker, QuiesceOrder(), Event.QUIESCED)
            case model.Drain(worker, is_last):
                self._drain(worker, is_last)
            case model.Terminate(worker):
                if process := self.processes.get(worker):
                    process.signal(signal.SIGTERM)
            case model.Kill(worker):
                if process := self.processes.get(worker):
                    process.kill()
            case model.StartTimer(timer, seconds):
                self._start_timer(timer, self._duration(timer.clock) if seconds is None else seconds)
            case model.StopTimer(timer):
                self._stop_timer(timer)
            case model.CloseListeners():
                self._tell_manager(stopping=True)
                for listener in self.listeners.values():
                    listener.close()
            case model.Accept() | model.Refuse():
                self._answer(effect)
            case Announce():
                self._publish(effect)
            case model.Finish(has_failed):
                self._finish(has_failed)
                return True
        return False

    def _spawn(self, worker: int, generation: int) -> None:
        launch = self._launches[generation]
        try:
            child = spawn(
                launch.argv(self.name, generation, worker),
                environment=launch.worker_environment(self.name, self.directory, generation, worker),
                cwd=launch.directory,
                listeners=[listener.fileno() for listener in self.listeners.values()],
                listen_names=self._names,
            )
        except HotportError as error:
            self._errors[worker] = str(error)
            self.input(Exited(worker, "could not be executed"))
            return
        path = os.path.join(self.directory, f"worker-{generation}.{worker}.sock")
        is_foreign = bool(launch.options.command)
        process = Process(worker, generation, child, path, is_foreign=is_foreign)
        self.processes[worker] = process
        self._log.info("worker.spawned", worker=worker, generation=generation, worker_pid=child.pid)
        self._tasks.start_soon(self._watch, process)
        if is_foreign and launch.options.ready == "exec":
            self.input(Said(worker, Event.READY))

    async def _watch(self, process: Process) -> None:
        why = await process.wait_ended(self._read_notifications)
        del self.processes[process.worker]
        if process.error:
            self._errors[process.worker] = process.error
        self.input(Exited(process.worker, why))

    def _order(self, worker: int, order: AcceptOrder | QuiesceOrder, answer: Event) -> None:
        process = self.processes.get(worker)
        if process is None:
            return  # its Exited is on the way
        if process.is_foreign:  # accepts from its start until it leaves, and cannot be told otherwise
            self._note_time(worker, answer, time.monotonic())
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
            process.order(DrainOrder(timeout_s=self.options.drain_timeout_s, is_last=is_last))

    def _finish(self, has_failed: bool) -> None:
        if has_failed:
            self.exit_code = ExitCode.NOT_STARTED
            words = next((text for text in self._errors.values() if text), None)
            self.failure = words or StartError(
                "HP403",
                f"the service {self.name} did not start",
                cause="no worker said READY=1; what they wrote is above",
                fix="hotport serve --log-level debug, or raise --ready-timeout",
            )
        elif self._has_cut:
            self.exit_code = ExitCode.CUT

    # -- timers --------------------------------------------------------------------------------------------

    def _duration(self, clock: Clock) -> float:
        options = self.options
        match clock:
            case Clock.READY:
                return options.ready_timeout_s
            case Clock.DRAIN:  # the worker keeps its own deadline; this is for one that cannot
                return options.drain_timeout_s + options.kill_timeout_s + ANSWER_TIMEOUT_S
            case Clock.KILL:
                return options.kill_timeout_s
            case Clock.SETTLE:
                return options.settle_s
            case Clock.STABLE:
                return STABLE_S
            case _:
                return ANSWER_TIMEOUT_S

    def _start_timer(self, timer: Timer, seconds: float) -> None:
        self._stop_timer(timer)
        scope = self._timers[timer] = anyio.CancelScope()
        self._tasks.start_soon(self._run_timer, timer, seconds, scope)

    def _stop_timer(self, timer: Timer) -> None:
        scope = self._timers.pop(timer, None)
        if scope is not None:
            scope.cancel()

    async def _run_timer(self, timer: Timer, seconds: float, scope: anyio.CancelScope) -> None:
        with scope:
            await anyio.sleep(seconds)
            if self._timers.get(timer) is scope:  # not replaced in the moment in which it ended
                del self._timers[timer]
                self.input(model.Elapsed(timer))

    # -- what workers say ----------------------------------------------------------------------------------

    async def _receive_notifications(self) -> None:
        while True:
            await anyio.wait_readable(self._notify_socket)
            self._read_notifications()

    def _read_notifications(self) -> None:
        while (received := receive_notification(self._notify_socket)) is not None:
            pid, _, payload = received
            process = self._process_of(pid)
            if process is not None:
                self._hear_notification(process, Notification.parse(payload))

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
            self.input(model.MoreTime(process.worker, said.extend_timeout_s))
        if said.ready:
            if not process.is_foreign:
                self._tasks.start_soon(process.converse, self._hear_word)
            self.input(Said(process.worker, Event.READY))
        if said.stopping:
            self.input(Said(process.worker, Event.LEAVING))

    def _hear_word(self, worker: int, word: Word) -> None:
        match word:
            case Accepting(at_s=at_s):
                self._note_time(worker, Event.ACCEPTING, at_s)
                self.input(Said(worker, Event.ACCEPTING))
            case Quiesced(at_s=at_s):
                self._note_time(worker, Event.QUIESCED, at_s)
                self.input(Said(worker, Event.QUIESCED))
            case Expired(why=why):
                self._log.info("worker.expired", worker=worker, why=why)
                self.input(model.Expired(worker))
            case Drained(fates=fates):
                if self.service.stopping is not model.Stopping.NO:
                    self._has_cut = self._has_cut or any(fate.startswith("cut_") for fate in fates)
                for record in self._records.values():
                    record.drained(worker, fates)
            case _:
                pass

    def _note_time(self, worker: int, event: Event, at_s: float) -> None:
        restart = self.service.restart
        if restart is None or (record := self._records.get(restart.generation)) is None:
            return
        if event is Event.ACCEPTING and worker in restart.new:
            record.accepting_at.setdefault(worker, at_s)
        elif event is Event.QUIESCED and worker in restart.old:
            record.quiesced_at[worker] = at_s

    # -- news ----------------------------------------------------------------------------------------------

    def _publish(self, announcement: Announce) -> None:
        news = announcement.news
        shown = {
            key: value
            for key, value in (
                ("generation", announcement.generation),
                ("worker", announcement.worker),
                ("why", announcement.why),
            )
            if value
        }
        if news in (News.ABORTED, News.WORKER_LOST) and (error := self._errors.get(announcement.worker)):
            shown["error"] = error
        is_bad = news in (News.ABORTED, News.WORKER_LOST, News.BACKING_OFF)
        if self.service.generation or not is_bad:  # a failure to boot is told once, at the end
            (self._log.warning if is_bad else self._log.info)(news.value, **shown)
        if news is News.STARTED:
            self._tell_manager(ready=True, status=f"generation {announcement.generation} serves")
        elif news is News.RESTART_BEGAN:
            self._records[announcement.generation] = RestartRecord(
                self.name,
                announcement.generation,
                self.service.restart.previous if self.service.restart else 0,
                is_phased=bool(self.service.restart and self.service.restart.is_phased),
                overflows=queue_overflows,
            )
        for subscriber in list(self._subscribers):
            subscriber(announcement)
        self._tell_records(announcement)

    def _tell_records(self, announcement: Announce) -> None:
        is_tracked = not self.options.command
        for record in list(self._records.values()):
            record.hear(announcement, is_tracked=is_tracked)
            if record.is_over:
                del self._records[record.generation]
                report = record.report(serving=self.service.generation, errors=self._errors)
                self.last_restart = report
                self._log.info(
                    "restart.report",
                    generation=report.generation,
                    outcome=report.outcome,
                    accept_gap_ms=report.accept_gap_ms,
                    connections=report.connections,
                )
                for subscriber in list(self._subscribers):
                    subscriber(report)
        alive = {worker.generation for worker in self.service.workers.values()}
        wanted = alive | {self.service.generation} | set(self._records)
        for generation in [g for g in self._launches if g not in wanted]:
            del self._launches[generation]
        if not self._records:
            self._errors = {w: text for w, text in self._errors.items() if not self.service.generation}

    def _tell_manager(self, **said: object) -> None:
        if self._own_notify_path is not None:
            notify(self._own_notify_path, encode_notification(**said))  # type: ignore[arg-type]

    # -- requests ------------------------------------------------------------------------------------------

    async def restart(
        self,
        *,
        is_phased: bool | None = None,
        hear: Callable[[Announce, float], None] = lambda news, ms: None,
    ) -> Report:
        """Restart and wait until the outcome is known and the losers are gone.

        Args:
            is_phased: Replace workers one by one; None leaves it to the options.
            hear: Called with each piece of news about it, and the milliseconds since it began.

        Raises:
            RestartError: It was refused: another one is in progress, or the service is starting or stopping
                (HP410), or the listeners would change (HP411).
            StartError: The new surroundings are not there; nothing was begun.
            ConfigError: The options cannot be read again; nothing was begun.
        """
        before, options = self.options, self._reread_options()
        asked = _Asked(Launch.resolve(options, self._surroundings))
        done = anyio.Event()
        result: list[Report] = []

        def listen(news: Announce | Report) -> None:
            if news.generation != asked.generation:
                return
            if isinstance(news, Report):
                result.append(news)
                done.set()
            elif (record := self._records.get(asked.generation)) is not None:
                hear(news, record.elapsed_ms())

        wanted = options.workers if options.workers != before.workers else None
        phased = options.phased if is_phased is None else is_phased
        self._subscribers.append(listen)
        try:
            await self._ask(asked, lambda n: model.RequestRestart(n, phased, wanted))
            self.options = options
            await done.wait()
        finally:
            self._subscribers.remove(listen)
        if result[0].outcome == "aborted":
            self.options = before
        return result[0]

    def _reread_options(self) -> Options:
        options = self._read_options(Path(self._surroundings.directory))
        if options.bind != self.options.bind:
            raise RestartError(
                "HP411",
                f"cannot restart {self.name} with other addresses",
                cause=f"it listens on {', '.join(self.options.bind)}; the options now say {', '.join(options.bind)}",
                fix=f"hotport stop {self.name}, then serve again",
                phase="refused",
                serving=self.service.generation,
            )
        return options

    async def scale(self, wanted: int) -> None:
        """Run `wanted` workers, and wait until they serve or one of them cannot.

        Raises:
            RestartError: Refused (HP410), or a worker was lost meanwhile (HP412).
        """
        failures = self.service.failures
        await self._ask(_Asked(), lambda n: model.RequestScale(n, wanted))
        while True:
            service = self.service
            serving = [w for w in service.current if w.phase is Phase.SERVING]
            if len(serving) == len(service.current) == wanted or service.wanted != wanted:
                return
            if service.failures > failures:
                raise RestartError(
                    "HP412",
                    f"cannot run {wanted} workers of {self.name} yet",
                    cause="a worker failed; it is tried again with increasing pauses",
                    fix=f"hotport status {self.name}, and look at the log",
                    phase="scaling",
                    serving=service.generation,
                )
            await self._stepped.wait()

    async def _ask(self, asked: _Asked, make: Callable[[int], model.Input]) -> None:
        """Put a request to the model and wait for its answer; raise RestartError if it is refused."""
        self._requests += 1
        self._asked[self._requests] = asked
        self.input(make(self._requests))
        await asked.is_answered.wait()
        if asked.refusal is not None:
            number = f" (generation {asked.generation})" if asked.generation else ""
            raise RestartError(
                "HP410",
                f"{self.name} does not take this request now",
                cause=f"{asked.refusal.value}{number}; generation {self.service.generation} serves",
                fix=f"hotport status {self.name}",
                phase="refused",
                serving=self.service.generation,
            )

    def _answer(self, answer: model.Accept | model.Refuse) -> None:
        asked = self._asked.pop(answer.request)
        asked.generation = answer.generation
        if isinstance(answer, model.Refuse):
            asked.refusal = answer.why
        elif asked.launch is not None:
            self._launches[answer.generation] = asked.launch
        asked.is_answered.set()

    async def status(self) -> Status:
        """The service as it is; workers that do not answer within half a second are shown without figures."""
        found: dict[int, Inspection | None] = {}

        async def inspect(process: Process) -> None:
            found[process.worker] = await process.inspect(INSPECT_TIMEOUT_S)

        async with anyio.create_task_group() as tasks:
            for each in self.processes.values():
                tasks.start_soon(inspect, each)
        service = self.service
        now = time.monotonic()
        workers = []
        for worker in service.workers.values():
            if (process := self.processes.get(worker.id)) is None:
                continue
            seen = found.get(worker.id)
            workers.append(
                WorkerStatus(
                    worker=worker.id,
                    generation=worker.generation,
                    pid=process.pid,
                    phase=worker.phase.value,
                    age_s=round(now - process.started_at, 3),
                    status=process.status,
                    connections=seen.connections if seen else None,
                    accepted=seen.accepted if seen else None,
                    requests=seen.requests if seen else None,
                    rss_bytes=seen.rss_bytes if seen else rss_bytes(process.pid),
                )
            )
        return Status(
            service=self.name,
            pid=os.getpid(),
            version=__version__,
            generation=service.generation,
            wanted=service.wanted,
            restarting=service.restart.generation if service.restart else 0,
            addresses=tuple(self.listeners),
            target=self.options.target or " ".join(self.options.command),
            age_s=round(now - self._started_at, 3),
            rss_bytes=rss_bytes(os.getpid()),
            workers=tuple(workers),
            last_restart=self.last_restart,
        )
