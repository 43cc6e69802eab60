"""Ranges on a logarithmic scale, as a picture that can be read on light and on dark ground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

__all__ = ["Lane", "Row", "ranges"]

WIDTH: Final = 860
LEFT, RIGHT, TOP, BOTTOM = 150, 190, 62, 40
LANE, PADDING = 13, 9

#: Both themes have to do with the page's own ground; the middle tones stand out on either.
STYLE: Final = """\
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 14px }
.faint { fill: #57606a; font-size: 11px }
.grid { stroke: #d0d7de; stroke-width: 1 }
.mark { stroke: #57606a; stroke-width: 2 }
.dashed { stroke-width: 1; stroke-dasharray: 3 3 }
.ring { fill: none; stroke: var(--c, #8b949e); stroke-width: 2 }
.c0 { --c: #0a7d5a } .c1 { --c: #b35900 } .c2 { --c: #8250df }
.dot { fill: var(--c) } .line { stroke: var(--c); stroke-width: 2; stroke-opacity: .55 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .faint { fill: #9198a1 } .grid { stroke: #3d444d } .mark { stroke: #9198a1 }
  .c0 { --c: #3fb98f } .c1 { --c: #f0883e } .c2 { --c: #b392f0 }
}"""


@dataclass(frozen=True, slots=True)
class Lane:
    """One range, in seconds; what is not above zero is drawn at the left edge."""

    low: float
    median: float
    high: float
    mark: float | None = None
    ring: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What belongs together, one lane a series; a lane may be missing."""

    label: str
    lanes: Sequence[Lane | None]
    note: str = ""


def ranges(
    title: str,
    series: Sequence[str],
    rows: Sequence[Row],
    *,
    mark: str,
    ring: str,
    note: str,
    line: float,
    low: float,
    high: float,
) -> str:
    """A picture with one line from the least to the most and a dot at the median, for each lane of each row.

    Args:
        title: What is shown.
        series: What the lanes of a row are called, at most three.
        rows: From top to bottom.
        mark: What the short upright strokes stand for.
        ring: What the rings stand for.
        note: What stands over the notes of the rows.
        line: Seconds at which a dashed line is drawn.
        low: Seconds at the left edge, a power of ten.
        high: Seconds at the right edge, a power of ten.
    """
    right = WIDTH - RIGHT

    def x(seconds: float) -> float:
        share = math.log10(max(seconds, low) / low) / math.log10(high / low)
        return round(LEFT + min(share, 1.0) * (right - LEFT), 1)

    depth = len(series) * LANE + PADDING
    floor = TOP + len(rows) * depth
    body = [f'<text class="title" x="12" y="20">{escape(title)}</text>']
    at = 12
    for number, name in enumerate(series):
        body += [
            f'<circle class="dot c{number}" cx="{at + 5}" cy="38" r="4"/>',
            f'<text class="faint" x="{at + 14}" y="42">{escape(name)}</text>',
        ]
        at += 26 + 6 * len(name)
    body += [
        f'<line class="mark" x1="{at + 5}" x2="{at + 5}" y1="33" y2="43"/>',
        f'<text class="faint" x="{at + 14}" y="42">{escape(mark)}</text>',
        f'<circle class="ring" cx="{at + 38 + 6 * len(mark)}" cy="38" r="4"/>',
        f'<text class="faint" x="{at + 47 + 6 * len(mark)}" y="42">{escape(ring)}</text>',
        f'<text class="faint" x="{right + 14}" y="{TOP - 6}">{escape(note)}</text>',
    ]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at_power = x(10.0**power)
        body += [
            f'<line class="grid" x1="{at_power}" x2="{at_power}" y1="{TOP}" y2="{floor}"/>',
            f'<text class="faint" text-anchor="middle" x="{at_power}" y="{floor + 16}">{_duration(power)}</text>',
        ]
    for number, row in enumerate(rows):
        top = TOP + number * depth
        body += [
            f'<line class="grid" x1="12" x2="{WIDTH - 12}" y1="{top}" y2="{top}"/>',
            f'<text x="12" y="{top + depth / 2 + 4}">{escape(row.label)}</text>',
            f'<text class="faint" x="{right + 14}" y="{top + depth / 2 + 4}">{escape(row.note)}</text>',
        ]
        for place, lane in enumerate(row.lanes):
            if lane is None:
                continue
            y = top + PADDING / 2 + LANE * (place + 0.5)
            body += [
                f'<line class="line c{place}" x1="{x(lane.low)}" x2="{x(lane.high)}" y1="{y}" y2="{y}"/>',
                f'<circle class="dot c{place}" cx="{x(lane.median)}" cy="{y}" r="4"/>',
            ]
            if lane.mark is not None:
                at_mark = x(lane.mark)
                body.append(f'<line class="mark" x1="{at_mark}" x2="{at_mark}" y1="{y - 5}" y2="{y + 5}"/>')
            if lane.ring is not None:
                body.append(f'<circle class="ring c{place}" cx="{x(lane.ring)}" cy="{y}" r="4"/>')
    body.append(f'<line class="mark dashed" x1="{x(line)}" x2="{x(line)}" y1="{TOP}" y2="{floor}"/>')
    height = floor + BOTTOM
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{STYLE}\n</style>",
            *body,
            "</svg>\n",
        ]
    )


def _duration(power: int) -> str:
    """A power of ten, of seconds."""
    unit, thousands = next(
        (unit, thousands) for unit, thousands in (("s", 0), ("ms", -3), ("us", -6)) if power >= thousands
    )
    return f"{10 ** (power - thousands)} {unit}"
