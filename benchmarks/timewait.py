"""What connections in TIME_WAIT cost a busy server today.

One process is client and server, in a network namespace of its own for each number of entries on the port. New
connections: connect, accept, and a reset (so that their number stays), one after the other. Binding: bind and listen,
and close, where nobody else listens, over the same entries; with SO_REUSEADDR on every address, on the address that
the entries have, and on one that they have not (bhash2 finds those apart); with SO_REUSEPORT on a port whose entries
have it, too; and with neither, which fails. Memory: an object of the kernel's cache `tw_sock_TCP`, by /proc/slabinfo.

Who closes first has the entry. A client with 500 ports (net.ipv4.ip_local_port_range) connects to one address and port
as fast as it can: how many connections in a second that gives, when the first one fails with EADDRNOTAVAIL, and who
has the entries, by who closes first and by the client's net.ipv4.tcp_tw_reuse.
"""

from __future__ import annotations

import errno
import socket
import statistics
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Samples, arguments, pinned, save, show
from benchmarks.generation import BACKLOG, bound
from benchmarks.netns import fill, is_permitted, isolated, sysctl, timers, timewaits

CONNECTIONS: Final = 2000

#: Of new connections a second with the most entries, to none.
RATE_RATIO: Final = 0.9

PORTS: Final = 500

#: Who closes first, and the client's tcp_tw_reuse.
CLOSERS: Final = (("server", 0), ("client", 0), ("client", 1))

#: What binding is done with, and to which address; entries have 127.0.0.1.
BINDS: Final = {
    "SO_REUSEADDR, every address": (socket.SO_REUSEADDR, "0.0.0.0"),
    "SO_REUSEADDR, the entries' address": (socket.SO_REUSEADDR, "127.0.0.1"),
    "SO_REUSEADDR, another address": (socket.SO_REUSEADDR, "127.0.0.9"),
    "neither, every address": (0, "0.0.0.0"),
}
REUSEPORT: Final = "SO_REUSEPORT, every address"

RESET: Final = struct.pack("ii", 1, 0)


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="timewait.json", rounds=30)
    parser.add_argument("--quick", action="store_true", help="10 rounds; 30 take three quarters of a minute")
    parser.add_argument("--entries", nargs="+", type=int, default=[0, 10_000, 100_000], help="in TIME_WAIT on the port")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each closing order [default: 5]")
    options = parser.parse_args()
    rounds = 10 if options.quick else options.rounds
    if not is_permitted():
        print("no network namespaces: measuring on the loopback interface that everybody has, without port exhaustion")

    samples: dict[str, Samples] = {}
    for entries in options.entries:
        with pinned(0):
            found = isolated(busy, entries, rounds)
            found[f"bind us: {REUSEPORT}"] = isolated(shared, entries, rounds)
        samples |= {f"{entries}: {name}": Samples(values) for name, values in found.items()}
    closers = [
        isolated(exhaust, who, reuse, options.seconds) for who, reuse in CLOSERS if is_permitted() and options.seconds
    ]

    show(f"{rounds} rounds", samples)
    print("bytes of an entry:", memory := _entry_bytes())
    for closer in closers:
        print(closer)
    print()
    most, least = (f"{count}: connections/s" for count in (options.entries[-1], options.entries[0]))
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=[
            Goal(
                f"connections/s with {options.entries[-1]} entries to {options.entries[0]}",
                samples[most].median / samples[least].median,
                at_least=RATE_RATIO,
            )
        ],
        entry_bytes=memory,
        closers=closers,
        has_namespaces=is_permitted(),
        entries=options.entries,
        ports=PORTS,
        seconds=options.seconds,
    )
    return 0


def busy(entries: int, rounds: int) -> dict[str, list[float]]:
    """New connections, and binding with and without SO_REUSEADDR."""
    listener = bound(0, socket.SO_REUSEADDR)
    port = listener.getsockname()[1]
    fill(listener, entries)
    found: dict[str, list[float]] = {"connections/s": [], "connect median us": [], "connect p99 us": []}
    for _ in range(rounds):
        began = time.perf_counter()
        took = [connect_us(listener) for _ in range(CONNECTIONS)]
        found["connections/s"].append(round(CONNECTIONS / (time.perf_counter() - began)))
        found["connect median us"].append(round(statistics.median(took), 1))
        found["connect p99 us"].append(round(statistics.quantiles(took, n=100)[98], 1))
    listener.close()
    for name, (option, address) in BINDS.items():
        found[f"bind us: {name}"] = [_bind_us(port, option, address) for _ in range(rounds)]
    return found


def connect_us(listener: socket.socket) -> float:
    """Of one new connection, which is reset when it is accepted."""
    address = listener.getsockname()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        began = time.perf_counter()
        client.connect(address)
        took = time.perf_counter() - began
        accepted = listener.accept()[0]
    accepted.close()
    return took * 1e6


def shared(entries: int, rounds: int) -> list[float]:
    """Binding where everything on the port has SO_REUSEPORT."""
    with bound(0, socket.SO_REUSEPORT) as listener:
        port = listener.getsockname()[1]
        fill(listener, entries)
    return [_bind_us(port, socket.SO_REUSEPORT, "0.0.0.0") for _ in range(rounds)]


def exhaust(who: str, reuse: int, seconds: float) -> dict[str, Any]:
    """Connect from a few ports for so long."""
    sysctl("net.ipv4.ip_local_port_range", f"50000 {50000 + PORTS - 1}")
    sysctl("net.ipv4.tcp_tw_reuse", str(reuse))
    counts: Counter[str] = Counter()
    first_failure = None
    with bound(900, socket.SO_REUSEADDR) as listener:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with socket.socket() as client:
                try:
                    client.connect(("127.0.0.1", 900))
                except OSError as failure:
                    counts[errno.errorcode[failure.errno or 0]] += 1
                    first_failure = first_failure or counts["connected"]
                    time.sleep(0.001)
                    continue
                counts["connected"] += 1
                with listener.accept()[0] as accepted:
                    (accepted if who == "server" else client).close()
    held = len(timers(900))
    return {
        "closes first": who,
        "tcp_tw_reuse": reuse,
        "connections/s": round(counts.pop("connected") / seconds, 1),
        "connections before the first failure": first_failure,
        "failures": dict(counts),
        "the server has": held,
        "the client has": timewaits() - held,
    }


def _bind_us(port: int, option: int, address: str) -> float:
    """Microseconds of bind and listen; of bind alone where it fails."""
    with socket.socket() as listener:
        if option:
            listener.setsockopt(socket.SOL_SOCKET, option, 1)
        began = time.perf_counter()
        try:
            listener.bind((address, port))
            listener.listen(BACKLOG)
        except OSError as failure:
            if failure.errno != errno.EADDRINUSE:
                raise
        return round((time.perf_counter() - began) * 1e6, 1)


def _entry_bytes() -> int | None:
    """What a connection in TIME_WAIT takes, if we may know.

    Sources: slabinfo(5): the fourth column is the size of an object.
    """
    try:
        lines = Path("/proc/slabinfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[3]) for line in lines if line.startswith("tw_sock_TCP ")), None)


if __name__ == "__main__":
    sys.exit(main())
