"""What tests share: how long they may take, and how they read a log."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock, patch

import pytest

from tests import conftest
from tests.support import SLOWNESS, Service


def test_what_repeats_is_given_time_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 upgrades seemed to hang at one of them, without a log line: the test was ended there, by the time for 20."""
    monkeypatch.setattr(conftest, "RESTARTS", 300)
    config, once, often = Mock(), Mock(), Mock()
    config.getoption.return_value, config.getini.return_value = None, "300"
    once.get_closest_marker.return_value = None
    often.get_closest_marker.side_effect = lambda name: pytest.mark.soak.mark if name == "soak" else None
    conftest.pytest_collection_modifyitems(config, [once, often])
    allowed = [item.add_marker.call_args.args[0].args[0] for item in (once, often)]
    assert allowed == [300 * SLOWNESS, 15 * 300 * SLOWNESS]


def test_a_log_is_read_once(tmp_path: Path) -> None:
    """Each look at the log of 300 upgrades parsed all of it, a hundred times a second, beside what was waited for."""
    service = Service.__new__(Service)
    service.log_path, service._lines, service._read_bytes = tmp_path / "log", [], 0
    service.log_path.write_text('{"event": "first"}\nsomething else\n{"event": "sec')
    assert service.log_lines() == [{"event": "first"}]
    with service.log_path.open("a") as log:
        log.write('ond"}\n')
    with patch.object(json, "loads", wraps=json.loads) as loads:
        assert [line["event"] for line in service.log_lines()] == ["first", "second"]
        assert len(service.log_events("first")) == 1
        assert loads.call_count == 1
