from __future__ import annotations

from docs.states import states_page
from hotport.model.lifecycle import TRANSITIONS


def test_page_of_states_shows_every_transition() -> None:
    page = states_page()
    for (before, event), after in TRANSITIONS.items():
        if before is after:
            continue
        assert f"`{event.value}` → {after.value}" in page
