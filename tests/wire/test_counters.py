"""The layout of counters: it only grows, and pages of garbage are bounded."""

from __future__ import annotations

import re

from hotport.adapters.asgi.http import HttpConnection
from hotport.adapters.asgi.websocket import WebSocketConnection
from hotport.adapters.protocol import _TrackedBase
from hotport.adapters.stream import Stream
from hotport.model.fates import Fate
from hotport.wire import counters
from hotport.wire.counters import CELLS, MAGIC, Section, fold, request_cell


def test_sections_lie_behind_each_other_as_they_always_have() -> None:
    """Pages outlive versions: to move a section would be to read another one's numbers in its place."""
    found = {name: value for name, value in vars(counters).items() if isinstance(value, Section)}
    assert [(name, *section[:2]) for name, section in sorted(found.items(), key=lambda item: item[1].start)] == [
        ("STATE", 1, 1),
        ("REQUESTS", 8, 960),
        ("TIMEOUTS", 968, 1),
        ("ACCEPTED", 969, 1),
        ("ADOPTED", 970, 1),
        ("LOG_DROPPED", 971, 1),
        ("CLOSED", 972, 48),
        ("OPEN", 1020, 16),
        ("CERTIFICATES", 1036, 16),
        ("RESTARTS", 1052, 8),
        ("PHASE_NS", 1060, 32),
        ("PHASE_COUNT", 1092, 32),
        ("GAP", 1124, 2),
        ("WORKERS", 1126, 16),
    ]
    assert counters.WORKERS.end <= CELLS
    assert request_cell(0, 0) == counters.REQUESTS.start
    last = request_cell(len(counters.METHODS) - 1, len(counters.STATUSES) - 1)
    assert last + counters.BUCKETS + 1 == counters.REQUESTS.end
    assert counters.FATES.index("finished") == 0
    assert counters.FATES.index(counters.KILLED) == 24


def test_names_fit_into_their_sections_and_are_complete() -> None:
    assert len(counters.FATES) <= counters.CLOSED.size
    assert set(counters.FATES) - {counters.KILLED} == {fate.value for fate in Fate} - {Fate.WORKERS_KILLED.value}
    assert len(counters.KINDS) <= counters.OPEN.size
    kinds = {each.kind for each in (HttpConnection, WebSocketConnection, Stream, _TrackedBase)}
    assert kinds == set(counters.KINDS)
    assert len(counters.PHASES) <= counters.PHASE_NS.size
    assert len(counters.OUTCOMES) <= counters.RESTARTS.size
    assert len(counters.WORKER_EVENTS) <= counters.WORKERS.size
    assert all(re.fullmatch(r"[a-zA-Z_ 1-5]+", name) for name in (*counters.PHASES, *counters.METHODS))


def page(**cells: int) -> list[int]:
    result = [0] * CELLS
    result[0] = MAGIC
    result[counters.STATE.start] = 1
    for name, value in cells.items():
        result[getattr(counters, name).start] = value
    return result


def test_a_total_adds_counters_and_forgets_how_things_were() -> None:
    total = fold((), [page(ACCEPTED=3, OPEN=2, CERTIFICATES=99), page(ACCEPTED=4, OPEN=1)])
    assert total[counters.ACCEPTED.start] == 7
    assert sum(counters.OPEN.of(total)) == sum(counters.CERTIFICATES.of(total)) == 0
    assert total[counters.STATE.start] == 0
    assert total[counters.CLOSED.start + counters.FATES.index(counters.KILLED)] == 3
    assert fold(total, []) == total
    assert fold(total[:1000], [])[:1000] == total[:1000]  # of an earlier version, which had fewer


def test_a_total_of_garbage_is_a_total() -> None:
    full = [(1 << 64) - 1] * CELLS
    total = fold(fold((), [full, full]), [full])
    assert len(total) == CELLS
    assert all(0 <= value < 1 << 64 for value in total)
    assert total[0] == MAGIC
