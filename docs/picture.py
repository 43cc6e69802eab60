"""The pictures of a restart and of a worker's life, from the model; ``python -m docs.generate`` draws them."""

from __future__ import annotations

from html import escape
from typing import Final

from hotport.model.lifecycle import TRANSITIONS, Event, Phase
from hotport.model.steps import Step

__all__ = ["phases_picture", "restart_picture"]

WIDTH, HEIGHT = 860, 330
LEFT, RIGHT = 150, 20

#: The steps of a restart that is neither a canary nor undone, and how wide each is drawn.
SHOWN: Final = {Step.STARTING: 170, Step.OPENING: 90, Step.QUIESCING: 100, Step.SETTLING: 120}
DRAINING: Final = 130  # no step of the table any more: the restart is decided

SOCKET: Final = "open all the time: one accept queue, owned by the supervisor"
UNDONE: Final = "If anything fails on the left of it, all is undone, and the old workers have accepted all the time."

STYLE: Final = """\
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 15px } .faint { fill: #57606a; font-size: 12px } .in { fill: #fff }
.grid { stroke: #d0d7de; stroke-dasharray: 3 3 } .commit { stroke: #57606a; stroke-width: 2 }
.port { fill: #57606a } .old { fill: #b35900 } .new { fill: #0a7d5a } .pale { fill-opacity: .3 }
.move { stroke: #8250df; stroke-width: 2; fill: none } .head { fill: #8250df }
.frame { fill: none; stroke: #57606a; stroke-dasharray: 4 4 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .faint { fill: #9198a1 } .grid { stroke: #3d444d } .commit { stroke: #9198a1 }
  .in { fill: #fff } .move { stroke: #b392f0 } .head { fill: #b392f0 }
}"""


def restart_picture() -> str:
    """Draw who does what in a restart, from left to right."""
    parts = [_text(LEFT - 140, 24, "What happens in a restart", "title")]
    edges: dict[str, int] = {}
    x = LEFT + 60
    for name, width in [*((step.value, width) for step, width in SHOWN.items()), ("draining", DRAINING)]:
        edges[name] = x
        parts.append(f'<line class="grid" x1="{x}" y1="40" x2="{x}" y2="290"/>')
        parts.append(_text(x + 6, 52, name, "faint"))
        x += width
    end = WIDTH - RIGHT
    parts += [
        *_lane(80, "listening socket", [(LEFT, end, "port", SOCKET)]),
        *_lane(
            130,
            "new workers",
            [
                (edges["starting"], edges["opening"], "new pale", ""),
                (edges["opening"], end, "new", "accept"),
            ],
        ),
        _text(edges["starting"] + 8, 149, "import, then READY=1"),
        *_lane(
            180,
            "old workers",
            [
                (LEFT, edges["quiescing"], "old", "accept"),
                (edges["quiescing"], edges["draining"], "old pale", ""),
                (edges["draining"], edges["draining"] + 90, "old pale", ""),
            ],
        ),
        _text(edges["quiescing"] + 8, 199, "finish what they have"),
        _text(edges["draining"] + 8, 199, "leave"),
        *_lane(230, "clients", [(LEFT, end, "port pale", "")]),
        _text(LEFT + 8, 249, "every request is answered once; an open connection stays open"),
        _arrow(edges["draining"] + 20, 178, 160, "connections move"),
        f'<line class="commit" x1="{edges["quiescing"]}" y1="60" x2="{edges["quiescing"]}" y2="272"/>',
        _text(edges["quiescing"] - 6, 286, "the commit", "faint", anchor="end"),
        _text(LEFT, 312, UNDONE, "faint"),
    ]
    return _svg("What happens in a restart", WIDTH, HEIGHT, parts)


#: Where each phase of a worker is drawn: its middle.
PLACES: Final = {
    Phase.STARTING: (90, 75),
    Phase.READY: (240, 75),
    Phase.OPENING: (420, 75),
    Phase.SERVING: (600, 75),
    Phase.QUIESCED: (420, 165),
    Phase.QUIESCING: (600, 165),
    Phase.STOPPING: (165, 270),
    Phase.DRAINING: (510, 270),
    Phase.GONE: (165, 350),
}
BOX: Final = (96, 30)

#: Phases that are left in the same way; the line begins at their frame.
FRAMES: Final = {
    (Phase.STARTING, Phase.READY): Phase.STOPPING,
    (Phase.OPENING, Phase.SERVING, Phase.QUIESCING, Phase.QUIESCED): Phase.DRAINING,
}


def phases_picture() -> str:
    """Draw the phases of a worker and what leads from one to the next, by the table.

    Raises:
        ValueError: Phases of one frame are not left in the same way; the picture has to be drawn anew.
    """
    moves: dict[tuple[Phase, Phase], list[str]] = {}
    for (before, event), after in TRANSITIONS.items():
        if before is not after and event is not Event.EXITED:
            moves.setdefault((before, after), []).append(event.value)
    parts = [_text(10, 24, "The life of one worker", "title")]
    for phases, after in FRAMES.items():
        found = {tuple(moves.pop((phase, after), ())) for phase in phases}
        if len(found) != 1:
            raise ValueError(f"{after.value} is reached in different ways from the phases of one frame")
        parts += _frame(phases, after, " / ".join(*found))
    parts += [_move(before, after, " / ".join(events)) for (before, after), events in moves.items()]
    parts += [
        _move(Phase.STOPPING, Phase.GONE, Event.EXITED.value),
        _move(Phase.DRAINING, Phase.GONE, Event.EXITED.value),
    ]
    for phase, (x, y) in PLACES.items():
        kind = "new" if phase in {Phase.OPENING, Phase.SERVING} else "old" if phase is Phase.DRAINING else "port"
        width, height = BOX
        box = f'x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}" rx="5"'
        parts += [f'<rect class="{kind}" {box}/>', _text(x, y + 5, phase.value, "in", anchor="middle")]
    return _svg("The life of one worker", 700, 380, parts)


def _frame(phases: tuple[Phase, ...], after: Phase, says: str) -> list[str]:
    width, height = BOX
    left = min(PLACES[phase][0] for phase in phases) - width // 2 - 14
    right = max(PLACES[phase][0] for phase in phases) + width // 2 + 14
    top = min(PLACES[phase][1] for phase in phases) - height // 2 - 12
    bottom = max(PLACES[phase][1] for phase in phases) + height // 2 + 12
    x, y = PLACES[after]
    return [
        f'<rect class="frame" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" rx="8"/>',
        _line(x, bottom, x, y - height // 2, says),
    ]


def _move(before: Phase, after: Phase, says: str) -> str:
    """A line from the edge of one box to that of another."""
    (x1, y1), (x2, y2) = PLACES[before], PLACES[after]
    width, height = BOX
    across, down = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    if y1 == y2 or abs(x2 - x1) > 200:
        return _line(x1 + across * width // 2, y1, x2 - across * width // 2, y2, says)
    return _line(x1 - (x1 != x2) * 30, y1 + down * height // 2, x2 + (x1 != x2) * 30, y2 - down * height // 2, says)


def _line(x1: int, y1: int, x2: int, y2: int, says: str) -> str:
    line = f'<path class="move" marker-end="url(#head)" d="M{x1} {y1} L{x2} {y2}"/>'
    if y1 == y2:
        return line + _text((x1 + x2) // 2 - 3, y1 - 6, says, "faint", anchor="middle")
    down = 18 if abs(x2 - x1) > 200 else 4
    return line + _text((x1 + x2) // 2 + 8, (y1 + y2) // 2 + down, says, "faint")


def _svg(title: str, width: int, height: int, parts: list[str]) -> str:
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="head" d="M0 0 L10 5 L0 10 z"/></marker></defs>'
    )
    body = "\n".join([f"<style>\n{STYLE}\n</style>", head, *parts])
    attributes = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>\n{body}\n</svg>\n'


def _lane(y: int, label: str, spans: list[tuple[int, int, str, str]]) -> list[str]:
    parts = [_text(LEFT - 10, y + 19, label, anchor="end")]
    for begin, end, kind, says in spans:
        parts.append(f'<rect class="{kind}" x="{begin}" y="{y}" width="{end - begin}" height="28" rx="3"/>')
        parts += [_text(begin + 8, y + 19, says, "in")] if says else []
    return parts


def _arrow(x: int, begin: int, end: int, says: str) -> str:
    line = f'<path class="move" d="M{x} {begin} V{end + 6}"/>'
    head = f'<path class="head" d="M{x - 5} {end + 7} L{x} {end - 2} L{x + 5} {end + 7} z"/>'
    return f"{line}{head}{_text(x + 10, begin - 4, says, 'faint')}"


def _text(x: int, y: int, says: str, kind: str = "", *, anchor: str = "start") -> str:
    style = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text x="{x}" y="{y}"{style}>{escape(says)}</text>'
