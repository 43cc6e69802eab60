from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.errors import ExitCode
from hotport.wire.frames import FRAME_BYTES_MAX, FrameDecoder, FrameError, encode_frame


@given(st.lists(st.binary(max_size=40), max_size=8), st.lists(st.integers(1, 9), min_size=1))
def test_frames_survive_however_the_stream_is_cut(payloads: list[bytes], sizes: list[int]) -> None:
    stream = b"".join(map(encode_frame, payloads))
    decoder = FrameDecoder()
    received: list[bytes] = []
    while stream:
        size = sizes[len(stream) % len(sizes)]
        received += decoder.feed(stream[:size])
        stream = stream[size:]
    assert received == payloads
    assert decoder.missing_bytes == 4


def test_header_is_four_bytes_big_endian() -> None:
    assert encode_frame(b"abc") == b"\x00\x00\x00\x03abc"


def test_longest_frame_passes() -> None:
    payload = bytes(FRAME_BYTES_MAX)
    assert FrameDecoder().feed(encode_frame(payload)) == [payload]


def test_too_long_payload_is_not_sent() -> None:
    with pytest.raises(FrameError, match="HP612") as raised:
        encode_frame(b"12345", frame_bytes_max=4)
    assert raised.value.exit_code == ExitCode.NO_SUPERVISOR


def test_too_long_frame_is_refused_from_its_header_alone() -> None:
    with pytest.raises(FrameError, match="HP610"):
        FrameDecoder(frame_bytes_max=4).feed(b"\x00\x00\x00\x05")


def test_garbage_is_refused_every_time_and_not_kept() -> None:
    decoder = FrameDecoder()
    for _ in range(3):
        with pytest.raises(FrameError, match="HP610"):
            decoder.feed(b"GET / HTTP/1.1\r\n" * 1000)
        assert len(decoder._buffer) == 4


def test_decoder_knows_how_much_of_the_next_payload_is_missing() -> None:
    """What comes behind a message may be no message: it is not to be read with it."""
    frame = encode_frame(b"payload")
    decoder = FrameDecoder()
    assert decoder.missing_bytes == 4
    assert decoder.feed(frame[:3]) == []
    assert decoder.missing_bytes == 1
    assert decoder.feed(frame[3:6]) == []
    assert decoder.missing_bytes == 5
    assert decoder.feed(frame[6:]) == [b"payload"]
    assert decoder.missing_bytes == 4
