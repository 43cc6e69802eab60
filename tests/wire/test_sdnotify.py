from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.wire.sdnotify import NOTIFICATION_BYTES_MAX, Notification, encode_notification

MAYBE_SECONDS = st.none() | st.integers(0, 10**12).map(lambda usec: usec / 1_000_000)
NOTIFICATIONS = st.builds(
    Notification,
    ready=st.booleans(),
    stopping=st.booleans(),
    reloading=st.booleans(),
    status=st.none() | st.from_regex(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{0,1000}", fullmatch=True),
    errno=st.none() | st.integers(0, 200),
    extend_timeout_s=MAYBE_SECONDS,
    watchdog=st.booleans(),
    main_pid=st.none() | st.integers(1, 2**22),
    monotonic_s=MAYBE_SECONDS,
    error=st.none() | st.text(),
)


@given(NOTIFICATIONS)
def test_what_is_said_is_what_is_heard(said: Notification) -> None:
    assert Notification.parse(encode_notification(**dataclasses.asdict(said))) == said


@given(st.binary(max_size=200))
def test_no_datagram_makes_the_reader_fail(payload: bytes) -> None:
    Notification.parse(payload)


def test_words_are_those_of_sd_notify() -> None:
    said = encode_notification(
        ready=True, status="up\nand well", extend_timeout_s=1.5, main_pid=7, monotonic_s=2.0, errno=2
    )
    assert said.decode().splitlines() == [
        "READY=1",
        "STATUS=up and well",
        "ERRNO=2",
        "EXTEND_TIMEOUT_USEC=1500000",
        "MAINPID=7",
        "MONOTONIC_USEC=2000000",
    ]
    assert encode_notification(stopping=True, reloading=True, watchdog=True) == (b"STOPPING=1\nRELOADING=1\nWATCHDOG=1")
    assert encode_notification() == b""


def test_unknown_keys_and_bad_numbers_are_ignored() -> None:
    words = b"READY=yes FDSTORE=1 noise = MAINPID=0 ERRNO=-1 EXTEND_TIMEOUT_USEC=1e6 MONOTONIC_USEC= STATUS=ok"
    assert Notification.parse(words.replace(b" ", b"\n")) == Notification(status="ok")
    assert Notification.parse(b"ERRNO=" + b"9" * 5000) == Notification()


def test_last_of_equal_keys_counts() -> None:
    assert Notification.parse(b"STATUS=a\nSTATUS=b=c\nREADY=1\n") == Notification(ready=True, status="b=c")


def test_error_keeps_its_lines() -> None:
    error = 'HP501 cannot import app\n  cause: "x"\n  try:   \u2028\ud800'
    payload = encode_notification(ready=False, error=error)
    assert payload.count(b"\n") == 0
    assert Notification.parse(payload).error == error.replace("\ud800", "\\ud800"), "half characters are spelled out"


@pytest.mark.parametrize("text", ["plain words", '"half a string', "17"])
def test_error_that_is_no_json_string_is_taken_as_it_is(text: str) -> None:
    assert Notification.parse(b"X_HOTPORT_ERROR=" + text.encode()).error == text


@pytest.mark.parametrize("letter", ["x", "\n", "\U0001f600", "\ud800"])
def test_too_long_error_keeps_its_end_and_fits(letter: str) -> None:
    payload = encode_notification(
        ready=True, status=letter * 5000, error=letter * NOTIFICATION_BYTES_MAX + "ValueError: last line"
    )
    assert NOTIFICATION_BYTES_MAX // 2 < len(payload) <= NOTIFICATION_BYTES_MAX
    heard = Notification.parse(payload)
    assert heard.ready
    assert heard.error is not None
    assert heard.error.startswith("[...] ")
    assert heard.error.endswith("ValueError: last line")
