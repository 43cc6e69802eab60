from __future__ import annotations

import pytest
from msgspec.structs import replace

from hotport.model.strategies import GUARANTEES, Choice, Facts, Strategy, choose, obstacle, table

HTTP = Facts()
ALL = frozenset(Strategy)
KEPT = {Strategy.INHERIT, Strategy.TRANSFER}


@pytest.mark.parametrize(
    ("facts", "can"),
    [
        (HTTP, ALL),
        (replace(HTTP, kind="asgi"), ALL),
        (replace(HTTP, schemes=("tcp", "unix")), KEPT),
        (replace(HTTP, schemes=("fd",)), KEPT),
        (replace(HTTP, schemes=("systemd",)), KEPT),
        (replace(HTTP, is_phased=True), KEPT),
        (replace(HTTP, is_stored=True), KEPT),
        (replace(HTTP, lingering=(3,)), KEPT),
        (replace(HTTP, can_steer=False), KEPT | {Strategy.REBIND}),
        (replace(HTTP, schemes=("udp",)), {Strategy.INHERIT}),
        (replace(HTTP, kind="sockets"), {Strategy.INHERIT}),
        (replace(HTTP, kind="datagram"), {Strategy.INHERIT}),
        (replace(HTTP, command="./server"), {Strategy.INHERIT}),
    ],
)
def test_every_service_can_have_the_strategies_of_its_kind_and_a_reason_for_each_other(
    facts: Facts, can: set[Strategy]
) -> None:
    assert {strategy for strategy in Strategy if not obstacle(strategy, facts)} == can
    for strategy in Strategy:
        chosen = choose(strategy.value, facts)
        assert chosen.why
        assert chosen.strategy is (strategy if strategy in can else None)


def test_auto_takes_the_best_and_says_why() -> None:
    for facts in (HTTP, replace(HTTP, schemes=("udp",)), replace(HTTP, command="./server")):
        chosen = choose("auto", facts)
        assert chosen.strategy is Strategy.INHERIT
        assert chosen.why.startswith("auto: ")


def test_forced_strategy_says_that_it_was_asked_for() -> None:
    assert choose("overlap", HTTP) == Choice(Strategy.OVERLAP, "asked for")


def test_only_a_rebind_loses_anything() -> None:
    assert {strategy for strategy, says in GUARANTEES.items() if not says.is_lossless} == {Strategy.REBIND}
    assert GUARANTEES.keys() == ALL


def test_strategy_whose_generations_cannot_both_be_sent_newcomers_says_why_it_has_no_canary() -> None:
    assert {strategy for strategy, says in GUARANTEES.items() if says.no_canary} == {Strategy.OVERLAP, Strategy.REBIND}


def test_table_tells_what_each_strategy_promises_and_what_is_in_its_way() -> None:
    rows = table(replace(HTTP, schemes=("unix",)))
    assert [row.strategy for row in rows] == list(Strategy)
    assert [bool(row.obstacle) for row in rows] == [False, False, True, True]
