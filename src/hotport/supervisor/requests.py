"""The requests to a running service: restart, undo, scale, rebalance, reload certificates, describe."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

import anyio
from msgspec.structs import asdict

from hotport import __version__
from hotport.errors import ConfigError, HotportError, RestartError, StartError
from hotport.kernel.process import is_stopped, rss_bytes
from hotport.kernel.sockets import accept_queue_length
from hotport.kernel.steer import can_steer
from hotport.model.effects import Announce, Refusal
from hotport.model.inputs import Input, RequestKeep, RequestRestart, RequestScale, RequestUndo
from hotport.model.lifecycle import CURRENT, Phase
from hotport.model.rules import refusal
from hotport.model.steps import STEPS, Step
from hotport.model.strategies import GUARANTEES, Facts, choose, table
from hotport.observe.logs import dropped, get_logger
from hotport.options import Options
from hotport.supervisor.lags import WINDOW_S
from hotport.supervisor.launch import Launch
from hotport.supervisor.process import WorkerProcess
from hotport.supervisor.supervisor import Asked, Supervisor
from hotport.wire.messages import (
    Inspection,
    InspectOrder,
    Rebalanced,
    RebalanceOrder,
    ReloadTlsOrder,
    Report,
    RestartRequest,
    Status,
    TlsReloaded,
    TlsReport,
    WatchStatus,
    WorkerStatus,
    WorkerTls,
)

__all__ = ["Hear", "describe", "keep", "lag_s", "reload_tls", "restart", "scale", "undo"]

#: Called with each announcement about a restart, and the milliseconds since it began.
Hear: TypeAlias = Callable[[Announce, float], None]

#: A restart without overrides of the options.
RESTART: Final = RestartRequest()

#: Seconds to wait for a worker's figures; a busy worker is shown without them.
INSPECT_TIMEOUT_S = 0.5

#: Seconds to wait for a worker to reload its certificates; a worker that is busy for longer is reported.
RELOAD_TIMEOUT_S = 5.0

#: Seconds for which a worker may hand off connections: busy ones have five seconds, batches under way some more.
REBALANCE_TIMEOUT_S = 20.0


def unheard(news: Announce, ms: float) -> None:
    """Ignore the news, for callers that only need the outcome."""


async def restart(supervisor: Supervisor, request: RestartRequest = RESTART, hear: Hear = unheard) -> Report:
    """Restart, and wait until the outcome is known and the workers that leave have ended.

    Args:
        hear: Called with each announcement about it, and the milliseconds since it began.

    Raises:
        RestartError: It was refused: another one is in progress, or the service is starting or stopping
            (HP410), the strategy cannot work (HP420), a new address cannot be bound (HP1xx), or the options (HP3xx),
            the surroundings (HP401, HP402, HP404, HP405) or the user of workers (HP430 to HP433) cannot be used.
            Nothing was begun.
    """
    before = supervisor.options
    try:
        options = _override(supervisor.read_options(Path(supervisor.surroundings.directory)), request)
        launch = Launch.resolve(options, supervisor.surroundings)
        supervisor.admit(launch.identity)
    except HotportError as error:
        raise _passed_on(error, supervisor) from error
    if refused := refusal(supervisor.service, is_restart=True):  # before anything is bound
        raise supervisor.refused(*refused)
    if supervisor.owned.lost:
        raise supervisor.refused(Refusal.PORT_LOST)
    strategy = request.strategy or options.strategy
    chosen = choose(strategy, facts(supervisor, options))
    if chosen.strategy is None:
        raise _refused(
            "HP420",
            f"the strategy {strategy} cannot work",
            supervisor,
            cause=chosen.why,
            fix=f"hotport restart {supervisor.name} --strategy auto",
        )
    status_bind = supervisor.status_port.bind if supervisor.status_port else None
    if options.status_bind != status_bind:
        raise _refused(
            "HP411",
            "the address of its status port has changed",
            supervisor,
            cause=f"it is {status_bind}; the options now say {options.status_bind}",
            fix=f"hotport upgrade {supervisor.name}",
            note="restart afterwards",
        )
    wants = chosen.strategy
    if options.canary and (no_canary := GUARANTEES[wants].no_canary):
        raise _refused(
            "HP421",
            "a canary cannot serve beside its old workers",
            supervisor,
            cause=no_canary,
            fix=f"hotport restart {supervisor.name} --canary 0",
            note="or use --strategy auto, which allows a canary",
        )
    try:
        plan = supervisor.owned.prepare(options, wants, supervisor.service.generation)
    except HotportError as error:
        raise _passed_on(error, supervisor) from error
    get_logger("hotport.supervisor").info("restart.strategy", strategy=wants.value, why=chosen.why)
    wanted = options.workers if options.workers != before.workers else None

    def make(number: int) -> RequestRestart:
        is_watched = options.undo_window_s > 0
        is_prepared = bool(options.before_start)
        return RequestRestart(number, options.phased, wanted, wants, options.canary, is_watched, is_prepared)

    return await _ask_for_report(supervisor, Asked(launch, plan), make, hear)


def _override(options: Options, request: RestartRequest) -> Options:
    """Return the options for one restart; the request's override the file's."""
    # Not the strategy: `hotport status` tells from the options which one the next restart takes.
    said = {name: value for name, value in asdict(request).items() if value is not None and name != "strategy"}
    options = replace(options, **said)
    if not (options.phased and options.canary):
        return options
    if request.phased and request.canary:
        raise ConfigError(
            "HP305",
            "--canary cannot be used with --phased",
            cause="a phased restart starts with one new worker anyway",
            fix="--undo-window 30s",
            note="it watches each worker of a phased restart",
        )
    return replace(options, phased=False) if request.canary else replace(options, canary=0)


async def undo(supervisor: Supervisor, by: str, hear: Hear = unheard) -> Report:
    """Undo the restart that is in progress or in its undo window, and wait until the new workers have ended.

    Raises:
        RestartError: There is none, or the service is stopping (HP410).
    """
    return await _ask_for_report(supervisor, Asked(), lambda request: RequestUndo(request, by), hear)


async def keep(supervisor: Supervisor) -> str:
    """End the bake or the undo window of a restart now; return a sentence about the next step.

    Raises:
        RestartError: There is none (HP410).
    """
    asked, restart = Asked(), supervisor.service.restart
    await supervisor.ask(asked, RequestKeep)
    is_baking = restart is not None and restart.step is Step.BAKING
    rest = "the other workers start" if is_baking else "the old generation leaves"
    return f"generation {asked.generation} stays: {rest}"


async def _ask_for_report(supervisor: Supervisor, asked: Asked, make: Callable[[int], Input], hear: Hear) -> Report:
    """Make a request about a restart, pass its news to `hear`, and return its report."""
    done = anyio.Event()
    result: list[Report] = []

    def listen(news: Announce | Report) -> None:
        if news.generation != asked.generation:
            return
        if isinstance(news, Report):
            result.append(news)
            done.set()
        else:
            hear(news, supervisor.news.reports.elapsed_ms(asked.generation))

    with supervisor.news.subscribed(listen):
        await supervisor.ask(asked, make)
        await done.wait()
    return result[0]


def facts(supervisor: Supervisor, options: Options) -> Facts:
    """Collect the facts by which a strategy is chosen."""
    workers = supervisor.service.workers
    leaving = {
        number: process.pid
        for number, process in supervisor.fleet.processes.items()
        if number not in workers or workers[number].phase not in CURRENT
    }
    asked = [each.asked for each in supervisor.owned.of(supervisor.service.generation)]
    return Facts(
        is_stored=any(map(supervisor.news.manager.keeps, supervisor.listeners)),
        schemes=tuple(text.partition(":")[0] for text in dict.fromkeys((*asked, *map(str, options.bind)))),
        command=options.command[0] if options.command else "",
        kind=options.kind,
        is_phased=options.phased,
        lingering=supervisor.owned.lingering(leaving, supervisor.service.generation) if leaving else (),
        can_steer=can_steer(),
    )


def _passed_on(error: HotportError, supervisor: Supervisor) -> RestartError:
    return _refused(error.code, error.what, supervisor, cause=error.cause, fix=error.fix, note=error.note)


def _refused(
    code: str, what: str, supervisor: Supervisor, *, cause: str, fix: str = "", note: str = ""
) -> RestartError:
    serving = supervisor.service.generation
    return RestartError(
        code,
        f"cannot restart {supervisor.name}, generation {serving} serves on: {what}",
        cause=cause,
        fix=fix,
        note=note,
        serving=serving,
    )


async def scale(supervisor: Supervisor, wanted: int) -> None:
    """Run `wanted` workers, and wait until they serve or one of them cannot.

    Raises:
        RestartError: Refused (HP410), or a worker was lost meanwhile (HP412).
    """
    failures = supervisor.service.failures
    await supervisor.ask(Asked(), lambda request: RequestScale(request, wanted))
    while True:
        service = supervisor.service
        serving = [worker for worker in service.current if worker.phase is Phase.SERVING]
        if len(serving) == len(service.current) == wanted or service.wanted != wanted:
            return
        if service.is_stopping:
            raise RestartError(
                "HP410",
                f"cannot run {wanted} workers of {supervisor.name}",
                cause="the service is stopping",
                fix=f"hotport status {supervisor.name}",
                phase="scaling",
                serving=0,
            )
        if service.failures > failures:
            raise RestartError(
                "HP412",
                f"cannot run {wanted} workers of {supervisor.name} yet",
                cause="a worker failed; it is tried again with increasing pauses",
                fix=f"hotport status {supervisor.name}",
                note="the service's log says why the worker failed",
                phase="scaling",
                serving=service.generation,
            )
        await supervisor.wait_stepped()


async def reload_tls(supervisor: Supervisor) -> TlsReport:
    """Make all workers that accept, or may accept again, reload their certificates.

    Raises:
        RestartError: The service has no certificates here, or is stopping (HP413). Nothing has changed.
    """
    if cause := _no_tls(supervisor):
        raise RestartError(
            "HP413",
            f"cannot renew the certificates of {supervisor.name}",
            cause=cause,
            fix=f"hotport status {supervisor.name}",
            serving=supervisor.service.generation,
        )
    found: dict[int, WorkerTls] = {}

    async def reload(process: WorkerProcess, phase: Phase) -> None:
        outcome, error = "starting", ""
        if phase is Phase.STARTING:
            process.order(ReloadTlsOrder())  # it may have read the old ones; the order is sent once it is connected
        else:
            answer = await process.ask(ReloadTlsOrder(), TlsReloaded, RELOAD_TIMEOUT_S)
            if answer is None and supervisor.fleet.processes.get(process.worker) is not process:
                return  # it has ended; its replacement reads the new ones
            error = _no_answer(supervisor.name, process.worker) if answer is None else answer.error
            outcome = "kept" if error else "reloaded"
        found[process.worker] = WorkerTls(
            worker=process.worker, generation=process.generation, pid=process.pid, outcome=outcome, error=error
        )

    workers = supervisor.service.workers
    async with anyio.create_task_group() as tasks:
        for number, process in supervisor.fleet.processes.items():
            if number in workers and workers[number].phase in CURRENT:
                tasks.start_soon(reload, process, workers[number].phase)
    return TlsReport(service=supervisor.name, workers=tuple(found[number] for number in sorted(found)))


async def rebalance(supervisor: Supervisor) -> int:
    """Make the workers share the open connections as evenly as possible; return how many have moved.

    Raises:
        RestartError: Workers do not balance (HP419). Nothing has moved.
    """
    if supervisor.options.balance == "off":
        raise RestartError(
            "HP419",
            f"cannot rebalance {supervisor.name}",
            cause="its workers do not know each other's load: balance is off",
            fix='balance = "auto"',
            note="then restart the service",
            serving=supervisor.service.generation,
        )
    moved: list[int] = []

    async def ask(process: WorkerProcess) -> None:
        answer = await process.ask(RebalanceOrder(), Rebalanced, REBALANCE_TIMEOUT_S)
        moved.append(0 if answer is None else answer.moved)

    async with anyio.create_task_group() as tasks:
        for number in supervisor.service.ids(Phase.SERVING):
            if process := supervisor.fleet.processes.get(number):
                tasks.start_soon(ask, process)
    return sum(moved)


def _no_tls(supervisor: Supervisor) -> str:
    """Why there are no certificates to reload; empty if there are."""
    if supervisor.service.is_stopping:
        return "the service is stopping"
    if supervisor.options.command:
        return f"{supervisor.options.command[0]} is a program of its own, and reads its certificates itself"
    return "" if supervisor.options.tls_cert else "it does not speak TLS: no tls_cert is set"


def _no_answer(service: str, worker: int) -> str:
    error = StartError(
        "HP414",
        f"worker {worker} did not confirm that it has read its certificates",
        cause=f"it was busy for {RELOAD_TIMEOUT_S:g} s, and may still do it",
        fix=f"hotport reload-tls {service}",
    )
    return str(error)


async def describe(supervisor: Supervisor) -> Status:
    """Describe the service's current state."""
    found: dict[int, Inspection | None] = {}

    async def inspect(process: WorkerProcess) -> None:
        found[process.worker] = await process.ask(InspectOrder(), Inspection, INSPECT_TIMEOUT_S)

    async with anyio.create_task_group() as tasks:
        for process in supervisor.fleet.processes.values():
            tasks.start_soon(inspect, process)
    service, options, now = supervisor.service, supervisor.options, time.monotonic()
    known = facts(supervisor, options)
    chosen = choose(options.strategy, known)
    return Status(
        service=supervisor.name,
        pid=os.getpid(),
        version=__version__,
        generation=service.generation,
        wanted=service.wanted,
        restarting=service.restart.generation if service.restart else 0,
        addresses=tuple(supervisor.listeners),
        target=options.target or " ".join(options.command),
        age_s=round(now - supervisor.started_at, 3),
        rss_bytes=rss_bytes(os.getpid()),
        workers=tuple(
            _describe_worker(process, service.workers[number].phase, found.get(number), now)
            for number, process in supervisor.fleet.processes.items()
            if number in service.workers
        ),
        last_restart=supervisor.news.reports.last,
        stage=service.stage.value,
        lame_duck_left_s=None if (left := supervisor.lame_duck_left_s) is None else round(left, 3),
        status_address=supervisor.status_port.address if supervisor.status_port else "",
        strategy=chosen.strategy.value if chosen.strategy else options.strategy,
        strategy_why=chosen.why,
        strategies={row.strategy.value: row.obstacle for row in table(known)},
        lost=supervisor.owned.lost,
        gone=supervisor.owned.gone,
        watch=_describe_watch(supervisor),
        log_dropped=dropped(),
        queues={
            address: accept_queue_length(sock)
            for address, sock in supervisor.listeners.items()
            if address.startswith("tcp:") and sock.fileno() != -1  # closed already: the service stops
        },
        mishaps=tuple(supervisor.history.mishaps),
    )


def _describe_watch(supervisor: Supervisor) -> WatchStatus | None:
    restart = supervisor.service.restart
    if restart is None or not STEPS[restart.step].is_watched:
        return None
    left_s = round(supervisor.watched_for_s(), 3)
    return WatchStatus(generation=restart.generation, step=restart.step.value, left_s=left_s)


def _describe_worker(process: WorkerProcess, phase: Phase, seen: Inspection | None, now: float) -> WorkerStatus:
    return WorkerStatus(
        worker=process.worker,
        generation=process.generation,
        pid=process.pid,
        phase=phase.value,
        age_s=round(now - process.started_at, 3),
        status=process.status,
        connections=seen.connections if seen else None,
        accepted=seen.accepted if seen else None,
        adopted=seen.adopted if seen else None,
        lingering=seen.lingering if seen else (),
        requests=seen.requests if seen else None,
        rss_bytes=seen.rss_bytes if seen else rss_bytes(process.pid),
        log_dropped=seen.log_dropped if seen else None,
        timeouts=seen.timeouts if seen else None,
        cuts=seen.cuts if seen else {},
        lag_s=None if (lag := lag_s(process)) is None else round(lag, 3),
        hung_s=round(process.silent_s, 3) if process.hang else None,
        hung_at=process.hang.at if process.hang else "",
        stack=process.hang.stack if process.hang else "",
        is_stopped=is_stopped(process.pid),
    )


def lag_s(process: WorkerProcess) -> float | None:
    """How long a worker's event loop was blocked at most in the last minute; it may still be."""
    worst_s = process.lags.worst_s(anyio.current_time() - WINDOW_S)
    return None if worst_s is None and not process.silent_s else max(worst_s or 0.0, process.silent_s)
