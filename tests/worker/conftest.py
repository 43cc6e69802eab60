"""What tests of workers share."""

from __future__ import annotations

import pytest

from hotport.observe import logs


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What hotport logs in a program that has configured no structlog, whatever other tests have done to it."""
    monkeypatch.setattr(logs.structlog, "is_configured", lambda: False)
    return caplog
