"""Starts workers: each when it is its turn, from its generation's template if there is one, behind those that serve."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import anyio

from hotport.address import listener_name, parse_address
from hotport.errors import HotportError
from hotport.kernel.loadpage import make_load_page
from hotport.kernel.process import cpu_s, may_raise_priority, numbers, set_niceness
from hotport.kernel.spawn import spawn
from hotport.model import inputs
from hotport.model.inputs import Exited
from hotport.model.lifecycle import Phase
from hotport.model.service import Service
from hotport.model.signals import WORKER
from hotport.model.strategies import Strategy
from hotport.observe.logs import get_logger
from hotport.options import Options
from hotport.supervisor.appmetrics import AppMetrics
from hotport.supervisor.contain import Containing, retried
from hotport.supervisor.counters import Counters
from hotport.supervisor.launch import Launch
from hotport.supervisor.listeners import Listeners
from hotport.supervisor.loop import Loop
from hotport.supervisor.news import Publisher
from hotport.supervisor.process import LAST_WORDS_S, WorkerProcess
from hotport.supervisor.template import Template
from hotport.wire.messages import COUNTERS, LOAD_PAGE, worker_socket

__all__ = ["Starter"]

#: By how much the niceness of a process is raised while it starts beside others that serve: it gets a quarter of a
#: processor that one of them uses all the time (sched(7): a factor of 1.25 a step).
STARTING_NICENESS: Final = 5

#: For which part of `ready_timeout`: beside others that take all of the processor, it would not be ready in time.
NICE_PART: Final = 0.25


class Starter:
    """Starts the workers of one service.

    Args:
        name: The service's name.
        directory: Its runtime directory.
        owned: The service's listeners.
        processes: The workers that were started, by number; the caller adds and removes them.
        begun: Adds a worker that was started, and watches it.
        mend: Restores missing files of the runtime directory; called before a worker is started.
        pages: The load pages of adopted workers: see `Found`.
        counters: Where workers count; the caller closes them.
        app_metrics: Where their applications count.

    Descriptors: owns the template and the load page of each generation.
    """

    def __init__(
        self,
        name: str,
        directory: str,
        loop: Loop,
        owned: Listeners,
        news: Publisher,
        processes: Mapping[int, WorkerProcess],
        begun: Callable[[WorkerProcess, Options], None],
        mend: Callable[[], object],
        *,
        pages: Mapping[int, int],
        counters: Counters,
        app_metrics: AppMetrics,
    ) -> None:
        self._name = name
        self._directory = directory
        self._loop = loop
        self._owned = owned
        self._news = news
        self._processes = processes
        self._begun = begun
        self._mend = mend
        self._pages = dict(pages)
        self._counters = counters
        self._app_metrics = app_metrics
        self._templates: dict[int, Template] = {}
        self._waiting: dict[int, tuple[int, Launch]] = {}
        self._late: set[int] = set()  # of these, those that wait for their turn
        self._log = get_logger("hotport.supervisor")

    @property
    def _service(self) -> Service:
        return self._loop.service

    def descriptors(self) -> Iterator[int]:
        """The descriptors that a forked child must not have."""
        yield from self._pages.values()
        for template in self._templates.values():
            yield from template.descriptors()

    def pids(self) -> set[int]:
        """The templates, which are waited for here."""
        return {each.pid for each in self._templates.values()}

    def close(self) -> None:
        """End templates; close load pages."""
        self.end_templates()
        for page in self._pages.values():
            os.close(page)
        self._pages.clear()

    # -- workers -------------------------------------------------------------------------------------------

    def spawn(self, worker: int, generation: int, launch: Launch) -> None:
        """Start a worker: now, or when it is its turn (`start_parallel`) and its template is loaded (`preload`)."""
        self._mend()
        if launch.options.app_metrics:
            with Containing("app_metrics"):
                self._app_metrics.prepare(launch.identity)
        self._waiting[worker] = generation, launch
        self.start_waiting()
        if worker in self._waiting and not launch.options.preload:
            self._late.add(worker)

    def start_waiting(self) -> None:
        """Start the waiting workers whose turn it is."""
        for worker, (generation, launch) in list(self._waiting.items()):
            try:
                template = self._template(generation, launch) if launch.options.preload else None
                if template is None and not self._has_turn(launch.options):
                    return
                if template is not None and not template.is_loaded:
                    continue
                del self._waiting[worker]
                self._spawn(worker, generation, launch, template)
            except Exception as error:
                self._waiting.pop(worker, None)
                self._late.discard(worker)
                self._fail(worker, error, "could not be executed")
                if not isinstance(error, HotportError | OSError | ValueError):
                    raise
            if worker in self._late:
                self._late.remove(worker)
                for other in (worker, *self._late):  # the time of each begins when it is started
                    self._loop.input(inputs.MoreTime(other, launch.options.ready_timeout_s))

    def _has_turn(self, options: Options) -> bool:
        """Whether one more worker may import now: not too many at a time while others serve."""
        service = self._service
        if not service.ids(Phase.SERVING):
            return True
        starting = sum(number in self._processes for number in service.ids(Phase.STARTING))
        return starting < (options.start_parallel or max(1, len(os.sched_getaffinity(0)) // 2))

    def _lower_priority(self, pid: int, ready_timeout_s: float, is_alive: Callable[[], bool]) -> None:
        """Let those that serve have the processor first while a process starts, if that can be undone.

        Args:
            is_alive: Whether it has not been collected yet, so that the pid is still its own.
        """
        if self._service.ids(Phase.SERVING) and may_raise_priority():
            set_niceness(pid, STARTING_NICENESS)
            self._loop.start("priority", self._restore_priority, pid, ready_timeout_s * NICE_PART, is_alive)

    async def _restore_priority(self, pid: int, after_s: float, is_alive: Callable[[], bool]) -> None:
        await anyio.sleep(after_s)
        if is_alive():
            set_niceness(pid, 0)

    def _fail(self, worker: int, error: object, why: str) -> None:
        self._news.note_error(worker, str(error))
        self._loop.input(Exited(worker, why))

    def _spawn(self, worker: int, generation: int, launch: Launch, template: Template | None) -> None:
        restart = self._service.restart
        # Strategies other than inherit give the listeners later.
        is_given = restart is not None and restart.generation == generation and restart.strategy is not Strategy.INHERIT
        listeners = {} if is_given else self._owned.sockets(generation)
        passed = {listener_name(parse_address(address)): each.fileno() for address, each in listeners.items()}
        if launch.options.balance != "off" and not launch.options.command:
            passed |= self._page(generation)
        with self._counting(worker, generation, launch) as page:
            passed |= page
            if template is not None:
                child = template.fork(launch.spec(self._name, self._directory, generation, worker), passed)
            else:
                child = spawn(
                    launch.argv(self._name, generation, worker),
                    environment=launch.worker_environment(self._name, self._directory, generation, worker),
                    cwd=launch.directory,
                    listeners=list(passed.values()),
                    listen_names=list(passed),
                    held=() if launch.options.command else numbers(WORKER.keys()),
                    identity=launch.identity,
                )
        self._counters.count("started")
        path = os.path.join(launch.place(self._directory), worker_socket(generation, worker))
        process = WorkerProcess(worker, generation, child, path, is_foreign=bool(launch.options.command))
        process.held = set(listeners.values())
        self._log.info("worker.spawned", worker=worker, generation=generation, worker_pid=child.pid)
        self._begun(process, launch.options)
        timeout_s = launch.options.ready_timeout_s
        self._lower_priority(child.pid, timeout_s, lambda: self._processes.get(worker) is process)

    @contextmanager
    def _counting(self, worker: int, generation: int, launch: Launch) -> Iterator[dict[str, int]]:
        """A page in which a new worker counts, by its name among the descriptors; none if that cannot be."""
        page: dict[str, int] = {}
        if self._counters.is_on and not launch.options.command:
            try:
                page[COUNTERS] = self._counters.make_page(generation, worker)
            except (HotportError, OSError) as error:
                self._log.warning("metrics.off", worker=worker, generation=generation, error=str(error))
        try:
            yield page
        finally:
            for fd in page.values():
                os.close(fd)

    # -- templates -----------------------------------------------------------------------------------------

    def preload(self, generation: int, launch: Launch) -> None:
        """Start the template of a generation whose workers were adopted, for those that are started later."""
        self._template(generation, launch)

    def _template(self, generation: int, launch: Launch) -> Template:
        """Return a generation's template; start it if there is none, or not any more."""
        template = self._templates.get(generation)
        if template is None or template.is_killed:
            template = self._templates[generation] = Template(self._name, self._directory, generation, launch)
            timeout_s = launch.options.ready_timeout_s
            self._lower_priority(template.pid, timeout_s, lambda: self._templates.get(generation) is template)
            self._log.info("template.spawned", generation=generation, template_pid=template.pid)
            self._loop.start("template.watch", self._watch_template, template)
        return template

    async def _watch_template(self, template: Template) -> None:
        """Fork the workers that wait for a template once it is loaded; collect it after its end."""
        error = ""
        waiting: list[int] = []
        with Containing("template.load"):
            error = await template.wait_loaded()
        if template.is_loaded:
            set_niceness(template.pid, 0)  # before workers inherit it
            self._news.reports.started(template.generation, cpu_s(template.pid))
            self._log.info("template.loaded", generation=template.generation, template_pid=template.pid)
            with Containing("template.fork"):
                self.start_waiting()
        else:
            if self._templates.get(template.generation) is template:  # else they wait for the next one
                waiting = [worker for worker, (each, _) in self._waiting.items() if each == template.generation]
            for worker in waiting:
                del self._waiting[worker]  # else another template would be started for them
            with Containing("template.end"), anyio.move_on_after(LAST_WORDS_S):
                await template.wait_ended()
            template.kill()  # what the application has started there must not keep it
        await retried("template.watch", template.wait_ended)
        why = template.collect()
        if self._templates.get(template.generation) is template:
            del self._templates[template.generation]
        for worker in waiting:
            self._fail(worker, error or f"the process that imports the application for all workers: {why}", why)
        if template.is_loaded and not template.is_killed:
            self._log.warning("template.lost", generation=template.generation, template_pid=template.pid, why=why)

    def call_off(self, worker: int) -> None:
        """Start a worker no more that waits for its turn, or for its template."""
        if worker not in self._waiting:
            return
        generation, _ = self._waiting.pop(worker)
        self._late.discard(worker)
        template = self._templates.get(generation)
        if template is not None and not self._waits(generation) and not self._has_workers(generation):
            template.kill()  # nobody waits for its import any more
        self._loop.input(Exited(worker, "was not started any more"))

    def _waits(self, generation: int) -> bool:
        return any(each == generation for each, _ in self._waiting.values())

    def end_unused_templates(self) -> None:
        """End the templates of generations that start no more workers."""
        service = self._service
        needed = {worker.generation for worker in service.workers.values()} | {service.generation}
        if service.restart is not None:
            needed.add(service.restart.generation)
        for template in self._templates.values():
            if service.is_stopping or not (template.generation in needed or self._waits(template.generation)):
                template.kill()

    def end_templates(self) -> None:
        """End all templates at once: this process ends, or another program takes its place."""
        for template in self._templates.values():
            template.end()
        self._templates.clear()

    # -- load pages ----------------------------------------------------------------------------------------

    def let_go(self, generation: int) -> None:
        """Close the load page of a generation that has no workers left."""
        if generation in self._pages and not self._has_workers(generation):
            os.close(self._pages.pop(generation))

    def _page(self, generation: int) -> dict[str, int]:
        """The load page for one more worker of a generation, by its name among the descriptors; none if that cannot be.

        It is made for the first one. If those that are there have another one, or none, they would not see each other.
        """
        try:
            if generation not in self._pages:
                if self._has_workers(generation):
                    raise OSError("no worker of this generation that serves has passed its load page on")
                self._pages[generation] = make_load_page()
        except OSError as error:
            self._log.warning("balance.off", generation=generation, error=str(error))
            return {}
        return {LOAD_PAGE: self._pages[generation]}

    def _has_workers(self, generation: int) -> bool:
        return any(process.generation == generation for process in self._processes.values())
