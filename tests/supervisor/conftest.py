"""What tests of a whole supervisor share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.supervisor.stage import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where workers are forked from: importing everything once is enough."""
    made = Nursery()
    yield made
    made.close()
