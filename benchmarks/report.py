"""Render tables and a picture from ``benchmarks/results/``; no number of ours in them is typed by hand."""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.svg import Lane, Row, ranges
from hotport.churn import fates

ROOT: Final = Path(__file__).parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
DOCS: Final = ROOT / "docs"

#: Rows of http.py: what they are called, what is compared, and how many decimals that has.
HTTP_ROWS: Final = {
    "keep-alive": ("`Hello, world!`, requests/s", "requests/s", 0),
    "connections": ("likewise, a connection for each", "requests/s", 0),
    "access-log": ("likewise, each one logged", "requests/s", 0),
    "latency": ("p99 latency in ms at {rate:,.0f} requests/s", "p99 ms", 2),
    "fastapi": ("FastAPI, a small JSON, requests/s", "requests/s", 0),
    "body": ("64 KiB in one piece, requests/s", "requests/s", 0),
    "stream": ("1 MiB in pieces of 64 KiB, MiB/s", "MiB/s", 0),
    "upload": ("upload of 1 MiB, MiB/s", "MiB/s", 0),
    "websocket": ("WebSocket, echo of 1 KiB, messages/s", "messages/s", 0),
    "memory": ("memory of an idle connection in KiB", "KiB", 1),
}


TLS_ROWS: Final = {
    "keep-alive": ("100 bytes, requests in a second of processor time", "requests/CPU s", 0),
    "body": ("16 KiB, likewise", "requests/CPU s", 0),
    "handshakes": ("100 bytes, a connection for each, likewise", "requests/CPU s", 0),
    "memory": ("memory of an idle connection in KiB", "KiB", 1),
}

#: What clients of rebind.py may meet.
LOSSES: Final = ("refused", "reset", "lost")

#: Of hostile.py: so much may be left of what a server has grown by.
LEFT_MIB_MAX: Final = 16.0

#: Ways of rebind.py, and what they are called.
WAYS: Final = {
    "inherit": "the socket itself is passed on",
    "overlap steered": "`SO_REUSEPORT`, steered by BPF, queue drained",
    "overlap drained": "`SO_REUSEPORT`, queue drained",
    "overlap migrated": "`SO_REUSEPORT`, `tcp_migrate_req=1`",
    "overlap closed": "`SO_REUSEPORT`, closed at once",
    "rebind warm drained": "`SO_REUSEADDR`, successor waits, queue drained",
    "rebind warm": "`SO_REUSEADDR`, successor waits",
    "rebind cold": "`SO_REUSEADDR`, successor starts afterwards",
}

#: What handoff.py compares `--handoff auto` with.
STEADILY: Final = {"off": " of those with `off`", "before": " of those of the code before connections could move"}

BINDS: Final = {
    "SO_REUSEADDR, every address": "with `SO_REUSEADDR`, every address",
    "SO_REUSEADDR, the entries' address": "likewise, only the address that the entries have",
    "SO_REUSEADDR, another address": "likewise, an address that they do not have",
    "SO_REUSEPORT, every address": "with `SO_REUSEPORT`, every address",
    "neither, every address": "with neither, which fails over entries",
}


def _measured(page: str) -> str:
    """The page of all figures that no other page has."""
    page = _between(page, "measured", _section())
    for name, section in {"rebind": _rebind, "peers": _peers, "handoff": _handoff}.items():
        if (results := results_of(name)) is not None:
            page = _between(page, name, section(results))
    return page


#: Of the README's table: the servers as peers.py names them, and as cost.py and http.py do.
BESIDE: Final = {
    "hotport": "hotport",
    "uvicorn": "uvicorn",
    "gunicorn, asgi": "gunicorn",
    "granian": "granian",
    "hypercorn": "hypercorn",
}


def _readme(readme: str) -> str:
    """The README with its one table; a cell that nobody has measured is empty."""
    peers, opened, cost, http = (results_of(name) for name in ("peers", "open", "cost", "http"))
    rows: dict[str, list[str]] = {
        "requests lost in 3 restarts": [],
        "answers that say `Connection: close` in 3 restarts": [],
        "WebSockets cut in a restart, of 20": [],
        "a worker whose event loop is blocked is replaced after": [],
        "memory of 4 workers, MiB": [],
        "`Hello, world!`, requests/s": [],
    }
    lost, told, cut, hung, memory, rate = rows.values()
    for name, short in BESIDE.items():
        rounds = peers["servers"][name]["rounds"]
        lost.append(f"{sum(found['lost'] for found in rounds):,}")
        told.append(f"{_peers_counts(rounds)['told to close']:,}")
        cut.append(_median(opened, f"{name}: cut"))
        blocked = _median(opened, f"{name}: blocked s")
        is_never = blocked and float(blocked) >= opened["limit_s"]
        hung.append("never" if is_never else f"{blocked} s" if blocked else "")
        memory.append(_median(cost, f"{short}: pss MiB"))
        rate.append(_median(http, f"keep-alive: {short} requests/s"))
    heads = [_peer(name, peers["servers"][name]).partition(",")[0] for name in BESIDE]
    lines = [
        f"| | {' | '.join(heads)} |",
        "|---|" + "---|" * len(heads),
        *(f"| {what} | {' | '.join(cells)} |" for what, cells in rows.items()),
        "",
        "Each was restarted as its manual recommends, with its own defaults; hotport with `--handoff websocket` for",
        f"WebSockets. Never is not within {opened['limit_s']:g} s. With `--preload`, hotport's memory is "
        f"{_median(cost, 'hotport --preload: pss MiB')} MiB. Empty is not measured.",
        "By `benchmarks/peers.py`, `open.py`, `cost.py`, `http.py`: `make bench`.",
        "",
    ]
    return _between(readme, "beside", "\n".join(lines))


def _median(results: Any, series: str) -> str:
    """The median of a series without decimals; empty if there is none."""
    values = results["samples"].get(series) if results is not None else None
    return f"{statistics.median(values):,.0f}" if values else ""


def _filled(page: str, name: str, sections: Mapping[str, Callable[[Any], str]]) -> str:
    """A page with what the results of a benchmark say between its markers."""
    results = results_of(name)
    for marker, section in sections.items() if results is not None else ():
        page = _between(page, marker, section(results))
    return page


def _picture(svg: str) -> str:
    results = results_of("rebind")
    return svg if results is None else _drawn(results)


def _drawn(results: dict[str, Any]) -> str:
    """The gaps of rebind.py."""
    samples, interval_s = results["samples"], 1 / results["rate"]
    rows = []
    for way in WAYS:
        lanes: list[Lane | None] = []
        lost = []
        for entries in results["entries"]:
            gaps = samples.get(f"{way}, {entries}: gap ms")
            if gaps is None:
                lanes.append(None)
                continue
            lane = Lane(min(gaps) / 1e3, statistics.median(gaps) / 1e3, max(gaps) / 1e3)
            if hole := samples.get(f"{way}, {entries}: hole us"):
                floor = samples[f"{way}, {entries}: floor us"]
                lane = replace(lane, mark=statistics.median(floor) / 1e6, ring=statistics.median(hole) / 1e6)
            lanes.append(lane)
            lost.append(sum(_mean(samples[f"{way}, {entries}: {loss}"]) for loss in LOSSES))
        if lost:
            rows.append(Row(way, lanes, " / ".join(_count(value) for value in lost)))
    waits = [results["plain"].get(str(entries)) for entries in results["entries"]]
    if any(waits):
        lanes = [_wait(found) for found in waits]
        rows.append(Row("plain", lanes, "not measured"))
    return ranges(
        f"From the old process's last accept to the new one's first; a client every {interval_s * 1e3:g} ms (dashed)",
        [f"{entries:,} in TIME_WAIT" for entries in results["entries"]],
        rows,
        mark="the bare system calls",
        ring="nobody listens",
        line=interval_s,
        note="lost clients a restart",
        low=1e-5,
        high=1e2,
    )


def _why(results: dict[str, Any]) -> str:
    samples, machine, there = results["samples"], results["machine"], results["on_the_port"]
    claims = list(results["told"]["crowded"]["hotport why"])[1:]
    lines = [
        f"| | ms, one listener | ms, crowded | lines, crowded | {' | '.join(claims)} |",
        "|---|---|---|---|" + "---|" * len(claims),
    ]
    for tool, told in results["told"]["crowded"].items():
        cells = []
        for port in ("a listener", "crowded"):
            wall, cpu = (samples[f"{port}: {tool}, ms{kind}"] for kind in ("", " of processor time"))
            cells.append(f"{statistics.median(wall):,.0f} ({statistics.median(cpu):,.0f})")
        cells += [f"{told['lines']:,}", *("yes" if told[claim] else "" for claim in claims)]
        lines.append(f"| `{tool}` | {' | '.join(cells)} |")
    alone, beside = (statistics.median(samples[f"connect p99 us, {name}"]) for name in ("alone", "beside hotport why"))
    return "\n".join(
        [
            *lines,
            "",
            "Medians from the shell's point of view (in brackets: of processor time). Crowded is",
            f"{there['established']:,} connections established on the port, and {there['TIME_WAIT at the end']:,} in",
            f"TIME_WAIT. A client's connect there took {alone:,.0f} us at p99, and {beside:,.0f} us while",
            "`hotport why` ran over and over.",
            f"Linux {machine['kernel']}, {machine['cores']} cores, load average {results['load_average']:.1f}:",
            "`benchmarks/why.py`, `benchmarks/results/why.json`.",
            "",
        ]
    )


def _wait(found: dict[str, Any] | None) -> Lane | None:
    """Until a plain bind works: how long that took, or how long it would have taken at least."""
    if found is None:
        return None
    took = found["worked after s"]
    waited = found["tried for s"] + found["the last of them for s"] if took is None else took
    return Lane(waited, waited, waited)


def _rebind(results: dict[str, Any]) -> str:
    samples, rate, machine = results["samples"], results["rate"], results["machine"]
    counts = results["entries"]
    lines = [
        "## From one process to the next",
        "",
        "What clients notice when a listening port changes hands, by how, and by how many connections are in",
        f"TIME_WAIT on it. Without a restart there is one accept every {1e3 / rate:g} ms.",
        "",
        "| how | "
        + " | ".join(f"gap in ms, {entries:,}" for entries in counts)
        + " | refused, reset, lost a restart |",
        "|---|" + "---|" * (len(counts) + 1),
    ]
    rounds = 0
    for way, what in WAYS.items():
        cells, losses = [], []
        for entries in counts:
            if gaps := samples.get(f"{way}, {entries}: gap ms"):
                rounds = len(gaps)
                cells.append(f"{_ms(statistics.median(gaps))} (to {_ms(max(gaps))})")
                losses.append([_mean(samples[f"{way}, {entries}: {loss}"]) for loss in LOSSES])
        if cells:
            cells.append("; ".join(", ".join(map(_count, of)) for of in losses) if any(map(any, losses)) else "0")
            lines.append(f"| {what} | {' | '.join(cells)} |")
    waits = [_wait(results["plain"].get(str(entries))) for entries in counts]
    if any(waits):
        cells = ["" if lane is None else f"{lane.median * 1e3:,.0f}" for lane in waits]
        lines.append(f"| neither option, until bind works | {' | '.join(cells)} | everybody until then |")
    holes = []
    for entries in counts:
        if hole := samples.get(f"rebind warm, {entries}: hole us"):
            floor = statistics.median(samples[f"rebind warm, {entries}: floor us"])
            holes.append(f"{statistics.median(hole):,.0f} us beside {floor:,.0f} us with {entries:,}")
    lines += [
        "",
        "![the gaps, on a logarithmic scale](../../benchmarks/results/rebind.svg)",
        "",
        f"Medians (and maxima) of {rounds} restarts; {rate:,.0f} connections a second, open loop; losses are means, by",
        "number of entries; how long bind fails without options is what the timers said, or was waited for.",
        "A successor that waits with everything imported leaves a hole in which nobody listens; its median, beside",
        "what the bare system calls take in a single process that repeats them, with warm caches:",
        ", ".join(holes) + " in TIME_WAIT.",
        f"Load average {machine['load_average'][0]:.1f} on {machine['cores']} cores. How: `benchmarks/rebind.py`;",
        "samples in `benchmarks/results/rebind.json`.",
        "",
    ]
    return "\n".join(lines)


def _gap(results: dict[str, Any]) -> str:
    samples, counts, machine = results["samples"], results["entries"], results["machine"]
    lines = [
        f"| in TIME_WAIT on the port | {' | '.join(f'{entries:,}' for entries in counts)} |",
        "|---|" + "---|" * len(counts),
    ]
    rounds = 0
    for way in ("rebind", "rebind --guard"):
        for series, what in (("gap us", f"`{way}`, nobody listens for, us"), ("floor us", "the bare system calls, us")):
            values = [samples[f"{way}, {entries}: {series}"] for entries in counts]
            rounds = len(values[0])
            cells = [f"{statistics.median(each):,.0f} (to {max(each):,.0f})" for each in values]
            lines.append(f"| {what} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Medians (and maxima) of {rounds} restarts, and as many repetitions of the same system calls in one process",
        f"that does nothing else. Load average {machine['load_average'][0]:.1f} on {machine['cores']} cores. How:",
        "`benchmarks/gap.py`; samples in `benchmarks/results/gap.json`.",
        "",
    ]
    return "\n".join(lines)


def _handoff(results: dict[str, Any]) -> str:
    samples, counts, machine = results["samples"], results["counts"], results["machine"]

    def row(what: str, name: str, decimals: int) -> str:
        cells = []
        for count in counts:
            found = samples[f"{count} idle: {name}"]
            low, middle, high = (
                f"{value:,.{decimals}f}" for value in (min(found), statistics.median(found), max(found))
            )
            cells.append(f"{middle} ({low} to {high})")
        return f"| {what} | {' | '.join(cells)} |"

    steadily = [
        ", ".join(_ratio(samples[f"auto to {other}, {unit}"]) for unit in ("requests/s", "requests/CPU s")) + what
        for other, what in STEADILY.items()
        if f"auto to {other}, requests/s" in samples
    ]
    rounds = len(samples[f"{counts[0]} idle: moved ms"])
    lines = [
        "## Connections that move",
        "",
        "| idle keep-alive connections | " + " | ".join(f"{count:,}" for count in counts) + " |",
        "|---|" + "---|" * len(counts),
        row("a restart moves all of them in, ms", "moved ms", 0),
        row("processor time of both workers for each, us", "both sides us", 1),
        row("the same descriptors and transports without hotport, us", "floor us", 1),
        row("p99.9 latency of requests meanwhile, longer than without a restart by, ms", "longer, p99.9 ms", 1),
        row("the slowest of those at the move, likewise", "longer at the move, max ms", 1),
        "",
        f"Medians and ranges of {rounds} restarts. The requests are {results['rate']:,.0f} a second on "
        f"{results['connections']} other kept connections, which",
        "move, too. Every answer after a restart was the new generation's, on the same connection. While nothing is",
        "restarted, requests/s with `--handoff auto`, and requests for each second of processor time, are",
        ",\nand ".join(steadily) + ".",
        f"Load average {machine['load_average'][0]:.1f} on {machine['cores']} cores. How: `benchmarks/handoff.py`;",
        "samples in `benchmarks/results/handoff.json`.",
        "",
    ]
    return "\n".join(lines)


def _timewait(results: dict[str, Any]) -> str:
    samples, counts = results["samples"], results["entries"]

    def row(what: str, name: str, decimals: int) -> str:
        found = [samples[f"{entries}: {name}"] for entries in counts]
        return f"| {what} | " + " | ".join(f"{statistics.median(values):,.{decimals}f}" for values in found) + " |"

    rounds = len(samples[f"{counts[0]}: connections/s"])
    lines = [
        "| entries on the port | " + " | ".join(f"{entries:,}" for entries in counts) + " |",
        "|---|" + "---|" * len(counts),
        row("new connections/s, one at a time", "connections/s", 0),
        row("connect, median, us", "connect median us", 1),
        row("connect, p99, us", "connect p99 us", 1),
        *(row(f"bind and listen {what}, us", f"bind us: {name}", 0) for name, what in BINDS.items()),
        "",
        f"Medians of {rounds} rounds on loopback, client and server in one process on one core, load average",
        f"{results['machine']['load_average'][0]:.1f} (`benchmarks/timewait.py`)."
        + (f" An entry takes {size} bytes of the kernel's memory." if (size := results["entry_bytes"]) else ""),
        "",
    ]
    if results["closers"]:
        lines += [
            f"Who closes first has the entry. A client with {results['ports']} ports connects to one address and port",
            f"as fast as it can, for {results['seconds']:g} s:",
            "",
            "| closes first | client's `tcp_tw_reuse` | connections | first fails after | entries: server, client |",
            "|---|---|---|---|---|",
        ]
        for found in results["closers"]:
            failure = found["connections before the first failure"]
            cells = (
                found["closes first"],
                found["tcp_tw_reuse"],
                f"{found['connections/s'] * results['seconds']:,.0f}",
                "none" if failure is None else f"{failure} connections",
                f"{found['the server has']}, {found['the client has']}",
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


#: Loads of power.py, what they are called, and the figure that says how much it was.
POWERS: Final = {
    "new connections": ("`--connect`, new connections/s", "attempts/s"),
    "keep-alive requests": ("`--keepalive 1000 --think 48ms`, requests/s", "attempts/s"),
    "held connections": ("`--keepalive 10000 --think 10s`, connections held", "connections"),
}


def _power(results: dict[str, Any]) -> str:
    samples, machine, cpu = results["samples"], results["machine"], "engine's CPU us/attempt"
    lines = [
        "| one engine, one core | kept | own lag p99 in ms: best, median, worst | processor time of an attempt, us |",
        "|---|---|---|---|",
    ]
    for name, (what, unit) in POWERS.items():
        found = {key: samples[f"{name}: {key}"] for key in (unit, "lag p99 ms", cpu)}
        lags = found["lag p99 ms"]
        lines.append(
            f"| {what} | {statistics.median(found[unit]):,.0f} | "
            f"{min(lags):.2f}, {statistics.median(lags):.2f}, {max(lags):.2f} | "
            f"{statistics.median(found[cpu]):.0f} |"
        )
    loads = [load for name in POWERS for load in samples[f"{name}: load average"]]
    first = ", engine and target before all others (SCHED_FIFO)" if results["first"] else ""
    return "\n".join(
        [
            *lines,
            "",
            f"{len(lags)} rounds of {results['seconds']:g} s against HAProxy on the other core; load average\n"
            f"{min(loads):.1f} to {max(loads):.1f} on {machine['cores']} cores{first}.",
            "How: `benchmarks/power.py`, `benchmarks/results/power.json`.",
            "",
        ]
    )


def _hostile(results: dict[str, Any]) -> str:
    samples, machine, servers = results["samples"], results["machine"], results["servers"]

    def median(name: str, server: str, what: str) -> float | None:
        values = samples.get(f"{name}: {server} {what}")
        return statistics.median(values) if values else None

    def latency(values: list[float | None]) -> str:
        return " / ".join("?" if value is None else _figure(value) for value in values)

    quiet = []
    for server in servers:
        by_row = [[median(name, server, f"{q} ms undisturbed") for name in results["rows"]] for q in ("p50", "p99")]
        quiet.append(latency([statistics.median(v for v in row if v is not None) for row in by_row]))
    lines = [
        f"| each client | clients | {' | '.join(servers)} |",
        "|---|---|" + "---|" * len(servers),
        f"| none is hostile | 0 | {' | '.join(quiet)} |",
    ]
    for name, row in results["rows"].items():
        cells = []
        for server in servers:
            grown = median(name, server, "MiB a client")
            endings = [ending for ending in row["endings"].get(server, ()) if ending]
            cell = []
            if grown is not None:
                cell.append(f"{_figure(grown)} MiB")
                cell.append(latency([median(name, server, f"{q} ms meanwhile") for q in ("p50", "p99")]))
            if endings:
                cell.append(endings[0])
            elif (left := median(name, server, "MiB left")) is not None and left > LEFT_MIB_MAX:
                cell.append(f"keeps {left:,.0f} MiB")
            cells.append("; ".join(cell))
        lines.append(f"| {row['what']} | {row['clients']} | {' | '.join(cells)} |")
    first = ", all of it before other processes (see there)" if results["first"] else ""
    return "\n".join(
        [
            *lines,
            "",
            "Memory that one worker grows by for each hostile client, then the latency of a polite client meanwhile",
            "(p50 and p99 in ms). *Keeps* is what was still there 5 s after all hostile clients had left, if that is",
            f"more than 16 MiB. They were there for {results['seconds']:g} s, each sent at most 16 MiB a second, and",
            "came again when it was cut; a server that took more than 1.5 GiB was killed. Where an answer is made in",
            "one piece, its 10 MiB are the application's own.",
            f"Linux {machine['kernel']}, {machine['cores']} cores, load average "
            f"{machine['load_average'][0]:.1f}{first}.",
            "How: `benchmarks/hostile.py`; samples in `benchmarks/results/hostile.json`.",
            "",
        ]
    )


#: Figures of balance.py: what they are called, which samples, and how many decimals they have.
SHARES: Final = (
    ("{connections:,} connections, one a millisecond: most, to the mean", ("one a ms, share",), 2),
    ("p50 / p99 of the first answer, ms", ("one a ms, p50 ms", "one a ms, p99 ms"), 1),
    ("64 connections at once: most, to the mean", ("at once, share",), 2),
    ("requests on these: most, to the fewest", ("at once, requests' share",), 2),
    ("their p50 / p99, ms", ("at once, p50 ms", "at once, p99 ms"), 1),
    ("a connection for each request: most, to the mean", ("for each request, share",), 2),
    ("connections for each second of processor time", ("for each request, connections/CPU s",), 0),
)


def _balance(results: dict[str, Any]) -> str:
    samples, machine = results["samples"], results["machine"]

    def figure(name: str, decimals: int = 0) -> str:
        return f"{statistics.median(samples[name]):,.{decimals}f}"

    lines = ["## Measured", ""]
    if servers := [name for name in results["servers"] if f"servers: {name} one a ms, share" in samples]:
        heads = [
            f"{name} {machine['packages'][name]}" if name in machine["packages"] else f"`{name}`" for name in servers
        ]
        lines += [f"| four workers | {' | '.join(heads)} |", "|---|" + "---|" * len(servers)]
        for what, keys, decimals in SHARES:
            cells = [" / ".join(figure(f"servers: {name} {key}", decimals) for key in keys) for name in servers]
            lines.append(f"| {what.format(**results)} | {' | '.join(cells)} |")
        lines += [
            "",
            "*Most* is the count of the worker with the most, 1.00 if all have the same.",
            *(f"{name} was left out: {why}." for name, why in results["skipped"].items()),
            "",
        ]
    if "scale: connections closed" in samples:
        farthest = statistics.median(samples["scale: farthest from the mean"])
        closed, lost = (sum(samples[f"scale: {what}"]) for what in ("connections closed", "messages lost"))
        latency = [figure(f"scale: p99 ms, {when}", 1) for when in ("before", "until all serve", "once all serve")]
        lines += [
            f"`hotport scale 4`, while two workers had {2 * results['connections']:,} connections, half of them",
            f"WebSockets: 2 s later no worker was farther than {100 * farthest:.1f} % from the mean;",
            f"{closed:,.0f} connections were closed, {lost:,.0f} messages lost. The p99 of other clients was",
            f"{latency[0]} ms before, {latency[1]} ms while the new workers started, and {latency[2]} ms in the 2 s",
            "after that.",
            "",
        ]
    if "stall: auto, connections left" in samples:
        before, left = figure("stall: auto, connections before"), max(samples["stall: auto, connections left"])
        lines += [
            "When one of four workers began to block its event loop for 300 ms of each 500 ms, it had",
            f"{before} connections; after 2 s it had {left:,.0f}. From then on the p99 of all clients was",
            f'{figure("stall: auto, p99 ms")} ms, and {figure("stall: off, p99 ms")} ms with `balance = "off"`.',
            "",
        ]
    rounds, load = max(map(len, samples.values())), machine["load_average"][0]
    return "\n".join(
        [
            *lines,
            f"Medians of {rounds} rounds; Linux {machine['kernel']}, {machine['cores']} cores, load average",
            f"{load:.1f}. How: `benchmarks/balance.py`; samples in `benchmarks/results/balance.json`.",
            "",
        ]
    )


#: Ways of sharing.py, as the page calls them.
SHARING: Final = {
    "plain": "one queue, nothing else",
    "exclusive": "`EPOLLEXCLUSIVE`",
    "defer": "who is ahead leaves the queue to others, at most 1 ms (hotport)",
    "exact": "who accepts hands each connection to the one with the fewest",
    "steered": "a queue each (`SO_REUSEPORT`), steered to the one with the fewest",
}


def _sharing(results: dict[str, Any]) -> str:
    samples, machine = results["samples"], results["machine"]

    def figure(name: str, decimals: int = 2) -> str:
        return f"{statistics.median(samples[name]):,.{decimals}f}"

    rounds = len(samples["plain: at once, share"])
    rows = []
    for way, what in SHARING.items():
        shares = [figure(f"{way}: {kind}, share") for kind in ("one a millisecond", "at once", "closed")]
        rows.append(f"| {what} | {' | '.join(shares)} | {figure(f'{way}: closed, us', 0)} |")
    return "\n".join(
        [
            "| four processes, bare system calls | one a ms: most, to the mean | 64 at once | one for each request "
            "| us of processor time for each |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"Medians of {rounds} rounds; Linux {machine['kernel']}, {machine['cores']} cores.",
            "How: `benchmarks/sharing.py`; samples in `benchmarks/results/sharing.json`.",
            "",
        ]
    )


#: Columns of cost.py, their headings, and decimals.
COSTS: Final = {
    "cpu s": ("start of 4 workers: processor, s", 1),
    "pss MiB": ("their memory, MiB", 0),
    "restart s": ("restart of 2: s", 1),
    "restart cpu s": ("processor, s", 1),
    "p99 ratio": ("p99 of clients in it, to before", 1),
    "replaced ms": ("a killed worker is replaced in, ms", 0),
}


def _cost(results: dict[str, Any]) -> str:
    samples, machine = results["samples"], results["machine"]
    names = dict.fromkeys(name.partition(": ")[0] for name in samples)

    def cell(name: str, what: str, decimals: int) -> str:
        values = samples.get(f"{name}: {what}")
        return "" if values is None else f"{statistics.median(values):,.{decimals}f}"

    rows = [
        f"| `{name}` | {' | '.join(cell(name, what, decimals) for what, (_, decimals) in COSTS.items())} |"
        for name in names
    ]
    rounds = len(next(iter(samples.values())))
    return "\n".join(
        [
            f"| | {' | '.join(heading for heading, _ in COSTS.values())} |",
            f"|---{'|---' * len(COSTS)}|",
            *rows,
            "",
            f"Medians of {rounds} rounds with {', '.join(results['modules'])}; Linux {machine['kernel']}, "
            f"{machine['cores']} cores. `gunicorn --preload`",
            "is not restarted, as its restart loads no new code.",
            "How: `benchmarks/cost.py`; samples in `benchmarks/results/cost.json`.",
            "",
        ]
    )


def _tls(results: dict[str, Any]) -> str:
    samples, machine = results["samples"], results["machine"]

    def name_of(server: str) -> str:
        return {"hotport": "hotport", "before": "hotport with its event loop's TLS"}.get(
            server, f"{server} {machine['packages'].get(server, '')}".strip()
        )

    def cell(row: str, server: str, what: str, decimals: int) -> str:
        values = samples.get(f"{row}: {server} {what}")
        return "" if values is None else f"{statistics.median(values):,.{decimals}f}"

    servers = [server for server in results["servers"] if f"keep-alive: {server} requests/CPU s" in samples]
    rounds = len(samples["keep-alive: hotport requests/CPU s"])
    return "\n".join(
        [
            f"| TLS 1.3, one worker | {' | '.join(map(name_of, servers))} |",
            f"|---{'|---:' * len(servers)}|",
            *(
                f"| {heading} | {' | '.join(cell(row, server, what, decimals) for server in servers)} |"
                for row, (heading, what, decimals) in TLS_ROWS.items()
            ),
            "",
            f"Medians of {rounds} rounds; Linux {machine['kernel']}, {machine['cores']} cores.",
            "How: `benchmarks/tls.py`; samples in `benchmarks/results/tls.json`.",
            "",
        ]
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _peers(results: dict[str, Any]) -> str:
    lines = [
        "## Beside other servers",
        "",
        "| restarted under load | how | attempts | lost | longest accept gap, ms | p99, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, server in results["servers"].items():
        rounds = server["rounds"]
        lines.append(
            f"| {_peer(name, server)} | {server['restart']} | {sum(found['attempts'] for found in rounds):,} | "
            f"{sum(found['lost'] for found in rounds):,} | {_peers_worst(rounds)} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{_peers_method(results)} What became of every client, and why:",
            "[what restarts cost elsewhere](what-restarts-cost-elsewhere.md).",
            "",
        ]
    )


def _peers_fates(results: dict[str, Any]) -> str:
    """One line a server, one column for each fate that any of them had."""
    counts = {name: _peers_counts(server["rounds"]) for name, server in results["servers"].items()}
    columns = [fate.value for fate in fates.LOSSES if any(count[fate.value] for count in counts.values())]
    heads = ["how", "answered", "late", *columns, "told to close", "idle close", "accept gap, ms", "p99, ms"]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, server in results["servers"].items():
        cells = [f"{counts[name][what]:,}" for what in ("answered", "late", *columns, "told to close", "idle close")]
        lines.append(
            f"| {_peer(name, server)} | {server['restart']} | {' | '.join(cells)} | {_peers_worst(server['rounds'])} |"
        )
    skipped = [f"{name} was left out: {why}." for name, why in results["skipped"].items()]
    return "\n".join([*lines, "", _peers_method(results), *skipped, ""])


def _peers_by_client(results: dict[str, Any]) -> str:
    """Who lost: one line a server that lost anything, one column a kind of client."""
    kinds = [load["kind"] for load in results["loads"]]
    lines = [f"| lost | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    losses = {fate.value for fate in fates.LOSSES}
    for name, server in results["servers"].items():
        lost = [
            sum(
                count
                for found in server["rounds"]
                for what, count in found["totals"].get(kind, {}).items()
                if what in losses
            )
            for kind in kinds
        ]
        if any(lost):
            lines.append(f"| {name} | {' | '.join(f'{count:,}' for count in lost)} |")
    return "\n".join([*lines, ""])


def _peer(name: str, server: dict[str, Any]) -> str:
    """``gunicorn 27.0.1, sync``."""
    program, comma, how = name.partition(",")
    return f"{program} {server['version']}{comma}{how}"


def _peers_counts(rounds: list[dict[str, Any]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for found in rounds:
        for of_kind in found["totals"].values():
            counts.update(of_kind)
    return counts


def _peers_worst(rounds: list[dict[str, Any]]) -> str:
    """The cells that both tables end with."""
    return " | ".join(f"{max(found[what] for found in rounds):,.0f}" for what in ("gap ms", "p99 ms"))


def _peers_method(results: dict[str, Any]) -> str:
    rounds = max(len(server["rounds"]) for server in results["servers"].values())
    return (
        f"{results['restarts'] * rounds} restarts each, of an application that takes a second to import; haproxy and\n"
        "nginx proxy for one that is not restarted. The gap is the longest time without a new connection answered,\n"
        "p99 that of requests on new connections from the first restart on. How:\n"
        "`benchmarks/peers.py`, `benchmarks/results/peers.json`."
    )


def _section() -> str:
    steady, restart = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("steady", "restart"))
    rss = steady["rss_mib"]
    lines = [
        "## Throughput and latency",
        "",
        "| what | median | range |",
        "|---|---|---|",
        _row("raw protocol, requests/s, to the same protocol on bare uvloop", steady, "ratio requests/s"),
        _row("raw protocol, new connections/s, likewise", steady, "ratio connections/s"),
        _row("the same for each second of the server's processor time", steady, "ratio connections/CPU s"),
        _row("`hotport restart` to commit, plain ASGI, to importing the same modules", restart, "plain ASGI: ratio"),
        _row("likewise with Starlette", restart, "Starlette: ratio"),
        f"| memory of the supervisor | {rss['supervisor']:.1f} MiB | |",
        f"| memory of an ASGI worker, beside uvicorn's | {rss['worker']:.1f} MiB, {rss['uvicorn']:.1f} MiB | |",
        "",
        _method(steady, restart),
        "",
        "A connection costs more processor time here than on bare uvloop because hotport accepts it itself:",
        "when descriptors run out, libuv closes the connections that wait; hotport leaves them in the queue.",
        "",
    ]
    if (http := results_of("http")) is not None:
        lines += _servers(http)
    return "\n".join(lines)


def _servers(results: dict[str, Any]) -> list[str]:
    """hotport beside other servers; what was not measured is left out."""
    samples, packages = results["samples"], results["machine"]["packages"]
    others = [name for name in ("uvicorn", "granian") if any(f": {name} " in key for key in samples)]
    lines = [
        "| one worker on one core | hotport | " + " | ".join(f"to {name} {packages[name]}" for name in others) + " |",
        "|---|---|" + "---|" * len(others),
    ]
    unnamed = {series.partition(": ")[0] for series in samples} - HTTP_ROWS.keys()
    assert not unnamed, f"HTTP_ROWS does not name {unnamed}"
    rounds, rate = 0, samples.get("latency: hotport requests/s", [0.0])[0]
    for row, (what, unit, decimals) in HTTP_ROWS.items():
        if ours := samples.get(f"{row}: hotport {unit}"):
            rounds = len(ours)
            ratios = [samples[f"{row}: hotport to {other}, {unit}"] for other in others]
            cells = [f"{statistics.median(ours):,.{decimals}f}", *map(_ratio, ratios)]
            lines.append(f"| {what.format(rate=rate)} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"Medians and ranges of {rounds} alternating rounds; of latency and memory, less is better. How, and the same",
        "for each second of processor time: `benchmarks/http.py`, `benchmarks/results/http.json`.",
        "",
    ]


def results_of(name: str) -> Any:
    """What a benchmark has stored; None if nothing."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _between(text: str, name: str, section: str) -> str:
    """The text with another section between the markers of this name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{section}{end}{after}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _count(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _ms(value: float) -> str:
    return "0" if value <= 0 else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _ratio(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _row(what: str, results: dict[str, Any], name: str) -> str:
    values = results["samples"][name]
    return f"| {what} | {statistics.median(values):.2f} | {min(values):.2f} to {max(values):.2f} |"


def _method(steady: dict[str, Any], restart: dict[str, Any]) -> str:
    machine = steady["machine"]
    rounds = len(steady["samples"]["ratio requests/s"]), len(restart["samples"]["plain ASGI: ratio"])
    python = machine["python"].split()[0]
    return (
        f"Linux {machine['kernel']}, {machine['cores']} cores ({machine['cpu']}), Python {python}, one worker, "
        f"{rounds[0]} and {rounds[1]} alternating rounds, `make bench`; samples in `benchmarks/results/`."
    )


#: What is written from results, and how it follows from what it is.
PAGES: Final[Mapping[Path, Callable[[str], str]]] = {
    ROOT / "README.md": _readme,
    DOCS / "discussion/measured.md": _measured,
    RESULTS / "rebind.svg": _picture,
    DOCS / "discussion/why-the-port-stays-busy.md": partial(_filled, name="timewait", sections={"timewait": _timewait}),
    DOCS / "discussion/what-restarts-cost-elsewhere.md": partial(
        _filled, name="peers", sections={"peers": _peers_fates, "peers by client": _peers_by_client}
    ),
    DOCS / "how-to/load-test-restarts.md": partial(_filled, name="power", sections={"power": _power}),
    DOCS / "how-to/explain-a-busy-port.md": partial(_filled, name="why", sections={"why": _why}),
    DOCS / "how-to/choose-a-strategy.md": partial(_filled, name="gap", sections={"gap": _gap}),
    DOCS / "how-to/share-load-among-workers.md": partial(_filled, name="balance", sections={"balance": _balance}),
    DOCS / "discussion/how-workers-share-a-port.md": partial(_filled, name="sharing", sections={"sharing": _sharing}),
    DOCS / "how-to/import-once.md": partial(_filled, name="cost", sections={"cost": _cost}),
    DOCS / "how-to/tls.md": partial(_filled, name="tls", sections={"tls": _tls}),
    DOCS / "how-to/limits-and-logs.md": partial(_filled, name="hostile", sections={"hostile": _hostile}),
}


def main() -> None:
    """Rewrite what stands between the markers, and draw."""
    for path, render in PAGES.items():
        path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
