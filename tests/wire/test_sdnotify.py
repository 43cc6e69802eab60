from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.address import parse_address
from hotport.wire.sdnotify import (
    BARRIER,
    NOTIFICATION_BYTES_MAX,
    Notification,
    encode_notification,
    encode_store,
    encode_store_remove,
    parse_store_name,
    store_name,
)

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
    watchdog_s=MAYBE_SECONDS,
    main_pid=st.none() | st.integers(1, 2**22),
    monotonic_s=MAYBE_SECONDS,
    error=st.none() | st.text(),
)


@given(NOTIFICATIONS)
def test_what_is_said_is_what_is_heard(said: Notification) -> None:
    assert Notification.parse(encode_notification(**msgspec.structs.asdict(said))) == said


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


def test_watchdog_may_be_told_of_a_failure_and_of_another_bound() -> None:
    said = encode_notification(watchdog=True, has_failed=True, watchdog_s=2.5)
    assert said == b"WATCHDOG=trigger\nWATCHDOG_USEC=2500000"
    assert Notification.parse(said) == Notification(has_failed=True, watchdog_s=2.5)


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


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("tcp://127.0.0.1:8000", "hotport+tcp%3A//127.0.0.1%3A8000"),
        ("udp://[::1]:53", "hotport+udp%3A//[%3A%3A1]%3A53"),
        ("unix:/run/my app/\xe4%3A.sock", "hotport+unix%3A/run/my%20app/%C3%A4%253A.sock"),
        ("unix:/run/\udcff", "hotport+unix%3A/run/%FF"),
        ("unix:@hidden", "hotport+unix%3A@hidden"),
    ],
)
def test_a_listener_is_stored_under_a_name_that_says_where_it_is(address: str, name: str) -> None:
    parsed = parse_address(address)
    assert store_name(parsed) == name
    assert parse_store_name(name) == parsed


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30))
def test_every_path_has_a_name_that_a_manager_takes(path: str) -> None:
    address = parse_address(f"unix:/{path.lstrip('/')}/s") if len(path.encode()) < 100 else parse_address("unix:s")
    name = store_name(address)
    if name is None:  # three letters for one byte can be too many
        return
    assert name.isascii()
    assert name.isprintable()
    assert ":" not in name
    assert parse_store_name(name) == address


def test_a_name_that_would_be_too_long_is_none() -> None:
    assert store_name(parse_address("unix:/" + "\u65e5" * 30)) is None
    assert store_name(parse_address("unix:/" + "a" * 100)) is not None


@pytest.mark.parametrize("name", ["web", "tcp%3A//127.0.0.1%3A8000", "hotport+", "hotport+what", "hotport+tcp%3A//x"])
def test_names_of_others_are_nothing_of_ours(name: str) -> None:
    assert parse_store_name(name) is None


def test_store_datagrams_byte_for_byte() -> None:
    assert encode_store("hotport+x") == b"FDSTORE=1\nFDNAME=hotport+x\nFDPOLL=0"
    assert encode_store_remove("hotport+x") == b"FDSTOREREMOVE=1\nFDNAME=hotport+x"
    assert BARRIER == b"BARRIER=1"
