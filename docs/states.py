"""The text of ``docs/reference/states.md``, from the tables of the model; ``python -m docs.generate`` writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from hotport.adapters.asgi.states import STATES, WEBSOCKET_STATES, Row
from hotport.model import lifecycle, rules
from hotport.model.effects import INVERSE, Effect, Open, Prepare, Quiesce, Rebind, Release, Spawn
from hotport.model.inputs import Clock
from hotport.model.lifecycle import CURRENT, TRANSITIONS, Phase
from hotport.model.steps import STEPS, Step
from hotport.supervisor.supervisor import ANSWER_TIMEOUT_S

__all__ = ["states_page"]

HEAD: Final = """
# Workers and restarts

<!-- Written by docs/generate.py from the source; do not edit. -->

What may happen to a worker is a table, `TRANSITIONS` in `hotport.model.lifecycle`; what a service does next is one pure
function, `step` in `hotport.model.rules`; the fate of a connection is a table in `hotport.adapters.asgi.states`.
This page is written from them.

## The life of one worker

`open`, `quiesce`, `drain` and `terminate` are the supervisor's decisions. The other events are facts: a worker's own
word, or the kernel's. `hotport status` shows the phase.
""".lstrip()

#: By ``docs/picture.py``, from the same table.
DIAGRAM: Final = "![The life of one worker](../phases.svg)\n"

AFTER_DIAGRAM: Final = """
From every phase `exited` leads to `gone`. A word that is not in the table is ignored, since a worker may be any
program; a decision that is not in it is a bug and changes nothing.
"""

RESTART: Final = """
## A restart, step by step

New workers take over from old ones in a batch of all, or, in a phased restart, in batches of one. Until the last line,
whatever goes wrong with a new worker takes back what the batch has done, first with the old workers, then with the new
ones, and the old generation serves on. That is called *aborted*; from `baking` and `watching`, and after the commit if
an undo is requested, it leads through `undoing` and is called *undone*. After a canary's bake the steps start again,
with the rest of its batch.

The steps *releasing* and *rebinding* are those of the strategy `rebind` alone. With `overlap`, newcomers are steered to
the new workers at the commit (`Steer`; its inverse is `Unsteer`), and what is quiesced empties its queue as well. What
strategies are is told in [strategies.md](strategies.md).
"""

#: How long the clocks of steps are.
LASTS: Final = {
    Clock.PREPARE: "before_start_timeout",
    Clock.READY: "ready_timeout",
    Clock.OPEN: f"{ANSWER_TIMEOUT_S:g} s",
    Clock.QUIESCE: f"{ANSWER_TIMEOUT_S:g} s",
    Clock.SETTLE: "settle",
    Clock.BAKE: "bake",
    Clock.WATCH: "undo_window",
    None: "at once",
}

WHO: Final = {
    Prepare: "the generation",
    Spawn: "each new worker",
    Release: "each old worker",
    Rebind: "the listeners",
    Open: "each new worker",
    Quiesce: "each old worker",
}
WHO_UNDOING: Final = "each old worker"

#: Where the inverse is for others.
INVERTED: Final[dict[type[Effect], str]] = {Rebind: "each old worker, with what was bound"}

TAIL: Final = """
- An undo waits until the old workers accept, so that the new ones can hand them their connections.
- A generation is prepared once, before its first batch; not for workers that replace lost ones or scale it. The first
  generation is prepared, too: if that fails, the service ends.
- While a generation is prepared and while a canary bakes, old workers are looked after as between restarts.
- If no old worker is left in an undo window, it is over.
- An old worker that was not yet ready at the commit is held, and told to accept if the restart aborts.
- An old worker that a signal or a debugger has stopped answers nothing and finishes nothing: after {answer:g} s for
  each answer it is asked to end, and killed after `kill_timeout`. If it is continued before, it has all of
  `drain_timeout`. The log names it.
- Draining has no inverse. If a later batch of a phased restart fails, the new workers of earlier batches are replaced
  by workers of the old code, start first, one at a time.
- If no old worker is left to take back, new ones that serve are kept until workers of the old code do.
- A second request during a restart is refused with the number of the first.

## Between restarts

- A lost worker is replaced at once; the next ones, without a quiet spell between, after {first:g} s, twice as long each
  time, up to {most:g} s. Workers that are lost together count once.
- A worker that has served long enough is replaced start first, one at a time.
- Scaling down lets go first of workers that do not accept yet, then of those that wait for a replacement, then of the
  newest.
- A restart is refused while {generations} older generations still drain.
- An address that another process has taken while it was bound again is tried after {regain:g} s, then twice as long
  each time, up to {regains:g} s; restarts are refused until it is there. Then the workers that serve get it (`Share`).
"""


CONNECTIONS: Final = """
## The states of a connection

What a connection of an ASGI application is doing decides its fate when its worker leaves. Quiesce changes
nothing in any state: it concerns the listeners. In the drain a connection moves to a worker that continues it, and
the client sees nothing of that. If none can (no worker follows, `handoff = "off"`, TLS without `tls_handoff`), no HTTP
connection is closed either: a connection that is closed without notice may be one on which the client has just begun to
send. Instead, the next answer that has no request behind it says `Connection: close`. At the deadline, `drain_timeout`,
what remains is ended and counted under its fate.
"""

WEBSOCKETS: Final = """
A WebSocket, from the moment at which its handshake request has been read:
"""


def _connections(states: Mapping[Any, Row]) -> str:
    rows = [
        (
            f"`{state.value}`",
            row.client,
            row.moves.value,
            row.drained.value,
            row.manner.value,
            f"`{row.fate}`" if row.fate else "",
        )
        for state, row in states.items()
    ]
    return _table(
        ("state", "the client waits for", "it moves", "if it cannot, it", "at the deadline it is", "fate"), rows
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


def _comments() -> dict[str, str]:
    """What the source says about each phase."""
    source = Path(lifecycle.__file__).read_text()
    return dict(re.findall(r'^    [A-Z]+ = "(\w+)"  #: (.*)$', source, re.MULTILINE))


def _phases() -> str:
    says = _comments()
    rows = []
    for phase in Phase:
        events = [f"`{e.value}` → {after.value}" for (p, e), after in TRANSITIONS.items() if p is phase is not after]
        is_current = "yes" if phase in CURRENT else ""
        rows.append((f"`{phase.value}`", says[phase.value], is_current, "<br>".join(events)))
    return _table(("phase", "means", "counts as wanted", "left by"), rows)


def _steps() -> str:
    rows = []
    for step in Step:
        row = STEPS[step]
        effect = row.does
        is_undoing = step is Step.UNDOING
        does = f"`{effect.__name__}` {WHO_UNDOING if is_undoing else WHO[effect]}" if effect else ""
        inverse = f"`{INVERSE[effect].__name__}` {INVERTED.get(effect, 'it')}" if effect and not is_undoing else ""
        rows.append((step.value, does, inverse, row.awaits, f"{LASTS[row.clock]}: {row.late}"))
    rows.append(("(done)", "`Drain` each old worker", "none", "", ""))
    return _table(("step", "effect", "inverse", "ends when", "at the latest"), rows)


def states_page() -> str:
    """The page, as it should be."""
    tail = TAIL.format(
        answer=ANSWER_TIMEOUT_S,
        first=rules.BACKOFF_FIRST_S,
        most=rules.BACKOFF_MAX_S,
        generations=rules.GENERATIONS_DRAINING_MAX,
        regain=rules.REGAIN_FIRST_S,
        regains=rules.REGAIN_MAX_S,
    )
    parts = (
        HEAD,
        "![The life of one worker](../phases.svg)\n",
        AFTER_DIAGRAM.lstrip(),
        _phases() + "\n",
        RESTART.lstrip(),
        _steps() + "\n",
    )
    connections = (CONNECTIONS, _connections(STATES) + "\n" + WEBSOCKETS, _connections(WEBSOCKET_STATES) + "\n")
    return "\n".join(parts) + tail + "\n".join(connections)
