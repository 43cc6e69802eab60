"""Where the tasks of a request wait, as a traceback for the log."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Final

__all__ = ["waiting_place"]

#: Frames of a traceback; of more the innermost are kept.
FRAMES_MAX: Final = 64

#: Frames that are followed in one task.
DEPTH_MAX: Final = 1000

#: Tasks among which those of the same request are looked for; with more of them it would take too long.
TASKS_MAX: Final = 1000

#: What each kind of awaitable calls its frame, and what it waits for.
_LINKS: Final = (("cr_frame", "cr_await"), ("gi_frame", "gi_yieldfrom"), ("ag_frame", "ag_await"))


def waiting_place(task: asyncio.Task[Any], scope: object) -> TracebackType | None:
    """Return where a task waits, and behind it where other tasks of the same request do, as one traceback.

    `asyncio.Task.get_stack` has only the outermost frame of a coroutine that waits. Middleware like Starlette's runs
    the application in a task of its own: such tasks are known by a variable ``scope`` that is the request's.
    """
    frames = deque(_frames(task), FRAMES_MAX)
    tasks = asyncio.all_tasks(task.get_loop())
    if len(tasks) <= TASKS_MAX:
        for other in tasks - {task}:
            theirs = list(_frames(other))
            if any(_has(frame, scope) for frame in theirs):
                frames.extend(theirs)
    found: TracebackType | None = None
    for frame in reversed(frames):
        found = TracebackType(found, frame, frame.f_lasti, frame.f_lineno or frame.f_code.co_firstlineno)
    return found


def _frames(task: asyncio.Task[Any]) -> Iterator[FrameType]:
    """The frames of a task that waits, the outermost first."""
    awaited: object = task.get_coro()
    for _ in range(DEPTH_MAX):
        frame = None
        for its_frame, its_await in _LINKS:
            if (frame := getattr(awaited, its_frame, None)) is not None:
                yield frame
                awaited = getattr(awaited, its_await)
                break
        if frame is None:
            return


def _has(frame: FrameType, scope: object) -> bool:
    code = frame.f_code
    return "scope" in code.co_varnames + code.co_cellvars + code.co_freevars and frame.f_locals.get("scope") is scope
