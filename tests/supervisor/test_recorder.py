"""The flight recorder's files, and what the next supervisor makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from hotport.model.effects import Announce, News
from hotport.model.service import Restart
from hotport.supervisor.recorder import RECORDINGS_MAX, Recorder, read_recordings
from hotport.supervisor.reports import Reports
from hotport.supervisor.timeline import LANES_MAX, SPANS_MAX, Timeline
from hotport.wire.messages import Import, Move, PhaseTime, Report
from hotport.wire.recording import Recording


def recording(number: int) -> Recording:
    report = Report(
        service="svc",
        generation=number,
        previous=number - 1,
        outcome="done",
        serving=number,
        began_at=f"2026-12-01T12:{number:02}:00.000+00:00",
        phases=(PhaseTime(name="retired", ms=1500.0),),
    )
    return Recording(report=report, supervisor=1, began_s=1.0, is_over=True)


def test_the_last_restarts_are_kept_and_older_ones_removed(tmp_path: Path) -> None:
    recorder = Recorder(str(tmp_path))
    assert recorder.read() == []
    for number in range(2, RECORDINGS_MAX + 5):
        recorder.keep(recording(number))
        recorder.keep(recording(number))  # as when it reaches the next phase
    found = recorder.read()
    assert [each.report.generation for each in found] == [*range(5, RECORDINGS_MAX + 5)]
    assert read_recordings(str(tmp_path), 2) == found[-2:]
    assert sum(1 for _ in (tmp_path / "restarts").iterdir()) == RECORDINGS_MAX
    assert (tmp_path / "restarts").stat().st_mode & 0o777 == 0o700


def test_damaged_files_are_skipped(tmp_path: Path) -> None:
    """One that a full disk has cut must not hide the others."""
    Recorder(str(tmp_path)).keep(recording(2))
    (tmp_path / "restarts" / "20261201T130000.000Z-3.json").write_bytes(b'{"report": {"serv')
    (tmp_path / "restarts" / "20261201T130000.000Z-4.json").write_bytes(b"")
    assert [each.report.generation for each in read_recordings(str(tmp_path))] == [2]


def test_failure_to_write_is_logged_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "restarts").write_text("in the way")
    recorder = Recorder(str(tmp_path))
    for number in (2, 3):
        recorder.keep(recording(number))
    assert "".join(capsys.readouterr()).count("recorder.failed") == 1
    (tmp_path / "restarts").unlink()
    recorder.keep(recording(4))
    assert [each.report.generation for each in read_recordings(str(tmp_path))] == [4]


def reports(directory: Path) -> Reports:
    return Reports("svc", Recorder(str(directory)), dropped=lambda: 5)


def hear(known: Reports, news: Iterable[Announce]) -> list[Report]:
    return [report for each in news for report in known.hear(each, serving=2, errors={})]


DRAINING = [
    *(
        Announce(News.RESTART_BEGAN, 2),
        Announce(News.READY, 2),
        Announce(News.COMMITTED, 2),
        Announce(News.QUIESCED, 2),
    ),
    *(Announce(News.DRAINING, 2, workers=(1, 2, 3)), Announce(News.DONE, 2)),
]


def begun(directory: Path, count: int = len(DRAINING)) -> Reports:
    known = reports(directory)
    known.begin(Restart(2, 3, 0), 1, is_tracked=True)
    known.spawned(SimpleNamespace(worker=4, generation=2, pid=1004))
    hear(known, DRAINING[:count])
    return known


def test_next_supervisor_completes_the_report_of_a_restart_whose_workers_still_leave(tmp_path: Path) -> None:
    """It was lost with the supervisor, and with it what became of the connections."""
    begun(tmp_path).drained(1, {"moved_http": 3}, [Move(at_s=1e9, ms=2.0, to="worker-2.4.sock", connections=3)])
    later = reports(tmp_path)
    later.resume({2, 3, 4}, serving=2)
    later.drained(2, {"moved_http": 4, "finished": 1})
    assert hear(later, [Announce(News.WORKER_RETIRED, worker=2)]) == []
    (report,) = hear(later, [Announce(News.WORKER_RETIRED, worker=3)])
    assert report == later.last
    assert (report.outcome, report.generation, report.dropped) == ("done", 2, 0)
    assert report.connections == {"moved_http": 7, "finished": 1, "workers_killed": 1}
    assert "1 workers ended while no supervisor ran" in report.error
    assert [phase.name for phase in report.phases] == ["ready", "committed", "quiesced", "draining", "retired"]
    (kept,) = later.recorder.read()
    assert kept.is_over
    assert kept.report == report
    assert [lane.worker for lane in kept.lanes] == [4]


def test_restart_whose_workers_have_all_ended_without_a_supervisor_is_over(tmp_path: Path) -> None:
    begun(tmp_path)
    later = reports(tmp_path)
    later.resume({4}, serving=2)
    assert later.last is not None
    assert "3 workers ended while no supervisor ran" in later.last.error
    assert not later.generations
    again = reports(tmp_path)
    again.resume({4}, serving=2)
    assert again.last == later.last
    assert "into generation 2, was done" in again.last_in_words()


def test_restart_that_a_killed_supervisor_had_begun_stays_as_it_was(tmp_path: Path) -> None:
    begun(tmp_path, count=2)
    later = reports(tmp_path)
    later.resume({1, 2, 3}, serving=1)
    assert not later.generations
    assert later.last is None
    (kept,) = later.recorder.read()
    assert (kept.report.outcome, kept.is_over) == ("", False)
    assert [phase.name for phase in kept.report.phases] == ["ready"]


def test_timeline_is_bounded() -> None:
    timeline = Timeline(10.0)
    for worker in range(LANES_MAX + 3):
        timeline.begin(worker, 2, 1000 + worker, 10.5, "starting")
        timeline.reach(worker, "starting", 11.0)
    move = Move(at_s=12.0, ms=1.0, to="worker-2.9.sock", connections=1)
    early = msgspec.structs.replace(move, at_s=9.0)  # of an earlier restart, which was undone
    timeline.moved(1, [early, *[move] * SPANS_MAX])
    timeline.moved(LANES_MAX + 1, [move])
    timeline.imported(2, [Import(name="app", at_s=10.6, ms=3.0, own_ms=1.0)])
    timeline.imported(LANES_MAX + 1, [])
    timeline.reach(LANES_MAX + 1, "opening", 11.0)
    timeline.begin(1, 2, 1, 13.0, "starting")
    lanes = timeline.lanes()
    assert len(lanes) == LANES_MAX
    assert timeline.workers_left_out == 3
    assert [(span.name, span.at_ms, span.ms) for span in lanes[0].spans] == [("starting", 500.0, 500.0)]
    assert (len(lanes[1].spans), lanes[1].left_out) == (SPANS_MAX, 1)
    assert [(span.name, span.at_ms) for span in lanes[2].imports] == [("app", 600.0)]
    assert Timeline(10.0, lanes).lanes() == lanes
    doing = timeline.lanes(now_s=12.0)[0].spans[-1]
    assert (doing.name, doing.at_ms, doing.ms) == ("opening", 1000.0, 1000.0)
