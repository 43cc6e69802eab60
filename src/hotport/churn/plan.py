"""Messages to and from engines: the only contract between engines and their coordinator.

An engine is a process, ``python -m hotport.churn.engine``. It reads one `Plan` as a line of JSON from stdin, prints
``{"type": "armed"}`` when it could begin, reads a second line, `Begin`, begins when CLOCK_MONOTONIC (the same in every
process of a machine) reaches that, and prints one `Tick` a line for each bucket and one `Summary` as its last
line. `End`, on a third line, brings its end forward. The end of its stdin means: stop now, and say what there is.
"""

from __future__ import annotations

import msgspec

from hotport.churn.result import Bucket, Incident, Load, Target

__all__ = ["Armed", "Begin", "End", "Plan", "Said", "Summary", "Tick"]


class Plan(msgspec.Struct, frozen=True):
    """One engine's share of a run.

    Attributes:
        loads: With this engine's share of each rate and count.
        begin_ns: On CLOCK_MONOTONIC; 0 if `Begin` says it, in a second line.
        seed: Of every random choice; differs between engines.
        arrivals: ``even`` or ``poisson``: how attempts at a rate are spread.
        timeout_ms: From an attempt's intended start to giving it up. What the client itself waits on purpose, and what
            the engine was late, is added: neither is the target's.
        late_ms: Above this a whole answer is late; 0: never.
        expected_status: Of whole answers; others are wrong.
        path, slow_path, upload_path: What is asked for over HTTP.
        upload_bytes: Sent by ``upload``, over `slow_ms`.
        slow_ms: How long ``late`` waits after connecting, ``halfhead`` between its halves, and ``upload`` takes for its
            body; no part of the latency.
        verify_tls: Whether certificates must be good.
        generation_header: Of answers, in lower case: says who has answered.
        incidents_max: How many are told one by one; the rest is only counted.
    """

    target: Target
    loads: list[Load]
    seed: int
    begin_ns: int
    duration_ms: float
    bucket_ms: int = 100
    arrivals: str = "poisson"
    timeout_ms: float = 10_000.0
    late_ms: float = 0.0
    expected_status: int = 200
    path: str = "/"
    slow_path: str = "/slow"
    upload_path: str = "/"
    upload_bytes: int = 256 * 1024
    slow_ms: float = 1000.0
    verify_tls: bool = False
    generation_header: str = "x-generation"
    incidents_max: int = 2000


class Begin(msgspec.Struct, frozen=True):
    """The moment at which every engine begins; sent once all are armed."""

    at_ns: int


class End(msgspec.Struct, frozen=True):
    """No attempt begins from then on, if that is before the plan's own end; those in progress continue."""

    at_ns: int


class Armed(msgspec.Struct, tag="armed"):
    """The engine is ready: it has its descriptors, and its target is an address."""


class Tick(msgspec.Struct, tag="tick"):
    """One bucket, as soon as it is over, and the incidents in it."""

    bucket: Bucket
    incidents: list[Incident] = []
    incidents_dropped: int = 0


class Summary(msgspec.Struct, tag="summary"):
    """The end of an engine.

    Attributes:
        lag: Histogram of how late attempts began through no fault of the target's, in microseconds.
        own_limits: Attempts that this machine did not let begin, by errno's name.
        connect_answers_ms: When attempts on new connections were answered, thinned to one a millisecond: for the
            accept gap.
    """

    lag: dict[int, int]
    own_limits: dict[str, int] = {}
    connect_answers_ms: list[int] = []
    error: str = ""


Said = Armed | Tick | Summary
