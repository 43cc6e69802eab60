"""What a fate says of the connection that has it."""

from __future__ import annotations

import pytest

from hotport.model.fates import Fate, by_name, names_cut


@pytest.mark.parametrize("fate", Fate)
def test_a_fate_is_a_cut_a_move_or_neither(fate: Fate) -> None:
    assert (fate.is_cut, fate.is_moved) == (fate.name.startswith("CUT_"), fate.name.startswith("MOVED_"))


def test_a_cut_of_a_later_version_is_known_as_one() -> None:
    assert names_cut("cut_something_new")
    assert not names_cut("something_new")


def test_fates_are_told_by_plain_strings() -> None:
    (name,) = by_name({Fate.FINISHED: 2})
    assert type(name) is str
    assert by_name({Fate.FINISHED: 2}) == {"finished": 2}
