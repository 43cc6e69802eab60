"""The application's own metrics: nothing is lost, counted twice or collected for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hotport.supervisor.appmetrics import AppMetrics

#: Counts in every way, then waits for its end.
COUNTS = """
import os, sys
from prometheus_client import Counter, Gauge, Histogram
Counter("jobs", "Jobs.", ["kind"]).labels("a").inc(int(sys.argv[1]))
Histogram("took_seconds", "Time.", buckets=(1, 2)).observe(1.5)
for mode in ("all", "liveall", "livesum", "sum", "min", "max", "mostrecent"):
    Gauge(f"depth_{mode}", "Depth.", multiprocess_mode=mode).set(int(sys.argv[1]))
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def count(directory: Path, value: int) -> subprocess.Popen[str]:
    """A process of an application, which has counted."""
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTS, str(value)],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory / "app-metrics")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    return process


def end(process: subprocess.Popen[str]) -> int:
    process.kill()
    process.communicate()
    return process.pid


def values(found: AppMetrics) -> dict[str, float]:
    return {
        f"{each.name}{''.join(f'/{value}' for key, value in sorted(each.labels.items()) if key != 'pid')}": each.value
        for metric in found.collect()
        for each in metric.samples
    }


def files(directory: Path) -> set[str]:
    return {each.name for each in (directory / "app-metrics").iterdir()}


@pytest.fixture
def metrics(tmp_path: Path) -> AppMetrics:
    found = AppMetrics(str(tmp_path))
    found.prepare(None)
    return found


def test_sums_go_on_when_processes_end_and_their_files_are_merged(tmp_path: Path, metrics: AppMetrics) -> None:
    first, second = count(tmp_path, 3), count(tmp_path, 5)
    try:
        before = values(metrics)
        assert before["jobs_total/a"] == 8
        assert before["depth_livesum"] == before["depth_sum"] == 8
        metrics.ended(end(first))
        found = values(metrics)
        assert found["jobs_total/a"] == 8
        assert found["took_seconds_count"] == 2
        assert found["took_seconds_bucket/1.0"] == 0
        assert found["took_seconds_bucket/2.0"] == 2
        assert found["depth_sum"] == 8
        assert (found["depth_min"], found["depth_max"], found["depth_mostrecent"]) == (3, 5, 5)
        assert found["depth_livesum"] == found["depth_liveall"] == found["depth_all"] == 5
    finally:
        metrics.ended(end(second))
    assert values(metrics)["jobs_total/a"] == 8
    assert len(files(tmp_path)) == 6  # of each kind that is kept, one
    for value in (1, 2):
        end(count(tmp_path, value))  # a process that hotport does not know, such as a child of a worker
    assert values(metrics)["jobs_total/a"] == 11
    assert len(files(tmp_path)) == 6
    metrics.clear()
    assert list(tmp_path.iterdir()) == []
    assert metrics.collect() == []


@pytest.mark.parametrize("call", ["rename", "unlink"])
@pytest.mark.parametrize("at", range(4))
def test_a_merge_that_is_interrupted_is_completed_by_the_next(
    tmp_path: Path, metrics: AppMetrics, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    for value in (3, 5):
        metrics.ended(end(count(tmp_path, value)))
    original = getattr(os, call)
    calls = 0

    class Killed(BaseException):
        pass

    def until_killed(*args: str) -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            raise Killed
        original(*args)

    monkeypatch.setattr(os, call, until_killed)
    with pytest.raises(Killed):
        metrics.collect()
    monkeypatch.undo()
    found = values(AppMetrics(str(tmp_path)))
    assert found["jobs_total/a"] == 8
    assert found["took_seconds_count"] == 2
    assert values(metrics) == found


def test_files_that_are_none_are_left_out(tmp_path: Path, metrics: AppMetrics) -> None:
    """They may be written by a user who is not trusted."""
    metrics.ended(end(count(tmp_path, 3)))
    place = tmp_path / "app-metrics"
    (place / "counter_1.db").write_bytes(b"\xff" * 5000)
    (place / "gauge.db").write_bytes(b"")
    (place / "histogram_2.db").symlink_to("/dev/zero")
    (place / "summary_3.db").mkdir()
    (place / "merge.json").write_text("{")
    assert values(metrics)["jobs_total/a"] == 3
    (place / "merge.json").write_text('{"made": ["../../x"], "merged": ["../../y"]}')
    (tmp_path.parent / "y").write_text("")
    assert values(metrics)["jobs_total/a"] == 3
    assert (tmp_path.parent / "y").exists()


def test_metrics_that_look_like_hotports_are_left_out(tmp_path: Path, metrics: AppMetrics) -> None:
    code = "from prometheus_client import Counter; Counter('hotport_restarts', 'x').inc()"
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "app-metrics")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert metrics.collect() == []
