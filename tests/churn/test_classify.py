"""Every pair of how far an attempt was and what happened then has one fate, or cannot be."""

from __future__ import annotations

import errno
import itertools

import pytest

from hotport.churn.classify import FATES, OWN_LIMITS, Happening, Stage, classify, happening_of
from hotport.churn.fates import ConnectionEvent, Fate

_IMPOSSIBLE = {
    (Stage.CONNECTING, Happening.WHOLE),
    (Stage.CONNECTING, Happening.WRONG),
    (Stage.IDLE, Happening.OVERDUE),  # nothing is waited for
}


@pytest.mark.parametrize(
    ("stage", "happening"), list(itertools.product(Stage, Happening)), ids=lambda value: value.name
)
def test_every_pair_has_one_meaning(stage: Stage, happening: Happening) -> None:
    if (stage, happening) in _IMPOSSIBLE:
        with pytest.raises(LookupError):
            classify(stage, happening)
        return
    fate = classify(stage, happening)
    assert isinstance(fate, ConnectionEvent if stage is Stage.IDLE else Fate)
    is_answer = fate in (Fate.ANSWERED, ConnectionEvent.IDLE_CLOSE) or fate is Fate.WRONG_STATUS
    assert is_answer == (stage is Stage.IDLE or happening in (Happening.WHOLE, Happening.WRONG))


@pytest.mark.parametrize("happening", [Happening.REFUSED, Happening.RESET, Happening.ENDED])
def test_what_ends_a_connection_is_named_by_how_far_the_attempt_was(happening: Happening) -> None:
    assert [FATES[stage][happening] for stage in (Stage.CONNECTED, Stage.ANSWERING, Stage.MESSAGE)] == [
        Fate.RESET_BEFORE_SEND,
        Fate.TRUNCATED,
        Fate.LOST,
    ]
    expected = Fate.CLOSED_UNANSWERED if happening is Happening.ENDED else Fate.RESET_AFTER_SEND
    assert FATES[Stage.PARTLY_SENT][happening] is FATES[Stage.SENT][happening] is expected


def test_every_errno_is_something_that_happens() -> None:
    for number in errno.errorcode:
        assert happening_of(number) in (Happening.REFUSED, Happening.RESET, Happening.OVERDUE)
    assert happening_of(errno.ECONNREFUSED) is Happening.REFUSED
    assert happening_of(errno.ECONNRESET) is happening_of(errno.EPIPE) is Happening.RESET
    assert happening_of(errno.ETIMEDOUT) is Happening.OVERDUE
    assert {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS} <= OWN_LIMITS
