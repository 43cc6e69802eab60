"""Tell a worker that hangs from one that was stopped, or has no processor, by the rounds in which it did not answer.

Silence is counted round by round. A round counts only as far as the worker could have answered in it: not one in which
the supervisor itself was late (the machine was suspended, or everything was stopped), not the time that the worker has
waited for a processor, and not while a signal or a debugger has stopped it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

__all__ = ["ROUND_MAX_S", "Case", "Finding", "Found", "Look", "judge", "round_s"]

#: Seconds between two questions at most: answers also have the lag of the worker's event loop.
ROUND_MAX_S: Final = 2.0

ROUND_MIN_S: Final = 0.05

#: Rounds in the shortest bound.
ROUNDS: Final = 10

#: The supervisor's own lateness beyond which a round does not count: this share of it, or so many seconds.
LATE_SHARE: Final = 0.5
LATE_MIN_S: Final = 0.1

#: If no worker answers, the cause is rather outside of them: so many times the bound, before one is replaced.
ALL_SILENT: Final = 2.0


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of one worker in a round.

    Attributes:
        report_s: Silence after which it is reported; 0: never.
        timeout_s: Silence after which it is replaced; 0: never.
        grace_s: Silence that is usual: a program of its own speaks by itself, and seldom.
        is_serving: It can be replaced, and relieve others.
        has_failed: It has said itself that it hangs.
        is_stopped: A signal or a debugger has stopped it.
        waited_s: How long it has waited for a processor, in all; None if it was not looked at.
    """

    worker: int
    has_answered: bool
    report_s: float = 0.0
    timeout_s: float = 0.0
    grace_s: float = 0.0
    is_serving: bool = True
    has_failed: bool = False
    is_stopped: bool = False
    waited_s: float | None = None


class Case(msgspec.Struct, frozen=True):
    """What is known of one worker after a round.

    Attributes:
        unheard_s: How long it has not answered.
        silent_s: How much of that counts.
    """

    unheard_s: float = 0.0
    silent_s: float = 0.0
    stopped_s: float = 0.0
    waited_s: float | None = None
    is_reported: bool = False
    is_given_up: bool = False
    is_named_stopped: bool = False


class Found(enum.Enum):
    """What a round has shown about a worker."""

    HUNG = "hung"
    GIVEN_UP = "given up"
    UNHUNG = "unhung"
    STOPPED = "stopped"
    CONTINUED = "continued"


class Finding(msgspec.Struct, frozen=True):
    """What to do about a worker now.

    Attributes:
        silent_s: For how long it has not answered, or was stopped.
        waited_s: How much of that it has waited for a processor.
    """

    worker: int
    found: Found
    silent_s: float = 0.0
    waited_s: float = 0.0


def round_s(report_s: float, timeout_s: float) -> float:
    """How long a round lasts, with these bounds; 0 is none."""
    shortest = min((bound for bound in (report_s, timeout_s) if bound), default=ROUND_MAX_S * ROUNDS)
    return max(ROUND_MIN_S, min(ROUND_MAX_S, shortest / ROUNDS))


def judge(
    cases: Mapping[int, Case], looks: Sequence[Look], *, planned_s: float, lateness_s: float
) -> tuple[dict[int, Case], list[Finding]]:
    """Judge a round: return the cases that follow, of the workers that were looked at, and what was found.

    At most one worker is given up at a time: the next one when that has been relieved, or has answered.

    Args:
        planned_s: How long the round was to last.
        lateness_s: How much longer it has lasted.
    """
    counts = lateness_s <= max(LATE_MIN_S, LATE_SHARE * planned_s)
    after: dict[int, Case] = {}
    findings: list[Finding] = []
    for look in looks:
        before = cases.get(look.worker, Case())
        after[look.worker], found = _see(before, look, planned_s if counts else 0.0)
        findings += found
    if counts and (given_up := _give_up(after, looks)) is not None:
        case = after[given_up]
        if not case.is_reported:
            findings.append(_finding(given_up, Found.HUNG, case))
        findings.append(_finding(given_up, Found.GIVEN_UP, case))
        after[given_up] = replace(case, is_reported=True, is_given_up=True)
    return after, findings


def _finding(worker: int, found: Found, case: Case) -> Finding:
    return Finding(worker, found, case.unheard_s, case.unheard_s - case.silent_s)


def _see(before: Case, look: Look, passed_s: float) -> tuple[Case, list[Finding]]:
    findings = []
    is_over = look.has_answered or not look.is_stopped
    if before.is_named_stopped and is_over:
        findings.append(Finding(look.worker, Found.CONTINUED, before.stopped_s))
    if look.has_answered and not look.has_failed:
        if before.is_reported:
            findings.append(_finding(look.worker, Found.UNHUNG, before))
        return Case(), findings
    if look.is_stopped:
        stopped_s = before.stopped_s + passed_s
        is_named = before.is_named_stopped or bool(look.report_s and stopped_s >= look.report_s)
        if is_named and not before.is_named_stopped:
            findings.append(Finding(look.worker, Found.STOPPED, stopped_s))
        stopped = Case(
            stopped_s=stopped_s,
            is_reported=before.is_reported,
            is_given_up=before.is_given_up,
            is_named_stopped=is_named,
        )
        return stopped, findings
    waited_s = 0.0
    if before.waited_s is not None and look.waited_s is not None:
        waited_s = min(passed_s, max(0.0, look.waited_s - before.waited_s))
    silent_s = before.silent_s + passed_s - waited_s
    is_reported = before.is_reported or look.has_failed or bool(look.report_s and silent_s >= look.report_s)
    after = Case(
        unheard_s=before.unheard_s + passed_s,
        silent_s=silent_s,
        waited_s=look.waited_s,
        is_reported=is_reported,
        is_given_up=before.is_given_up,
    )
    if is_reported and not before.is_reported:
        findings.append(_finding(look.worker, Found.HUNG, after))
    return after, findings


def _give_up(cases: Mapping[int, Case], looks: Sequence[Look]) -> int | None:
    """Choose the worker to give up in this round, the one that has been silent for longest; None if there is none."""
    serving = [look for look in looks if look.is_serving]
    if any(cases[look.worker].is_given_up for look in serving):
        return None
    is_any_well = any(not look.is_stopped and cases[look.worker].silent_s <= look.grace_s for look in serving)
    patience = 1.0 if is_any_well or len(serving) == 1 else ALL_SILENT
    due = [
        look.worker
        for look in serving
        if look.has_failed or (look.timeout_s and cases[look.worker].silent_s >= patience * look.timeout_s)
    ]
    return max(due, key=lambda worker: cases[worker].silent_s, default=None)
