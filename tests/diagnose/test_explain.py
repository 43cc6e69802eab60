from __future__ import annotations

import pytest

from hotport.diagnose.explain import TOPICS, explain
from hotport.errors import ConfigError
from hotport.model.port import State


@pytest.mark.parametrize("topic", TOPICS)
def test_every_text_has_sources_and_fits_a_terminal(topic: str) -> None:
    lines = explain(topic).splitlines()
    assert lines[-1].startswith("Sources: ")
    assert max(map(len, lines)) <= 120


def test_every_state_is_explained() -> None:
    assert set(State) <= set(TOPICS)


@pytest.mark.parametrize("spelling", ["TIME_WAIT", "time-wait", "timewait"])
def test_spelling_does_not_matter(spelling: str) -> None:
    assert explain(spelling) == TOPICS["TIME_WAIT"]


def test_unknown_topic_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"^HP135 ") as raised:
        explain("CLOSE_WAITS")
    assert raised.value.fix == "hotport why --explain CLOSE_WAIT"
    with pytest.raises(ConfigError) as raised:
        explain("%")
    assert raised.value.fix == "hotport why --explain TIME_WAIT"
