"""Judge the health of the new workers of a restart, by samples and the user's rules."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

__all__ = ["Ill", "Rules", "Sample", "verdict"]


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """The user's bounds for healthy workers; a bound of 0 allows anything.

    Attributes:
        errors_max: The share of failed requests (0 to 1), looked at from `requests_min` requests on.
        lag_max_s: How long an event loop may be held up.
        memory_max_bytes: Resident memory of one worker.
    """

    errors_max: float = 0.0
    requests_min: int = 1
    lag_max_s: float = 0.0
    memory_max_bytes: int = 0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of one new worker.

    Attributes:
        requests: Taken up since it started; `errors` of them failed.
        lag_s: How long its event loop was held up at most, since the last sample.
        is_silent: It was asked, and had not answered when `Rules.lag_max_s` was over.
        probe: Why a request to the health path failed; empty if it did not, or none was made.
    """

    worker: int
    requests: int = 0
    errors: int = 0
    lag_s: float = 0.0
    memory_bytes: int = 0
    is_silent: bool = False
    probe: str = ""


class Ill(msgspec.Struct, frozen=True):
    """Why the new workers are not healthy; `worker` is 0 if it is about all of them together."""

    why: str
    worker: int = 0


def verdict(rules: Rules, samples: Sequence[Sample]) -> Ill | None:
    """Return the first rule that the new workers of a restart break; None if they are healthy."""
    for sample in samples:
        if why := _is_ill(rules, sample):
            return Ill(f"worker {sample.worker} {why}", sample.worker)
    requests = sum(sample.requests for sample in samples)
    errors = sum(sample.errors for sample in samples)
    if rules.errors_max and requests >= rules.requests_min and errors > rules.errors_max * requests:
        return Ill(f"{errors} of {requests} requests failed; health_errors_max is {rules.errors_max:.7g}")
    return None


def _is_ill(rules: Rules, sample: Sample) -> str:
    if sample.probe:
        return sample.probe
    if rules.lag_max_s and sample.is_silent:
        return f"has not answered for {rules.lag_max_s:g} s: its event loop is held up; that is health_lag_max"
    if rules.lag_max_s and sample.lag_s > rules.lag_max_s:
        return f"had its event loop held up for {sample.lag_s:.3g} s; health_lag_max is {rules.lag_max_s:g} s"
    if rules.memory_max_bytes and sample.memory_bytes > rules.memory_max_bytes:
        used, allowed = sample.memory_bytes / 2**20, rules.memory_max_bytes / 2**20
        return f"uses {used:.0f} MiB of memory; health_memory_max is {allowed:.7g} MiB"
    return ""
