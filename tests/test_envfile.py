"""Files of environment variables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.errors import ConfigError
from hotport.options.envfile import parse_variables
from tests.support import assert_three_lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("A=1", {"A": "1"}),
        ("A=1\nB=2\n", {"A": "1", "B": "2"}),
        ("A=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
        ("\n# A=1\n; B=2\n  # C=3\nD=4", {"D": "4"}),
        ("A=", {"A": ""}),
        ("export A=1", {"A": "1"}),
        ("  A = 1 2  ", {"A": "1 2"}),
        ("A=1\nA=2", {"A": "2"}),
        ("A=x=y", {"A": "x=y"}),
        ("URL=http://h/p#part?q=$x", {"URL": "http://h/p#part?q=$x"}),
        ("A='  # ${B} \\n \"'", {"A": '  # ${B} \\n "'}),
        ('A="a\\nb\\t\\"\\\\ \\$\\{ \\x # é"', {"A": 'a\nb\t"\\ $\\{ \\x # é'}),
        ('KEY="one\ntwo"\nB=1', {"KEY": "one\ntwo", "B": "1"}),
        ("KEY='one\ntwo'  \nB=1", {"KEY": "one\ntwo", "B": "1"}),
        ('A="\\${B}"', {"A": "${B}"}),
        ("A=it's", {"A": "it's"}),
        ("A=C:\\x", {"A": "C:\\x"}),
    ],
)
def test_a_file_is_read_as_uvicorn_and_systemd_read_it(text: str, expected: dict[str, str]) -> None:
    assert parse_variables(text.encode(), ".env") == expected


@pytest.mark.parametrize(
    ("text", "line", "cause"),
    [
        ("A=1\nnonsense", 2, "it has no ="),
        ("export A", 1, "it has no ="),
        ("=1", 1, "no name"),
        ("1A=1", 1, "no name"),
        ("A B=1", 1, "no name"),
        ("A-B=1", 1, "no name"),
        ("\n\nA='x", 3, "does not end"),
        ('A="x\\"', 1, "does not end"),
        ("A='x'y", 1, "something follows"),
        ("A='x' # why", 1, "a comment follows"),
        ("K='a\nb'\nA=secret #1", 3, "begins a comment for some"),
        ("A=# why", 1, "begins a comment for some"),
        ("A=${B}", 1, "refers to another"),
        ('A="x${B:-1}"', 1, "refers to another"),
        ("A=1\\\n2", 1, "backslash"),
        ("A=x\0y", 1, "NUL"),
        ("HOTPORT_WORKERS=4", 1, "hotport sets"),
        ("NOTIFY_SOCKET=/x", 1, "hotport sets"),
    ],
)
def test_a_line_that_others_read_differently_is_refused_with_its_number(text: str, line: int, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause) as caught:
        parse_variables(text.encode(), ".env", reserved=frozenset({"NOTIFY_SOCKET"}))
    assert caught.value.code == "HP309"
    assert f"line {line} of .env" in str(caught.value)
    assert "secret" not in str(caught.value), "values are not shown"
    assert_three_lines(str(caught.value), "HP309")


@given(st.text(st.characters(exclude_characters="'\0\r", exclude_categories=["Cs"])))
def test_a_single_quoted_value_is_kept_as_it_stands(value: str) -> None:
    assert parse_variables(f"A='{value}'\nB=1".encode(), ".env") == {"A": value, "B": "1"}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_variables(text.encode(), ".env")
    except ConfigError:
        return
    assert all(name.isascii() and "\0" not in value for name, value in found.items())


def test_a_file_is_utf_8() -> None:
    assert parse_variables(b"\xef\xbb\xbfA=1", ".env") == {"A": "1"}, "with the mark that Windows puts there"
    with pytest.raises(ConfigError, match=r"line 2 of \.env"):
        parse_variables(b"A=1\nB=\xe9", ".env")
