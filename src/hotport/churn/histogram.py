"""Latencies in buckets whose width grows with the value: small, mergeable, and never off by more than 0.8 %."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["Histogram"]

#: Buckets for each doubling of the value.
FINENESS: Final = 64
_SHIFT: Final = FINENESS.bit_length() - 1


class Histogram:
    """Counts of durations in whole microseconds.

    Up to 127 us each value has its own bucket; above, each doubling is divided into `FINENESS` equal parts.
    """

    __slots__ = ("counts",)

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: dict[int, int] = dict(counts or {})

    def add(self, us: int) -> None:
        """Count a value; negative ones count as 0."""
        index = _index(us) if us > 0 else 0
        counts = self.counts
        counts[index] = counts.get(index, 0) + 1

    def merge(self, other: Mapping[int, int]) -> None:
        """Add the counts of another histogram."""
        for index, count in other.items():
            self.counts[index] = self.counts.get(index, 0) + count

    def less(self, us: float) -> Histogram:
        """Return the same values with so many microseconds taken off each, down to 0."""
        found = Histogram()
        for index, count in self.counts.items():
            found.merge({_index(max(0, round(_middle(index) - us))): count})
        return found

    def __len__(self) -> int:
        return sum(self.counts.values())

    def percentile(self, share: float) -> float:
        """The value in microseconds at or below which that share (0 to 1) lies, by the nearest rank; 0.0 if empty."""
        total = len(self)
        rank = max(1, min(total, -int(-share * total // 1)))
        seen = 0
        for index in sorted(self.counts):
            seen += self.counts[index]
            if seen >= rank:
                return _middle(index)
        return 0.0

    @property
    def maximum(self) -> float:
        """In microseconds, up to the width of its bucket; 0.0 if empty."""
        return _middle(max(self.counts)) if self.counts else 0.0


def _index(us: int) -> int:
    """Return the bucket of a value: the number of the doubling, and which part of it."""
    doubling = us.bit_length() - 1 - _SHIFT
    if doubling <= 0:
        return us
    return (doubling << _SHIFT) + (us >> doubling)


def _middle(index: int) -> float:
    doubling = max(0, (index >> _SHIFT) - 1)
    low = index - (doubling << _SHIFT) if doubling else index
    return (low << doubling) + ((1 << doubling) - 1) / 2
