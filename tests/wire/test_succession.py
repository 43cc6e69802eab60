from __future__ import annotations

import msgspec
import pytest

from hotport.errors import ControlError
from hotport.wire.messages import OfferOrder, decode, encode
from hotport.wire.succession import Ask, CommitOrder, Committed, Succession


def test_a_newer_predecessor_may_say_more() -> None:
    told = Succession(predecessor=7, generation=2, control="@c", manager="", asked=("tcp://127.0.0.1:0",))
    later = encode(told)[:-1] + b',"colour":"blue"}'
    assert msgspec.json.decode(later, type=Succession) == told


@pytest.mark.parametrize("order", [CommitOrder(), OfferOrder(version=1)])
def test_orders_are_told_apart(order: msgspec.Struct) -> None:
    assert decode(encode(order), Ask) == order


def test_answer_is_no_order() -> None:
    assert decode(encode(Committed(dropped=(1,))), Committed).dropped == (1,)
    with pytest.raises(ControlError, match="HP602"):
        decode(encode(Committed()), Ask)
