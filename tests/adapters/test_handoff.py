"""The driver of a handoff, with a connection that notes what is asked of it; real ones are in tests/worker."""

from __future__ import annotations

from typing import Any

import pytest

from hotport.adapters.base import Connections, Offer
from hotport.adapters.handoff import Handoff, Stage, end_handoff, prepare, stands_still
from hotport.wire.envelope import Envelope, StreamState

pytestmark = pytest.mark.anyio

OFFER = Offer(3, Envelope(None, None, False, b"", StreamState(None)))


class Transport:
    """Has `unsent` bytes to write."""

    unsent = 0

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def set_write_buffer_limits(self, high: int | None = None) -> None:
        pass


class Moves:
    """A connection whose application packs `packs`."""

    def __init__(self, packs: Any = OFFER, *, is_at_safe_point: bool = True) -> None:
        self.handoff: Handoff | None = None
        self.is_at_safe_point = is_at_safe_point
        self.packs = packs
        self.said: list[str] = []
        self.transport = Transport()
        self.connections = Connections()
        self.prepare()

    def prepare(self) -> None:
        prepare(self, self.connections, lambda _: self.said.append("ready"))  # type: ignore[arg-type]

    def hold(self) -> None:
        self.said.append("hold")

    def pack(self) -> Any:
        if isinstance(self.packs, Exception):
            raise self.packs
        return self.packs

    def resume(self, was_offered: bool) -> None:
        self.said.append("resume offered" if was_offered else "resume")

    def stay(self) -> None:
        end_handoff(self)  # type: ignore[arg-type]

    def offer(self) -> Offer | None:
        assert self.handoff is not None
        return self.handoff.offer(self, self.transport)  # type: ignore[arg-type]

    def rest(self) -> bool:
        assert self.handoff is not None
        return self.handoff.come_to_rest(self)  # type: ignore[arg-type]

    @property
    def stage(self) -> Stage | None:
        return None if self.handoff is None else self.handoff.stage


async def test_connection_is_offered_once_and_goes_on_if_it_is_kept() -> None:
    moves = Moves()
    assert moves.offer() is OFFER
    assert stands_still(moves.handoff)
    assert moves.offer() is None
    assert not moves.rest()
    assert not end_handoff(moves)  # type: ignore[arg-type]
    moves.prepare()
    assert moves.said == ["ready", "hold"]
    assert moves.handoff is not None
    moves.handoff.keep(moves, moves.transport)  # type: ignore[arg-type]
    assert (moves.said[2:], moves.stage) == (["resume offered"], Stage.PREPARED)


@pytest.mark.parametrize("unsent", [0, 1])
async def test_connection_that_was_asked_for_too_early_is_held_at_its_next_safe_point(unsent: int) -> None:
    moves = Moves(is_at_safe_point=unsent > 0)
    moves.transport.unsent = unsent
    assert moves.offer() is None
    moves.said.clear()
    moves.is_at_safe_point = True
    assert moves.rest()
    assert (moves.said, moves.stage) == (["hold", "ready"], Stage.WANTED)
    moves.transport.unsent = 0
    assert moves.offer() is OFFER


async def test_application_that_declines_is_asked_again() -> None:
    moves = Moves(packs=None)
    assert moves.offer() is None
    assert (moves.said, moves.stage) == (["ready", "hold", "resume"], Stage.PREPARED)
    assert not moves.rest()
    assert moves.said[3:] == ["ready"]


async def test_application_that_fails_keeps_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    moves = Moves(packs=ValueError("no"))
    assert moves.offer() is None
    assert moves.handoff is None
    assert "ValueError: no" in caplog.text
    assert moves.said[:3] == ["ready", "hold", "resume offered"]


async def test_worker_that_stays_has_connections_as_before() -> None:
    moves = Moves(is_at_safe_point=False)
    moves.offer()
    assert end_handoff(moves)  # type: ignore[arg-type]
    assert (moves.said, moves.handoff) == (["resume"], None)
