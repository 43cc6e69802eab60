"""Render everything that listens as a table for people."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Final

from hotport.kernel.listeners import Found
from hotport.model.listening import Listening
from hotport.model.port import State
from hotport.model.process import age

__all__ = ["table"]

HEADS: Final = ("ADDRESS", "PROGRAM", "PID", "USER", "UNIT", "AGE", "QUEUE")
WIDTHS_MAX: Final = (44, 34, 16, 16, 28, 8, 16)


def table(found: Found, *, columns: int) -> str:
    """Render the table, without a line break at its end: a row each, and below it what is odd about it."""
    order = {"tcp": 0, "udp": 1, "unix": 2}
    rows = sorted(found.listening, key=lambda one: (order[one.protocol], one.number, one.place))
    cells = [HEADS, *(_cells(one) for one in rows)]
    widths = [
        min(max(map(len, column)), most) for column, most in zip(zip(*cells, strict=True), WIDTHS_MAX, strict=True)
    ]
    lines = [_row(HEADS, widths)]
    for one, row in zip(rows, cells[1:], strict=True):
        lines.append(_row(row, widths))
        for text in one.odd:
            lines += textwrap.wrap(text, columns, initial_indent="  ! ", subsequent_indent="    ")
    for sentence in found.unread:
        lines += ["", *textwrap.wrap(f"not read: {sentence}", columns)]
    return "\n".join(lines)


def _cells(one: Listening) -> tuple[str, ...]:
    first = next(iter(one.holders), None)
    container = first.origin.container if first else None
    more = f" +{len(one.holders) - 1}" if len(one.holders) > 1 else ""
    kind = " (bound)" if one.protocol == "tcp" and one.state == State.BOUND else ""
    times = f" x{one.count}" if one.count > 1 else ""
    return (
        f"{one.protocol}:{one.place}" if one.protocol == "unix" else f"{one.protocol}://{one.place}{times}{kind}",
        first.command if first else "(not permitted)",
        f"{first.pid}{more}" if first else "-",
        first.user if first else one.user or "-",
        str(container) if container else (first.unit if first else one.unit) or "-",
        age(first.origin.age_s) if first else "-",
        f"{one.queue:,} of {one.backlog:,}" if one.backlog else f"{one.queue:,}" if one.queue else "-",
    )


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(_cut(cell, width).ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
