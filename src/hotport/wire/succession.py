"""Messages between a program that restarts itself and its successor.

The successor is told in ``HOTPORT_SUCCESSION`` what it succeeds, and gets the listeners as `hotport.wire.listenfds` has
it. It says ``READY=1`` when it could accept; then its predecessor connects to its control socket and orders the commit,
and later offers its connections there as one worker does to another.
"""

from __future__ import annotations

from typing import Final

import msgspec

from hotport.wire.messages import OfferOrder

__all__ = ["SUCCESSION_VARIABLE", "Ask", "CommitOrder", "Committed", "Succession"]

SUCCESSION_VARIABLE: Final = "HOTPORT_SUCCESSION"


class Succession(msgspec.Struct, frozen=True, kw_only=True):
    """What a successor needs to know at its start, as JSON.

    Attributes:
        predecessor: The pid of the process that started it.
        generation: The successor's.
        control: Where it has to listen: ``@name`` of an abstract unix socket.
        manager: ``NOTIFY_SOCKET`` of the service manager, which the predecessor's own stands in for; empty without one.
        asked: The addresses of the passed listeners, as they were asked for: ``tcp://127.0.0.1:0`` keeps its port.
        passed: Names of the descriptors that follow the listeners (`Server.pass_on`).
    """

    predecessor: int
    generation: int
    control: str
    manager: str
    asked: tuple[str, ...]
    passed: tuple[str, ...] = ()


class CommitOrder(msgspec.Struct, frozen=True, kw_only=True, tag="commit"):
    """Accept connections now, and confirm it: the predecessor then stops accepting.

    Attributes:
        connections: How many may come from there: keep room for them.
    """

    connections: int = 0


class Committed(msgspec.Struct, frozen=True, kw_only=True, tag="committed"):
    """Connections are being accepted.

    Attributes:
        dropped: Which of the passed listeners are not wanted any more; by number, in the order of `Succession.asked`.
    """

    dropped: tuple[int, ...] = ()


Ask = CommitOrder | OfferOrder
