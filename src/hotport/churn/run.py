"""One run: engines armed, begun at one moment and listened to, restarts meanwhile, and the result."""

from __future__ import annotations

import asyncio
import math
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import IO, Final, TypeVar

import msgspec

from hotport.churn.gates import Gates, failures
from hotport.churn.histogram import Histogram
from hotport.churn.machine import machine
from hotport.churn.plan import Armed, Begin, End, Plan, Said, Summary, Tick
from hotport.churn.restarts import Restarts
from hotport.churn.result import FORMAT, Bucket, Incident, Lag, Load, RestartMark, Result, Verdict
from hotport.churn.verdict import LAG_P99_US_MAX, judge, window
from hotport.errors import StartError
from hotport.kernel.process import describe_exit

__all__ = [
    "ENGINE",
    "Experiment",
    "Observer",
    "accept_gaps",
    "default_engines",
    "descriptors_needed",
    "quiet_gap",
    "run",
    "shares",
    "usual_gap",
]

#: What an engine is.
ENGINE: Final = (sys.executable, "-P", "-m", "hotport.churn.engine")

#: An engine imports, reads its plan and says that it is armed.
ARM_TIMEOUT_S: Final = 30.0

#: From telling the last engine to the beginning.
BEGIN_S: Final = 0.1

#: Between what the last attempt may take and the end of the patience with an engine.
OVERDUE_S: Final = 15.0

#: One engine can make so many attempts a second with time to spare; held connections ask without being paced.
ATTEMPTS_PER_ENGINE: Final = 1000

#: What a process has open for itself.
OWN_DESCRIPTORS: Final = 32

#: A line holds at most what a summary says: one number for each millisecond of a run.
LINE_BYTES_MAX: Final = 2**28

_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class Experiment:
    """The configuration of a run.

    Attributes:
        plan: Of all engines together.
        allowed: How many of which fate are no matter; None: any number.
        gates: What else the run has to keep.
        settle_s: The load ends so long after the last restart is over and its time between restarts has passed (a
            signal has no report of its end), even if the plan's end is later; None: with the plan.
        lag_p99_us_max: A run whose attempts began later than this means nothing.
    """

    plan: Plan
    engines: int = 1
    restarts: Restarts | None = None
    allowed: Mapping[str, int | None] = field(default_factory=dict)
    settle_s: float | None = None
    lag_p99_us_max: float = LAG_P99_US_MAX
    gates: Gates = field(default_factory=Gates)


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Observer:
    """Callbacks during a run.

    Attributes:
        bucket: Each one when every engine has told its part of it, in order.
        restart: Each mark when it begins, and again when it has an outcome.
    """

    bucket: Callable[[Bucket], None] = _ignore
    restart: Callable[[RestartMark], None] = _ignore


def default_engines(loads: Sequence[Load], cores: int) -> int:
    """Return as many engines as the load needs, and the machine has processors for."""
    return max(1, min(cores, math.ceil(attempts_a_second(loads) / ATTEMPTS_PER_ENGINE)))


def attempts_a_second(loads: Sequence[Load]) -> float:
    """Return about how many attempts a load makes while answers take no time."""
    return sum(load.rate + load.count * 1000 / max(10.0, load.think_ms) for load in loads)


def descriptors_needed(plan: Plan, engines: int) -> int:
    """Return how many descriptors one engine needs if the target stands still for a whole timeout."""
    connections = sum(
        math.ceil(load.count / engines) + math.ceil(load.rate / engines * plan.timeout_ms / 1000) for load in plan.loads
    )
    return OWN_DESCRIPTORS + connections


def shares(plan: Plan, engines: int) -> list[Plan]:
    """Divide a plan among engines: rates evenly, connections as evenly as whole numbers allow."""
    return [
        msgspec.structs.replace(
            plan,
            seed=plan.seed + number,
            loads=[share for load in plan.loads if (share := _share(load, number, engines)) is not None],
            incidents_max=plan.incidents_max // engines,
        )
        for number in range(engines)
    ]


def _share(load: Load, number: int, engines: int) -> Load | None:
    count = load.count // engines + (number < load.count % engines)
    return msgspec.structs.replace(load, rate=load.rate / engines, count=count) if count or load.rate else None


def accept_gaps(answers_ms: Sequence[int], restarts: Sequence[RestartMark], end_ms: float) -> list[float | None]:
    """Return for each restart the longest time without an answer on a new connection that touches it.

    A restart counts from its beginning until the next one begins: what goes wrong late is its doing, too.

    Args:
        answers_ms: In order.
    """
    if not (answers_ms and restarts):
        return [None] * len(restarts)
    times = [0.0, *answers_ms, max(end_ms, float(answers_ms[-1]))]
    pauses = list(pairwise(times))
    ends_ms = [mark.began_ms for mark in restarts[1:]] + [times[-1]]
    return [
        max((after - before for before, after in pauses if after > mark.began_ms and before < until), default=None)
        for mark, until in zip(restarts, ends_ms, strict=True)
    ]


def quiet_gap(answers_ms: Sequence[int], restarts: Sequence[RestartMark], end_ms: float) -> float | None:
    """Return the longest time without an answer on a new connection where no restart is felt; None if there is none.

    Args:
        answers_ms: In order.
    """
    windows = [window(mark) for mark in restarts]
    times = [0.0, *answers_ms, end_ms] if answers_ms else []
    quiet = (
        after - before
        for before, after in pairwise(times)
        if not any(began < after and before < ended for began, ended in windows)
    )
    return max(quiet, default=None)


def usual_gap(answers: int, duration_ms: float, restarts: int) -> float | None:
    """Return the longest gap to be expected by chance in the time from one restart to the next.

    Clients connect at random moments, so gaps are exponentially distributed: the longest of n is on average the mean
    times (ln n + 0.577).
    """
    if not answers or duration_ms <= 0:
        return None
    mean_ms = duration_ms / answers
    return mean_ms * (math.log(max(1.0, answers / max(1, restarts))) + 0.577)


async def run(experiment: Experiment, observer: Observer | None = None, stop: asyncio.Event | None = None) -> Result:
    """Put the target under load, restart it meanwhile, and report the fate of every attempt.

    Args:
        stop: When it is set, the engines say what there is, and the result is partial.

    Raises:
        StartError: An engine could not begin (HP710). One that ends later only makes the result invalid.

    Cancellation: safe; engines and a restart's command are ended.
    Processes: engines, and what restarts start; all have ended when this returns, but for what a command has left in
        the background on purpose.
    """
    plan, observer, stop = experiment.plan, observer or Observer(), stop or asyncio.Event()
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(_engine(number, share))
            for number, share in enumerate(shares(plan, experiment.engines), 1)
        ]
        for engine in engines:
            await engine.arm()
        started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        begin_ns = time.monotonic_ns() + round(BEGIN_S * 1e9)
        for engine in engines:
            engine.send(Begin(begin_ns))

        def now_ms() -> float:
            return (time.monotonic_ns() - begin_ns) / 1e6

        end_ms = plan.duration_ms
        merger = _Merger(len(engines), observer.bucket)
        marks: dict[int, RestartMark] = {}

        def tell(mark: RestartMark) -> None:
            marks[mark.number] = mark
            observer.restart(mark)

        async def stop_engines() -> None:
            await stop.wait()
            for engine in engines:
                engine.stop()
            restarting.cancel()

        async def restart() -> None:
            nonlocal end_ms
            if experiment.restarts is None:
                return
            try:
                await experiment.restarts.perform(now_ms, plan.duration_ms, tell)
            finally:  # also if an observer has raised
                if experiment.settle_s is not None:
                    began_ms = max((mark.began_ms for mark in marks.values()), default=0.0)
                    over_ms = max(now_ms(), began_ms + experiment.restarts.every_s * 1000)
                    end_ms = min(end_ms, over_ms + experiment.settle_s * 1000)
                    for engine in engines:
                        engine.send(End(begin_ns + round(end_ms * 1e6)))

        overdue_s = BEGIN_S + (plan.duration_ms + plan.timeout_ms + plan.slow_ms) / 1000 + OVERDUE_S
        restarting = asyncio.create_task(restart())
        stopping = asyncio.create_task(stop_engines())
        try:
            async with asyncio.TaskGroup() as tasks:
                for engine in engines:
                    tasks.create_task(engine.listen(merger, overdue_s))
            duration_ms = max(0.0, min(now_ms(), end_ms))
            await asyncio.wait([restarting])  # one that began in time has its time
            if not restarting.cancelled():
                restarting.result()
        finally:
            for task in (stopping, restarting):
                task.cancel()
            await asyncio.wait([stopping, restarting])
    return _result(
        experiment,
        engines=engines,
        merger=merger,
        restarts=list(marks.values()),
        started_at=started_at,
        duration_ms=duration_ms,
        is_partial=stop.is_set(),
    )


def _result(
    experiment: Experiment,
    *,
    engines: Sequence[_Engine],
    merger: _Merger,
    restarts: list[RestartMark],
    started_at: str,
    duration_ms: float,
    is_partial: bool,
) -> Result:
    plan = experiment.plan
    totals: dict[str, dict[str, int]] = {}
    for bucket in merger.buckets:
        _add_fates(totals, bucket.fates)
    lags, own_limits, answers_ms = Histogram(), dict[str, int](), set[int]()
    for engine in engines:
        lags.merge(engine.summary.lag)
        _add(own_limits, engine.summary.own_limits)
        answers_ms.update(engine.summary.connect_answers_ms)
    lag = Lag(lags.percentile(0.5), lags.percentile(0.99), lags.maximum)
    errors = [f"engine {engine.number}: {error}" for engine in engines if (error := engine.summary.error)]
    wanted = experiment.restarts.times if experiment.restarts else 0
    if len(restarts) < wanted and not is_partial:
        errors.append(
            f"the load was over before restart {len(restarts) + 1} of {wanted}: restarts took longer than --every"
            " allows for, or --duration is too short"
        )
    if not is_partial:  # what was to be tested has not happened
        errors += [
            f"restart {mark.number} {mark.outcome}: {mark.detail}"
            for mark in restarts
            if mark.outcome in {"failed", "timed out"}
        ]
    answers = sorted(answers_ms)
    result = Result(
        format=FORMAT,
        target=plan.target,
        loads=plan.loads,
        seed=plan.seed,
        engines=experiment.engines,
        started_at=started_at,
        duration_ms=duration_ms,
        bucket_ms=plan.bucket_ms,
        late_ms=plan.late_ms,
        buckets=merger.buckets,
        totals=totals,
        incidents=sorted(merger.incidents, key=lambda incident: incident.ended_ms),
        incidents_dropped=merger.incidents_dropped,
        restarts=restarts,
        accept_gap_ms=accept_gaps(answers, restarts, duration_ms),
        quiet_gap_ms=quiet_gap(answers, restarts, duration_ms),
        usual_gap_ms=usual_gap(len(answers), duration_ms, len(restarts)),
        lag=lag,
        own_limits=own_limits,
        is_partial=is_partial,
        verdict=Verdict(is_valid=False, is_clean=False, exit_code=2),
        machine=machine(),
    )
    missing, failed = failures(experiment.gates, result)
    result.verdict = judge(
        totals,
        lag=lag,
        own_limits=own_limits,
        engine_errors=errors + (missing if not is_partial else []),
        allowed=experiment.allowed,
        failed=failed,
        lag_p99_us_max=experiment.lag_p99_us_max,
    )
    return result


# -- buckets ------------------------------------------------------------------------------------------------


class _Merger:
    """Merges the reports of engines about the same slice of time."""

    def __init__(self, engines: int, tell: Callable[[Bucket], None]) -> None:
        self.buckets: list[Bucket] = []
        self.incidents: list[Incident] = []
        self.incidents_dropped = 0
        self._tell = tell
        self._reached = [-math.inf] * engines
        self._open: dict[int, Bucket] = {}

    def hear(self, engine: int, tick: Tick) -> None:
        self.incidents += tick.incidents
        self.incidents_dropped += tick.incidents_dropped
        told = tick.bucket
        if (bucket := self._open.get(told.at_ms)) is None:
            self._open[told.at_ms] = told
        else:
            _add_fates(bucket.fates, told.fates)
            for kind, counts in told.latency.items():
                _add(bucket.latency.setdefault(kind, {}), counts)
            _add(bucket.answered_by, told.answered_by)
            _add(bucket.lag, told.lag)
            bucket.in_flight += told.in_flight
            bucket.connections += told.connections
        self._reach(engine, told.at_ms)

    def end(self, engine: int) -> None:
        """Stop waiting for this engine."""
        self._reach(engine, math.inf)

    def _reach(self, engine: int, at_ms: float) -> None:
        self._reached[engine - 1] = at_ms
        for at in sorted(at for at in self._open if at <= min(self._reached)):
            bucket = self._open.pop(at)
            self.buckets.append(bucket)
            self._tell(bucket)


def _add_fates(into: dict[str, dict[str, int]], found: Mapping[str, Mapping[str, int]]) -> None:
    for kind, counts in found.items():
        _add(into.setdefault(kind, {}), counts)


def _add(into: dict[_Key, int], found: Mapping[_Key, int]) -> None:
    for key, count in found.items():
        into[key] = into.get(key, 0) + count


# -- engines ------------------------------------------------------------------------------------------------


class _Engine:
    """One process, from its start to its summary.

    Attributes:
        summary: What it said last; if it did not, only why.
    """

    def __init__(self, number: int, process: asyncio.subprocess.Process, words: IO[bytes]) -> None:
        self.number = number
        self.summary = Summary({})
        self._process = process
        self._words = words
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    def send(self, message: msgspec.Struct) -> None:
        if not self._stdin.is_closing():  # as it is when it was told to stop, or has ended
            self._stdin.write(msgspec.json.encode(message) + b"\n")

    def stop(self) -> None:
        self._stdin.close()

    async def arm(self) -> None:
        try:
            async with asyncio.timeout(ARM_TIMEOUT_S):
                said = await self._hear()
                if isinstance(said, Armed):
                    return
                why = said.error if isinstance(said, Summary) else await self._last_words()
        except TimeoutError:
            why = f"it was not armed within {ARM_TIMEOUT_S:g} s"
        except (msgspec.MsgspecError, ValueError) as error:
            why = f"it said what cannot be read: {error}"
        raise StartError(
            "HP710",
            f"engine {self.number} could not begin",
            cause=why,
            note="try a smaller load, or fewer --engines",
        )

    async def listen(self, merger: _Merger, overdue_s: float) -> None:
        """Read everything that the engine reports, to the end of its process."""
        summary: Summary | None = None
        why = ""
        try:
            async with asyncio.timeout(overdue_s):
                while said := await self._hear():
                    match said:
                        case Tick():
                            merger.hear(self.number, said)
                        case Summary():
                            summary = said
                why = await self._last_words()
        except TimeoutError:
            why = f"it was not over after {overdue_s:.0f} s"
        except (msgspec.MsgspecError, ValueError) as error:
            why = f"it said what cannot be read: {error}"
        merger.end(self.number)
        self.summary = summary or Summary({}, error=why)

    async def _hear(self) -> Armed | Tick | Summary | None:
        line = await self._stdout.readline()
        return _DECODER.decode(line) if line else None

    async def _last_words(self) -> str:
        status = await self._process.wait()
        self._words.seek(0)
        said = self._words.read().decode(errors="replace").strip().splitlines()
        return f"{describe_exit(status)} before its time" + (f": {said[-1]}" if said else "")


_DECODER: Final = msgspec.json.Decoder(Said)


@asynccontextmanager
async def _engine(number: int, plan: Plan) -> AsyncIterator[_Engine]:
    with tempfile.TemporaryFile() as words:
        process = await asyncio.create_subprocess_exec(
            *ENGINE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=words,
            limit=LINE_BYTES_MAX,
            start_new_session=True,  # Ctrl-C is for us: engines say what they have seen first
        )
        try:
            engine = _Engine(number, process, words)
            engine.send(plan)
            yield engine
        finally:
            with suppress(ProcessLookupError):
                process.kill()  # none that has said its summary is left, and no other one is waited for
            await process.wait()
