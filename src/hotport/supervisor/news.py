"""Publish a supervisor's news: to the log, the service manager, restart reports and subscribers."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Final

from hotport.errors import StartError
from hotport.model.effects import Announce, News
from hotport.model.inputs import Clock
from hotport.model.service import Service
from hotport.observe.logs import get_logger
from hotport.options import Options, format_duration
from hotport.supervisor.contain import Containing
from hotport.supervisor.manager import ServiceManager
from hotport.supervisor.recorder import Recorder
from hotport.supervisor.reports import Reports
from hotport.wire.messages import Report

__all__ = ["BAD", "Publisher", "until"]

#: News of mishaps.
BAD: Final = (
    News.ABORTED,
    News.WORKER_LOST,
    News.WORKER_GIVEN_UP,
    News.BACKING_OFF,
    News.UNDOING,
    News.UNDONE,
)


class Publisher:
    """Publishes the news of one service.

    Args:
        name: The service's name.
        manager: Notifies the service manager; the caller closes it.
        recorder: Keeps what restarts have done.
        dropped: Counts what the kernel has dropped at the service's listeners.

    Attributes:
        reports: The reports of restarts.
    """

    def __init__(self, name: str, manager: ServiceManager, recorder: Recorder, dropped: Callable[[], int]) -> None:
        self.reports = Reports(name, recorder, dropped=dropped)
        self.manager = manager
        self._name = name
        self._errors: dict[int, str] = {}
        self._loss = ""
        self._subscribers: list[Callable[[Announce | Report], None]] = []
        self._log = get_logger("hotport.supervisor")

    def note_error(self, worker: int, error: str) -> None:
        """Remember why a worker could not start, or ended, until its restart has been reported."""
        self._errors[worker] = error

    def note_failure(self, generation: int, error: str) -> None:
        """Remember why a generation could not be prepared: for the report of its restart, or of a failed start."""
        if not self.reports.fail(generation, error):
            self._errors[0] = error

    def publish(
        self,
        announcement: Announce,
        service: Service,
        options: Options,
        listeners: Mapping[str, socket.socket],
        *,
        is_running: bool,
        bound_s: float = 0.0,
    ) -> list[Report]:
        """Log an announcement, pass it to the manager and the subscribers, and return the reports that it completes.

        Args:
            service: The state after the step that announced it.
            options: The options of its generation.
            listeners: The listeners of the serving generation, by address.
            is_running: Whether the worker that it names still runs.
            bound_s: The duration of `Announce.clock`, if there is one.
        """
        news = announcement.news
        serving = service.generation
        is_stuck = news is News.WORKER_LOST and is_running
        error = self._errors.get(announcement.worker, "")
        if news is News.WORKER_LOST:
            bound = "ready_timeout is" if announcement.clock is Clock.READY else "it had"
            self._loss = f"worker {announcement.worker} {announcement.why}; " + (
                f"{bound} {format_duration(bound_s)}" if bound_s else "if it has written why, that is above"
            )
        # A failed boot is reported once, at its end; but a worker that hangs is reported at once.
        if serving or news not in BAD or is_stuck:
            (self._log.warning if news in BAD else self._log.info)(news.value, **_fields(announcement, error))
        if news is News.RESTART_BEGAN and service.restart is not None:
            self.reports.begin(service.restart, serving, is_tracked=not options.command)
        with Containing("manager"):
            if news is News.DONE:
                self.manager.follow(listeners)
            self.manager.hear(announcement, serving=serving, why=error)
        self._tell_subscribers(announcement)
        ended = self.reports.hear(announcement, serving=0 if service.is_stopping else serving, errors=self._errors)
        for report in ended:
            self._log.info(
                "restart.report",
                generation=report.generation,
                outcome=report.outcome,
                accept_gap_ms=report.accept_gap_ms,
                connections=report.connections,
            )
            self._tell_subscribers(report)
        if serving and not self.reports.generations:
            self._errors.clear()
        return ended

    def not_started(self) -> StartError | str:
        """Report to the manager that the service did not start; return why, as a worker's error if there is one."""
        failure: StartError | str | None = next((text for text in self._errors.values() if text), None)
        failure = failure or StartError(
            "HP403",
            f"the service {self._name} did not start",
            cause=self._loss or "no worker said READY=1",
            fix="--log-level debug",
            note="if it needs longer to start, raise --ready-timeout",
        )
        self.manager.failed(str(failure))
        return failure

    def subscribe(self, subscriber: Callable[[Announce | Report], None]) -> None:
        """Call `subscriber` with all news and reports from now on."""
        self._subscribers.append(subscriber)

    @contextmanager
    def subscribed(self, subscriber: Callable[[Announce | Report], None]) -> Iterator[None]:
        """Call `subscriber` with all news and reports within the block."""
        self.subscribe(subscriber)
        try:
            yield
        finally:
            self._subscribers.remove(subscriber)

    def _tell_subscribers(self, news: Announce | Report) -> None:
        for subscriber in list(self._subscribers):
            with Containing("subscriber"):
                subscriber(news)


def until(seconds: float) -> str:
    """Render a period that begins now, with the time of day at its end."""
    return f"{format_duration(seconds)}, until {datetime.now() + timedelta(seconds=seconds):%H:%M:%S}"


def _fields(announcement: Announce, error: str) -> dict[str, object]:
    """The fields of an announcement's log line."""
    fields = {
        "generation": announcement.generation,
        "worker": announcement.worker,
        "why": announcement.why,
        # The key whose line breaks renderers keep.
        "exception": error if announcement.news is News.WORKER_LOST else "",
    }
    return {key: value for key, value in fields.items() if value}
