"""How long nobody listens when hotport binds a port again, beside what the bare system calls take.

In one run and one network namespace for each number of connections in TIME_WAIT on the port, with `--guard` and
without: first the *floor*, close, socket, setsockopt, bind and listen in one process that does nothing else, again and
again, so that its caches are warm; then restarts of a service with `--strategy rebind`, whose reports say how long
nobody listened (`rebind_gap_us`: from before close to after listen). The socket listens on every IPv4 address. Nobody
connects meanwhile. With `--guard`, listeners have SO_REUSEPORT beside SO_REUSEADDR, in the floor as well.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Samples, arguments, save, show
from benchmarks.generation import BACKLOG
from benchmarks.netns import fill, is_permitted, isolated, timewaits
from tests.support import LINE_APP, Service, write_code

#: The ways, and the option of hotport.
WAYS: Final[dict[str, tuple[str, ...]]] = {"rebind": (), "rebind --guard": ("--guard",)}


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="gap.json", rounds=20)
    parser.add_argument("--entries", nargs="+", type=int, default=[0, 10_000, 100_000], help="in TIME_WAIT on the port")
    options = parser.parse_args()
    if not is_permitted():
        print("no network namespaces: what is in TIME_WAIT here belongs to everybody")

    samples: dict[str, Samples] = {}
    control: dict[str, Any] = {}
    for entries in options.entries:
        for way in WAYS:
            found = isolated(gaps, way, entries, options.rounds)
            control[f"{way}, {entries}"] = found.pop("control")
            series = {f"{way}, {entries}: {name}": Samples(values) for name, values in found.items()}
            show(f"{options.rounds} rounds", series)
            samples |= series

    def median(way: str, entries: int, what: str) -> float:
        return samples[f"{way}, {entries}: {what}"].median

    few, many = min(options.entries), max(options.entries)
    ratio = median("rebind", few, "gap us") / median("rebind", few, "floor us")
    flat = median("rebind --guard", many, "gap us") / median("rebind --guard", few, "gap us")
    goals = [
        Goal(f"rebind: gap to floor with {few:,} in TIME_WAIT", ratio, at_most=3),
        Goal(f"rebind --guard: gap with {many:,} in TIME_WAIT to that with {few:,}", flat, at_most=2),
    ]
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=goals,
        control=control,
        has_namespaces=is_permitted(),
        entries=options.entries,
    )
    return 0


def gaps(way: str, entries: int, rounds: int) -> dict[str, Any]:
    """The floor and the gaps of one way, in microseconds."""
    listener = _listening(0, way)
    port = listener.getsockname()[1]
    fill(listener, entries)
    floor = []
    for _ in range(rounds):
        began = time.monotonic()
        listener.close()
        listener = _listening(port, way)
        floor.append(time.monotonic() - began)
    listener.close()
    before = timewaits()
    with tempfile.TemporaryDirectory(prefix="hp-") as name:
        directory = Path(name)
        write_code(directory / "app.py", LINE_APP.format(version="one"))
        bind = ("--bind", f"0.0.0.0:{port}", "--strategy", "rebind", *WAYS[way])
        with Service(directory, *bind, "--settle", "0", "--backlog", str(BACKLOG), "app:app") as service:
            service.wait_ready()
            found = [service.restart()["rebind_gap_us"] for _ in range(rounds)]
    control = {"TIME_WAIT before": before, "TIME_WAIT after": timewaits()}
    return {"gap us": found, "floor us": [round(took * 1e6, 1) for took in floor], "control": control}


def _listening(port: int, way: str) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if "--guard" in WAYS[way]:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("0.0.0.0", port))
    listener.listen(BACKLOG)
    return listener


if __name__ == "__main__":
    sys.exit(main())
