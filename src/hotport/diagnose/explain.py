"""Short texts about the states of a port; exact, with sources."""

from __future__ import annotations

from typing import Final

from hotport.errors import ConfigError, nearest

__all__ = ["TOPICS", "explain"]

TOPICS: Final = {
    "LISTEN": """\
A server waits for connections. The kernel completes the handshake by itself and puts the connection into the accept
queue, whose length is the backlog of listen(2), at most net.core.somaxconn; the process takes it out with accept(2).
While a socket listens, no other one gets the port, unless both have SO_REUSEPORT and belong to one user.
The listener belongs to every process that has a descriptor of it: one that was leaked into a child, `sleep` say, keeps
the port after the server is gone, and clients connect and hang.
Sources: listen(2), accept(2), socket(7).""",
    "BOUND": """\
A socket has the port, and neither listens nor is connected. netstat and /proc/net/tcp do not show it; sock_diag does
since Linux 6.8. It excludes all other sockets, except where both set SO_REUSEADDR, or SO_REUSEPORT as one user.
A process can bind like that in the gap of a restart, unnoticed, and listen in the next gap: a sleeper. Bound with
SO_REUSEPORT alone, as the service's own user, the same is a guard: it keeps strangers out and takes nothing itself.
Sources: bind(2), socket(7).""",
    "SYN_SENT": """\
This side wants to connect and waits for the answer. It has the port while it does.
Sources: RFC 9293 section 3.3.2.""",
    "SYN_RECV": """\
A client's first segment has been answered, and the handshake is not complete. Until it is, nothing of it stands in
the way of a bind. If the listener goes away now, the client tries again by itself, and finds the next one if that
listens within a second.
Sources: RFC 9293 section 3.3.2.""",
    "ESTABLISHED": """\
A connection is open. It keeps the local port as much as a socket that is only bound does: so a server that closed
its listener, and drains, or another program's outgoing connection that was given this port, lets a new server bind
only if both have SO_REUSEADDR (accepted connections have it from their listener), or SO_REUSEPORT as one user.
Without a process it has not been accepted yet, and is reset when the listener closes.
Sources: RFC 9293 section 3.3.2, socket(7).""",
    "FIN_WAIT1": """\
This side has closed; not everything it sent, or its FIN, has been acknowledged. If its process is gone the kernel
completes it alone (an orphan). While the peer lives and does not read, this can last indefinitely: more than
five minutes were measured. net.ipv4.tcp_orphan_retries bounds it only if the peer does not answer at all.
Sources: RFC 9293 section 3.3.2, tcp(7).""",
    "FIN_WAIT2": """\
This side has closed and the peer has acknowledged that, but has not closed itself. If a process still holds the
socket (after shutdown(2)), it may stay so for ever. Without one it is dropped after net.ipv4.tcp_fin_timeout, 60 s
by default. Until then it blocks a bind just as TIME_WAIT does.
Sources: RFC 9293 section 3.3.2, tcp(7).""",
    "CLOSING": """\
Both sides have closed at the same time, and this one's FIN has not been acknowledged yet. TIME_WAIT follows.
Sources: RFC 9293 section 3.5.""",
    "TIME_WAIT": """\
The side that closes a connection first remembers it: two addresses and two ports. It protects from two things.
- If the last acknowledgement was lost, the peer repeats its FIN, which has to be answered.
- A late segment must not be taken for data of a new connection between the same two ports. So the pair rests until
  every segment has died: twice the maximum segment lifetime, for which RFC 9293 assumes 2 minutes. Linux waits 60 s,
  and has no setting for that (net.ipv4.tcp_fin_timeout is about FIN_WAIT2).
A client that comes back from the same port is accepted at once (RFC 6191), so a running server notices nothing: 256
bytes of memory each. But bind fails, unless the server that left them had SO_REUSEADDR and the new one has it.
That is safe for a server: bind and listen give it a port, they do not revive an old pair, and each new connection is
checked against the remembered ones as before. Do not shorten the wait by SO_LINGER with 0: it resets connections, and
loses what was not delivered.
Sources: RFC 9293 section 3.4.2 and 3.6.1, RFC 1337, RFC 6191, tcp(7), socket(7).""",
    "CLOSE_WAIT": """\
The peer has closed, and this process has not. That lasts until it does, or ends: no timer helps. Many of them are a
leak in the program: it does not read the end of the stream, or forgets to close.
Sources: RFC 9293 section 3.3.2.""",
    "LAST_ACK": """\
The peer has closed, this side has, too, and its FIN waits to be acknowledged: behind unsent data, if the peer does
not read; as in FIN_WAIT1 there may be no end to that.
Sources: RFC 9293 section 3.3.2.""",
    "SO_REUSEADDR": """\
On Linux, TCP: allow a bind despite leftovers on the port, if those have set the option, too, and do not listen.
It never makes two servers listen on one port. The *old* socket needs it as well, so set it always, before bind.
It ignores the owner of the old socket: once no socket listens, every user who sets it can take a port above
net.ipv4.ip_unprivileged_port_start, even over open connections of another user.
On UDP there is nothing to wait for, and it does something else: several sockets, of any users, have one port, and
the last one bound gets every datagram. Do not set it there.
On BSD and macOS only the new socket needs it. On Windows it lets any process take the port of a running server;
SO_EXCLUSIVEADDRUSE is what a server wants there, and a bind over TIME_WAIT works without any option.
Sources: socket(7), ip(7); Microsoft, "Using SO_REUSEADDR and SO_EXCLUSIVEADDRUSE".""",
    "SO_REUSEPORT": """\
Several sockets have one port, if all of them have set it and belong to one user; root is no exception. Of listeners
each has an accept queue of its own, and the kernel spreads connections over them by a hash: what is in the queue of
one that closes is reset, unless net.ipv4.tcp_migrate_req is 1 (Linux 5.14). Connections in TIME_WAIT do not ask for
the user. A bind with it takes 10 us, however many those are.
Sources: socket(7); the kernel's Documentation/networking/ip-sysctl.rst.""",
    "IPV6_V6ONLY": """\
A socket on :: takes connections over IPv4 as well (dual stack), unless it has set this, or net.ipv6.bindv6only is 1.
A dual-stack one needs the port of 0.0.0.0, too: it finds EADDRINUSE where a server listens there, and an IPv6 only
one beside it does not. hotport and asyncio set it; many others, python -m http.server among them, do not.
Sources: ipv6(7).""",
    "EADDRINUSE": """\
Another socket has the port, or leftovers of one do: bind(2) and listen(2) compare the new socket with every one whose
address overlaps: 0.0.0.0 with every IPv4 address; :: with everything, unless it is IPv6 only (IPV6_V6ONLY); a
connection has the address that its client connected to, not the one that the server was bound to.
From listen it means that another socket has begun to listen since the bind.
Sources: bind(2), listen(2), ipv6(7).""",
    "EACCES": """\
Ports below net.ipv4.ip_unprivileged_port_start, 1024 by default, belong to processes with CAP_NET_BIND_SERVICE in the
network namespace: so that a client may trust what answers there to be the machine's and not a user's. Give it to the
service (AmbientCapabilities= in systemd), lower the sysctl, or let systemd or a proxy hold the port.
Sources: ip(7), capabilities(7).""",
    "EADDRNOTAVAIL": """\
No interface of this machine (of this network namespace) has that address, at this moment; or, from connect(2), every
port for outgoing connections to that address is in use. An address that comes later can be bound beforehand with
net.ipv4.ip_nonlocal_bind=1 or IP_FREEBIND.
Sources: bind(2), ip(7).""",
    "BUSY": """\
Which side should close first? That side has the connection in TIME_WAIT. On a server that costs 256 bytes each, no
throughput, and time in the next bind with SO_REUSEADDR: 0.2 ms for 10,000, 5 to 15 ms for 100,000, while which new
connections wait. On a client it costs ports: those of net.ipv4.ip_local_port_range, divided by 60 s, for each address
and port that it connects to, unless net.ipv4.tcp_tw_reuse lets it use them again after a second. So a proxy in front
of few servers runs out first, and is better off if they close. Once it was the other way round (Faber, Touch and
Yue, 1997 and 1999): kernels searched a list for the connection of each segment, where they use a hash table today.
Best is not to close: keep-alive.
Sources: RFC 9293 section 3.5.2; benchmarks/timewait.py; draft-faber-time-wait-avoidance-00.""",
}


def explain(topic: str) -> str:
    """Return the text about a topic; case, ``-`` and ``_`` do not matter.

    Raises:
        ConfigError: If there is none (HP135).
    """
    known = {name.replace("_", ""): text for name, text in TOPICS.items()}
    key = topic.upper().replace("-", "").replace("_", "")
    if key not in known:
        near = nearest(topic.upper().replace("-", "_"), TOPICS)
        raise ConfigError(
            "HP135",
            f"there is no text about {topic!r}",
            cause=f"there are some about {', '.join(TOPICS)}",
            fix=f"hotport why --explain {near or 'TIME_WAIT'}",
        )
    return known[key]
