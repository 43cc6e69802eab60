"""Check the health of a restart's new workers while they can be taken back.

Health is polled, since bad health is no event that can be awaited. Only the end of a worker is an event, for the model.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias

import anyio

from hotport.kernel.process import rss_bytes
from hotport.model.health import Rules, Sample, verdict
from hotport.options import Options
from hotport.supervisor.contain import Containing
from hotport.supervisor.process import WorkerProcess
from hotport.wire.messages import Inspection, InspectOrder, Probed, ProbeOrder

__all__ = ["watch_health"]

INTERVAL_S: Final = 0.25

#: Seconds between two requests to the health path.
PROBE_INTERVAL_S: Final = 1.0

#: Seconds to wait for an answer if no rule limits a worker's silence.
ANSWER_TIMEOUT_S: Final = 0.5

#: The supervisor's own lag beyond which a missed answer does not count against a worker.
OWN_LAG_MAX_S: Final = 0.1


Tell: TypeAlias = Callable[[str, int], None]


async def watch_health(workers: Callable[[], Sequence[WorkerProcess]], options: Options, tell: Tell) -> None:
    """Check the new workers of a restart, and report bad health once.

    A failed check counts as bad health.

    Args:
        workers: Returns the workers to check now; none when the watch is over.
        tell: Called with the reason, and the worker's number: 0 for all workers together.
    """

    def give_up(error: Exception) -> None:
        tell(f"its health could not be watched: {type(error).__name__} ({error})", 0)

    with Containing("health", give_up):
        await _watch(workers, options, tell)


async def _watch(workers: Callable[[], Sequence[WorkerProcess]], options: Options, tell: Tell) -> None:
    rules = Rules(
        errors_max=options.health_errors_max,
        requests_min=options.health_requests_min,
        lag_max_s=options.health_lag_max_s,
        memory_max_bytes=options.health_memory_max_bytes,
    )
    last: dict[int, tuple[float, Inspection]] = {}

    async def look_again(interval_s: float, look: Callable[[WorkerProcess], Awaitable[Sample]]) -> None:
        while processes := workers():
            began = anyio.current_time()
            samples: list[Sample] = []

            async def note(process: WorkerProcess, samples: list[Sample] = samples) -> None:
                samples.append(await look(process))

            async with anyio.create_task_group() as looks:
                for process in processes:
                    looks.start_soon(note, process)
            if ill := verdict(rules, samples):
                tell(ill.why, ill.worker)
                return
            await anyio.sleep_until(began + interval_s)

    async with anyio.create_task_group() as tasks:
        if rules != Rules(requests_min=rules.requests_min):
            tasks.start_soon(look_again, INTERVAL_S, lambda process: _inspect(process, rules, last))
        if options.health_path is not None:
            tasks.start_soon(look_again, PROBE_INTERVAL_S, lambda process: _probe(process, options))


async def _inspect(process: WorkerProcess, rules: Rules, last: dict[int, tuple[float, Inspection]]) -> Sample:
    timeout_s = rules.lag_max_s or ANSWER_TIMEOUT_S
    began = anyio.current_time()
    found = await process.ask(InspectOrder(is_watched=True), Inspection, timeout_s)
    is_late = anyio.current_time() - began > timeout_s + OWN_LAG_MAX_S
    since, known = last.get(process.worker, (began, None))
    if found is not None:
        known = found
        last[process.worker] = (began, found)
    return Sample(
        worker=process.worker,
        requests=known.requests if known else 0,
        errors=known.errors if known else 0,
        lag_s=process.lags.worst_s(since) or 0.0,  # others ask, too, and each answer is about the time since the last
        memory_bytes=rss_bytes(process.pid),
        is_silent=found is None and process.is_talking and not is_late,
    )


async def _probe(process: WorkerProcess, options: Options) -> Sample:
    path, timeout_s = options.health_path, options.health_timeout_s
    assert path is not None
    began = anyio.current_time()
    answer = await process.ask(ProbeOrder(path=path, timeout_s=timeout_s), Probed, timeout_s + OWN_LAG_MAX_S)
    is_late = anyio.current_time() - began > timeout_s + 2 * OWN_LAG_MAX_S
    why = answer.why if answer else ""
    if answer is None and process.is_talking and not is_late:
        why = f"did not answer GET {path} within {timeout_s:g} s"
    return Sample(worker=process.worker, probe=why)
