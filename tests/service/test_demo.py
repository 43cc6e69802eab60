"""``hotport demo``: what it shows is what happened, and it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from hotport.churn.result import Result
from hotport.churn.verdict import answered_by, attempts_of, losses_of
from hotport.cli import demo
from hotport.errors import ConfigError
from tests.support import DEADLINE_S, HOTPORT

SMALL = ("demo", "--restarts", "1", "--connections", "10")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where the demo makes its directory; unix sockets lie there, so the path is short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def environment(temporary: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(temporary), "TERM": "xterm"}


def test_no_request_is_lost_and_every_version_answers(temporary: Path) -> None:
    result = subprocess.run(
        [*HOTPORT, *SMALL, "--json"], env=environment(temporary), capture_output=True, text=True, timeout=2 * DEADLINE_S
    )
    assert result.returncode == 0, result.stdout + result.stderr
    seen = msgspec.json.decode(result.stdout, type=Result)
    assert not losses_of(seen.totals)
    assert set(seen.totals) == {"keepalive", "connect", "late", "halfhead", "slow"}
    assert list(answered_by(seen.buckets)) == ["v1, generation 1", "v2, generation 2"]
    assert sum(answered_by(seen.buckets).values()) == attempts_of(seen.totals)
    assert [mark.outcome for mark in seen.restarts] == ["done"]
    assert not list(temporary.iterdir())


@pytest.mark.measured
def test_a_terminal_gets_a_picture_and_a_verdict(temporary: Path) -> None:
    ours, theirs = os.openpty()
    try:
        with subprocess.Popen(
            [*HOTPORT, *SMALL], env=environment(temporary), stdout=subprocess.PIPE, stderr=theirs, text=True
        ) as process:
            os.close(theirs)
            words = read_terminal(ours)
            out = process.communicate(timeout=DEADLINE_S)[0]
    finally:
        os.close(ours)
    assert process.returncode == 0, words + out
    assert "answering" in words
    assert "█" in words
    assert "under way" in words
    assert "nothing lost" in out
    assert out.rstrip().endswith("After each restart the new code answered.")


def read_terminal(fd: int) -> str:
    """Everything written to a terminal, until the last program there closes it (pty(7): then read gives EIO)."""
    parts = []
    try:
        while data := os.read(fd, 65536):
            parts.append(data)
    except OSError:
        pass
    return b"".join(parts).decode()


@pytest.mark.measured
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_stops_the_service_and_removes_its_directory(temporary: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [*HOTPORT, "demo"], env=environment(temporary), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("hotport demo: a Starlette app on http://127.0.0.1:")
        process.send_signal(number)
        out, words = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, words
    assert "interrupted" in words
    assert not out
    assert not list(temporary.iterdir())


def test_without_its_packages_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    result = CliRunner().invoke(demo.command)
    assert isinstance(result.exception, ConfigError)
    assert "starlette and httptools" in str(result.exception)
    assert "pip install 'hotport[demo]'" in str(result.exception)
