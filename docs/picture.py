"""The picture of a restart, ``docs/restart.svg``; ``python -m docs.generate`` draws it."""

from __future__ import annotations

from html import escape
from typing import Final

from hotport.model.steps import Step

__all__ = ["restart_picture"]

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
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="What happens in a restart">\n<style>\n{STYLE}\n</style>\n{body}\n</svg>\n'
    )


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
