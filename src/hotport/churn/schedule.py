"""When attempts begin: the same for the same seed, whatever the target does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from math import log

__all__ = ["arrivals", "gap_ns"]

_NS_PER_S = 1e9


def arrivals(rate: float, begin_ns: int, end_ns: int, how: str, rng: random.Random) -> Iterator[int]:
    """Intended starts between `begin_ns` and `end_ns`.

    Args:
        rate: A second.
        how: ``even``, from a random phase on, so that several engines do not beat as one; or ``poisson``.
    """
    between = _NS_PER_S / rate
    number = 0
    at = phase = begin_ns + between * (rng.random() if how == "even" else _exponential(rng))
    while at < end_ns:
        yield int(at)
        number += 1
        at = phase + number * between if how == "even" else at + between * _exponential(rng)


def gap_ns(mean_ms: float, rng: random.Random) -> int:
    """Draw a think time, exponential around its mean; at least a millisecond, to avoid a busy loop."""
    gap = int(_exponential(rng) * mean_ms * 1e6)
    return max(1000000, gap)


def _exponential(rng: random.Random) -> float:
    """Draw like `random.Random.expovariate`, at half its cost."""
    return -log(1.0 - rng.random())
