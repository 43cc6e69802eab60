"""Restarting by a command, by a signal, by hotport; and what goes wrong with each."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hotport.churn.restarts import AskHotport, How, Restarts, RunCommand, SendSignal
from hotport.churn.result import RestartMark
from hotport.errors import ConfigError
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import Failure, Progress, Report, encode
from tests.support import assert_three_lines, eventually

pytestmark = pytest.mark.anyio


def is_alive(pid: int) -> bool:
    """A zombie, which waits for whoever has adopted it, is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def perform(how: How, *, times: int = 1, timeout_s: float = 30.0, end_ms: float = 1e9) -> list[RestartMark]:
    """One schedule without pauses, and its marks."""
    begin_ns = time.monotonic_ns()
    marks: dict[int, RestartMark] = {}

    def tell(mark: RestartMark) -> None:
        marks[mark.number] = mark

    schedule = Restarts(how, times=times, after_s=0.0, every_s=0.0, timeout_s=timeout_s)
    await schedule.perform(lambda: (time.monotonic_ns() - begin_ns) / 1e6, end_ms, tell)
    return list(marks.values())


async def test_a_command_is_done_when_it_exits_with_0() -> None:
    (mark,) = await perform(RunCommand("echo fine; echo words >&2"))
    assert (mark.outcome, mark.detail, mark.how) == ("done", "fine\nwords", "echo fine; echo words >&2")
    assert mark.ended_ms is not None
    assert mark.ended_ms > mark.began_ms


async def test_a_command_that_fails_does_not_end_the_schedule() -> None:
    marks = await perform(RunCommand("echo no such unit; exit 3"), times=2)
    assert [(mark.outcome, mark.detail) for mark in marks] == [("failed", "exited 3: no such unit")] * 2


async def test_only_the_end_of_what_a_command_says_is_kept() -> None:
    (mark,) = await perform(RunCommand("yes | head -c 100000; echo end"))
    assert len(mark.detail) <= 2000
    assert mark.detail.endswith("end")


async def test_a_command_that_never_ends_is_ended_with_what_it_started(tmp_path: Path) -> None:
    (mark,) = await perform(RunCommand(f"sleep 1000 & echo $! > {tmp_path}/pid; wait"), timeout_s=0.5)
    assert (mark.outcome, mark.ended_ms) == ("timed out", None)
    pid = int((tmp_path / "pid").read_text())
    eventually(lambda: not is_alive(pid), "what it started has ended, too")


async def test_a_command_may_leave_something_in_the_background(tmp_path: Path) -> None:
    (mark,) = await perform(RunCommand(f"sleep 1000 & echo $! > {tmp_path}/pid"))
    assert mark.outcome == "done"
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


async def test_no_restart_begins_after_the_end() -> None:
    assert await perform(RunCommand("true"), end_ms=0.0) == []


async def test_a_signal_is_sent_to_the_pid_in_a_file(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGHUP, lambda *_: exit(7)); print('armed', flush=True); signal.pause()"
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "armed\n"
        (tmp_path / "app.pid").write_text(f"{process.pid}\n")
        how = SendSignal(signal.SIGHUP, pid_file=tmp_path / "app.pid")
        how.check()
        (mark,) = await perform(how)
        assert (mark.outcome, mark.ended_ms) == ("sent", None)
        assert process.wait() == 7


async def test_a_pid_file_that_is_gone_fails_one_restart(tmp_path: Path) -> None:
    (mark,) = await perform(SendSignal(signal.SIGHUP, pid_file=tmp_path / "gone.pid"))
    assert mark.outcome == "failed"
    assert "ENOENT" in mark.detail


@pytest.mark.parametrize("text", ["", "0", "1", "-5", "nginx"])
def test_a_file_without_a_pid_is_found_before_anything_begins(tmp_path: Path, text: str) -> None:
    (tmp_path / "app.pid").write_text(text)
    with pytest.raises(ConfigError) as caught:
        SendSignal(signal.SIGHUP, pid_file=tmp_path / "app.pid").check()
    assert_three_lines(str(caught.value), "HP714")


REPORT = Report(service="svc", generation=2, previous=1, outcome="done", serving=2, began_at="now", accept_gap_ms=1.5)


@pytest.mark.parametrize(
    ("replies", "outcome", "detail"),
    [
        ((Progress(event="restart.began", ms=0.0), REPORT), "done", ""),
        ((Failure(code="HP410", what="busy", cause="a restart runs", fix="wait", exit_code=4),), "failed", "HP410"),
        ((), "failed", "the supervisor ended"),
    ],
    ids=["done", "refused", "gone"],
)
async def test_hotport_is_asked_and_its_report_is_kept(
    tmp_path: Path, replies: tuple[Progress | Report | Failure, ...], outcome: str, detail: str
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = FrameDecoder()
        while not list(decoder.feed(await reader.read(65536))):
            pass
        for reply in replies:
            writer.write(encode_frame(encode(reply)))
        writer.close()
        await writer.wait_closed()

    control = tmp_path / "control.sock"
    server = await asyncio.start_unix_server(serve, control)
    try:
        (mark,) = await perform(AskHotport("svc", control))
    finally:
        server.close()
        await server.wait_closed()
        control.unlink(missing_ok=True)
    assert mark.outcome == outcome
    assert detail in mark.detail
    assert (mark.report or {}).get("accept_gap_ms") == (1.5 if outcome == "done" else None)


async def test_a_supervisor_that_cannot_be_reached_fails_one_restart(tmp_path: Path) -> None:
    (mark,) = await perform(AskHotport("svc", tmp_path / "control.sock"))
    assert mark.outcome == "failed"
    assert "ENOENT" in mark.detail
