"""Metrics for Prometheus: what `counters` has counted, and how the service is now.

Workers are not asked: what they have counted is read from their pages, and the kernel is asked for the rest. So a
worker that hangs delays nothing and is not missing. Labels are bounded: a worker is named by its *slot*, the lowest
number that no other worker had when it was first seen.

The package prometheus-client renders them. It is optional, and loaded with the first question.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, count
from socket import AF_UNIX
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import anyio
import anyio.to_thread

from hotport import __version__
from hotport.kernel.process import cpu_s, rss_bytes
from hotport.kernel.sockdiag import unix
from hotport.kernel.sockets import accept_queue_length, dropped
from hotport.model.lifecycle import CURRENT, Phase
from hotport.model.service import Stage
from hotport.supervisor.process import WorkerProcess
from hotport.supervisor.requests import lag_s
from hotport.supervisor.supervisor import Supervisor
from hotport.wire import counters

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ["Rendered", "render"]

#: What to say where the package is missing.
MISSING: Final = """\
cannot render metrics: the supervisor's Python has no package prometheus-client
  try:   {python} -m pip install prometheus-client
  note:  then ask again; hotport[metrics] requires it
"""

NANO: Final = 1e-9

#: Values by their labels.
Labelled: TypeAlias = Mapping[Any, float]

#: A worker has no more open connections, whatever it writes.
OPEN_MAX: Final = 1 << 32

PHASES: Final = tuple(phase for phase in Phase if phase is not Phase.GONE)


class Rendered(NamedTuple):
    """The metrics in the format that was asked for, or why there are none."""

    body: bytes
    content_type: str
    status: HTTPStatus = HTTPStatus.OK


async def render(supervisor: Supervisor, accept: str) -> Rendered:
    """Render all metrics of a service.

    Args:
        accept: The field of the request by which the format is chosen: OpenMetrics, or Prometheus's older text.
    """
    if find_spec("prometheus_client") is None:
        text = MISSING.format(python=sys.executable)
        return Rendered(text.encode(), "text/plain; charset=utf-8", HTTPStatus.NOT_IMPLEMENTED)
    await anyio.to_thread.run_sync(import_module, "prometheus_client.exposition")  # takes a while, once
    families = list(_families(supervisor))
    has_app = supervisor.options.app_metrics

    def encode() -> Rendered:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder

        encoder, content_type = choose_encoder(accept)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(families + (supervisor.app_metrics.collect() if has_app else [])))
        return Rendered(encoder(registry), content_type)

    return await anyio.to_thread.run_sync(encode)


class _Families:
    """A collector of prometheus_client, of families that are known."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _counter(name: str, says: str, labels: Sequence[str], values: Labelled) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(f"hotport_{name}", says, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _gauge(name: str, says: str, labels: Sequence[str], values: Labelled) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"hotport_{name}", says, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _families(supervisor: Supervisor) -> Iterator[Metric]:
    cells, pages = supervisor.counters.read()
    yield from _of_requests(cells)
    yield from _of_connections(supervisor, cells, pages)
    yield from _of_restarts(cells)
    yield from _of_workers(supervisor, cells)
    yield from _of_listeners(supervisor)
    yield from _of_certificates(supervisor, pages)
    yield from _of_service(supervisor)


def _of_requests(cells: Sequence[int]) -> Iterator[Metric]:
    from prometheus_client.core import HistogramMetricFamily

    requests: dict[tuple[str, str], float] = {}
    buckets = [[0] * counters.BUCKETS for _ in counters.STATUSES]
    sums = [0] * len(counters.STATUSES)
    for row, method in enumerate(counters.METHODS):
        counts: dict[tuple[str, str], float] = {}
        for column, status in enumerate(counters.STATUSES):
            cell = counters.request_cell(row, column)
            took_ns, *these = cells[cell : cell + 1 + counters.BUCKETS]
            counts[method, status] = sum(these)
            sums[column] += took_ns
            buckets[column] = [a + b for a, b in zip(buckets[column], these, strict=True)]
        if method in ("GET", "POST") or any(counts.values()):  # a series that begins with 0 has no first step
            requests |= counts
    yield _counter(
        "http_requests",
        "HTTP requests by method and class of the answer's status; none: without a complete answer.",
        ("method", "status"),
        requests,
    )
    histogram = HistogramMetricFamily(
        "hotport_http_request_duration_seconds",
        "Seconds from calling the application to the end of its answer.",
        labels=("status",),
    )
    bounds = [*(repr(bound) for bound in counters.BOUNDS_S), "+Inf"]
    for column, status in enumerate(counters.STATUSES):
        cumulated = list(zip(bounds, map(float, accumulate(buckets[column])), strict=True))
        histogram.add_metric((status,), cumulated, sum_value=sums[column] * NANO)
    yield histogram
    yield _counter(
        "http_request_timeouts",
        "HTTP requests that were cancelled after request_timeout.",
        (),
        {(): cells[counters.TIMEOUTS.start]},
    )


def _of_connections(
    supervisor: Supervisor, cells: Sequence[int], pages: Mapping[tuple[int, int], Sequence[int]]
) -> Iterator[Metric]:
    yield _counter(
        "connections_accepted", "Connections accepted from clients.", (), {(): cells[counters.ACCEPTED.start]}
    )
    yield _counter(
        "connections_adopted",
        "Connections that a worker took over from another one.",
        (),
        {(): cells[counters.ADOPTED.start]},
    )
    closed = counters.CLOSED.of(cells)
    yield _counter(
        "connections_closed",
        "Connections that ended in a worker, by what became of them; moved_*: another worker serves them.",
        ("fate",),
        {(fate,): closed[place] for place, fate in enumerate(counters.FATES)},
    )
    workers = supervisor.service.workers
    is_open = {(kind, state): 0.0 for kind in counters.KINDS for state in ("serving", "leaving")}
    for (_, number), page in pages.items():
        is_serving = number in workers and workers[number].phase in CURRENT
        for kind, number_open in zip(counters.KINDS, counters.OPEN.of(page), strict=False):
            is_open[kind, "serving" if is_serving else "leaving"] += min(number_open, OPEN_MAX)
    yield _gauge(
        "connections",
        "Open connections by kind; leaving: of workers that leave, as in a restart.",
        ("kind", "state"),
        {key: value for key, value in is_open.items() if key[0] == "http" or value},
    )


def _of_restarts(cells: Sequence[int]) -> Iterator[Metric]:
    from prometheus_client.core import SummaryMetricFamily

    outcomes = counters.RESTARTS.of(cells)
    yield _counter(
        "restarts",
        "Restarts by outcome.",
        ("outcome",),
        {(outcome,): outcomes[place] for place, outcome in enumerate(counters.OUTCOMES)},
    )
    phases = SummaryMetricFamily(
        "hotport_restart_phase_seconds",
        "Seconds until a restart came to a phase from the one before.",
        labels=("phase",),
    )
    for place, phase in enumerate(counters.PHASES):
        if times := cells[counters.PHASE_COUNT.start + place]:
            total_s = cells[counters.PHASE_NS.start + place] * NANO
            phases.add_metric((phase.replace(" ", "_"),), count_value=times, sum_value=total_s)
    yield phases
    gap_ns, times = counters.GAP.of(cells)
    yield SummaryMetricFamily(
        "hotport_restart_accept_gap_seconds",
        "Seconds of a restart in which no worker accepted; new connections waited in the queue.",
        count_value=times,
        sum_value=gap_ns * NANO,
    )


def _of_workers(supervisor: Supervisor, cells: Sequence[int]) -> Iterator[Metric]:
    events = counters.WORKERS.of(cells)
    yield _counter(
        "worker_events",
        "What happened to workers: started, lost (crashed or killed), hung, given up while they hung, expired.",
        ("event",),
        {(event,): events[place] for place, event in enumerate(counters.WORKER_EVENTS)},
    )
    yield _counter(
        "log_lines_dropped",
        "Log lines that were dropped since nobody read them.",
        (),
        {(): cells[counters.LOG_DROPPED.start]},
    )
    service, processes = supervisor.service, supervisor.fleet.processes
    phases = Counter(worker.phase for worker in service.workers.values())
    yield _gauge("workers", "Workers by phase.", ("phase",), {(each.value,): phases[each] for each in PHASES})
    yield _gauge("workers_wanted", "Workers that should serve.", (), {(): service.wanted})
    yield _gauge(
        "workers_hung", "Workers that hang now.", (), {(): sum(each.hang is not None for each in processes.values())}
    )
    _give_slots(processes.values())
    slots = {(str(each.slot),): each for each in processes.values()}
    now_s = time.monotonic()
    for name, says, value in (
        ("worker_generation", "The generation of a worker.", lambda each: each.generation),
        ("worker_age_seconds", "Seconds since a worker was started.", lambda each: now_s - each.started_at),
        ("worker_resident_memory_bytes", "Resident memory of a worker.", lambda each: rss_bytes(each.pid)),
        (
            "worker_event_loop_lag_seconds",
            "The longest time for which a worker's event loop was blocked in the last minute; it may still be.",
            lag_s,
        ),
    ):
        yield _gauge(name, says, ("slot",), _known(slots, value))
    yield _counter(
        "worker_cpu_seconds", "Processor time of a worker.", ("slot",), _known(slots, lambda each: cpu_s(each.pid))
    )


def _known(
    slots: Mapping[tuple[str], WorkerProcess], value: Callable[[WorkerProcess], float | None]
) -> dict[tuple[str], float]:
    found: dict[tuple[str], float] = {}
    for slot, process in slots.items():
        with suppress(OSError):  # it has ended
            if (known := value(process)) is not None:
                found[slot] = known
    return found


def _give_slots(processes: Iterable[WorkerProcess]) -> None:
    taken = {each.slot for each in processes}
    for each in processes:
        if each.slot < 0:
            each.slot = next(slot for slot in count() if slot not in taken)
            taken.add(each.slot)


def _of_listeners(supervisor: Supervisor) -> Iterator[Metric]:
    listeners = supervisor.listeners
    queued = {(address,): accept_queue_length(sock) for address, sock in listeners.items()}
    inodes = {os.fstat(sock.fileno()).st_ino: address for address, sock in listeners.items() if sock.family == AF_UNIX}
    with suppress(OSError):  # the kernel does not tell
        queued |= {(inodes[each.inode],): each.rqueue for each in (unix() if inodes else ()) if each.inode in inodes}
    yield _gauge(
        "listener_queue_connections", "Connections that wait to be accepted, by the kernel.", ("address",), queued
    )
    yield _counter(
        "listener_drops",
        "Connections (or datagrams) that the kernel dropped since a queue was full.",
        ("address",),
        {(address,): dropped(sock) for address, sock in listeners.items()},
    )


def _of_certificates(supervisor: Supervisor, pages: Mapping[tuple[int, int], Sequence[int]]) -> Iterator[Metric]:
    if not supervisor.options.tls_cert:
        return
    workers = supervisor.service.workers
    ends: dict[tuple[str, ...], float] = {}
    for (_, number), page in pages.items():
        if number in workers and workers[number].phase in CURRENT:
            for file, end_s in zip(supervisor.options.tls_cert, counters.CERTIFICATES.of(page), strict=False):
                if end_s:
                    key = (os.path.basename(file),)
                    ends[key] = min(end_s, ends.get(key, end_s))
    yield _gauge(
        "tls_certificate_expiry_timestamp_seconds",
        "When a certificate that workers use expires, in seconds since 1970.",
        ("certificate",),
        ends,
    )


def _of_service(supervisor: Supervisor) -> Iterator[Metric]:
    service, pid = supervisor.service, os.getpid()
    stages = {(each.value,): float(each is service.stage) for each in Stage}
    yield _gauge("stage", "1 for the stage of the service, as its status port tells it.", ("stage",), stages)
    yield _gauge("generation", "The generation that serves.", (), {(): service.generation})
    yield _gauge("supervisor_resident_memory_bytes", "Resident memory of the supervisor.", (), {(): rss_bytes(pid)})
    yield _gauge(
        "supervisor_start_time_seconds",
        "When the supervisor was started, in seconds since 1970.",
        (),
        {(): time.time() - (time.monotonic() - supervisor.started_at)},
    )
    yield _counter("supervisor_cpu_seconds", "Processor time of the supervisor.", (), {(): cpu_s(pid)})
    labels = {
        "version": __version__,
        "python": platform.python_version(),
        "service": supervisor.name,
    }
    yield _gauge("build_info", "The versions of this supervisor; always 1.", tuple(labels), {tuple(labels.values()): 1})
