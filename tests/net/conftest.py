"""Tests in network namespaces of their own, with several users: for root, where the machine permits it."""

from __future__ import annotations

import os

import pytest

from benchmarks.netns import is_permitted


@pytest.fixture(autouse=True)
def networks() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can act as several users")
    if not is_permitted():
        pytest.skip("no network namespaces here")
