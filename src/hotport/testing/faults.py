"""Applications that fail on demand, to see how a deployment reacts."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, NamedTuple

from hotport.errors import ConfigError
from hotport.options import parse_duration

__all__ = ["FaultyApp"]

VARIABLE: Final = "HOTPORT_FAULTS"

_ONE: Final = re.compile(r"(never-ready|fail-startup|crash-after|slow-drain)(?:=([0-9a-z.]+))?(?:@([0-9]+))?")

#: Faults that take a value, and how it is read.
_VALUES: Final[dict[str, Callable[[str], float]]] = {"crash-after": int, "slow-drain": parse_duration}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[Any]]


class _Fault(NamedTuple):
    name: str
    value: float
    generation: int | None


class FaultyApp:
    """An ASGI application with faults; without any it is `app`.

    ::

        app = FaultyApp(app)  # HOTPORT_FAULTS=fail-startup@2 hotport serve main:app

    Faults stand with commas between them. ``@2`` confines one to generation 2; without it every generation has it.

    - ``never-ready``: the application never finishes its start.
    - ``fail-startup``: it fails in its start.
    - ``crash-after=100``: after so many requests and WebSockets its worker is killed by the next one, as by the
      kernel when memory runs out.
    - ``slow-drain=5s``: it takes so long to shut down.

    Args:
        faults: What ``HOTPORT_FAULTS`` says, if that is not given.

    Raises:
        ConfigError: There is no such fault (HP722).
    """

    def __init__(self, app: Application, faults: str | None = None) -> None:
        self._app = app
        generation = int(os.environ.get("HOTPORT_GENERATION", "0"))
        found = _parse(os.environ.get(VARIABLE, "") if faults is None else faults)
        self._faults = {fault.name: fault.value for fault in found if fault.generation in (None, generation)}
        self._requests = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        self._requests += 1
        if self._requests > self._faults.get("crash-after", self._requests):
            os.kill(os.getpid(), signal.SIGKILL)
        await self._app(scope, receive, send)

    async def _live(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if "never-ready" in self._faults:
            await asyncio.get_running_loop().create_future()
        if "fail-startup" in self._faults:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": "FaultyApp was told to fail"})
            return
        pause_s = self._faults.get("slow-drain", 0.0)
        if not pause_s:
            await self._app(scope, receive, send)
            return
        is_asked = has_answered = False

        async def receive_slowly() -> Message:
            nonlocal is_asked
            message = await receive()
            is_asked = True
            if message["type"] == "lifespan.shutdown":
                await asyncio.sleep(pause_s)
            return message

        async def note(message: Message) -> None:
            nonlocal has_answered
            has_answered = True
            await send(message)

        try:
            await self._app(scope, receive_slowly, note)
        except Exception:
            if has_answered:
                raise
            if not is_asked:  # an application that has no lifespan
                await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive_slowly()
            await send({"type": "lifespan.shutdown.complete"})


def _parse(text: str) -> list[_Fault]:
    return [_one(part.strip()) for part in text.split(",") if part.strip()]


def _one(text: str) -> _Fault:
    try:
        match = _ONE.fullmatch(text)
        if match is None:
            raise ValueError("faults are never-ready, fail-startup, crash-after=N and slow-drain=TIME")
        name, value, generation = match.groups()
        if (name in _VALUES) != (value is not None):
            raise ValueError(f"{name} {'needs' if name in _VALUES else 'has no'} value")
        return _Fault(name, _VALUES[name](value) if value else 0.0, int(generation) if generation else None)
    except ValueError as error:
        raise ConfigError(
            "HP722", f"{text!r} is not a fault", cause=str(error), fix=f"{VARIABLE}=crash-after=100,fail-startup@2"
        ) from None
