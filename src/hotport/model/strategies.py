"""What each strategy promises and needs, and which one a service can use: a table, and two functions.

A *strategy* is how the listeners reach the next generation. Nothing here asks the system: what is known of a service
comes as `Facts`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import msgspec

__all__ = ["GUARANTEES", "Choice", "Facts", "Guarantee", "Row", "Strategy", "choose", "obstacle", "table"]


class Strategy(enum.Enum):
    """The ways in which a listener reaches the next generation, the best first."""

    INHERIT = "inherit"
    TRANSFER = "transfer"
    OVERLAP = "overlap"
    REBIND = "rebind"


class Guarantee(msgspec.Struct, frozen=True):
    """What a strategy is and promises.

    Attributes:
        how: What happens.
        clients_see: In the words of a client.
        refused: Connections that are refused (ECONNREFUSED).
        reset: Connections that are made, and reset before they are served.
        gap: How long no process listens.
        needs: What must be so.
        shares: How evenly workers share what comes.
        is_lossless: No client is refused, reset or late.
        no_canary: Why a canary makes no sense with it; empty if it does.
    """

    how: str
    clients_see: str
    refused: str
    reset: str
    gap: str
    needs: str
    shares: str
    is_lossless: bool = True
    no_canary: str = ""


GUARANTEES: Final[Mapping[Strategy, Guarantee]] = {
    Strategy.INHERIT: Guarantee(
        how="workers are started with the listeners: LISTEN_FDS, from descriptor 3 up",
        clients_see="nothing: one accept queue for the whole life of the service, which a worker always serves",
        refused="none",
        reset="none",
        gap="none",
        needs="nothing: it works for every address and every program",
        shares="even in each generation; while both accept, each gets what the kernel gives it",
    ),
    Strategy.TRANSFER: Guarantee(
        how="workers are started without listeners, and get them over their control socket (SCM_RIGHTS) when they are "
        "told to accept; they acknowledge it",
        clients_see="nothing: it is the same accept queue as with inherit",
        refused="none",
        reset="none",
        gap="none",
        needs="an application that is served by hotport: an asgi, stream or protocol one",
        shares="even in each generation; while both accept, each gets what the kernel gives it",
    ),
    Strategy.OVERLAP: Guarantee(
        how="a second socket joins with SO_REUSEPORT; once the new workers accept, a one-instruction classic BPF "
        "program sends every newcomer to it; the old workers empty the old queue and close it",
        clients_see="nothing; but a handshake that takes longer than settle, begun before the restart committed, is "
        "reset if tcp_migrate_req is 0",
        refused="none",
        reset="none, but for handshakes that are slower than settle",
        gap="none",
        needs="tcp addresses that hotport has bound itself, an application that is served by hotport, and all workers "
        "replaced at once",
        shares="even in each generation, which has a queue of its own",
        no_canary="with the strategy overlap every newcomer is sent to one generation: it would see none of them",
    ),
    Strategy.REBIND: Guarantee(
        how="the new workers have started completely; the old ones empty the accept queue and close; the port is bound "
        "again with SO_REUSEADDR and given to the new ones",
        clients_see="a gap: connects are refused in it, and those of the last microseconds before it are late by the "
        "second after which TCP sends a SYN again",
        refused="those that come in the gap; counted in the report",
        reset="those in the accept queue that no worker can be given, counted in the report; and those whose handshake "
        "is half done when the port is closed, not counted",
        gap="10 us with nothing in TIME_WAIT on the port, 0.2 ms with 10,000, 5 to 15 ms with 100,000; with --guard "
        "10 us at any number",
        needs="as overlap. Without --guard any user can take a port above 1023 in the gap",
        shares="even: one generation accepts at a time",
        is_lossless=False,
        no_canary="with the strategy rebind the old generation lets go of the port before the new one has it",
    ),
}


class Facts(msgspec.Struct, frozen=True):
    """Facts about a service and a requested restart.

    Attributes:
        schemes: Of its addresses: ``tcp``, ``udp``, ``unix``, ``fd``, ``systemd``.
        command: The program in place of an application; empty if there is none.
        kind: The option of that name: ``auto`` is found out by workers.
        is_phased: One worker after the other is replaced.
        lingering: Workers of older generations that still have a socket of an address open.
        can_steer: The kernel lets a socket of a SO_REUSEPORT group be chosen.
        is_stored: The service manager keeps duplicates of listeners.
    """

    schemes: tuple[str, ...] = ("tcp",)
    command: str = ""
    kind: str = "auto"
    is_phased: bool = False
    lingering: tuple[int, ...] = ()
    can_steer: bool = True
    is_stored: bool = False


def obstacle(strategy: Strategy, facts: Facts) -> str:
    """Explain why a service cannot use a strategy; empty if it can."""
    if strategy is Strategy.INHERIT:
        return ""
    if facts.command:
        return f"{facts.command} is a program of its own: it takes listeners at its start, and only there"
    if facts.kind in ("sockets", "datagram"):
        return f"an application of kind {facts.kind} takes its sockets at its start, and only there"
    if "udp" in facts.schemes:
        return "a udp address is served by an application of kind datagram, which takes its sockets at its start"
    if strategy is Strategy.TRANSFER:
        return ""
    if foreign := sorted({scheme for scheme in facts.schemes if scheme != "tcp"}):
        why = {
            "unix": "a unix address is a file: SO_REUSEPORT is for tcp, and to bind it again would replace the file",
            "fd": "an fd:// socket was made by the process that started hotport, and may be shared with others",
            "systemd": "a systemd: socket belongs to the service manager, which keeps it open",
        }
        return why[foreign[0]]
    if facts.is_stored:
        return "the service manager keeps the listener (FileDescriptorStoreMax), and would go on listening with it"
    if facts.is_phased:
        return "a phased restart has workers of both generations on one socket, for as long as it takes"
    if strategy is Strategy.OVERLAP and not facts.can_steer:
        return "this kernel does not steer connections between sockets (SO_ATTACH_REUSEPORT_CBPF, Linux 4.5)"
    if facts.lingering:
        workers = ", ".join(map(str, facts.lingering))
        return f"worker {workers} of an older generation still has the socket open; it drains or hangs"
    return ""


class Choice(msgspec.Struct, frozen=True):
    """The chosen strategy of a restart, and why; without one, why not."""

    strategy: Strategy | None
    why: str


def choose(wanted: str, facts: Facts) -> Choice:
    """Choose the strategy for the option's value: ``auto``, or the name of one."""
    if wanted != "auto":
        why = obstacle(Strategy(wanted), facts)
        return Choice(None, why) if why else Choice(Strategy(wanted), "asked for")
    # The best one always can: a child inherits descriptors without anyone's consent.
    best = next(strategy for strategy in Strategy if not obstacle(strategy, facts))
    return Choice(best, "auto: the best there is, and it can always work within one supervisor")


class Row(msgspec.Struct, frozen=True):
    """One strategy for one service: its promises, and why the service cannot use it, if it cannot."""

    strategy: Strategy
    guarantee: Guarantee
    obstacle: str


def table(facts: Facts) -> tuple[Row, ...]:
    """List every strategy for a service, the best first."""
    return tuple(Row(strategy, GUARANTEES[strategy], obstacle(strategy, facts)) for strategy in Strategy)
