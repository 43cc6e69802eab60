"""Find what could go wrong on a port, at the next restart or now; a pure function of the facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from hotport.model.bind import narrate, overlaps
from hotport.model.port import Port, Sockets, State

__all__ = ["risks_of"]

#: From so many connections in TIME_WAIT on, binding with SO_REUSEADDR takes milliseconds; and how many of them one ms.
MANY: Final = 10_000
BOUND_IN_A_MS: Final = 20_000  # 0.2 ms for 10,000, 5 to 15 ms for 100,000: benchmarks/timewait.py

#: Seconds after which a connection in an accept queue shows that no process accepts.
PATIENCE_S: Final = 1.0


def risks_of(port: Port) -> tuple[str, ...]:
    """Return one sentence for each risk, the most urgent first; empty if there is none."""
    listeners = [old for old in port.sockets if old.state == State.LISTEN]
    if port.protocol == "udp":
        return tuple(_datagrams(port))
    return (
        *_queues(port, listeners),
        *_sleepers(port),
        *_leaks(port),
        *_groups(port, listeners),
        *_stolen(port, listeners),
        *_gap(port, listeners),
        *_slow(port),
    )


def _queues(port: Port, listeners: list[Sockets]) -> Iterator[str]:
    for old in listeners:
        if old.queue > old.backlog:
            counted = f"; the machine has counted {port.overflows:,} so far (ListenOverflows)" if port.overflows else ""
            yield (
                f"the accept queue of {old.local}:{port.number} is full ({old.queue:,} of {old.backlog:,}): new "
                f"connections are dropped, and tried again by the client after a second{counted}"
            )
        programs = {holder.command for holder in old.holders}
        if old.waited_s >= PATIENCE_S:
            leaked = "; perhaps it was leaked into a process that knows nothing of it" if len(programs) <= 1 else ""
            wait = "1 waits" if old.queue == 1 else f"{old.queue:,} wait"
            yield (
                f"no process accepts: {narrate(old, port)}, {wait} in its queue, the first for at least "
                f"{old.waited_s:.0f} s, and clients hang{leaked}"
            )
        if len(programs) > 1 and not _is_handed_on(old):
            names = " and ".join(sorted(map(str, old.holders))[:3])
            yield f"several programs hold one listener, {names}: it stays until the last one has closed it"


def _is_handed_on(listener: Sockets) -> bool:
    """Whether it is a listener of hotport's, which several processes share on purpose."""
    return bool(listener.holders) and all(holder.is_ours for holder in listener.holders)


def _sleepers(port: Port) -> Iterator[str]:
    for old in port.sockets:
        if old.state == State.BOUND:
            yield (
                f"a sleeper: {narrate(old, port)}; with SO_REUSEADDR it can listen, and get the clients, as soon as "
                "no other socket does; /proc/net/tcp and netstat do not show it"
            )


def _leaks(port: Port) -> Iterator[str]:
    for old in port.sockets:
        if old.state == State.CLOSE_WAIT and old.is_held:
            yield f"a leak, if it lasts: {narrate(old, port)}; that never ends by itself"


def _groups(port: Port, listeners: list[Sockets]) -> Iterator[str]:
    shared = [old for old in listeners if old.options is not None and old.options.reuse_port]
    if len(shared) > 1:
        pids = sorted({holder.pid for old in shared for holder in old.holders})
        yield (
            f"{len(shared)} listeners share the port by SO_REUSEPORT (pids {', '.join(map(str, pids[:8]))}): when one "
            "closes, what is in its queue is reset, unless net.ipv4.tcp_migrate_req is 1"
        )
    elif shared:
        yield (
            f"every process of user {shared[0].user} can join by SO_REUSEPORT, and gets its share of the connections; "
            "with another SO_REUSEPORT socket that is bound and never listens strangers are kept out even in a gap"
        )


def _stolen(port: Port, listeners: list[Sockets]) -> Iterator[str]:
    """Find listeners on a specific address that take connections from a wildcard listener."""
    for wide in listeners:
        if not wide.local.host.is_unspecified:
            continue
        for narrow in listeners:
            if narrow is wide or not overlaps(wide.local, narrow.local):
                continue
            if not narrow.local.plain.is_unspecified:
                yield (
                    f"{narrow.local}:{port.number} takes the connections to that address from the listener on "
                    f"{wide.local}:{port.number}: {narrate(narrow, port)}"
                )
            elif wide.local.host.version == 6 and narrow.local.host.version == 4:
                yield f"the listener on 0.0.0.0 takes all IPv4 connections from the dual-stack one on {wide.local}"
        if wide.local.host.version == 6 and wide.local.v6only is False:
            alone = f"no other socket can be bound to 0.0.0.0:{port.number}"
            yield f"{narrate(wide, port)}, and IPv4 as well (dual stack): {alone}"


def _gap(port: Port, listeners: list[Sockets]) -> Iterator[str]:
    """Find what could take the port between the close of a server and its next bind."""
    for old in listeners[:1]:
        if _is_handed_on(old):
            continue
        if old.options is not None and old.options.reuse_address and port.number >= port.low_end:
            yield (
                "in a restart that closes the port, any user with SO_REUSEADDR can take it in the gap; a listener that "
                f"is handed on (hotport restart) leaves none, and ports below {port.low_end} are not for every user"
            )
        if port.ephemeral.gives(port.number):
            yield (
                "while no socket listens, an outgoing connection can be given the port, which is one of "
                f"{port.ephemeral.low} to {port.ephemeral.high}: {port.ephemeral.keeping(port.number)}"
            )


def _slow(port: Port) -> Iterator[str]:
    count = sum(old.count for old in port.sockets if old.state == State.TIME_WAIT)
    if count > MANY:
        yield (
            f"{count:,} connections in TIME_WAIT: a bind with SO_REUSEADDR looks at all of them, for about "
            f"{count / BOUND_IN_A_MS:.1f} ms or several times that, while new connections wait; handing the listener "
            "on, or SO_REUSEPORT, avoids it"
        )


def _datagrams(port: Port) -> Iterator[str]:
    for old in port.sockets:
        if old.options is not None and old.options.reuse_address:
            yield (
                f"{narrate(old, port)} with SO_REUSEADDR: any user who sets it, too, can bind beside it, and the "
                "last to bind gets every datagram; UDP has no TIME_WAIT, so the option is not needed there"
            )
    owners = {old.user for old in port.sockets}
    if len(owners) > 1:
        yield f"sockets of several users are on the port: {', '.join(sorted(owners))}"
    wide = [old for old in port.sockets if old.local.plain.is_unspecified]
    for old in port.sockets:
        if wide and not old.local.plain.is_unspecified and overlaps(wide[0].local, old.local):
            yield f"{old.local}:{port.number} takes the datagrams to that address from {wide[0].local}:{port.number}"
