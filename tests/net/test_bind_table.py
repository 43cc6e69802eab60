"""The rule in `hotport.model.bind` and the kernel agree in every cell."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from benchmarks.netns import isolated
from hotport.model.bind import CHOICES
from hotport.model.port import Port, State
from tests.net.cells import (
    ADDRESSES,
    HERE,
    LEFTOVERS,
    UIDS,
    Leftovers,
    Where,
    disagreements,
    look,
    new_port,
    opened,
)


def test_every_leftover_with_every_choice_of_options_by_every_user() -> None:
    assert isolated(lambda: list(leftover_cells())) == []


def test_every_address_beside_every_other() -> None:
    assert isolated(lambda: list(address_cells())) == []


def test_every_datagram_socket_beside_every_other() -> None:
    assert isolated(lambda: list(datagram_cells())) == []


def leftover_cells() -> Iterator[str]:
    for title, (leave, states) in LEFTOVERS.items():
        for old_name, old in CHOICES.items():
            for uid in UIDS:
                left = Leftovers(new_port(), old, uid=uid)
                with left.stack:
                    leave(left)
                    port = settled(left.port, states)
                    yield from disagreements(f"{title}, old {old_name} by {uid}", port, HERE, known=old)


def address_cells() -> Iterator[str]:
    """Sockets that listen, are only bound, or have left a connection: what differs is what they let in."""
    for title in ("LISTEN", "BOUND", "ESTABLISHED", "TIME_WAIT"):
        leave, states = LEFTOVERS[title]
        for where in ADDRESSES:
            for via in contacts(where) if title in {"ESTABLISHED", "TIME_WAIT"} else ("",):
                for old_name, old in CHOICES.items():
                    left = Leftovers(new_port(), old, where, via)
                    with left.stack:
                        leave(left)
                        port = settled(left.port, states)
                        for new in ADDRESSES:
                            cell = f"{title} at {where} via {via}, old {old_name}"
                            v6only = where[1] or where[0] == "::1"
                            yield from disagreements(cell, port, new, known=old, v6only=v6only)


def datagram_cells() -> Iterator[str]:
    for where in ADDRESSES:
        for old_name, old in CHOICES.items():
            for uid in UIDS:
                number = new_port()
                with opened(where, number, old, uid=uid, kind=socket.SOCK_DGRAM):
                    port = look(number, socket.SOCK_DGRAM)
                    assert [found.state for found in port.sockets] == [State.BOUND]
                    for new in ADDRESSES:
                        cell = f"UDP at {where}, old {old_name} by {uid}"
                        yield from disagreements(cell, port, new, known=old, kind=socket.SOCK_DGRAM)


def contacts(where: Where) -> tuple[str, ...]:
    """Over which addresses clients reach a listener; it is their address that stays."""
    host, v6only = where
    if host == "::":
        return ("::1",) if v6only else ("127.0.0.1", "::1")
    if host == "::1":
        return ("::1",)
    return ("127.0.0.2",) if host == "127.0.0.2" else ("127.0.0.1",)


def settled(number: int, states: set[State]) -> Port:
    """The facts, which are those that were made: a loopback interface has delivered when a call returns."""
    port = look(number)
    assert {found.state for found in port.sockets} == states, port
    return port
