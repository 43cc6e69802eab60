"""What is counted in a restart's report, and on whose side."""

from __future__ import annotations

from hotport.model.effects import Announce, News
from hotport.supervisor.reports import RestartRecord


def record(*, is_phased: bool = False) -> RestartRecord:
    """Of a restart from generation 1 to 2."""
    return RestartRecord("app", 2, 1, is_phased=is_phased, is_tracked=True, dropped=int)


def test_new_worker_that_dies_in_the_window_is_counted_with_those_that_are_taken_back() -> None:
    """Its connections were in no report: only workers that were left when the old ones accepted again counted."""
    kept = record()
    kept.hear(Announce(News.UNDOING, 2, worker=3, why="worker 3 was killed by SIGKILL", workers=(3, 4)))
    kept.hear(Announce(News.WORKER_RETIRED, 2, worker=3))
    kept.drained(4, {"moved_http": 5})  # it was signalled, and is gone before the old ones accept
    kept.hear(Announce(News.WORKER_RETIRED, 2, worker=4))
    kept.hear(Announce(News.UNDONE, 2))
    assert kept.is_over
    report = kept.report(serving=1, errors={})
    assert (report.connections, report.connections_back) == ({}, {"moved_http": 5, "workers_killed": 1})


def test_old_workers_that_still_drain_when_a_phased_restart_is_undone_count_as_old_ones() -> None:
    phased = record(is_phased=True)
    phased.hear(Announce(News.DRAINING, 2, workers=(1,)))
    phased.hear(Announce(News.UNDOING, 2, workers=(4,)))
    phased.hear(Announce(News.UNDONE, 2, workers=(4,)))
    phased.drained(1, {"moved_http": 1})
    phased.drained(4, {"finished": 2})
    for worker in (1, 4):
        assert not phased.is_over
        phased.hear(Announce(News.WORKER_RETIRED, worker=worker))
    report = phased.report(serving=1, errors={})
    assert (report.connections, report.connections_back) == ({"moved_http": 1}, {"finished": 2})


def test_new_worker_that_dies_right_after_the_commit_is_counted() -> None:
    """Whoever was connected to it had lost that, and the report of the abort did not tell."""
    aborted = record()
    aborted.hear(Announce(News.COMMITTED, 2))
    aborted.hear(Announce(News.ABORTED, 2, worker=3, why="worker 3 was killed by SIGKILL", workers=(3, 4)))
    aborted.hear(Announce(News.WORKER_RETIRED, 2, worker=3))
    aborted.drained(4, {"moved_http": 2})
    aborted.hear(Announce(News.WORKER_RETIRED, 2, worker=4))
    assert aborted.is_over
    report = aborted.report(serving=1, errors={})
    assert (report.connections, report.connections_back) == ({}, {"moved_http": 2, "workers_killed": 1})


def test_workers_that_never_served_are_no_loss() -> None:
    """Those that start after a bake; and those of a phased restart's next batch."""
    baked = record()
    baked.hear(Announce(News.BAKING, 2, workers=(3,)))
    phased = record(is_phased=True)
    phased.hear(Announce(News.COMMITTED, 2))
    phased.hear(Announce(News.DRAINING, 2))
    for each in (baked, phased):
        each.hear(Announce(News.ABORTED, 2, worker=4, workers=(3, 4) if each is baked else (4,)))
        each.drained(3, {"finished": 1})
        each.hear(Announce(News.WORKER_RETIRED, 2, worker=3))
        each.hear(Announce(News.WORKER_RETIRED, 2, worker=4))
        assert each.is_over
    assert baked.report(serving=1, errors={}).connections_back == {"finished": 1}
    assert phased.report(serving=1, errors={}).connections_back is None
