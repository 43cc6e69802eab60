"""The counters of a service go on whichever process ends, and whenever."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hotport.kernel.counterpage import CounterPage
from hotport.model.effects import Announce, News
from hotport.supervisor.counters import UNCLAIMED_S, Counters
from hotport.wire import counters
from hotport.wire.messages import PhaseTime, Report

ACCEPTED = counters.ACCEPTED.start


@contextmanager
def service(directory: Path) -> Iterator[Counters]:
    """A supervisor's counters, until it is killed."""
    found = Counters(str(directory), is_on=True)
    try:
        yield found
    finally:
        found.close(is_last=False)


def serve(found: Counters, worker: int, accepted: int) -> CounterPage:
    """A worker that counts, in this process."""
    page = CounterPage(found.make_page(1, worker))
    page.cells[ACCEPTED] += accepted
    return page


def pages(directory: Path) -> set[str]:
    return {each.name for each in (directory / "counters").glob("[0-9]*.page")}


def test_sums_go_on_when_workers_end_and_supervisors_are_killed(tmp_path: Path) -> None:
    with service(tmp_path) as first:
        serve(first, 1, 5).close()
        serve(first, 2, 7).close()
        first.count("started")
        assert first.read()[0][ACCEPTED] == 12
        assert set(first.read()[1]) == {(1, 1), (1, 2)}
        first.fold()
        assert first.read()[0][ACCEPTED] == 12
        assert first.read()[1] == {}
        assert pages(tmp_path) == set()
        serve(first, 3, 1).close()
    with service(tmp_path) as second:
        assert pages(tmp_path) == set()
        sums, _ = second.read()
        assert sums[ACCEPTED] == 13
        assert sums[counters.WORKERS.start] == 1
        second.close(is_last=True)
    assert list(tmp_path.iterdir()) == []


def test_nothing_counts_twice_if_a_supervisor_is_killed_before_it_removes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with service(tmp_path) as first:
        serve(first, 1, 5).close()
        monkeypatch.setattr(os, "unlink", kill)
        with pytest.raises(Killed):
            first.fold()
        monkeypatch.undo()
        assert len(pages(tmp_path)) == 1
        assert first.read()[0][ACCEPTED] == 5
        serve(first, 2, 2).close()
        with service(tmp_path) as second:
            assert second.read()[0][ACCEPTED] == first.read()[0][ACCEPTED] == 7
            assert pages(tmp_path) == set()


def test_a_supervisor_killed_before_it_has_a_new_total_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(tmp_path) as found:
        serve(found, 1, 5).close()

        def fail(*_: object) -> None:
            raise OSError("no room")

        monkeypatch.setattr(os, "rename", fail)
        found.fold()
        monkeypatch.undo()
        assert found.read()[0][ACCEPTED] == 5
        found.fold()
        assert found.read()[0][ACCEPTED] == 5
        assert pages(tmp_path) == set()


def test_a_reader_sees_each_page_once_while_another_supervisor_folds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a take-over; otherwise a scrape would see the sum fall, which is a restart for Prometheus."""
    with service(tmp_path) as first, service(tmp_path) as second:
        serve(first, 1, 5).close()
        names = second._names

        def names_and_fold() -> list[str]:
            found = names()
            first.fold()
            return found

        monkeypatch.setattr(second, "_names", names_and_fold)
        assert second.read()[0][ACCEPTED] == 5


def test_a_page_that_no_worker_has_taken_goes_after_its_time(tmp_path: Path) -> None:
    with service(tmp_path) as found:
        os.close(found.make_page(1, 1))
        found.fold()
        (name,) = pages(tmp_path)
        path = tmp_path / "counters" / name
        long_ago = path.stat().st_mtime - UNCLAIMED_S - 1
        os.utime(path, (long_ago, long_ago))
        found.fold()
        assert pages(tmp_path) == set()


def test_garbage_breaks_nothing(tmp_path: Path) -> None:
    with service(tmp_path) as found:
        page = CounterPage(found.make_page(1, 1))
        for cell in range(2, counters.CELLS):
            page.cells[cell] = (1 << 64) - 1
        page.close()
        found.fold()
        found.fold()
        assert len(found.read()[0]) == counters.CELLS
        (tmp_path / "counters" / "1.2.page").write_bytes(b"\xff" * 100_000)
        (tmp_path / "counters" / "total.json").write_bytes(b"{nonsense")
        assert found.read()[0][ACCEPTED] == 0
        serve(found, 3, 4).close()
        found.fold()
        assert found.read()[0][ACCEPTED] == 4


def test_a_directory_that_is_removed_is_made_again(tmp_path: Path) -> None:
    with service(tmp_path) as found:
        found.count("lost")
        for each in (tmp_path / "counters").iterdir():
            each.unlink()
        (tmp_path / "counters").rmdir()
        found.fold()
        assert found.read()[0][counters.WORKERS.start + 1] == 1
        serve(found, 1, 3).close()
        assert found.read()[0][ACCEPTED] == 3


def test_a_directory_of_something_else_turns_metrics_off(tmp_path: Path) -> None:
    (tmp_path / "counters").write_text("")
    with service(tmp_path) as found:
        found.count("lost")
        found.fold()
        assert found.read()[0][ACCEPTED] == 0
        with pytest.raises(Exception, match="HP622"):
            found.make_page(1, 1)


def test_nothing_is_made_where_nobody_asks(tmp_path: Path) -> None:
    found = Counters(str(tmp_path), is_on=False)
    found.count("lost")
    found.fold()
    found.close(is_last=True)
    assert list(tmp_path.iterdir()) == []


def test_restarts_and_losses_are_counted(tmp_path: Path) -> None:
    with service(tmp_path) as found:
        found.hear(Announce(News.WORKER_LOST, generation=1, worker=1))
        found.hear(Announce(News.READY, generation=1))
        phases = (PhaseTime(name="ready", ms=250.0, batch=1), PhaseTime(name="committed", ms=260.0, batch=1))
        report = Report(
            service="svc",
            generation=2,
            previous=1,
            outcome="done",
            serving=2,
            error="",
            is_phased=False,
            began_at="",
            phases=phases,
            accept_gap_ms=1.5,
            connections=None,
        )
        found.hear(report)
        sums, _ = found.read()
    assert counters.WORKERS.of(sums)[1] == 1
    assert counters.RESTARTS.of(sums)[0] == 1
    assert list(counters.GAP.of(sums)) == [1_500_000, 1]
    place = counters.PHASES.index("committed")
    assert counters.PHASE_NS.of(sums)[place] == 10_000_000
    assert counters.PHASE_COUNT.of(sums)[place] == 1
