"""May a socket be bound: the kernel's rule, applied to a port as it was found.

A new socket is compared with every socket on the port whose address overlaps. Each of them refuses it, unless

- both have SO_REUSEADDR, and the old one does not listen (of UDP: both have it), or
- both have SO_REUSEPORT and one uid (an old one in TIME_WAIT: any uid).

``listen`` applies the same rule again, so a socket that can be bound can listen, unless another one listens in between.

What the kernel remembers of sockets that are gone cannot be read: it lets in a socket with SO_REUSEPORT, without
looking at the others, if the last one that was bound to the port had it, too, and the same uid and address. So a "no"
to SO_REUSEPORT may be a "yes" where sockets with SO_REUSEADDR alone and with both have met; a "yes" never is a "no".

Sources: socket(7); kernel ``net/ipv4/inet_connection_sock.c`` inet_csk_get_port, inet_bind_conflict,
sk_reuseport_match; ``net/ipv4/udp.c`` udp_lib_lport_inuse; ``net/ipv6/af_inet6.c`` ipv6_rcv_saddr_equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from math import ceil
from shlex import quote
from typing import Final

import msgspec
from msgspec.structs import replace

from hotport.model.port import LEFT, Asker, Local, Port, ReuseOptions, Sockets, State, UnixName
from hotport.model.process import Process, ending

__all__ = [
    "CHOICES",
    "Answer",
    "Can",
    "blame",
    "judge",
    "judge_name",
    "narrate",
    "overlaps",
    "remedies",
    "remedies_of_name",
    "reset_outgoing",
    "usual",
]

#: What a socket may set before it is bound, by a short name.
CHOICES: Final = {
    "none": ReuseOptions(),
    "reuseaddr": ReuseOptions(reuse_address=True),
    "reuseport": ReuseOptions(reuse_port=True),
    "both": ReuseOptions(reuse_address=True, reuse_port=True),
}


class Can(StrEnum):
    """Three answers, because not every fact can be read."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


class Answer(msgspec.Struct, frozen=True):
    """Whether a bind and listen with some options works.

    Attributes:
        error: The errno that a bind would fail with, by its name; empty unless `can` is NO.
        rule: The rule that decides, in one sentence; with `who` before it, if that is not empty.
        who: Who is in the way, and how.
        until: When that will change, in one sentence; empty if it need not.
        ends_in_s: Seconds until it changes by itself; None if it does not, or the time is unknown.
        blockers: The sockets that prevent it, or may; the longest-lived first.
    """

    can: Can
    rule: str
    who: str = ""
    error: str = ""
    until: str = ""
    ends_in_s: float | None = None
    blockers: tuple[Sockets, ...] = ()

    @property
    def because(self) -> str:
        """Which process prevents it, and by which rule."""
        return f"{self.who}; {self.rule}" if self.who else self.rule


def usual(port: Port) -> ReuseOptions:
    """Return the options that servers usually set, hotport among them: SO_REUSEADDR on TCP, none on UDP."""
    return CHOICES["reuseaddr" if port.protocol == "tcp" else "none"]


def judge(port: Port, asker: Asker, options: ReuseOptions) -> Answer:
    """Judge whether `asker` can bind to the port with `options`, and listen, as far as the facts decide it."""
    if (denied := _denied(port, asker)) is not None:
        return denied
    refusing: list[Sockets] = []
    perhaps: list[Sockets] = []
    shared: list[Sockets] = []
    for old in port.sockets:
        match refuses(port, old, asker.uid, options):
            case True:
                refusing.append(old)
            case None:
                perhaps.append(old)
            case False if options.reuse_port and _is_shared(port, old, asker.uid):
                shared.append(old)
    if refusing and shared:
        refusing, perhaps = [], refusing
    blockers = tuple(sorted(refusing or perhaps, key=_stays, reverse=True))
    if not blockers:
        return Answer(Can.YES, _why_not_refused(port))
    timed = max(old.ends_in_s for old in blockers) if all(old.is_timed for old in blockers) else None
    first = blockers[0]
    told = Answer(
        Can.NO, _rule(first, asker, options), narrate(first, port), "EADDRINUSE", _until(first), timed, blockers
    )
    if refusing:
        return told
    return replace(told, can=Can.UNKNOWN, rule=_doubt(port, first, options, is_shared=bool(shared)), error="")


def blame(port: Port, asker: Asker, options: ReuseOptions) -> Answer:
    """Judge after the kernel has refused, which settles the facts that could not be read."""
    answer = judge(port, asker, options)
    if answer.can == Can.UNKNOWN:
        return replace(answer, can=Can.NO, rule=_rule(answer.blockers[0], asker, options), error="EADDRINUSE")
    return answer


def judge_name(name: UnixName) -> Answer:
    """Judge whether a socket file or an abstract name can be bound; options make no difference there.

    An existing file prevents a bind, held or not: so servers remove it, or rename another over it.

    Sources: unix(7), NOTES; bind(2).
    """
    directory = _directory(name.path)
    match name.obstacle:
        case "":
            pass
        case "ENOENT":
            return Answer(Can.NO, f"there is no directory {directory}", error=name.obstacle)
        case "EROFS":
            return Answer(Can.NO, f"the file system of {directory} is read-only", error=name.obstacle)
        case "EACCES":
            return Answer(Can.NO, f"you may not make files in {directory}", error=name.obstacle)
        case _:
            return Answer(Can.NO, f"nothing can be made at {name.path}", error=name.obstacle)
    if name.found == "nothing":
        lost = f"{_seen(name.holders, name.user, '')} listens without it, and clients cannot connect"
        return Answer(Can.YES, f"its file was removed: {lost}" if name.is_listening else "nothing has that name")
    rule, error = "bind takes no name that exists", "EADDRINUSE"
    if name.found != "socket":
        who = f"{name.path} is a file, a directory or a link, and no socket"
        return Answer(Can.NO, rule, who, error, "when it is moved away")
    if not name.is_held:
        who = f"{name.path} is left from a server that is gone"
        return Answer(Can.NO, rule, who, error, "when the file is removed; hotport serve replaces it by itself")
    does = "is listening on" if name.is_listening else "is bound to"
    who = f"{_seen(name.holders, name.user, '')} {does} {name.path}"
    return Answer(Can.NO, rule, who, error, "when it ends" + ", and the file is removed" * (not name.is_abstract))


def refuses(port: Port, old: Sockets, uid: int, new: ReuseOptions) -> bool | None:
    """Whether sockets on the port prevent a new one; None if a fact is missing."""
    is_near = overlaps(port.local, old.local)
    if is_near is False or old.state == State.SYN_RECV:  # not in the table of bound ports until the handshake is done
        return False
    address = port_ = None
    if old.options is not None:
        address, port_ = old.options.reuse_address, old.options.reuse_port
    if port_ is None and _inherits_reuse_port(port, old):
        port_ = True
    by_address = _all(new.reuse_address, port.protocol == "udp" or old.state != State.LISTEN, address)
    by_port = _all(new.reuse_port, port_, _is_timewait(old) or _equal(old.uid, uid))
    return _all(is_near, _not(by_address), _not(by_port))


def overlaps(new: Local, old: Local) -> bool | None:
    """Whether two addresses have one in common; None if it depends on an IPV6_V6ONLY that could not be read.

    A connection to a dual-stack listener over IPv6 stands in the way of 0.0.0.0, though it has no IPv4 address.
    """
    ours, theirs = new.plain, old.plain
    if ours.version == 4 and theirs.version == 4:
        return ours == theirs or _is_any(new) or _is_any(old)
    if ours.version == 4:
        reaches = theirs.is_unspecified or (new.host.version == 4 and _is_any(new))
        return _all(reaches, _not(old.v6only))
    if theirs.version == 4:
        return _is_any(new) and not new.v6only
    return ours == theirs or _is_any(new) or _is_any(old)


def narrate(old: Sockets, port: Port) -> str:
    """Say what sockets do on the port, as the beginning of a sentence."""
    who, place, many = _seen(old.holders, old.user, old.unit), f"{old.local}:{port.number}", old.count != 1
    connections = f"{old.count:,} connections" if many else "a connection"
    match old.state:
        case State.LISTEN:
            return f"{who} is listening on {place}"
        case State.BOUND:
            return f"{who} is bound to {place}" + (" without listening" if port.protocol == "tcp" else "")
        case _ if old.is_timed:
            from_ = f" from {_listed(old.peers)}" if old.peers else ""
            return f"{connections}{from_} that this side has closed {'are' if many else 'is'} in {old.state} on {place}"
        case _ if old.state in LEFT and not old.is_held:
            unsent = old.backlog - old.count  # the FIN behind them counts as one
            waits = f", {unsent:,} bytes unsent: {_listed(old.peers)} does not read" if unsent > 0 else ""
            return (
                f"{connections} on {place} without a process (orphan) {'are' if many else 'is'} in {old.state}{waits}"
            )
        case _ if not old.is_held:
            return f"{connections} on {place} {'wait' if many else 'waits'} to be accepted"
        case State.CLOSE_WAIT:
            return f"{who} has not closed {connections} on {place} that the peer has closed (CLOSE_WAIT)"
        case _:
            outgoing = "outgoing " if old.is_outgoing else ""
            connections = f"{old.count:,} {outgoing}connections" if many else f"an {outgoing or 'open '}connection"
            to = f" to {_listed(old.peers)}" if old.is_outgoing else ""
            return f"{who} has {connections}{to} on {place} ({old.state})"


def remedies(port: Port, answer: Answer) -> Iterator[str]:
    """Suggest remedies for an answer that is not yes, the most likely one first."""
    match answer.error:
        case "EACCES":
            yield f"sysctl -w net.ipv4.ip_unprivileged_port_start={port.number}  # as root"
            yield "give the program the capability: AmbientCapabilities=CAP_NET_BIND_SERVICE in its unit"
            return
        case "EINVAL" if port.local.plain.version == 4:
            yield f"hotport why {port.protocol}://{port.local.plain}:{port.number}"
            return
        case "EADDRNOTAVAIL" | "EINVAL":
            yield "ip -brief address"
            return
    if answer.can == Can.UNKNOWN:
        yield f"hotport why {port.address} --probe  # binds for a moment"
    for old in answer.blockers[:1]:
        if old.is_outgoing:
            yield f"{reset_outgoing(port)}  # as root; its program connects again, from another port"
        if old.is_timed:
            yield f"sleep {ceil(answer.ends_in_s or old.ends_in_s)}"
            state = _SS.get(old.state, "all")
            yield f"ss -K state {state} sport = :{port.number}  # as root: at once"
            yield "set SO_REUSEADDR before bind, in the old server and in the new one"
        elif old.holders:
            everyone = {holder.pid: holder for each in answer.blockers for holder in each.holders}
            yield from ending(list(everyone.values())).texts
        elif not old.is_held:
            state = _SS.get(old.state, "all")
            yield f"ss -K state {state} sport = :{port.number}  # as root; what is unsent is lost"
        elif old.unit:
            yield f"systemctl status {old.unit}"
        else:
            yield f"sudo hotport why {port.address}"
        if old.state == State.ESTABLISHED and not old.is_outgoing and _may_be_outgoing(port):
            yield f"{port.ephemeral.keeping(port.number)}  # if it is an outgoing one: keeps others away in future"


def reset_outgoing(port: Port) -> str:
    """The command that keeps outgoing connections away from a port, and resets those that have it.

    Sources: ss(8) -K; sock_diag(7) SOCK_DESTROY, for CAP_NET_ADMIN, CONFIG_INET_DIAG_DESTROY.
    """
    return f"{port.ephemeral.keeping(port.number)} && ss -K state established sport = :{port.number}"


def remedies_of_name(name: UnixName, answer: Answer) -> Iterator[str]:
    """Suggest remedies for a name of AF_UNIX."""
    if answer.can == Can.YES:
        return
    path, directory = _pasteable(name.path), _pasteable(_directory(name.path))
    if answer.error == "ENOENT":
        yield f"mkdir -p {directory}"
    elif name.found == "socket" and not name.is_held:
        yield f"rm {path}"
    elif name.holders:
        yield from ending(name.holders).texts
    elif name.user:
        yield f"sudo hotport why {quote(name.address)}"
    elif name.is_held:  # in a network namespace that one of these processes is in
        yield f"grep -lF {path} /proc/[0-9]*/net/unix"
    else:
        yield f"ls -ld {directory} {path}"


def _directory(path: str) -> str:
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def _pasteable(path: str) -> str:
    return quote(f"./{path}" if path.startswith("-") else path)


#: As ss(8) calls them.
_SS: Final = {
    State.FIN_WAIT1: "fin-wait-1",
    State.FIN_WAIT2: "fin-wait-2",
    State.TIME_WAIT: "time-wait",
    State.LAST_ACK: "last-ack",
    State.CLOSING: "closing",
}


def _denied(port: Port, asker: Asker) -> Answer | None:
    """Judge what the kernel checks before other sockets; IPv6 checks the port first, IPv4 the address."""
    low = absent = invalid = None
    host = port.local.host
    if 0 < port.number < port.low_end and not asker.may_bind_low:
        because = f"ports below {port.low_end} need CAP_NET_BIND_SERVICE (net.ipv4.ip_unprivileged_port_start)"
        low = Answer(Can.NO, f"user {asker.user} may not: {because}", error="EACCES")
    if port.is_local is False:
        absent = Answer(Can.NO, f"no interface of this machine has the address {host}", error="EADDRNOTAVAIL")
    if (nonsense := _nonsense(port)) is not None:
        invalid = Answer(Can.NO, nonsense, error="EINVAL")
    return (low or invalid or absent) if host.version == 6 else (absent or low)


def _nonsense(port: Port) -> str | None:
    """Explain why no socket of this kind can ever have an address.

    Sources: kernel ``net/ipv6/af_inet6.c`` __inet6_bind.
    """
    host = port.local.host
    if host.version == 4:
        return None
    if host.is_multicast and port.protocol == "tcp":
        return f"TCP does not know multicast, and {host} is such an address"
    if host.ipv4_mapped and port.local.v6only:
        return f"a socket that is IPv6 only, as hotport's are, does not take {host.ipv4_mapped} written as IPv6"
    is_on_a_link = host.is_link_local or (host.is_multicast and host.packed[1] & 0xF == 2)
    if is_on_a_link and not port.scope:
        return f"many links have an address like {host}: its interface has to be named, as in fe80::1%eth0"
    return None


def _is_any(local: Local) -> bool:
    return local.plain.is_unspecified


def _is_timewait(old: Sockets) -> bool:
    """FIN_WAIT2 without a process is kept as a TIME_WAIT is (kernel tcp_time_wait)."""
    return old.state == State.TIME_WAIT or (old.state == State.FIN_WAIT2 and old.is_timed)


def _inherits_reuse_port(port: Port, old: Sockets) -> bool:
    """Whether a listener proves that leftovers under it have SO_REUSEPORT.

    What was there before it must have let it in, and what came later has its options from it.
    """
    return any(
        listener.state == State.LISTEN
        and listener.options is not None
        and listener.options.reuse_port
        and bool(overlaps(listener.local, old.local))
        and (not listener.options.reuse_address or _covers(listener.local, port.local))
        for listener in port.sockets
    )


def _covers(wide: Local, narrow: Local) -> bool:
    return bool(overlaps(wide, narrow)) and (_is_any(wide) or wide.plain == narrow.plain)


def _is_shared(port: Port, old: Sockets, uid: int) -> bool:
    """Whether the kernel may let a socket with SO_REUSEPORT in because of `old`, before it has looked at the others."""
    is_near = overlaps(port.local, old.local) if port.protocol == "udp" else _covers(old.local, port.local)
    return bool(is_near) and old.options is not None and old.options.reuse_port and old.uid == uid


def _all(*values: bool | None) -> bool | None:
    if False in values:
        return False
    return None if None in values else True


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _equal(one: int | None, other: int) -> bool | None:
    return None if one is None else one == other


_ORDER: Final = (State.LISTEN, State.BOUND, State.CLOSE_WAIT, State.ESTABLISHED)


def _stays(old: Sockets) -> tuple[int, float]:
    """Return a sort key: how long sockets will stay."""
    if old.is_timed:
        return 0, old.ends_in_s
    return len(_ORDER) - _ORDER.index(old.state) + 1 if old.state in _ORDER else 1, 0.0


def _until(old: Sockets) -> str:
    pids = sorted({holder.pid for holder in old.holders})
    one = f"pid {pids[0]}" if pids else "its process"
    owner = f"each of pids {', '.join(map(str, pids))}" if len(pids) > 1 else one
    if old.is_timed:
        return f"by itself: the last one is gone in {old.ends_in_s:.0f} s"
    if old.state == State.CLOSE_WAIT:
        return f"never by itself: {owner} has to close them, or end"
    if old.is_held:
        return f"when {owner} closes {'it' if old.count == 1 else 'them'}, or ends"
    if old.state in LEFT:
        return "it is not known when: the peer has to read, or to leave; the kernel gives up after many minutes"
    return "when its listener accepts and ends it, or closes"


def _seen(holders: tuple[Process, ...], user: str, unit: str) -> str:
    """Name the holder, as far as it is visible."""
    if holders:
        others = f" with {len(holders) - 1} more" if len(holders) > 1 else ""
        return f"{holders[0]}{others}"
    user = f" of user {user}" if user else ""
    unit = f" in {unit}" if unit else ""
    return f"a process{user}{unit} that we may not look at"


def _listed(peers: tuple[str, ...]) -> str:
    return ", ".join(peers[:2]) + (", ..." if len(peers) > 2 else "")


def _rule(old: Sockets, asker: Asker, new: ReuseOptions) -> str:
    """Say why `old` refuses, as the end of a sentence."""
    is_alien = old.uid is not None and old.uid != asker.uid
    if new.reuse_port and is_alien and (old.options is None or old.options.reuse_port):
        return f"SO_REUSEPORT is shared by the sockets of one user only, and it is user {old.user}'s"
    if old.state == State.LISTEN:
        if new.reuse_port:
            return "it has not set SO_REUSEPORT, and both must have"
        return "a listener shares its port only if both have set SO_REUSEPORT"
    if not new.reuse_address and not new.reuse_port:
        return "a socket without SO_REUSEADDR and SO_REUSEPORT gets no port on which there is anything"
    either = str(new).replace(" and ", " or ")
    if old.options is None:
        return f"the server that left it had not set {either}, and both must have"
    return f"it has set {old.options}, and both must have set {either}"


def _doubt(port: Port, old: Sockets, new: ReuseOptions, *, is_shared: bool) -> str:
    """Say which fact is missing, as the end of a sentence."""
    if is_shared:
        return (
            "it would refuse, but another socket of this user shares the port by SO_REUSEPORT, and the kernel does "
            "not show which of them it asks first"
        )
    if overlaps(port.local, old.local) is None:
        return "whether it is IPv6 only (IPV6_V6ONLY) cannot be read of such a socket"
    if not old.is_held:
        either = str(new).replace(" and ", " or ")
        return f"yes if the server that left it had set {either}, too, which the kernel does not show"
    return f"whether it has set {new} can be read by root or its own user only: sudo hotport why {port.address}"


def _why_not_refused(port: Port) -> str:
    near = [old for old in port.sockets if overlaps(port.local, old.local) is not False]
    if not port.sockets:
        return "nothing is on the port"
    if not near:
        return "what is on the port has other addresses"
    listeners = [old for old in near if old.state == State.LISTEN]
    if listeners:
        return "the listener there has SO_REUSEPORT, too, and belongs to the same user: connections would be shared"
    return "the leftovers on the port have set the same option, and do not listen"


def _may_be_outgoing(port: Port) -> bool:
    return port.ephemeral.gives(port.number) and not any(old.state == State.LISTEN for old in port.sockets)
