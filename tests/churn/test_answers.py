"""Where answers end, however they come in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.churn.answers import AnswerError, HttpReader

_OK = b"HTTP/1.1 200 OK\r\n"
_LENGTH = _OK + b"X-Generation: g7\r\nContent-Length: 5\r\n\r\nhello"
_CHUNKED = _OK + b"Transfer-Encoding: chunked\r\n\r\n3;a=b\r\nhel\r\n2\r\nlo\r\n0\r\nTrailer: x\r\n\r\n"

#: Answer, status, whether it keeps its connection, whether only its end ends it.
_ANSWERS = [
    (_LENGTH, 200, True, False),
    (_CHUNKED, 200, True, False),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + _LENGTH, 200, True, False),
    (b"HTTP/1.1 204 No Content\r\n\r\n", 204, True, False),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\n\r\n", 304, True, False),
    (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 101, True, False),
    (b"HTTP/1.1 503 \r\nConnection: foo, Close\r\nContent-Length: 0\r\n\r\n", 503, False, False),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, False, False),
    (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok", 200, True, False),
    (_OK + b"\r\nuntil the end", 200, False, True),
    (_OK + b"Transfer-Encoding: gzip\r\n\r\nuntil the end", 200, False, True),
    (_OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok", 200, True, False),
]


@given(st.sampled_from(_ANSWERS), st.lists(st.integers(1, 30)))
def test_answer_ends_where_it_ends_in_whatever_pieces(answer: tuple[bytes, int, bool, bool], sizes: list[int]) -> None:
    data, status, keeps_open, needs_end = answer
    reader = HttpReader(b"x-generation")
    for _ in range(2):
        reader.start()
        rest = data
        for size in sizes:
            piece, following = rest[:size], rest[size:]
            if not following:
                break
            assert not reader.feed(piece)
            rest = following
        assert reader.feed(rest) is not needs_end
        assert reader.has_begun
        assert reader.end() is needs_end
        assert (reader.status, reader.keeps_open) == (status, keeps_open)
        assert reader.who == ("g7" if b"g7" in data else "")


@given(st.sampled_from(_ANSWERS), st.data())
def test_part_of_an_answer_is_not_whole_when_the_connection_ends(
    answer: tuple[bytes, int, bool, bool], data: st.DataObject
) -> None:
    text, _, _, needs_end = answer
    reader = HttpReader()
    head = text.rindex(b"\r\n\r\n") + 4
    limit = head if needs_end else len(text)
    assert not reader.feed(text[: data.draw(st.integers(1, limit - 1))])
    assert not reader.end()


def test_more_than_an_answer_spoils_the_connection() -> None:
    reader = HttpReader()
    assert reader.feed(_LENGTH + b"H")
    assert not reader.keeps_open


@pytest.mark.parametrize(
    "data",
    [
        b"garbage",
        b"\x16\x03\x01\x00\x00",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 99 no\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        _OK + b"no colon\r\n\r\n",
        _OK + b"Content-Length: x\r\n\r\n",
        _OK + b"Content-Length: -1\r\n\r\n",
        _OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        _OK + b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
        _OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        _OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 70_000,
        _OK + b"X: " + b"x" * 70_000,
    ],
    ids=range(13),
)
def test_what_is_no_answer_is_not_taken_for_one(data: bytes) -> None:
    with pytest.raises(AnswerError):
        HttpReader().feed(data)
