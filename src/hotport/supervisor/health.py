"""Looking at the new workers of a restart while they can be taken back.

Health is looked at, again and again: there is nothing to await that says that somebody is not well. Only the end of a
worker is an event, and the model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from hotport.kernel.process import rss_bytes
from hotport.model.health import Rules, Sample, verdict
from hotport.model.service import Step, Unhealthy
from hotport.options import Options
from hotport.supervisor.process import Process
from hotport.wire.messages import Inspection, InspectOrder, Probed, ProbeOrder

if TYPE_CHECKING:
    from hotport.supervisor.supervisor import Supervisor

__all__ = ["watch_health"]

INTERVAL_S: Final = 0.25

#: From one request to the health path to the next.
PROBE_INTERVAL_S: Final = 1.0

#: How long an answer is waited for, if no rule says how long a worker may be silent.
ANSWER_TIMEOUT_S: Final = 0.5

#: What a supervisor that wakes up so late has missed says nothing about a worker.
OWN_LAG_MAX_S: Final = 0.1


async def watch_health(supervisor: Supervisor, generation: int, step: Step) -> None:
    """Look at the new workers of this restart until it leaves this step, and say when they are not well."""
    options = supervisor.options
    rules = Rules(
        errors_max=options.health_errors_max,
        requests_min=options.health_requests_min,
        lag_max_s=options.health_lag_max_s,
        memory_max_bytes=options.health_memory_max_bytes,
    )
    if rules == Rules(requests_min=rules.requests_min) and options.health_path is None:
        return
    probe_at = anyio.current_time()
    seen: dict[int, Sample] = {}
    while (
        (restart := supervisor.service.restart) is not None
        and restart.generation == generation
        and restart.step is step
    ):
        began = anyio.current_time()
        is_probing = began >= probe_at
        if is_probing:
            probe_at = began + PROBE_INTERVAL_S
        async with anyio.create_task_group() as tasks:
            for number in restart.new:
                if process := supervisor.processes.get(number):
                    tasks.start_soon(_look_at, process, options, is_probing, seen)
        there = [seen[number] for number in sorted(restart.new) if number in seen and number in supervisor.processes]
        if ill := verdict(rules, there):
            supervisor.input(Unhealthy(generation, ill.why, ill.worker))
            return
        await anyio.sleep_until(began + INTERVAL_S)


async def _look_at(process: Process, options: Options, is_probing: bool, seen: dict[int, Sample]) -> None:
    before = seen.get(process.worker, Sample(worker=process.worker))
    probes: list[str] = []

    async def probe() -> None:
        probes.append(await _probe(process, options))

    async with anyio.create_task_group() as tasks:
        if is_probing and options.health_path is not None:
            tasks.start_soon(probe)
        timeout_s = options.health_lag_max_s or ANSWER_TIMEOUT_S
        began = anyio.current_time()
        found = await process.ask(InspectOrder(is_watched=True), Inspection, timeout_s)
        is_late = anyio.current_time() - began > timeout_s + OWN_LAG_MAX_S
    seen[process.worker] = Sample(
        worker=process.worker,
        requests=found.requests if found else before.requests,
        errors=found.errors if found else before.errors,
        lag_s=found.lag_s if found else 0.0,
        memory_bytes=rss_bytes(process.pid),
        is_silent=found is None and process.is_talking and not is_late,
        probe="".join(probes),
    )


async def _probe(process: Process, options: Options) -> str:
    """Why a request to the health path failed; empty if it did not."""
    assert options.health_path is not None
    timeout_s = options.health_timeout_s
    began = anyio.current_time()
    order = ProbeOrder(path=options.health_path, timeout_s=timeout_s)
    answer = await process.ask(order, Probed, timeout_s + OWN_LAG_MAX_S)
    if answer is not None:
        return answer.why
    if not process.is_talking or anyio.current_time() - began > timeout_s + 2 * OWN_LAG_MAX_S:
        return ""
    return f"did not answer GET {options.health_path} within {timeout_s:g} s"
