"""A command of the operator runs to its end, or is ended, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from hotport.errors import KernelError
from hotport.kernel.process import open_descriptors
from hotport.supervisor.command import OUTPUT_BYTES_MAX, Command
from tests.support import DEADLINE_S, watching_pid

pytestmark = pytest.mark.anyio


def command(
    script: str, *, stdin: bytes = b"", timeout_s: float | None = None, kill_timeout_s: float = 60.0
) -> Command:
    return Command(
        ["sh", "-c", script],
        environment=dict(os.environ),
        cwd="/",
        stdin=stdin,
        timeout_s=timeout_s,
        kill_timeout_s=kill_timeout_s,
    )


async def wait_output(running: Command, text: str) -> None:
    """Return when the command has written this."""
    with anyio.fail_after(DEADLINE_S):
        while text not in running.output:
            await anyio.lowlevel.checkpoint()


async def test_output_and_status_of_a_command_are_known() -> None:
    running = command("echo out; echo error >&2; pwd; exit 3")
    assert await running.wait() == 3
    assert running.output == "out\nerror\n/"
    assert not running.is_late


async def test_input_may_be_longer_than_a_pipe_and_need_not_be_read() -> None:
    data = b"x" * 1_000_000
    running = command("wc -c", stdin=data)
    assert await running.wait() == 0
    assert running.output == "1000000"
    assert await command("exit 0", stdin=data).wait() == 0
    nothing = command("wc -c")
    assert await nothing.wait() == 0
    assert nothing.output == "0"


async def test_of_a_long_output_the_end_is_kept_by_whole_lines() -> None:
    running = command(f"head -c 300000 /dev/zero | tr '\\0' x; echo; seq {OUTPUT_BYTES_MAX}")
    assert await running.wait() == 0
    lines = running.output.splitlines()
    assert len(running.output) <= OUTPUT_BYTES_MAX
    assert lines[-1] == str(OUTPUT_BYTES_MAX)
    assert [int(line) for line in lines] == list(range(int(lines[0]), OUTPUT_BYTES_MAX + 1))
    one_line = command(f"head -c {OUTPUT_BYTES_MAX * 3} /dev/zero | tr '\\0' x")
    await one_line.wait()
    assert one_line.output == "x" * OUTPUT_BYTES_MAX


async def test_what_a_command_leaves_running_ends_with_it() -> None:
    running = command("sleep 1000 & echo $!")
    assert await running.wait() == 0
    child = int(running.output)
    with suppress(ProcessLookupError), watching_pid(child) as wait_ended:
        await anyio.to_thread.run_sync(wait_ended)


async def test_command_that_is_ended_has_time_to_do_so() -> None:
    running = command("trap 'echo leaving; exit 7' TERM; echo ready; while :; do sleep 0.01; done")
    async with anyio.create_task_group() as tasks:

        async def end() -> None:
            await wait_output(running, "ready")
            running.end()

        tasks.start_soon(end)
        assert await running.wait() == 7
    lines = running.output.splitlines()  # the shell may tell of its child between them
    assert (lines[0], lines[-1]) == ("ready", "leaving")


@pytest.mark.parametrize("is_hurried", [True, False])
async def test_command_that_ignores_its_end_is_killed_with_its_children(is_hurried: bool) -> None:
    running = command(
        "trap '' TERM; sleep 1000 & echo $!; while :; do sleep 0.01; done", kill_timeout_s=60.0 if is_hurried else 0.05
    )
    async with anyio.create_task_group() as tasks:

        async def end() -> None:
            with anyio.fail_after(DEADLINE_S):
                while not running.output.strip():
                    await anyio.lowlevel.checkpoint()
            with watching_pid(int(running.output)) as wait_ended:
                running.end()
                if is_hurried:
                    running.hurry()
                await anyio.to_thread.run_sync(wait_ended)

        tasks.start_soon(end)
        assert await running.wait() == -signal.SIGKILL


async def test_command_that_takes_too_long_is_ended() -> None:
    running = command("exec sleep 1000", timeout_s=0.05)
    assert await running.wait() == -signal.SIGTERM
    assert running.is_late


async def test_command_whose_wait_is_cancelled_is_killed_and_nothing_stays_open() -> None:
    before = open_descriptors()
    running = command("trap '' TERM; exec sleep 1000")
    with watching_pid(running.pid) as wait_ended:
        with anyio.move_on_after(0.02):
            await running.wait()
        await anyio.to_thread.run_sync(wait_ended)
    with suppress(ChildProcessError):  # unless it was reaped already
        os.waitpid(running.pid, 0)  # noqa: ASYNC222  it has ended
    assert open_descriptors() == before


async def test_command_that_cannot_be_executed_leaves_nothing() -> None:
    before = open_descriptors()
    with pytest.raises(KernelError, match="HP550"):
        Command(["no-such-program"], environment={}, cwd="/", stdin=b"x", kill_timeout_s=1.0)
    assert open_descriptors() == before
