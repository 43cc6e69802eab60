"""The watcher: changes on disk become bursts of files, and those become restarts."""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from hotport.cli import watch
from hotport.cli._watched import Watched
from tests.support import DEADLINE_S


@contextmanager
def standing(*paths: Path, **patterns: tuple[str, ...]) -> Iterator[Callable[[], set[str]]]:
    """A watch that stands; what it yields is a function that waits for the next files that have changed."""
    changes = watch._Changes(Watched([str(path) for path in paths], **patterns))
    changes.stand()

    def changed() -> set[str]:
        burst = changes.next(DEADLINE_S)
        assert burst is not None
        return {os.path.basename(file) for file in burst.files}

    try:
        yield changed
    finally:
        changes.end()
        for thread in threading.enumerate():
            if thread.name == watch.THREAD:
                thread.join(DEADLINE_S)


def replace(path: Path, text: str) -> None:
    """As an editor saves: beside it, and renamed."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def test_a_file_that_is_named_is_seen_each_time_it_is_replaced_or_written(tmp_path: Path) -> None:
    """Any file but a Python one was ignored; and one that was replaced was seen the first time only."""
    path = tmp_path / "config.yaml"
    path.write_text("0")
    with standing(path) as changed:
        for number in range(3):
            replace(path, str(number))
            assert changed() == {"config.yaml"}
        path.write_text("in place")
        assert changed() == {"config.yaml"}


def test_a_link_that_is_switched_is_followed(tmp_path: Path) -> None:
    for name in ("r1", "r2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "app.py").write_text("")
    (tmp_path / "current").symlink_to("r1")
    with standing(tmp_path / "current") as changed:
        (tmp_path / "next").symlink_to("r2")
        os.replace(tmp_path / "next", tmp_path / "current")
        assert "current" in changed()
        (tmp_path / "r2" / "app.py").write_text("edited")
        assert changed() == {"app.py"}


def test_a_directory_that_is_replaced_is_seen_when_it_is_back(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    with standing(app) as changed:
        app.rename(tmp_path / "old")
        app.mkdir()
        assert "app" in changed()
        (app / "main.py").write_text("")
        assert changed() == {"main.py"}


def test_what_changed_while_nothing_was_asked_for_is_one_burst(tmp_path: Path) -> None:
    changes = watch._Changes(Watched([str(tmp_path)]))
    for number in range(3):
        changes._found.put(watch._Burst(frozenset({f"{tmp_path}/{number}.py", f"{tmp_path}/{number}.md"}), number))
    assert changes.next() == (frozenset({f"{tmp_path}/{number}.py" for number in range(3)}), 0)
    with pytest.raises(queue.Empty):
        changes.next(0)
    changes.end()
    assert changes.next() is None


def test_what_cannot_be_watched_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> Iterator[set[object]]:
        if args:
            raise OSError("OS file watch limit reached")
        yield set()

    monkeypatch.setattr("watchfiles.watch", full)
    with pytest.raises(OSError, match="limit reached"):
        watch._Changes(Watched([str(tmp_path)])).stand()


class Scripted:
    """Bursts at given moments, and a clock that they set."""

    def __init__(self, moments: Sequence[float | None]) -> None:
        self.moments = list(moments)
        self.waits: list[float] = []

    def next(self, timeout_s: float | None = None) -> watch._Burst | None:
        if timeout_s is not None:
            self.waits.append(timeout_s)
        if not self.moments:
            return None
        at = self.moments.pop(0)
        if at is None:
            raise queue.Empty
        return watch._Burst(frozenset({os.path.abspath("gen.py")}), at)


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(watch, "_restart", lambda name, gone: found.append(name))
    return found


def test_a_service_that_writes_its_own_code_is_braked_and_the_log_says_so(restarts: list[str]) -> None:
    """It restarted for ever, as fast as it could."""
    scripted = Scripted([-math.inf, -math.inf, -math.inf, -math.inf, None, -math.inf, None])
    with structlog.testing.capture_logs() as logs:
        watch._restart_for_each(scripted, "app", threading.Event())  # type: ignore[arg-type]
    assert scripted.waits == [1.0, 2.0]
    assert len(restarts) == 5
    braked = [line for line in logs if line["event"] == "watch.braked"]
    assert [(line["wait_s"], line["files"]) for line in braked] == [(1.0, ["gen.py"]), (2.0, ["gen.py"])]


def test_another_change_ends_the_wait(restarts: list[str]) -> None:
    scripted = Scripted([*[-math.inf] * 4, math.inf, -math.inf])
    with structlog.testing.capture_logs() as logs:
        watch._restart_for_each(scripted, "app", threading.Event())  # type: ignore[arg-type]
    assert scripted.waits == [1.0]
    assert sum(line["event"] == "watch.braked" for line in logs) == 1
    assert len(restarts) == 5
