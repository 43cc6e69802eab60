"""Everything that listens on a machine, and what is odd about it. Values only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from hotport.model.bind import overlaps
from hotport.model.port import Ephemeral, Local, State
from hotport.model.process import Process

__all__ = ["Listening", "oddities"]

#: Seconds after which a connection in an accept queue shows that no process accepts.
PATIENCE_S: Final = 1.0


class Listening(msgspec.Struct, frozen=True):
    """A socket, or several alike, that takes connections or datagrams.

    Attributes:
        protocol: ``tcp``, ``udp`` or ``unix``.
        place: As in ``127.0.0.1:8000``, or the path.
        local: None of ``unix``.
        number: The port; 0 of ``unix``.
        state: LISTEN; BOUND of UDP, and of TCP sockets that have a port and do not listen.
        count: More than one is a group with SO_REUSEPORT.
        holders: As far as they may be seen.
        queue: Connections that wait to be accepted, or bytes not read yet (UDP).
        backlog: How long the queue may become; 0 if that is not counted in connections.
        waited_s: For how long at least a connection has been in the queue.
        odd: What is unusual about it; a few words each.
    """

    protocol: str
    place: str
    local: Local | None = None
    number: int = 0
    state: State = State.LISTEN
    count: int = 1
    holders: tuple[Process, ...] = ()
    user: str = ""
    unit: str = ""
    queue: int = 0
    backlog: int = 0
    waited_s: float = 0.0
    odd: tuple[str, ...] = ()


def oddities(one: Listening, everything: Sequence[Listening], ephemeral: Ephemeral) -> Iterator[str]:
    """Say in a few words each what is unusual about a listener, the most urgent first."""
    if any(holder.is_suspended for holder in one.holders):
        yield "suspended: it accepts nothing"
    elif one.waited_s >= PATIENCE_S:
        yield f"nothing is accepted: the first in the queue waits for {one.waited_s:.0f} s"
    if one.backlog and one.queue > one.backlog:
        yield "the accept queue is full"
    if one.protocol == "tcp" and one.state == State.BOUND:
        yield "has the port and does not listen (a sleeper)"
    programs = {holder.command.split(" ")[0] for holder in one.holders}
    if len(programs) > 1 and not all(holder.is_ours for holder in one.holders):
        pids = ", ".join(str(holder.pid) for holder in one.holders[:3])
        yield f"held by several programs (pids {pids})"
    if any(holder.origin.is_left for holder in one.holders):
        yield "left behind: what started it has ended"
    yield from dict.fromkeys(f"{name} was deleted or replaced" for each in one.holders for name in each.origin.deleted)
    yield from _shadows(one, everything)
    if one.protocol == "tcp" and one.state == State.LISTEN and ephemeral.gives(one.number):
        yield "an outgoing connection may take the port while it is down"


def _shadows(one: Listening, everything: Sequence[Listening]) -> Iterator[str]:
    """Find listeners with an address of their own within a wider one of another program."""
    if one.local is None or not one.local.host.is_unspecified or one.state != State.LISTEN:
        return
    for other in everything:
        is_near = other.protocol == one.protocol and other.number == one.number and other.state == State.LISTEN
        if other is one or other.local is None or not is_near or other.local.host.is_unspecified:
            continue
        if overlaps(one.local, other.local) and {each.pid for each in one.holders}.isdisjoint(
            each.pid for each in other.holders
        ):
            yield f"{other.place} takes its connections there"
