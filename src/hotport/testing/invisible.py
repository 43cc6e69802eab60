"""Restart a service under load, and fail if a client noticed."""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any, Final, ParamSpec

from hotport.churn.fates import ConnectionEvent, Fate, Kind
from hotport.churn.plan import Plan
from hotport.churn.restarts import AskHotport, Restarts
from hotport.churn.result import Load, RestartMark, Result
from hotport.churn.run import Experiment, Observer, run
from hotport.churn.target import BY_RATE, resolve
from hotport.churn.verdict import sentences
from hotport.errors import ConfigError, nearest
from hotport.testing.service import Service

__all__ = ["KINDS", "assert_invisible_restart", "assert_invisible_restart_async"]

_Parameters = ParamSpec("_Parameters")

#: Clients of an application that speaks HTTP: each is in another state when the restart comes.
KINDS: Final = ("connect", "keepalive", "late", "halfhead")

#: How many of a kind that is only named: attempts a second, or connections held.
_RATE: Final = 10.0
_RATES: Final = {Kind.CONNECT: 50.0}
_COUNT: Final = 10
_THINK_MS: Final = 50.0

#: Late, halfhead and upload clients take so long: some of them are in the middle of it at each restart.
_SLOW_MS: Final = 300.0

#: Load before the first restart, between the beginnings of two, and after the last.
_AFTER_S: Final = 0.3
_EVERY_S: Final = 0.5
_SETTLE_S: Final = 0.5

_INCIDENTS: Final = 5


async def assert_invisible_restart_async(
    app: str | Callable[..., Any],
    *,
    kinds: Collection[str] | Mapping[str, float] = KINDS,
    restarts: int = 2,
    workers: int = 2,
    timeout_s: float = 30.0,
    edit: Callable[[int], object] | None = None,
    env: Mapping[str, str] | None = None,
    path: str = "/",
    slow_path: str = "/slow",
    upload_path: str = "/",
    expected_status: int = 200,
    **options: Any,
) -> Result:
    """`assert_invisible_restart` for tests that run in an asyncio event loop.

    Cancellation: safe; the service and its clients are ended.
    """
    loads = _loads(kinds)
    scheme = "tcp" if {load.kind for load in loads} == {Kind.STREAM.value} else None

    def tell(mark: RestartMark) -> None:
        if edit is not None and not mark.outcome:
            edit(mark.number)

    with tempfile.TemporaryDirectory(prefix="hotport-") as directory:
        service = Service(
            app, directory=Path(directory), env=env, timeout_s=timeout_s, **{"workers": workers, **options}
        )
        try:
            await asyncio.to_thread(service.wait_ready)
            url = f"{scheme}://127.0.0.1:{service.port}" if scheme else service.url
            plan = Plan(
                target=resolve(url, timeout_s=timeout_s),
                loads=loads,
                seed=random.randrange(2**31),
                begin_ns=0,
                duration_ms=(_AFTER_S + restarts * (timeout_s + _EVERY_S) + _SETTLE_S) * 1000,
                timeout_ms=timeout_s * 1000,
                expected_status=expected_status,
                path=path,
                slow_path=slow_path,
                upload_path=upload_path,
                slow_ms=_SLOW_MS,
            )
            experiment = Experiment(
                plan,
                restarts=Restarts(
                    AskHotport(service.name, service.runtime / "control.sock"), restarts, _AFTER_S, _EVERY_S, timeout_s
                ),
                settle_s=_SETTLE_S,
                lag_p99_us_max=math.inf,
            )
            result = await run(experiment, Observer(restart=tell))
        finally:
            await asyncio.to_thread(service.end)
        is_done = all(mark.outcome == "done" for mark in result.restarts)
        if not (is_done and result.verdict.is_valid and result.verdict.is_clean):
            raise AssertionError(_told(result, service))
    return result


def _with_parameters_of(
    model: Callable[_Parameters, Coroutine[Any, Any, Result]],
) -> Callable[[Callable[..., Result]], Callable[_Parameters, Result]]:
    """Give two functions one signature, for people, type checkers and documentation."""

    def decorated(function: Callable[..., Result]) -> Callable[_Parameters, Result]:
        function.__signature__ = signature(model)  # type: ignore[attr-defined]
        return function

    return decorated


@_with_parameters_of(assert_invisible_restart_async)
def assert_invisible_restart(*args: Any, **kwargs: Any) -> Result:
    """Serve an application, restart it under load, and fail if a client lost anything by it. It takes about 4 s.

    ::

        def test_restarts_are_invisible() -> None:
            assert_invisible_restart("shop.main:app")

    How late answers are is no matter: the machines that run tests are busy.

    Args:
        app: A target (``"module:app"``, ``"path/file.py:app"``), or a function or class at the top level of a module.
        kinds: Of client, as ``hotport churn`` has them; or how many of which: attempts a second, or connections
            for keepalive, websocket and stream.
        timeout_s: For the service to start, for one attempt and for one restart.
        edit: Called before each restart with its number, from 1: to change the code, for example.
        env: Variables for the service, beside those of this process.
        path, slow_path, upload_path: What clients ask for; the last two those of the kinds slow and upload.
        expected_status: Of every answer.
        options: As ``hotport.run`` takes them, except ``bind``: it is a free port of the loopback interface.

    Raises:
        AssertionError: An attempt was lost, or a restart was not done; with what became of every attempt, and the
            end of the service's log.
        ConfigError: An option is wrong, `app` has no name by which a worker can import it (HP330), or there is no
            such kind of client (HP723).
        StartError: The service did not start (HP720).

    Processes: the service and one engine; all have ended when this returns.
    """
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        raise ConfigError(
            "HP725",
            "assert_invisible_restart cannot run in an event loop",
            cause="it has one of its own, and would stop this one",
            fix="await assert_invisible_restart_async(...)",
        )
    return asyncio.run(assert_invisible_restart_async(*args, **kwargs))


def _loads(kinds: Collection[str] | Mapping[str, float]) -> list[Load]:
    numbers = kinds if isinstance(kinds, Mapping) else dict.fromkeys(kinds, 0.0)
    loads = []
    for name, number in numbers.items():
        try:
            kind = Kind(name)
        except ValueError:
            known = [kind.value for kind in Kind]
            raise ConfigError(
                "HP723",
                f"there are no clients of kind {name!r}",
                cause=f"kinds are {', '.join(known)}",
                fix=f"kinds=[{(nearest(name, known) or KINDS[0])!r}]",
            ) from None
        if kind in BY_RATE:
            loads.append(Load(name, rate=number or _RATES.get(kind, _RATE)))
        else:
            loads.append(Load(name, count=int(number or _COUNT), think_ms=_THINK_MS))
    return loads


def _told(result: Result, service: Service) -> str:
    """Describe everything needed to see what went wrong."""
    parts = ["\n".join(sentences(result)), _table(result.totals)]
    parts += [f"restart {mark.number} {mark.outcome}: {mark.detail}" for mark in result.restarts if mark.detail]
    incidents = result.incidents[:_INCIDENTS]
    parts.append("\n".join(f"{i.ended_ms:8.0f} ms  {i.kind}: {i.fate} ({i.detail})" for i in incidents))
    if (more := len(result.incidents) + result.incidents_dropped - len(incidents)) > 0:
        parts.append(f"and {more:,} more")
    parts.append(f"the service's log ends with:\n{service.log_tail()}")
    return "\n\n".join(part for part in parts if part)


def _table(totals: Mapping[str, Mapping[str, int]]) -> str:
    """Render a table of clients, and of the fates of their attempts and connections."""
    seen = [
        what.value for what in (*Fate, *ConnectionEvent) if any(counts.get(what.value) for counts in totals.values())
    ]
    rows = [("", *seen)]
    rows += [(kind, *(f"{counts.get(what, 0):,}" for what in seen)) for kind, counts in totals.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
