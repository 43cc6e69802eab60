"""Background tasks, which no code awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hotport.observe.logs import get_shared_logger

__all__ = ["start"]


def start(what: str, steps: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    """Start a task; an unexpected error ends only this one, and is logged as ``WHAT.failed``.

    Args:
        tasks: Holds it while it runs.
    """

    def note_end(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            get_shared_logger("hotport.worker").error(f"{what}.failed", exc_info=error)

    task = asyncio.get_running_loop().create_task(steps)
    tasks.add(task)
    task.add_done_callback(note_end)
    return task
