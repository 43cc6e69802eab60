"""Tasks that nothing awaits."""

from __future__ import annotations

import asyncio

import pytest

from hotport.worker import background

pytestmark = pytest.mark.anyio


async def test_error_is_logged_at_once_and_ends_only_the_task(log: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise LookupError("a bug of ours")

    tasks: set[asyncio.Task[None]] = set()
    task = background.start("probe", fail(), tasks)
    assert tasks == {task}
    await asyncio.wait(tasks)
    await asyncio.sleep(0)
    assert not tasks
    assert "probe.failed" in log.text
    assert "a bug of ours" in log.text


async def test_cancellation_is_no_error(log: pytest.LogCaptureFixture) -> None:
    tasks: set[asyncio.Task[None]] = set()
    background.start("probe", asyncio.Event().wait(), tasks).cancel()  # type: ignore[arg-type]
    await asyncio.wait(tasks)
    await asyncio.sleep(0)
    assert not tasks
    assert not log.text
