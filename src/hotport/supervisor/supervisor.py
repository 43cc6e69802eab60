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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

import anyio
import anyio.abc

from hotport.address import listener_name, parse_address
from hotport.errors import ExitCode, HotportError, RestartError, StartError
from hotport.kernel.notify import notify, receive_notification
from hotport.kernel.procfs import queue_overflows
from hotport.kernel.spawn import spawn
from hotport.model import service as model
from hotport.model.lifecycle import Event, Phase
from hotport.model.service import Announce, Clock, Exited, News, Said, Service
from hotport.observe.logs import get_logger
from hotport.options import Options, format_duration
from hotport.supervisor.health import watch_health
from hotport.supervisor.launch import Launch, Surroundings
from hotport.supervisor.process import Process
from hotport.supervisor.reports import Reports
from hotport.supervisor.timers import Timers
from hotport.wire.messages import (
    Accepting,
    AcceptOrder,
    Drained,
    DrainOrder,
    Expired,
    Quiesced,
    QuiesceOrder,
    Report,
    SuccessorsOrder,
    TlsReloaded,
    Word,
)
from hotport.wire.sdnotify import Notification, encode_notification

__all__ = ["Supervisor"]

#: Bounds the answer to an order that a worker can carry out at once.
ANSWER_TIMEOUT_S: Final = 5.0

#: So long without losing a worker, and the next loss counts as the first again.
STABLE_S: Final = 10.0


class Asked:
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
        self.reports = Reports(name, overflows=queue_overflows)
        self.exit_code: int = ExitCode.DONE
        self.failure: HotportError | str | None = None
        self._names = [listener_name(parse_address(address)) for address in listeners]
        self._notify_socket = notify_socket
        self.surroundings = surroundings
        self.read_options = read_options
        self._own_notify_path = own_notify_path
        self._launches: dict[int, Launch] = {}
        self._errors: dict[int, str] = {}
        self._loss = ""
        self._requests = 0
        self._asked: dict[int, Asked] = {}
        self._subscribers: list[Callable[[Announce | Report], None]] = []
        self._stepped = anyio.Event()
        self._has_cut = False
        self.finished = anyio.Event()
        self._put, self._inputs = anyio.create_memory_object_stream[model.Input](math.inf)
        self._log = get_logger("hotport.supervisor")
        self.started_at = time.monotonic()
        self._tasks: anyio.abc.TaskGroup
        self._timers: Timers

    # -- life ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Boot, serve, and return when the last worker is gone; then look at `exit_code` and `failure`."""
        try:
            self._launches[1] = Launch.resolve(self.options, self.surroundings)
        except StartError as error:  # raised from here, task groups would wrap it
            self.failure, self.exit_code = error, error.exit_code
            self.finished.set()
            return
        async with anyio.create_task_group() as self._tasks:
            self._timers = Timers(self._tasks, lambda timer: self.input(model.Elapsed(timer)))
            self._tasks.start_soon(self._receive_notifications)
            self._put.send_nowait(model.Boot())
            async for event in self._inputs:
                self.service, effects = model.step(self.service, event)
                is_finished = False
                for effect in effects:
                    is_finished = self._carry_out(effect) or is_finished
                self._redirect()
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
                if process := self.processes.get(worker):
                    process.successors = ()  # whatever it handed over, it stops
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
                    # It may have had connections, and cannot tell any more.
                    self._has_cut = self._has_cut or (self.service.is_stopping and process.is_talking)
                    process.kill()
            case model.StartTimer(timer, seconds):
                self._timers.start(timer, self._duration(timer.clock) if seconds is None else seconds)
            case model.ExtendTimer(timer, seconds):
                self._timers.extend(timer, seconds)
            case model.StopTimer(timer):
                self._timers.stop(timer)
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
        except (HotportError, OSError, ValueError) as error:
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
            process.successors = () if is_last else self._successors(worker)
            process.order(
                DrainOrder(timeout_s=self.options.drain_timeout_s, is_last=is_last, successors=process.successors)
            )

    def _successors(self, leaving: int) -> tuple[str, ...]:
        """Control sockets of those that can go on with a worker's connections: the newest generation that serves."""
        if self.service.is_stopping:
            return ()
        serving = [self.service.workers[number] for number in self.service.ids(Phase.SERVING) if number != leaving]
        newest = max((worker.generation for worker in serving), default=0)
        processes = [self.processes.get(worker.id) for worker in serving if worker.generation == newest]
        return tuple(process.control_path for process in processes if process is not None and process.is_talking)

    def _redirect(self) -> None:
        """Tell workers that drain, or may be taken back, who can go on with their connections, if that has changed."""
        restart = self.service.restart
        is_watching = restart is not None and restart.step is model.Step.WATCHING
        for number in self.service.ids(Phase.DRAINING, *((Phase.QUIESCED,) if is_watching else ())):
            process = self.processes.get(number)
            if process is None or process.is_foreign or not process.is_talking:
                continue
            successors = self._successors(number)
            if successors and successors != process.successors:
                process.successors = successors
                process.order(SuccessorsOrder(successors=successors))

    def _finish(self, has_failed: bool) -> None:
        if has_failed:
            self.exit_code = ExitCode.NOT_STARTED
            words = next((text for text in self._errors.values() if text), None)
            self.failure = words or StartError(
                "HP403",
                f"the service {self.name} did not start",
                cause=self._loss or "no worker said READY=1",
                fix="hotport serve --log-level debug, or raise --ready-timeout",
            )
        elif self._has_cut:
            self.exit_code = ExitCode.CUT

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
            case Clock.BAKE:
                return options.bake_s
            case Clock.WATCH:
                return options.undo_window_s
            case _:
                return ANSWER_TIMEOUT_S

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
            if not process.is_foreign and not process.is_talking:
                self._tasks.start_soon(process.converse, self._hear_word)
            self.input(Said(process.worker, Event.READY))
        if said.stopping:
            self.input(Said(process.worker, Event.LEAVING))

    def _hear_word(self, worker: int, word: Word) -> None:
        match word:
            case Accepting(at_s=at_s, fates=fates):
                self.reports.taken_back(self.service.restart, worker, fates)
                self.reports.note(self.service.restart, worker, Event.ACCEPTING, at_s)
                self.input(Said(worker, Event.ACCEPTING))
            case Quiesced(at_s=at_s):
                self.reports.note(self.service.restart, worker, Event.QUIESCED, at_s)
                self.input(Said(worker, Event.QUIESCED))
            case Expired():
                self.input(model.Expired(worker))
            case Drained(fates=fates):
                if self.service.is_stopping:
                    self._has_cut = self._has_cut or any(fate.startswith("cut_") for fate in fates)
                self.reports.drained(worker, fates)
            case TlsReloaded(error=error) if error:  # nobody waits: it was told while it started
                self._log.warning("tls.kept", worker=worker, error=error)
            case _:
                pass

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
                bound if is_stuck else "what it wrote is above"
            )
            if error := self._errors.get(announcement.worker):
                shown["exception"] = error  # the key under which renderers keep lines apart
        is_bad = news in (News.ABORTED, News.WORKER_LOST, News.BACKING_OFF, News.UNDOING, News.UNDONE)
        # A failure to boot is told once, at the end; but one that hangs may be a while in coming to it.
        if self.service.generation or not is_bad or is_stuck:
            (self._log.warning if is_bad else self._log.info)(news.value, **shown)
        if news is News.STARTED:
            self._tell_manager(ready=True, status=f"generation {announcement.generation} serves")
        elif news in (News.ABORTED, News.UNDONE):
            self.options = self._launches[self.service.generation].options
        elif news is News.DONE:
            self._tell_manager(status=f"generation {announcement.generation} serves")
        elif news is News.RESTART_BEGAN and self.service.restart is not None:
            is_tracked = not self.options.command
            self.reports.begin(self.service.restart, self.service.generation, is_tracked=is_tracked)
        elif news in (News.BAKING, News.WATCHING) and self.service.restart is not None:
            self._tasks.start_soon(watch_health, self, announcement.generation, self.service.restart.step)
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
        seconds = self._duration(clock)
        return f"{format_duration(seconds)}, until {datetime.now() + timedelta(seconds=seconds):%H:%M:%S}"

    def _tell_subscribers(self, news: Announce | Report) -> None:
        for subscriber in list(self._subscribers):
            subscriber(news)

    def _forget(self) -> None:
        """Let go of what belongs to generations and workers that are over."""
        alive = {worker.generation for worker in self.service.workers.values()}
        wanted = alive | {self.service.generation} | self.reports.generations
        self._launches = {number: launch for number, launch in self._launches.items() if number in wanted}
        if self.service.generation and not self.reports.generations:
            self._errors.clear()

    def _tell_manager(self, *, ready: bool = False, stopping: bool = False, status: str | None = None) -> None:
        """Notify the service manager; only READY=1 is worth waiting for one that does not read."""
        if self._own_notify_path is not None:
            said = encode_notification(ready=ready, stopping=stopping, status=status)
            notify(self._own_notify_path, said, timeout_s=1.0 if ready else 0.0)

    # -- requests ------------------------------------------------------------------------------------------

    @contextmanager
    def subscribed(self, subscriber: Callable[[Announce | Report], None]) -> Iterator[None]:
        """Have `subscriber` called with all news and reports."""
        self._subscribers.append(subscriber)
        try:
            yield
        finally:
            self._subscribers.remove(subscriber)

    async def wait_stepped(self) -> None:
        """Return after the next step of the model."""
        await self._stepped.wait()

    async def ask(self, asked: Asked, make: Callable[[int], model.Input]) -> None:
        """Put a request to the model and wait for its answer; raise RestartError if it is refused."""
        self._requests += 1
        self._asked[self._requests] = asked
        self.input(make(self._requests))
        await asked.is_answered.wait()
        if asked.refusal is not None:
            number = f" (generation {asked.generation})" if asked.generation else ""
            last = self.reports.last_in_words() if asked.refusal is model.Refusal.NOTHING_TO_UNDO else ""
            raise RestartError(
                "HP410",
                f"{self.name} does not take this request now",
                cause=f"{asked.refusal.value}{number}{last}; generation {self.service.generation} serves",
                fix=_fix(self.name, asked.refusal),
                phase="refused",
                serving=self.service.generation,
            )

    def watched_for_s(self) -> float:
        """Seconds left of a bake or an undo window; 0 outside of one."""
        return max(self._timers.left_s(model.Timer(clock)) for clock in (Clock.BAKE, Clock.WATCH))

    def _answer(self, answer: model.Accept | model.Refuse) -> None:
        asked = self._asked.pop(answer.request)
        asked.generation = answer.generation
        if isinstance(answer, model.Refuse):
            asked.refusal = answer.why
        elif asked.launch is not None:
            self._launches[answer.generation] = asked.launch
            self.options = asked.launch.options  # before the first of its timers starts
        asked.is_answered.set()


def _fix(name: str, refusal: model.Refusal) -> str:
    """What somebody can do whose request was refused."""
    match refusal:
        case model.Refusal.WATCHED:
            return f"hotport undo {name}, or hotport undo --keep {name}"
        case model.Refusal.NOTHING_TO_UNDO:
            return f"deploy the old code and hotport restart {name}; next time with --undo-window 30s"
        case _:
            return f"hotport status {name}"
