"""Render the measured table of the README from ``benchmarks/results/``; no number in it is typed by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
README: Final = ROOT / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->"

#: Rows of http.py: what they are called, what is compared, and how many decimals that has.
SERVERS: Final = {
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


def main() -> None:
    """Rewrite the section between the two markers."""
    README.write_text(rendered(README.read_text()))


def rendered(readme: str) -> str:
    """The README with its measured section as the results have it."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{_section()}{END}{after}"


def _section() -> str:
    results = ROOT / "benchmarks" / "results"
    steady, restart = (json.loads((results / f"{name}.json").read_text()) for name in ("steady", "restart"))
    rss = steady["rss_mib"]
    lines = [
        "## Measured",
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
    if (http := results / "http.json").exists():
        lines += _servers(json.loads(http.read_text()))
    return "\n".join(lines)


def _servers(results: dict[str, Any]) -> list[str]:
    """hotport beside other servers; what was not measured is left out."""
    samples, packages = results["samples"], results["machine"]["packages"]
    others = [name for name in ("uvicorn", "granian") if any(f": {name} " in key for key in samples)]
    lines = [
        "| one worker on one core | hotport | " + " | ".join(f"to {name} {packages[name]}" for name in others) + " |",
        "|---|---|" + "---|" * len(others),
    ]
    rounds, rate = 0, samples.get("latency: hotport requests/s", [0.0])[0]
    for row, (what, unit, decimals) in SERVERS.items():
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


if __name__ == "__main__":
    main()
