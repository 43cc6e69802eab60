"""The watcher: changes on disk become bursts of files, and those become restarts."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from hotport.cli import watch
from hotport.cli._watched import Watched
from hotport.wire.messages import Progress, RestartRequest
from tests.support import DEADLINE_S, eventually


@contextmanager
def standing(*paths: Path, **patterns: tuple[str, ...]) -> Iterator[Callable[[], set[str]]]:
    """A watch that stands; what it yields is a function that waits for the next files that have changed."""
    changes = watch._Changes(Watched([str(path) for path in paths], **patterns))
    before = set(os.listdir("/proc/self/fd"))
    changes.stand()

    def changed() -> set[str]:
        files = changes.next(DEADLINE_S)
        assert files is not None
        return {os.path.basename(file) for file in files}

    try:
        yield changed
    finally:
        changes.end()
        for thread in threading.enumerate():
            if thread.name == watch.THREAD:
                thread.join(DEADLINE_S)
        # The library closes what it has opened in a thread of its own.
        eventually(lambda: set(os.listdir("/proc/self/fd")) <= before, "nothing is open any more")


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


def test_what_changed_while_nothing_was_asked_for_comes_together(tmp_path: Path) -> None:
    changes = watch._Changes(Watched([str(tmp_path)]))
    for number in range(3):
        changes._found.put(frozenset({f"{tmp_path}/{number}.py", f"{tmp_path}/{number}.md"}))
    assert changes.next() == frozenset(f"{tmp_path}/{number}.py" for number in range(3))
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
    """An application that writes a file of its code as it starts; and, while a restart is held back, a hand or none."""

    def __init__(self, path: Path, rounds: int, *, is_edited: bool) -> None:
        self.path = path
        self.rounds = rounds
        self.is_edited = is_edited
        self.waits: list[float] = []
        self.restarts = 0

    def next(self, timeout_s: float | None = None) -> frozenset[str] | None:
        if timeout_s is not None:
            self.waits.append(timeout_s)
            if not self.is_edited:
                raise queue.Empty
        elif self.restarts == self.rounds:
            return None
        return frozenset({str(self.path)})

    def restart(self, name: str, gone: threading.Event) -> tuple[float, float]:
        self.restarts += 1
        self.path.write_text("")
        at = self.path.stat().st_ctime
        return at, at


@pytest.mark.parametrize(("is_edited", "waits"), [(False, [1, 2, 4]), (True, [1])])
def test_service_that_writes_its_own_code_is_braked_until_a_hand_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_edited: bool, waits: list[float]
) -> None:
    """It restarted for ever, as fast as it could."""
    scripted = Scripted(tmp_path / "gen.py", 6, is_edited=is_edited)
    monkeypatch.setattr(watch, "_restart", scripted.restart)
    with structlog.testing.capture_logs() as logs:
        watch._restart_for_each(scripted, "app", threading.Event())  # type: ignore[arg-type]
    assert scripted.waits == waits
    braked = [(line["wait_s"], line["files"]) for line in logs if line["event"] == "watch.braked"]
    assert braked == [(wait, [os.path.relpath(scripted.path)]) for wait in waits]


def test_new_code_starts_from_the_request_until_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(name: str, request: RestartRequest) -> Iterator[object]:
        yield Progress(event="restart.began", ms=1.0)
        yield Progress(event="restart.ready", ms=0.0)

    monkeypatch.setattr(watch, "ask", ask)
    began, ready = watch._restart("app", threading.Event())
    assert began == ready
