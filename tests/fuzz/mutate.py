"""Mutations without knowledge of the code's branches: where atheris is not installed, and the same in every run."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from tests.fuzz.targets import OneInput

__all__ = ["INPUT_BYTES_MAX", "Failed", "mutate", "search"]

INPUT_BYTES_MAX: Final = 8192

#: Numbers at which lengths and bits turn over.
BYTES: Final = (0, 1, 10, 13, 32, 58, 126, 127, 128, 254, 255)


class Failed(NamedTuple):
    """An input that broke a promise, and how."""

    data: bytes
    error: BaseException


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """The data with up to five changes."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(found) + 1)
        size = rng.choice((1, 1, 1, 2, 4, 16, 64))
        match rng.randrange(6):
            case 0:
                found[at : at + 1] = bytes([rng.choice(BYTES)])
            case 1 if at < len(found):
                found[at] ^= 1 << rng.randrange(8)
            case 2:
                del found[at : at + size]
            case 3:
                found[at:at] = found[at : at + size] * rng.choice((1, 2, 30))
            case 4:
                other = rng.choice(others)
                begin = rng.randrange(len(other) + 1)
                found[at:at] = other[begin : begin + 4 * size]
            case _:
                found[at:at] = rng.randbytes(size)
    return bytes(found[:INPUT_BYTES_MAX])


def search(
    one_input: OneInput, seeds: Sequence[bytes], *, executions: int | None = None, seconds: float | None = None
) -> tuple[int, Failed | None]:
    """Try the seeds and then mutations of them, until one fails or there were enough.

    Returns:
        How many inputs were tried, and the one that failed.
    """
    rng = random.Random(1)
    end = None if seconds is None else time.monotonic() + seconds
    count = 0
    while (executions is None or count < executions) and (end is None or time.monotonic() < end):
        data = seeds[count] if count < len(seeds) else mutate(rng.choice(seeds), seeds, rng)
        count += 1
        try:
            one_input(data)
        except Exception as error:
            return count, Failed(data, error)
    return count, None
