"""One worker, from the supervisor's side."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from anyio.abc import UNIXSocketStream

from hotport.kernel.spawn import Child, spawn
from hotport.supervisor import process as under_test
from hotport.supervisor.contain import retried
from hotport.supervisor.process import WorkerProcess
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import AcceptOrder, Hello, Order, Probed, ProbeOrder, Word, decode, encode
from tests.support import DEADLINE_S

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_conversation_ends_with_its_worker_though_a_child_of_it_holds_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with a process pool was killed, and a minute later the port was refused: the supervisor had ended."""
    monkeypatch.setattr(under_test, "LAST_WORDS_S", 0.01)
    control = str(tmp_path / "worker.sock")
    child = spawn(["sleep", "60"], environment=os.environ, cwd="/")
    process = WorkerProcess(1, 1, child, control, is_foreign=False)
    held: list[UNIXSocketStream] = []
    has_connected, has_ended = anyio.Event(), anyio.Event()

    async def hold(stream: UNIXSocketStream) -> None:
        held.append(stream)
        has_connected.set()
        await has_ended.wait()

    async def converse() -> None:
        await process.converse(lambda *_: None)
        has_ended.set()

    async with await anyio.create_unix_listener(control) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, hold)  # type: ignore[arg-type]
        tasks.start_soon(converse)
        with anyio.fail_after(DEADLINE_S):
            await has_connected.wait()
            process.order(AcceptOrder())
            process.kill()
            await process.wait_ended()
            assert process.is_talking
            assert process.collect() == "killed by SIGKILL"
            await has_ended.wait()
        tasks.cancel_scope.cancel()
    for stream in held:
        await stream.aclose()


async def test_worker_that_closes_the_conversation_and_lives_on_is_connected_to_again(tmp_path: Path) -> None:
    """It left after orphan_timeout, as if its supervisor had died: one order had failed."""
    control = str(tmp_path / "worker.sock")
    process = WorkerProcess(1, 1, Child(os.getpid(), -1), control, is_foreign=False)
    has_come_again = anyio.Event()
    count = 0

    async def greet(stream: UNIXSocketStream) -> None:
        nonlocal count
        count += 1
        async with stream:
            if count == 2:
                has_come_again.set()
                os.unlink(control)  # it leaves

    async with await anyio.create_unix_listener(control) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, greet)  # type: ignore[arg-type]
        with anyio.fail_after(DEADLINE_S):
            await process.converse(lambda *_: None)
        assert has_come_again.is_set()
        assert count == 2
        tasks.cancel_scope.cancel()


async def test_conversation_that_fails_is_taken_up_again_with_the_orders_that_are_left(tmp_path: Path) -> None:
    control = str(tmp_path / "worker.sock")
    process = WorkerProcess(1, 1, Child(os.getpid(), -1), control, is_foreign=False)
    connections: list[UNIXSocketStream] = []
    ordered: list[type] = []
    is_obeyed = anyio.Event()

    async def greet(stream: UNIXSocketStream) -> None:
        connections.append(stream)
        async with stream:
            await stream.send(encode_frame(encode(Hello(pid=1, service="svc", generation=1, worker=1))))
            decoder = FrameDecoder()
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    ordered.extend(type(decode(each, Order)) for each in decoder.feed(await stream.receive()))
                    is_obeyed.set()

    def hear(worker: int, word: Word) -> None:
        if len(connections) == 1:
            raise LookupError("a bug of ours")
        process.order(AcceptOrder())

    async with await anyio.create_unix_listener(control) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, greet)  # type: ignore[arg-type]
        tasks.start_soon(retried, "worker.conversation", process.converse, hear)
        with anyio.fail_after(DEADLINE_S):
            await is_obeyed.wait()
        tasks.cancel_scope.cancel()
    assert len(connections) == 2
    assert ordered == [AcceptOrder]
    os.unlink(control)


async def test_worker_that_answers_nothing_is_asked_a_bounded_number_of_times(tmp_path: Path) -> None:
    """Each health probe of a worker that was stopped left a question and an order behind."""
    process = WorkerProcess(1, 1, Child(os.getpid(), -1), str(tmp_path / "worker.sock"), is_foreign=False)
    process.is_talking = True
    for _ in range(2 * under_test.ASKED_MAX):
        assert await process.ask(ProbeOrder(path="/", timeout_s=1.0), Probed, 0.0) is None
    assert len(process._asked) == len(process._orders) == under_test.ASKED_MAX
