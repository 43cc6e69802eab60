"""The inheritance of a new supervisor from its predecessor."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from hotport.channel import Channel
from hotport.supervisor.supervisor import StatusPort
from hotport.wire.messages import Memory

__all__ = ["Inheritance"]


@dataclass(frozen=True, slots=True)
class Inheritance:
    """Descriptors and state of the predecessor, received by `upgrade` or `takeover`.

    Attributes:
        version: The predecessor's hotport version.
        memory: State that its workers may not know.
        lock: Descriptor of the runtime directory's lock.
        listeners: The listeners of the serving generation, by canonical address.
        bind: The same addresses as its options name them, in that order; empty after an upgrade.
        status_port: Its status port, on which a live predecessor answers until our workers serve.
        predecessor: The control connection to it; None if this process was that supervisor before an exec.
        paths: After an exec: the control and the notify socket, bound in the runtime directory.
        service: After an exec: the service's name.
        numbers: After an exec: its workers by pid.
        client: After an exec: the connection of the command that waits for the outcome.
        began_s: After an exec: when the supervisor began to depart (CLOCK_MONOTONIC).

    Descriptors: owns `predecessor` and `client`; `start_up` gives the others to their owners.
    """

    version: str
    memory: Memory
    lock: int
    listeners: dict[str, socket.socket]
    bind: tuple[str, ...] = ()
    status_port: StatusPort | None = None
    predecessor: Channel | None = None
    paths: tuple[socket.socket, socket.socket] | None = None
    service: str = ""
    numbers: dict[int, int] = field(default_factory=dict)
    client: Channel | None = None
    began_s: float = 0.0

    def close(self) -> None:
        """Close the connection to the predecessor, or to the client."""
        for connection in (self.predecessor, self.client):
            if connection is not None:
                connection.close()

    def listener(self, text: str) -> tuple[str, socket.socket] | None:
        """Return the canonical address and the listener of an address as our options name it."""
        for named, (address, listener) in zip(self.bind, self.listeners.items(), strict=False):
            if text in (named, address):
                return address, listener
        return None
