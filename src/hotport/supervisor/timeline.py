"""Collect what each worker did during a restart, for its recording."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from hotport.wire.messages import Import, Move
from hotport.wire.recording import Lane, Span

__all__ = ["Timeline"]

#: How many spans of a worker are kept, and of how many workers: a recording is written while the supervisor waits.
SPANS_MAX = 100
LANES_MAX = 64

#: What a worker does after that.
_NEXT: Final = {"starting": "opening", "opening": "accepting", "accepting": "draining", "draining": "ending"}


class Timeline:
    """The workers of one restart.

    Args:
        began_s: When it was requested (CLOCK_MONOTONIC).
        lanes: Those of a recording that an earlier supervisor began.
    """

    def __init__(self, began_s: float, lanes: Sequence[Lane] = ()) -> None:
        self._began_s = began_s
        self._generations = {lane.worker: (lane.generation, lane.pid) for lane in lanes}
        self._spans = {lane.worker: list(lane.spans) for lane in lanes}
        self._imports = {lane.worker: lane.imports for lane in lanes}
        self._left_out = {lane.worker: lane.left_out for lane in lanes}
        self._since_ms: dict[int, float] = {}
        self._doing: dict[int, str] = {}
        self.workers_left_out = 0

    def begin(self, worker: int, generation: int, pid: int, now_s: float, doing: str) -> None:
        """Add a worker that does this now: ``starting``, or ``accepting`` of one that will leave."""
        if worker in self._generations:
            return
        if len(self._generations) >= LANES_MAX:
            self.workers_left_out += 1
            return
        self._generations[worker] = generation, pid
        self._since_ms[worker] = self._ms(now_s)
        self._doing[worker] = doing

    def reach(self, worker: int, name: str, now_s: float) -> None:
        """End what a worker has been doing since the last call; name it."""
        if worker in self._generations:
            since_ms = self._since_ms.get(worker, 0.0)
            at_ms = max(since_ms, self._ms(now_s))
            self._since_ms[worker] = at_ms
            self._add(worker, Span(name=name, at_ms=since_ms, ms=round(at_ms - since_ms, 3)))
            self._doing[worker] = _NEXT.get(name, "")

    def moved(self, worker: int, moves: Sequence[Move]) -> None:
        """Add the batches of connections that a worker has handed off since the restart began."""
        for move in moves:
            if worker in self._generations and move.at_s >= self._began_s:
                facts: dict[str, int | float | str] = {
                    "connections": move.connections,
                    "batches": move.batches,
                    "to": move.to,
                }
                self._add(worker, Span(name="moving", at_ms=self._ms(move.at_s), ms=move.ms, facts=facts))

    def imported(self, worker: int, imports: Sequence[Import]) -> None:
        """Add the slowest modules of a worker."""
        if worker in self._generations:
            self._imports[worker] = tuple(
                Span(name=each.name, at_ms=self._ms(each.at_s), ms=each.ms, facts={"own_ms": each.own_ms})
                for each in imports
            )

    def lanes(self, now_s: float | None = None) -> tuple[Lane, ...]:
        """What is known by now, by worker; at `now_s` with what is not over."""
        return tuple(
            Lane(
                worker=worker,
                generation=generation,
                pid=pid,
                spans=(*self._spans.get(worker, ()), *self._open(worker, now_s)),
                imports=self._imports.get(worker, ()),
                left_out=self._left_out.get(worker, 0),
            )
            for worker, (generation, pid) in sorted(self._generations.items())
        )

    def _open(self, worker: int, now_s: float | None) -> Iterator[Span]:
        if now_s is not None and (doing := self._doing.get(worker)):
            at_ms = self._since_ms[worker]
            yield Span(name=doing, at_ms=at_ms, ms=max(0.0, round(self._ms(now_s) - at_ms, 3)))

    def _add(self, worker: int, span: Span) -> None:
        spans = self._spans.setdefault(worker, [])
        if len(spans) < SPANS_MAX:
            spans.append(span)
        else:
            self._left_out[worker] = self._left_out.get(worker, 0) + 1

    def _ms(self, at_s: float) -> float:
        return round((at_s - self._began_s) * 1000, 3)
