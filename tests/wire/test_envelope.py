"""Envelopes: what travels with a connection comes out as it went in, or is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.errors import ControlError
from hotport.wire.envelope import (
    HEADER_BYTES,
    Ack,
    Envelope,
    Frame,
    HttpState,
    ProtocolState,
    StreamState,
    WebSocketState,
    decode_ack,
    decode_batch,
    decode_count,
    encode_frame,
    encode_state,
    pack,
    parse_header,
)
from hotport.wire.tlskeys import TLS13
from hotport.wire.tlsrecords import TlsAbout, TlsState

seconds = st.floats(0, 1e6)
exported = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
states = st.one_of(
    st.builds(HttpState, st.booleans(), seconds),
    st.builds(StreamState, exported),
    st.builds(ProtocolState, exported),
    st.builds(
        WebSocketState,
        target=st.binary(),
        headers=st.lists(st.tuples(st.binary(), st.binary())),
        subprotocol=st.text(),
        extensions=st.text(),
        undelivered=st.lists(st.text() | st.binary()),
        waits_for=st.sampled_from(["NOTHING", "PING", "PONG"]),
        wait_s=seconds,
        has_heard=st.booleans(),
        application=exported,
    ),
)
addresses = st.one_of(
    st.tuples(st.ip_addresses(v=4).map(str), st.integers(0, 65535)),
    st.tuples(st.ip_addresses(v=6).map(str), st.integers(0, 65535), st.just(0), st.integers(0, 9)),
    st.just(""),
    st.binary(),
    st.none(),
)
envelopes = st.builds(Envelope, addresses, addresses, st.booleans(), st.binary(), states)


@given(st.lists(envelopes, max_size=4))
def test_batch_comes_out_as_it_went_in(batch: list[Envelope]) -> None:
    frame = encode_frame(Frame.BATCH, batch)
    kind, size = parse_header(frame[:HEADER_BYTES])
    assert (kind, size) == (Frame.BATCH, len(frame) - HEADER_BYTES)
    out = [each for each in decode_batch(frame[HEADER_BYTES:]) if each is not None]
    assert len(out) == len(batch)
    assert [each.state for each in out] == [each.state for each in batch]
    assert [(each.unread, each.is_proxied) for each in out] == [(each.unread, each.is_proxied) for each in batch]
    assert [each.endpoints for each in out] == [(each.peer, each.own) for each in batch]


def test_envelopes_of_the_version_before_are_understood() -> None:
    before = encode_state([["10.0.0.1", 80], None, False, b"unread", ["http", True, 2.5]])
    frame = encode_frame(Frame.BATCH, [msgspec.Raw(before)])
    assert decode_batch(frame[HEADER_BYTES:]) == [
        Envelope(["10.0.0.1", 80], None, False, b"unread", HttpState(True, 2.5), None)
    ]


def test_the_version_before_understands_envelopes_without_tls() -> None:
    class Before(msgspec.Struct, frozen=True, array_like=True):
        peer: Any
        own: Any
        is_proxied: bool
        unread: bytes
        state: HttpState

    now = pack(Envelope(None, None, True, b"", HttpState(False, 1.0)))
    assert msgspec.msgpack.decode(now, type=Before) == Before(None, None, True, b"", HttpState(False, 1.0))


def test_an_envelope_with_tls_shows_no_secret() -> None:
    tls = TlsState(
        TLS13, "TLS_AES_128_GCM_SHA256", b"r" * 32, b"w" * 32, 1, 2, 0, False, 16384, b"", TlsAbout(("", "", 0))
    )
    envelope = Envelope(None, None, False, b"", HttpState(True, 0.0), tls)
    frame = encode_frame(Frame.BATCH, [pack(envelope)])
    assert decode_batch(frame[HEADER_BYTES:]) == [envelope]
    assert "rrrr" not in repr(envelope)
    assert "wwww" not in repr(envelope)


def test_answer_comes_out_as_it_went_in() -> None:
    frame = encode_frame(Frame.ACK, Ack([1, 3], 17))
    assert decode_ack(frame[HEADER_BYTES:]) == Ack([1, 3], 17)
    assert parse_header(encode_frame(Frame.GO)) == (Frame.GO, 0)


@pytest.mark.parametrize(
    "header", [b"\0\0\0\0\0", b"\x09\0\0\0\1", b"\1\xff\xff\xff\xff"], ids=["zero", "unknown", "huge"]
)
def test_what_is_no_frame_is_refused(header: bytes) -> None:
    with pytest.raises(ControlError, match="HP220"):
        parse_header(header)


@given(st.binary(max_size=60))
def test_garbage_is_refused_and_nothing_else_happens(garbage: bytes) -> None:
    for decode in (decode_batch, decode_ack, decode_count):
        with contextlib.suppress(ControlError):
            decode(garbage)


@pytest.mark.parametrize("decode", [decode_batch, decode_ack, decode_count])
def test_frame_nested_deeper_than_the_stack_is_refused(decode: Any) -> None:
    with pytest.raises(ControlError, match="HP220"):
        decode(b"\x91" * 100_000)


@pytest.mark.parametrize("state", [object(), {"file": open}, 1 << 80, {1: object()}], ids=["a", "b", "c", "d"])
def test_state_that_cannot_travel_is_refused_before_anything_moves(state: Any) -> None:
    with pytest.raises(TypeError, match="cannot travel to another process"):
        encode_state(state)


def test_state_that_refers_to_itself_is_refused() -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(TypeError, match="cannot travel"):
        encode_state(state)


def test_envelope_that_cannot_travel_is_refused_before_it_does() -> None:
    with pytest.raises(TypeError, match="cannot travel"):
        pack(Envelope("/run/caf\udce9", "", False, b"", StreamState(None)))


def test_envelope_that_is_none_leaves_the_others_alone() -> None:
    good, bad = (Envelope("", "", False, unread, StreamState(None)) for unread in (b"good", "bad"))  # type: ignore[arg-type]
    assert decode_batch(encode_frame(Frame.BATCH, [good, pack(bad), pack(good)])[HEADER_BYTES:]) == [good, None, good]


def test_number_of_connections_is_none_below_zero() -> None:
    assert decode_count(encode_frame(Frame.REST, 7)[HEADER_BYTES:]) == 7
    with pytest.raises(ControlError, match="HP220"):
        decode_count(b"\xff")
