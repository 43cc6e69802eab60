"""The log of a whole process, in processes of its own: what it does to `sys.stderr` and at exit stays there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import DEADLINE_S

PROGRAM = """
import logging, sys, warnings
from hotport.observe import logs

logs.configure(format="json", level="info", service="svc")
log = logging.getLogger("app")
"""


def run(program: str, **where: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end, with stdout read."""
    command = [sys.executable, "-W", "always", "-c", PROGRAM + program]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, **where)


WRITERS = """
for number in range(2000):
    log.info("line %d %s", number, "x" * 100)
warnings.warn("an old way")
print("of a library", file=sys.stderr)
logs.write("access\\n")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it failed")
log.info("%d", "no number")
print(logs.dropped())
"""


def test_nobody_reads_and_every_writer_goes_on() -> None:
    """Log lines, warnings, tracebacks and prints: each of them blocked the process."""
    read, write = os.pipe()
    try:
        done = run(WRITERS.replace("2000", "20000"), stderr=write)
        assert done.returncode == 0
        assert int(done.stdout) > 0
    finally:
        os.close(write)
    with os.fdopen(read) as reader:
        lines = reader.read().splitlines()
    assert [json.loads(line)["event"][:6] for line in lines[:3]] == ["line 0", "line 1", "line 2"]


def test_reader_that_has_gone_ends_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = run(WRITERS + "raise SystemExit(7)", stderr=write)
    finally:
        os.close(write)
    assert done.returncode == 7
    assert int(done.stdout) >= 2005


def test_full_disk_ends_nothing() -> None:
    with Path("/dev/full").open("w") as full:
        done = run(WRITERS + "raise SystemExit(7)", stderr=full)
    assert done.returncode == 7


def test_closed_stderr_ends_nothing() -> None:
    done = run(WRITERS + "raise SystemExit(7)", preexec_fn=lambda: os.close(2))
    assert done.returncode == 7


def test_every_line_is_there_when_somebody_reads(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as log:
        done = run(WRITERS, stderr=log)
    assert done.stdout == "0\n"
    lines = path.read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines if line.startswith("{")]
    assert len(events) == 2002
    assert events[-1] == "it failed"
    assert "of a library" in lines
    assert "access" in lines
    assert any(line.startswith("a line of app cannot be shown, from ") for line in lines)
    assert "TypeError: %d format: a real number is required, not str" in lines


def test_count_is_a_line_of_its_own_like_all_others() -> None:
    read, write = os.pipe()
    program = """
import fcntl
from hotport.kernel.output import open_sink
from hotport.observe.output import Output

logs._look.output = Output(open_sink(2), logs._dropped_line, waiting_bytes_max=1000)
for number in range(2000):
    log.info("line %d", number)
print(logs.dropped(), flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", PROGRAM + program]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=write, text=True) as process,
        os.fdopen(read) as reader,
    ):
        os.close(write)
        assert process.stdout is not None
        assert process.stdin is not None
        dropped = int(process.stdout.readline())
        line: dict[str, Any] = {}
        while line.get("event") != "log.dropped":
            line = json.loads(reader.readline())
        assert line["lines"] == dropped > 0
        assert line["why"] == "they are not read"
        assert (line["level"], line["logger"], line["service"], line["pid"]) == (
            "warning",
            "hotport.log",
            "svc",
            process.pid,
        )
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("ending", ["raise SystemExit(7)", "raise RuntimeError('the last word')"])
def test_last_line_of_a_process_is_waited_for(ending: str) -> None:
    """A pipe that is read, but slowly: the process ends only when its lines are in there, or its time is over."""
    done = run(
        "for number in range(3000): log.info('line %d', number)\n" + ending,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode in (1, 7)
    lines = done.stdout.splitlines()
    assert json.loads(lines[2999])["event"] == "line 2999"
    assert (lines[-1] == "RuntimeError: the last word") == (done.returncode == 1)
