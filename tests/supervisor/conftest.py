"""What tests of a whole supervisor share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hotport.kernel import process
from tests.supervisor.stage import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where workers are forked from: importing everything once is enough."""
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_subreaper() -> Iterator[None]:
    """A supervisor with `preload` in this process makes it the parent of orphans, also those of other rooms' tests."""
    yield
    if process._is_subreaper:
        process.load_prctl()(process._PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        process._is_subreaper = False
