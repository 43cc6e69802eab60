"""The steps of a restart as a table: what each one does and awaits, and how it ends."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

import msgspec

from hotport.model.effects import Effect, Open, Prepare, Quiesce, Rebind, Release, Spawn
from hotport.model.inputs import Clock

__all__ = [
    "STEPS",
    "Row",
    "Step",
    "Undoing",
]


class Step(enum.Enum):
    """How far the current batch of a restart has come."""

    PREPARING = "preparing"
    STARTING = "starting"
    RELEASING = "releasing"
    REBINDING = "rebinding"
    OPENING = "opening"
    BAKING = "baking"
    QUIESCING = "quiescing"
    SETTLING = "settling"
    WATCHING = "watching"
    UNDOING = "undoing"


class Undoing(enum.Enum):
    """How a restart is taken back."""

    ABORT = "abort"  # at once
    UNDO = "undo"  # in two steps, so that connections can go back
    NONE = "nothing"  # that is being done already


class Row(msgspec.Struct, frozen=True):
    """What a step of a restart is, and how it ends.

    The rules read `clock`, `lost`, `unwanted`, `is_committed` and `is_watched`; `does`, `awaits` and `late` tell in
    ``docs/states.py`` what they do.

    Attributes:
        does: The effect that it begins with; None if it only waits.
        awaits: What ends it, in the words of the reference.
        clock: What bounds it: `READY` and `OPEN` each worker by itself, the others the restart; None: nothing does.
        late: What follows when that has elapsed, in the words of the reference.
        lost: What follows when a new worker is lost.
        unwanted: What follows when the new workers are not well, or an undo is requested.
        is_committed: The new workers are to stay, and newcomers are steered to them.
        is_watched: The new workers serve and are judged.
    """

    does: type[Effect] | None
    awaits: str
    clock: Clock | None
    late: str
    lost: Undoing = Undoing.ABORT
    unwanted: Undoing = Undoing.ABORT
    is_committed: bool = False
    is_watched: bool = False


STEPS: Final[Mapping[Step, Row]] = {
    Step.PREPARING: Row(Prepare, "`before_start` has exited with 0, if there is one", Clock.PREPARE, "abort"),
    Step.STARTING: Row(Spawn, "every new worker has said `READY=1`", Clock.READY, "abort"),
    Step.RELEASING: Row(
        Release, "every old worker has emptied the accept queue and closed the listeners", Clock.QUIESCE, "abort"
    ),
    Step.REBINDING: Row(Rebind, "the addresses are bound again", None, "done, or abort"),
    Step.OPENING: Row(Open, "every new worker has acknowledged that it accepts: the commit", Clock.OPEN, "abort"),
    Step.BAKING: Row(
        None,
        "the canary, if there is one, has been well for so long",
        Clock.BAKE,
        "the others start",
        lost=Undoing.UNDO,
        unwanted=Undoing.UNDO,
        is_watched=True,
    ),
    Step.QUIESCING: Row(
        Quiesce,
        "every old worker has acknowledged that it stopped accepting",
        Clock.QUIESCE,
        "go on",
        unwanted=Undoing.UNDO,
        is_committed=True,
    ),
    Step.SETTLING: Row(
        None,
        "no new worker has failed for a moment",
        Clock.SETTLE,
        "the end of this step",
        unwanted=Undoing.UNDO,
        is_committed=True,
    ),
    Step.WATCHING: Row(
        None,
        "the new workers have been well for an undo window, if there is one",
        Clock.WATCH,
        "its end",
        lost=Undoing.UNDO,
        unwanted=Undoing.UNDO,
        is_committed=True,
        is_watched=True,
    ),
    Step.UNDOING: Row(
        Open,
        "every old worker accepts again or has failed to; then `Drain` each new one",
        Clock.OPEN,
        "go on",
        lost=Undoing.NONE,
        unwanted=Undoing.NONE,
    ),
}
