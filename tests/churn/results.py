"""Results of runs that never were, complete and consistent: what is shown of a run is tested without one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from hotport.churn.fates import LOSSES, ConnectionEvent, Fate, Kind
from hotport.churn.histogram import Histogram
from hotport.churn.result import FORMAT, Bucket, Incident, Lag, Load, RestartMark, Result, Target
from hotport.churn.verdict import judge

BUCKET_MS = 100

#: ``{at_ms: {(kind, fate or event): count}}``, on top of what is answered.
Extra = Mapping[int, Mapping[tuple[Kind, Fate | ConnectionEvent], int]]

MACHINE: Mapping[str, Any] = {
    "at": "2026-11-23T12:00:00+00:00",
    "cpu": "Imaginary Processor 9000",
    "cores": 2,
    "kernel": "6.18.0",
    "packages": {"hotport": "0.9.0", "uvloop": "0.22.1"},
    "sysctls": {"net.core.somaxconn": "4096", "net.ipv4.tcp_abort_on_overflow": "0"},
}


def build(
    *,
    duration_ms: int = 12_000,
    restarts: list[RestartMark],
    accept_gap_ms: list[float | None],
    extra: Extra | None = None,
    lag: Lag | None = None,
    own_limits: dict[str, int] | None = None,
    engine_errors: tuple[str, ...] = (),
    allowed: dict[str, int | None] | None = None,
    is_partial: bool = False,
    detail: str = "",
    url: str = "http://127.0.0.1:8000/",
    seed: int = 7,
) -> Result:
    """A run of a keep-alive, a connect and a WebSocket load, slower while it restarts."""
    dice = random.Random(seed)
    buckets: list[Bucket] = []
    incidents: list[Incident] = []
    totals: dict[str, dict[str, int]] = {}
    for at_ms in range(0, duration_ms, BUCKET_MS):
        bucket = Bucket(at_ms=at_ms, fates={}, latency={}, answered_by={})
        number = sum(mark.began_ms <= at_ms for mark in restarts)
        since_ms = at_ms - restarts[number - 1].began_ms if number else 10**6
        factor = 1 + 6 * max(0.0, 1 - since_ms / 900)
        for kind, rate in ((Kind.KEEPALIVE, 30), (Kind.CONNECT, 8), (Kind.WEBSOCKET, 12)):
            answered = max(1, round(dice.gauss(rate, rate**0.5)))
            histogram = Histogram()
            for _ in range(answered):
                histogram.add(round(dice.lognormvariate(6.4, 0.35) * factor * (1.6 if kind is Kind.CONNECT else 1)))
            bucket.latency[kind.value] = histogram.counts
            bucket.fates[kind.value] = {Fate.ANSWERED.value: answered}
            name = f"generation {number + 1}"
            bucket.answered_by[name] = bucket.answered_by.get(name, 0) + answered
        for (kind, what), count in (extra or {}).get(at_ms, {}).items():
            found = bucket.fates[kind.value]
            found[what.value] = found.get(what.value, 0) + count
            if what in LOSSES or what is Fate.LATE:
                ended = at_ms + BUCKET_MS / 2
                took = 10_000.0 if what is Fate.TIMED_OUT else 700.0 if what is Fate.LATE else dice.uniform(0.3, 40)
                words = detail or {Fate.REFUSED: "ECONNREFUSED", Fate.WRONG_STATUS: "503"}.get(what, "")
                incidents += [Incident(kind.value, what.value, ended - took, ended, words) for _ in range(count)]
            if what is Fate.LATE:
                slow = Histogram(bucket.latency[kind.value])
                for _ in range(count):
                    slow.add(700_000)
                bucket.latency[kind.value] = slow.counts
        bucket.in_flight = round(dice.gauss(6, 1.5) * factor)
        bucket.connections = 60 + round(dice.gauss(3, 1))
        buckets.append(bucket)
        for name, counts in bucket.fates.items():
            for what_name, count in counts.items():
                into = totals.setdefault(name, {})
                into[what_name] = into.get(what_name, 0) + count
    lag = lag or Lag(p50=80.0, p99=900.0, maximum=2600.0)
    return Result(
        format=FORMAT,
        target=Target(url=url, host="127.0.0.1", port=8000, is_http=True, is_tls=False),
        loads=[
            Load("keepalive", count=40, think_ms=20.0),
            Load("connect", rate=80.0),
            Load("websocket", count=20, think_ms=160.0),
        ],
        seed=seed,
        engines=2,
        started_at="2026-11-23T12:00:00+00:00",
        duration_ms=float(duration_ms),
        bucket_ms=BUCKET_MS,
        late_ms=500.0,
        buckets=buckets,
        totals=totals,
        incidents=incidents,
        incidents_dropped=0,
        restarts=restarts,
        accept_gap_ms=accept_gap_ms,
        lag=lag,
        own_limits=own_limits or {},
        is_partial=is_partial,
        verdict=judge(totals, lag=lag, own_limits=own_limits or {}, engine_errors=engine_errors, allowed=allowed),
        machine=dict(MACHINE),
    )


def mark(number: int, began_ms: float, ended_ms: float | None, outcome: str = "done", **more: Any) -> RestartMark:
    """One restart by hotport's own command."""
    return RestartMark(number, "hotport restart svc", began_ms, ended_ms, outcome, **more)


def clean() -> Result:
    """Three restarts, nothing lost; 40 clients had to reconnect."""
    told: Extra = {
        at: {
            (Kind.KEEPALIVE, ConnectionEvent.TOLD_TO_CLOSE): count,
            (Kind.KEEPALIVE, ConnectionEvent.RECONNECTED): count,
        }
        for at, count in ((2200, 14), (5200, 13), (8200, 13))
    }
    connections = {"told_to_close": 14, "moved": 1200, "of_which_nobody_knows_yet": 1, "cut_body": 0}
    report = {"generation": 2, "phases": [{"name": "ready", "ms": 210.0}], "connections": connections}
    return build(
        restarts=[mark(1, 2040, 2700, report=report), mark(2, 5010.5, 5640), mark(3, 8030, 8710)],
        accept_gap_ms=[21.0, 18.5, 33.0],
        extra=told,
    )


def lossy() -> Result:
    """Losses of every kind around a restart and before it, late answers, and a restart that was aborted."""
    extra: dict[int, dict[tuple[Kind, Fate | ConnectionEvent], int]] = {
        1000: {(Kind.CONNECT, Fate.WRONG_STATUS): 1},
        2400: {(Kind.CONNECT, Fate.REFUSED): 120, (Kind.KEEPALIVE, Fate.RESET_AFTER_SEND): 5},
        2500: {(Kind.CONNECT, Fate.REFUSED): 92, (Kind.KEEPALIVE, Fate.CLOSED_UNANSWERED): 4},
        2600: {(Kind.KEEPALIVE, Fate.TRUNCATED): 2, (Kind.CONNECT, Fate.RESET_BEFORE_SEND): 3},
        2700: {(Kind.WEBSOCKET, Fate.LOST): 6, (Kind.WEBSOCKET, Fate.DUPLICATED): 1},
        2800: {(Kind.WEBSOCKET, Fate.OUT_OF_ORDER): 1, (Kind.KEEPALIVE, Fate.LATE): 9},
        3000: {(Kind.WEBSOCKET, ConnectionEvent.RECONNECTED): 20, (Kind.KEEPALIVE, ConnectionEvent.IDLE_CLOSE): 11},
        7300: {(Kind.KEEPALIVE, Fate.REFUSED): 3},
        9000: {(Kind.CONNECT, Fate.TIMED_OUT): 2},
    }
    return build(
        restarts=[mark(1, 2350, 2900), mark(2, 7040, 7400, "aborted", detail="HP403 not ready within 30 s")],
        accept_gap_ms=[310.0, None],
        extra=extra,
    )


def invalid() -> Result:
    """The machine was too busy and ran out of ports; an engine died."""
    return build(
        restarts=[mark(1, 3000, 3600)],
        accept_gap_ms=[25.0],
        lag=Lag(p50=900.0, p99=23_000.0, maximum=180_000.0),
        own_limits={"EADDRNOTAVAIL": 17},
        engine_errors=("engine 2 ended with exit code -9",),
    )


def partial() -> Result:
    """Ctrl-C in the middle of a restart by a signal, whose end nobody knows."""
    return build(
        duration_ms=3400,
        restarts=[RestartMark(1, "SIGHUP to pid 4312", 3000, None, "sent")],
        accept_gap_ms=[None],
        is_partial=True,
    )


def quiet() -> Result:
    """No restart at all."""
    return build(duration_ms=4000, restarts=[], accept_gap_ms=[])


def hostile() -> Result:
    """What a page would stumble over, in every string that somebody else chooses."""
    evil = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&'\u2028"
    result = build(
        restarts=[RestartMark(1, evil, 1000, 1500, evil, evil)],
        accept_gap_ms=[1.0],
        extra={1200: {(Kind.CONNECT, Fate.REFUSED): 2}},
        duration_ms=2500,
        engine_errors=(evil,),
        detail=evil,
        url=evil,
    )
    result.buckets[-1].answered_by = {evil: 5}
    result.machine[evil] = evil
    return result
