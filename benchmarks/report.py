"""Render the measured table of the README from ``benchmarks/results/``; no number in it is typed by hand."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
README: Final = ROOT / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->"


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
    return "\n".join(lines)


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
