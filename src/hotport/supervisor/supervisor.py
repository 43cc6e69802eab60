"""The supervisor's loop: give inputs to `hotport.model.rules` and carry out the effects.

One task takes inputs from one queue, steps the model and carries out the effects, in order. Everything else (a worker's
end, its messages, a signal, a command, a timer) only puts an input into that queue; so a restart never blocks the
supervisor, which is always between two steps. `fleet.py` has the worker processes, `news.py` publishes news.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import replace as replace_field
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVarTuple

import anyio
import anyio.abc
import anyio.lowlevel
from msgspec.structs import replace

from hotport.errors import ConfigError, ExitCode, HotportError, RestartError, StartError
from hotport.kernel.process import is_stopped
from hotport.kernel.users import Identity
from hotport.model import effects, inputs, rules
from hotport.model.effects import Announce, News
from hotport.model.inputs import Clock, Timer
from hotport.model.service import Restart, Service
from hotport.observe.logs import get_logger, set_level
from hotport.options import Options
from hotport.options.definition import LogLevel
from hotport.supervisor.appmetrics import AppMetrics
from hotport.supervisor.contain import Containing, contained, retried
from hotport.supervisor.counters import Counters
from hotport.supervisor.fleet import Fleet
from hotport.supervisor.hangs import Hangs
from hotport.supervisor.health import watch_health
from hotport.supervisor.history import History
from hotport.supervisor.hooks import Hooks
from hotport.supervisor.launch import Launch, Surroundings
from hotport.supervisor.listeners import Listener, Listeners
from hotport.supervisor.manager import ServiceManager
from hotport.supervisor.news import Publisher, until
from hotport.supervisor.process import WorkerProcess
from hotport.supervisor.recorder import Recorder
from hotport.supervisor.recovery import Found
from hotport.supervisor.rights import socket_access
from hotport.supervisor.timers import Timers
from hotport.wire.messages import TakenOver, parse_worker_path

__all__ = ["StatusPort", "Supervisor"]

Arguments = TypeVarTuple("Arguments")

#: Seconds that a worker has to answer an order that it can carry out at once.
ANSWER_TIMEOUT_S: Final = 5.0

#: Seconds without losing a worker after which the next loss counts as the first.
STABLE_S: Final = 10.0


class Asked:
    """A request on its way through the model, and its answer.

    Args:
        launch: Of a restart: how to start the next generation.
        plan: Of a restart: the listeners of the next generation.

    Attributes:
        error: The unexpected error that prevented an answer.
    """

    def __init__(self, launch: Launch | None = None, plan: list[Listener] | None = None) -> None:
        self.launch = launch
        self.plan = plan or []
        self.is_answered = anyio.Event()
        self.generation = 0
        self.refusal: effects.Refusal | None = None
        self.error: Exception | None = None


class StatusPort(NamedTuple):
    """The status port: its address in the options, its bound address, its listener, and its socket file."""

    bind: str
    address: str
    listener: socket.socket
    file: tuple[int, int] | None = None


class Supervisor:
    """Runs one service, until its last worker has ended.

    Args:
        name: The service's name.
        directory: Its runtime directory, private, existing.
        notify_socket: Bound in `directory`; owned from here on.
        read_options: Reads the options again for each restart, from a directory; may raise ConfigError.
        manager: Notifies the service manager; the caller closes it.
        found: Workers of an earlier supervisor, and the listeners; these are owned from here on.
        mend: Restores missing files of the runtime directory; called before a worker is started.
        admit: Makes a place for workers of another user there; may raise HotportError.

    Attributes:
        is_departing: Whether it ends without its workers: this process becomes their next supervisor.
        has_departed: Whether it takes no more inputs; until then, a request to stop the service cancels the departure.
        begun: Set when the first worker was started, or those of an earlier supervisor are adopted.
        is_succeeded: Whether another process has the listeners, and the paths in `directory`.
        awaits_child: Whether a child runs that is neither a worker nor one of `hooks`.
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
        manager: ServiceManager,
        mend: Callable[[Supervisor], object] = lambda supervisor: None,
        admit: Callable[[Identity | None], object] = lambda identity: None,
    ) -> None:
        self.name = name
        self.directory = directory
        self.options = options
        self.owned = Listeners(found.listeners, self._asked_of(found), shared=found.shared)
        self.service = Service(wanted=options.workers)
        self.news = Publisher(name, manager, Recorder(directory), self.owned.dropped)
        self.counters = Counters(directory, is_on=options.status_bind is not None)
        self.news.subscribe(self.counters.hear)
        self.app_metrics = AppMetrics(directory)
        if not (found.orphans or found.shared):  # neither workers nor another supervisor
            self.app_metrics.clear()
        self.fleet = Fleet(
            name,
            directory,
            notify_socket,
            self,
            self.owned,
            self.news,
            partial(mend, self),
            pages=found.pages,
            counters=self.counters,
            app_metrics=self.app_metrics,
        )
        self.hooks = Hooks(name, self, self.news)
        self.history = History(self.fleet.processes)
        self.news.subscribe(self.history.hear)
        self._status_port: StatusPort | None = None
        self.exit_code: int = ExitCode.DONE
        self.failure: HotportError | str | None = None
        self.surroundings = surroundings
        self.read_options = read_options
        self.admit = admit
        self._found = found
        self.is_departing = self.awaits_child = False
        self.has_departed = False
        self.is_succeeded = False
        self._access_options = options  # by which socket files have their access
        self._launches: dict[int, Launch] = {}
        self._requests = 0
        self._asked: dict[int, Asked] = {}
        self._stepped = anyio.Event()
        self.begun = anyio.Event()
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
        """Boot or adopt, serve, and return when the last worker has ended; then `exit_code` and `failure` are set."""
        try:
            self._prepare_launches()
        except (StartError, ConfigError) as error:  # not raised: a task group would wrap it
            self.failure, self.exit_code = error, error.exit_code
            self.finished.set()
            return
        async with anyio.create_task_group() as self._tasks:
            self._timers = Timers(self._tasks, lambda timer: self.input(inputs.Elapsed(timer)))
            self.keep("notifications", self.fleet.receive_notifications)
            self.keep("manager", self.news.manager.run)
            if self._status_port is not None:
                self.keep("history", self.history.keep)
            self.keep("hangs", Hangs(self, self.fleet.processes, self.counters).watch)
            await retried("begin", anyio.lowlevel.checkpoint)  # signals are handled before anything is started
            self._adopt()
            await retried("inputs", self._take_inputs)
            await retried("hooks", self._finish_hooks)
            self._tasks.cancel_scope.cancel()
        self.finished.set()

    async def _finish_hooks(self) -> None:
        if self.has_departed:  # the upgrade has waited for them: this one has begun since
            self.hooks.hurry()
        await self.hooks.finish(self.options.after_restart_timeout_s + self.options.kill_timeout_s)

    def start(self, what: str, run: Callable[[*Arguments], Awaitable[None]], *args: *Arguments) -> None:
        """Start a task that ends with the supervisor; an unexpected error ends only this one."""
        self._tasks.start_soon(contained, what, run, *args)

    def keep(self, what: str, run: Callable[[*Arguments], Awaitable[None]], *args: *Arguments) -> None:
        """Start a task that ends with the supervisor; after an unexpected error it is retried."""
        self._tasks.start_soon(retried, what, run, *args)

    async def _take_inputs(self) -> None:
        """Step the model with each input, in order, until the last worker has ended or this supervisor departs."""
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
                    self.is_departing = False  # a stop was requested first
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
        fleet = self.fleet
        follows = (
            fleet.starter.start_waiting,
            fleet.redirect,
            fleet.deposit,
            fleet.close_unused,
            fleet.starter.end_unused_templates,
        )
        for follow in follows:
            with Containing("step", after=str(event)):
                follow()
        with Containing("manager"):
            self.news.manager.extend(self._timers)
        self.begun.set()
        self._stepped.set()
        self._stepped = anyio.Event()
        return any(isinstance(effect, effects.Finish) for effect in wanted)

    def _give_up(self, event: inputs.Input, error: Exception) -> None:
        """Answer a request with the error at which the model has failed; the service's state is unchanged."""
        if (asked := self._asked.pop(getattr(event, "request", 0), None)) is not None:
            asked.error = error
            asked.is_answered.set()

    def _asked_of(self, found: Found) -> dict[int, tuple[str, ...]]:
        """The addresses of each generation as its options name them."""
        asked = {each.generation: each.launch.options.bind for each in found.orphans if each.launch is not None}
        return {found.current: self.options.bind, **asked}

    def _prepare_launches(self) -> None:
        found = self._found
        for orphan in found.orphans:
            if orphan.launch is not None:
                self._launches.setdefault(orphan.generation, orphan.launch)
                with Containing("admit", worker=orphan.worker):
                    self.admit(orphan.launch.identity)
        if found.current not in self._launches:
            launch = self._launches[found.current] = Launch.resolve(self.options, self.surroundings)
            self.admit(launch.identity)
        self.options = self._access_options = self._launches[found.current].options

    def _adopt(self) -> None:
        """Start the first generation, or adopt the workers of an earlier supervisor."""
        found = self._found
        phases = {worker.id: worker.phase for worker in found.workers}
        for orphan in found.orphans:
            with Containing("worker.adopt", worker=orphan.worker):
                self.fleet.adopt(orphan, phases.get(orphan.worker))
        workers = tuple(worker for worker in found.workers if worker.id in self.fleet.processes)
        if workers:
            with Containing("recorder"):
                self.news.reports.resume(self.fleet.processes.keys(), found.generation)
        wanted = found.wanted or self.options.workers
        is_prepared = bool(self.options.before_start)
        self.input(inputs.Adopt(workers, wanted, found.generations, found.spawned, found.favoured, is_prepared))
        if workers and self.options.preload:
            with Containing("template"):
                self.fleet.starter.preload(found.current, self._launches[found.current])

    @property
    def why_busy(self) -> str:
        """What must end before another supervisor can take the service; empty if it can take it now."""
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

    def begin_hand_over(self) -> None:
        """Refuse requests until `end_hand_over`: another supervisor assigns the numbers, and has the paths."""
        self.is_succeeded = True
        self.owned.share_files(self.listeners)

    def end_hand_over(self, commit: TakenOver | None) -> None:
        """Stop the service here after a commit, since the other supervisor's workers accept; else continue."""
        self.owned.own_files()
        if commit is None:
            self.is_succeeded = False
            return
        names = filter(parse_worker_path, commit.workers)
        self.fleet.name_successors([os.path.join(self.directory, name) for name in names])
        self.owned.give_away(commit.addresses)
        self.input(inputs.RequestStop(is_succeeded=True))

    def depart(self) -> None:
        """End `run` after the queued inputs; the workers continue to serve."""
        self.is_departing = True
        self._put(None)

    def descriptors(self) -> Iterator[int]:
        """The descriptors that a forked child must not have."""
        yield from self.fleet.descriptors()
        yield from (sock.fileno() for sock in self.owned.all_sockets())
        if self._status_port is not None:
            yield self._status_port.listener.fileno()

    def close(self) -> None:
        """Close the fleet's descriptors, the listeners and the counters; the caller unlinks paths."""
        self.fleet.close()
        self.owned.close()
        has_ended = self.begun.is_set() and self.finished.is_set()
        is_last = has_ended and not (self.is_departing or self.is_succeeded)
        self.counters.close(is_last=is_last)
        if is_last:
            self.app_metrics.clear()

    def input(self, event: inputs.Input) -> None:
        """Put an input at the end of the queue."""
        if isinstance(event, inputs.RequestStop):
            self.is_departing = self.has_departed
            if event.now or self.service.is_stopping:
                self.hooks.hurry()
        self._put(event)

    def _put(self, event: inputs.Input | None) -> None:
        self._inputs.append(event)
        self._has_inputs.set()

    def stop(self, *, now: bool = False, lame_duck_s: float | None = None) -> None:
        """Request the end of the service; `lame_duck_s` None takes that time from the options."""
        seconds = self.options.lame_duck_s if lame_duck_s is None else lame_duck_s
        self.input(inputs.RequestStop(now=now, lame_duck_s=seconds))

    @property
    def lame_duck_left_s(self) -> float | None:
        """Seconds for which a lame duck continues to serve; None if the service is none."""
        return self._timers.left_s(Timer(Clock.LAME_DUCK)) if self.service.is_lame_duck else None

    # -- effects -------------------------------------------------------------------------------------------

    def _carry_out(self, effect: effects.Effect) -> None:
        match effect:
            case effects.Spawn(worker, generation):
                self.fleet.starter.spawn(worker, generation, self._launches[generation])
            case effects.Prepare(generation):
                self.hooks.prepare(generation, self._launches[generation])
            case effects.Abandon(generation, why):
                self.hooks.abandon(generation, why)
            case effects.Open(worker):
                self.fleet.open(worker)
            case effects.Quiesce(worker, empties):
                self.fleet.quiesce(worker, empties=empties)
            case effects.Release(worker):
                self.fleet.release(worker)
            case effects.Rebind(generation):
                self.fleet.rebind(generation)
            case effects.Regain():
                self.fleet.regain()
            case effects.Share(worker):
                self.fleet.share(worker)
            case effects.Steer(generation) | effects.Unsteer(generation):
                self.fleet.steer(generation, 1 if isinstance(effect, effects.Steer) else 0)
            case effects.Drain(worker, is_last):
                self.fleet.drain(worker, is_last=is_last)
            case effects.Terminate(worker, is_hurried):
                self.fleet.terminate(worker, is_hurried=is_hurried)
            case effects.Kill(worker):
                self.fleet.kill(worker)
            case effects.StartTimer(timer, seconds):
                self._timers.start(timer, self._duration(timer) if seconds is None else seconds)
            case effects.ExtendTimer(timer, seconds):
                self._timers.extend(timer, seconds)
            case effects.StopTimer(timer):
                self._timers.stop(timer)
            case effects.CloseListeners():
                self.owned.give_away([each for each in self.listeners if self.news.manager.keeps(each)])
                self.owned.close()
            case effects.Accept() | effects.Refuse():
                self._answer(effect)
            case Announce():
                self._publish(effect)
            case effects.Finish(has_failed):
                self._finish(has_failed)

    def _finish(self, has_failed: bool) -> None:
        if has_failed:
            self.exit_code, self.failure = ExitCode.NOT_STARTED, self.news.not_started()
        elif self.fleet.has_cut:
            self.exit_code = ExitCode.CUT

    def _duration(self, timer: Timer) -> float:
        options = self.options
        match timer.clock:
            case Clock.PREPARE:
                return options.before_start_timeout_s
            case Clock.READY:
                return options.ready_timeout_s
            case Clock.DRAIN if self._is_stopped(timer.worker):
                return ANSWER_TIMEOUT_S
            case Clock.DRAIN:  # beyond the worker's own deadline, for one that hangs
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
        """Whether a worker is suspended by a signal, and finishes nothing until it is continued; log it."""
        process = self.fleet.processes.get(worker)
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

    # -- news ----------------------------------------------------------------------------------------------

    def _publish(self, announcement: Announce) -> None:
        restart, generation = self.service.restart, self.service.generation
        match announcement.news:
            case News.BAKING | News.WATCHING as news:
                clock = Clock.BAKE if news is News.BAKING else Clock.WATCH
                announcement = replace(announcement, why=until(self._duration(Timer(clock))))
                if restart is not None:
                    self._watch_health(restart)
            case News.ABORTED | News.UNDONE:
                self.options = self._launches[generation].options
                self._follow_options()
            case News.COMMITTED:
                self._follow_options()
            case _:
                pass
        worker, late = announcement.worker, announcement.clock
        ended = self.news.publish(
            announcement,
            self.service,
            self.options,
            self.listeners,
            is_running=worker in self.fleet.processes,
            bound_s=self._duration(Timer(late, worker)) if late is not None else 0.0,
        )
        for report in ended:
            if launch := self._launches.get(generation):
                self.hooks.tell(report, launch)
        wanted = {worker.generation for worker in self.service.workers.values()} | {generation, self.service.preparing}
        wanted |= self.news.reports.generations
        self._launches = {number: launch for number, launch in self._launches.items() if number in wanted}

    def set_log_level(self, level: LogLevel) -> None:
        """Log this level and those above it in all processes of the service, until the next restart."""
        set_level(level)
        self.options = replace_field(self.options, log_level=level)
        for number, launch in self._launches.items():  # for workers that replace others
            self._launches[number] = replace_field(launch, options=replace_field(launch.options, log_level=level))
        self.fleet.set_log_level(level)
        self._log.info("log.level", level_now=level)

    def _follow_options(self) -> None:
        """Take the log level of the options, and give socket files the access that they say, if these have changed."""
        set_level(self.options.log_level)
        try:
            before, access = socket_access(self._access_options), socket_access(self.options)
            if access is not None and access != before:
                self.owned.change_access(access)
        except HotportError as error:
            self._log.error("listener.access_unchanged", error=str(error))
        self._access_options = self.options

    # -- requests ------------------------------------------------------------------------------------------

    @property
    def status_port(self) -> StatusPort | None:
        """The current status port; the caller of `use_status_port` closes the last one."""
        return self._status_port

    def use_status_port(self, port: StatusPort) -> None:
        """Replace the status port, close the old listener, and wake the waiters of `wait_stepped`."""
        before, self._status_port = self._status_port, port
        if before is not None:
            before.listener.close()
        self._stepped.set()
        self._stepped = anyio.Event()

    async def wait_stepped(self) -> None:
        """Wait for the next step of the model, or for a new status port."""
        await self._stepped.wait()

    async def ask(self, asked: Asked, make: Callable[[int], inputs.Input]) -> None:
        """Queue a request for the model and wait for its answer; raise RestartError if it is refused."""
        if self.is_succeeded or self.is_departing:
            self.owned.discard(asked.plan)
            raise self._refused(
                "another supervisor is taking over", f"hotport status {self.name}", "try again when that has ended"
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
        """Check the health of a restart's new workers until it leaves its step."""

        def workers() -> list[WorkerProcess]:
            now = self.service.restart
            if now is None or (now.generation, now.step, now.new) != (restart.generation, restart.step, restart.new):
                return []
            processes = self.fleet.processes
            return [processes[number] for number in sorted(now.new) if number in processes]

        def tell(why: str, worker: int) -> None:
            self.input(inputs.Unhealthy(restart.generation, why, worker))

        self.start("health", watch_health, workers, self.options, tell)

    def refused(self, refusal: effects.Refusal, generation: int = 0) -> RestartError:
        """Make the error for a refused request."""
        last = self.news.reports.last_in_words() if refusal is effects.Refusal.NOTHING_TO_UNDO else ""
        number = f" (generation {generation})" if generation else ""
        return self._refused(f"{refusal.value}{number}{last}", *_advice(self.name, refusal))

    def _refused(self, cause: str, fix: str, note: str) -> RestartError:
        serving = self.service.generation
        return RestartError(
            "HP410",
            f"{self.name} does not take this request now",
            cause=f"{cause}; generation {serving} serves",
            fix=fix,
            note=note,
            serving=serving,
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
