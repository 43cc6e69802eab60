"""Fates of the connections of a worker: a closed list.

The values stand in messages, reports and `hotport status`. A supervisor may hear fates of a version that it does not
know: their prefix says what they mean (`names_cut`). What clients of `hotport churn` see is another list.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

__all__ = ["Fate", "by_name", "names_cut"]


def names_cut(name: str) -> bool:
    """Return whether a fate is a cut, by its name on the wire."""
    return name.startswith("cut_")


class Fate(StrEnum):
    """How one connection has ended here; what each costs a client is in ``docs/reference/report.md``."""

    FINISHED = "finished"
    IDLE_CLOSED = "idle_closed"
    CLOSED_NO_ROOM = "closed_no_room"
    TOLD_TO_CLOSE = "told_to_close"
    SERVER_FINISHED = "server_finished"

    MOVED_HTTP = "moved_http"
    MOVED_WEBSOCKET = "moved_websocket"
    MOVED_STREAM = "moved_stream"
    MOVED_PROTOCOL = "moved_protocol"

    CUT_OFFERED = "cut_offered"
    CUT_UNACCEPTED = "cut_unaccepted"
    CUT_FRESH = "cut_fresh"
    CUT_HALF_HEAD = "cut_half_head"
    CUT_BODY = "cut_body"
    CUT_IN_FLIGHT = "cut_in_flight"
    CUT_STREAMING = "cut_streaming"
    CUT_SLOW_BODY = "cut_slow_body"
    CUT_SLOW_READER = "cut_slow_reader"
    CUT_WEBSOCKET = "cut_websocket"
    CUT_MEMORY = "cut_memory"
    CUT_STREAM = "cut_stream"
    CUT_PROTOCOL = "cut_protocol"
    CUT_DATAGRAM = "cut_datagram"
    CUT_SERVER = "cut_server"

    #: Counts workers that ended without reporting their connections.
    WORKERS_KILLED = "workers_killed"

    def __init__(self, name: str) -> None:
        #: Something was lost, or may have been.
        self.is_cut = names_cut(name)
        #: Another worker serves the connection.
        self.is_moved = name.startswith("moved_")


def by_name(fates: Mapping[Fate, int]) -> dict[str, int]:
    """Return counts by plain strings, for messages and reports."""
    return {fate.value: count for fate, count in fates.items()}
