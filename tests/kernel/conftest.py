"""A test of system calls leaves nothing behind: no descriptor, no child, no signal handler."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import psutil
import pytest

from hotport.kernel.process import open_descriptors
from tests.support import collect


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    collect()  # garbage of an earlier test must not be counted as ours
    descriptors = open_descriptors()
    handlers, children = _handlers(), set(psutil.Process().children())
    yield
    assert open_descriptors() == descriptors
    assert _handlers() == handlers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    assert set(psutil.Process().children()) == children


def _handlers() -> dict[int, object]:
    # SIGALRM is pytest-timeout's.
    return {number: signal.getsignal(number) for number in signal.valid_signals() - {signal.SIGALRM}}
