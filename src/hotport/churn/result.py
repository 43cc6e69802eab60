"""The result of a run, as engines send it and ``--json`` and the HTML page show it.

Times are milliseconds since the run began; latencies are microseconds, counted from the *intended* start of an attempt
(a client that waits for a slow server does not stop the clock: no coordinated omission).
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["FORMAT", "Bucket", "Incident", "Lag", "Load", "RestartMark", "Result", "Target", "Verdict"]

#: Raised when a reader of an older result would be wrong about a newer one.
FORMAT = 1


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The load asked for of one kind of client.

    Attributes:
        rate: Attempts a second over all engines, for kinds that are asked for by rate; else 0.
        count: Connections held over all engines, for kinds that are asked for by number; else 0.
        think_ms: Between an answer and the next attempt on a held connection.
    """

    kind: str
    rate: float = 0.0
    count: int = 0
    think_ms: float = 0.0


class Target(msgspec.Struct, frozen=True):
    """The target of the load.

    Attributes:
        host: As it was given.
        address: What `host` was resolved to, once for all engines: the first address that answered.
        socket_path: Of a Unix socket, which `host` and `port` then do not name; ``@name`` is an abstract one.
    """

    url: str
    host: str
    port: int
    is_http: bool
    is_tls: bool
    socket_path: str = ""
    address: str = ""


class Bucket(msgspec.Struct):
    """One slice of the run, by the time at which attempts ended.

    Attributes:
        at_ms: Its beginning.
        fates: ``{kind: {fate or event: count}}``.
        latency: Of whole answers, in time or late: ``{kind: {histogram bucket: count}}`` (`churn.histogram`).
        answered_by: Whole answers by who gave them, where the target tells: ``{"generation 2": 512}``.
        in_flight: Attempts under way at its end.
        connections: Open at its end.
        lag: Of the attempts that began in it, as in `Lag`: a histogram.
    """

    at_ms: int
    fates: dict[str, dict[str, int]] = {}
    latency: dict[str, dict[int, int]] = {}
    answered_by: dict[str, int] = {}
    in_flight: int = 0
    connections: int = 0
    lag: dict[int, int] = {}


class Incident(msgspec.Struct, frozen=True):
    """One attempt that was lost, or late.

    Attributes:
        intended_ms: When it should have begun.
        ended_ms: When its fate was known.
        detail: The errno's name, the status, the number of the message; for people.
    """

    kind: str
    fate: str
    intended_ms: float
    ended_ms: float
    detail: str = ""


class RestartMark(msgspec.Struct):
    """One restart on the time line.

    Attributes:
        ended_ms: When the command ended, or the report said so; None if that is not known (a signal), or it never did.
        outcome: ``done``, ``aborted``, ``failed``, ``sent`` (a signal) or ``timed out``.
        report: hotport's own restart report, if the target is one.
    """

    number: int
    how: str
    began_ms: float
    ended_ms: float | None = None
    outcome: str = ""
    detail: str = ""
    report: dict[str, Any] | None = None


class Lag(msgspec.Struct):
    """How late the engines began attempts, in microseconds."""

    p50: float = 0.0
    p99: float = 0.0
    maximum: float = 0.0


class Verdict(msgspec.Struct):
    """The verdict on a run.

    Attributes:
        is_valid: The engines kept their schedule and had what they needed; else `why_invalid` says what was missing.
        is_clean: Nothing was lost, but for what was allowed, and every limit was kept.
        exit_code: 0 clean and valid, 1 something was lost, 2 the run means nothing.
        allowed: How many of which fate were no matter; None: any number.
        failed: Limits that were asked for and not kept, a sentence each (`churn.gates`).
    """

    is_valid: bool
    is_clean: bool
    exit_code: int
    why_invalid: list[str] = []
    allowed: dict[str, int | None] = {}
    failed: list[str] = []


class Result(msgspec.Struct):
    """Everything about one run.

    Attributes:
        is_partial: It was ended before its time (Ctrl-C).
        own_limits: Attempts that this machine did not let begin, by errno: no fate of the target's.
        accept_gap_ms: For each restart the longest time around it without any new connection being answered;
            None where no client connected.
        totals: ``{kind: {fate or event: count}}`` over the whole run.
        quiet_gap_ms: As `accept_gap_ms`, where no restart is felt; None where that cannot be told.
        usual_gap_ms: The longest gap to be expected by chance around each restart, by how often clients connect: a
            shorter one says nothing. None where no client connected.
    """

    format: int
    target: Target
    loads: list[Load]
    seed: int
    engines: int
    started_at: str
    duration_ms: float
    bucket_ms: int
    late_ms: float
    buckets: list[Bucket]
    totals: dict[str, dict[str, int]]
    incidents: list[Incident]
    incidents_dropped: int
    restarts: list[RestartMark]
    accept_gap_ms: list[float | None]
    lag: Lag
    own_limits: dict[str, int]
    is_partial: bool
    verdict: Verdict
    machine: dict[str, Any]
    quiet_gap_ms: float | None = None
    usual_gap_ms: float | None = None
