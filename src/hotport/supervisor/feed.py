"""Send the state of a service to the viewers of its live page, as server-sent events.

There is no work without viewers, and one that does not read is dropped.

Sources: HTML Living Standard, 9.2 Server-sent events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from hotport.kernel.sockets import dropped
from hotport.supervisor.requests import describe
from hotport.supervisor.supervisor import Supervisor
from hotport.wire.messages import Report, Status
from hotport.wire.recording import Lane, Recording, Span, current_step, phase_spans

__all__ = ["Feed"]

#: Seconds between two states, and at least between two that the supervisor's steps cause.
INTERVAL_S: Final = 1.0
PAUSE_S: Final = 0.2

#: Events that wait for a viewer who does not read; with one more the viewer is dropped.
EVENTS_MAX: Final = 8

#: How many restarts are shown, how many workers of each, and how many spans of each.
RESTARTS_MAX: Final = 10
LANES_MAX: Final = 16
SPANS_MAX: Final = 32

Viewer = MemoryObjectSendStream[bytes]


class Feed:
    """The events of one status port, the same for every viewer.

    Args:
        publish: Removes what may be secret from a status.
    """

    def __init__(self, supervisor: Supervisor, publish: Callable[[Status], Status]) -> None:
        self._supervisor = supervisor
        self._publish = publish
        self._viewers: set[Viewer] = set()
        self._has_viewers = anyio.Event()
        self._sent: list[Shown] = []

    def __len__(self) -> int:
        return len(self._viewers)

    @contextmanager
    def subscribed(self) -> Iterator[MemoryObjectReceiveStream[bytes]]:
        """Receive events within the block, from everything that is known to what happens; it ends for a slow reader."""
        send, receive = anyio.create_memory_object_stream[bytes](EVENTS_MAX)
        with send, receive:
            send.send_nowait(b"retry: 1000\n\n" + self._past())
            self._viewers.add(send)
            self._has_viewers.set()
            try:
                yield receive
            finally:
                self._viewers.discard(send)

    async def run(self) -> None:
        """Send the state to the viewers while there are some, until cancelled."""
        while True:
            if not self._viewers:
                self._has_viewers = anyio.Event()
                await self._has_viewers.wait()
            latest = self._restarts(1)
            event = _event("state", await self._state())
            self._send(event + _event("restarts", latest) if latest != self._sent else event)
            self._sent = latest
            await anyio.sleep(PAUSE_S)
            with anyio.move_on_after(INTERVAL_S - PAUSE_S):
                await self._supervisor.wait_stepped()

    def _send(self, event: bytes) -> None:
        for viewer in list(self._viewers):
            try:
                viewer.send_nowait(event)
            except anyio.WouldBlock:
                self._viewers.discard(viewer)
                viewer.close()

    def _past(self) -> bytes:
        history = self._supervisor.history
        return _event("past", {"points": list(history.points), "restarts": self._restarts(RESTARTS_MAX)})

    async def _state(self) -> dict[str, Any]:
        supervisor = self._supervisor
        status = self._publish(await describe(supervisor))
        history = supervisor.history
        return {
            "now": round(time.time(), 1),
            "status": msgspec.structs.replace(status, last_restart=None),
            "dropped": {address: dropped(sock) for address, sock in supervisor.listeners.items()},
            "points": list(history.points)[-2:],
        }

    def _restarts(self, last: int) -> list[Shown]:
        return [_public(each) for each in self._supervisor.news.reports.recordings(last)]


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A restart on the page; see `Recording`.

    Attributes:
        steps: Those that are over; `doing` is the one after them.
    """

    report: Report
    is_over: bool
    leaving: tuple[int, ...]
    lanes: tuple[Lane, ...]
    lanes_left_out: int
    steps: tuple[Span, ...]
    doing: str


def _public(recording: Recording) -> Shown:
    """Remove the words of the application, and what the page does not show."""
    report: Report = msgspec.structs.replace(recording.report, error="")
    lanes = tuple(
        msgspec.structs.replace(
            lane,
            imports=(),
            spans=lane.spans[:SPANS_MAX],
            left_out=lane.left_out + max(0, len(lane.spans) - SPANS_MAX),
        )
        for lane in recording.lanes[:LANES_MAX]
    )
    left_out = recording.lanes_left_out + max(0, len(recording.lanes) - LANES_MAX)
    return Shown(
        report=report,
        is_over=recording.is_over,
        leaving=recording.leaving,
        lanes=lanes,
        lanes_left_out=left_out,
        steps=phase_spans(report),
        doing=current_step(report),
    )


def _event(name: str, data: Any) -> bytes:
    """Encode an event; JSON has no line breaks of its own."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))
