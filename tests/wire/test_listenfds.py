from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.errors import ConfigError
from hotport.wire.listenfds import LISTEN_VARIABLES, listen_environment, parse_listen_environment

NAMES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters=":"), min_size=1)


@given(st.lists(NAMES, max_size=5), st.integers(1, 2**22))
def test_what_is_passed_is_what_is_found(names: list[str], pid: int) -> None:
    environ = listen_environment(names, pid)
    assert parse_listen_environment(environ, pid) == tuple(enumerate(names, 3))
    assert set(environ) <= set(LISTEN_VARIABLES)


def test_variables_are_those_of_sd_listen_fds() -> None:
    assert listen_environment(["web", "tcp%3A//[%3A%3A]%3A80"], 42) == {
        "LISTEN_FDS": "2",
        "LISTEN_PID": "42",
        "LISTEN_FDNAMES": "web:tcp%3A//[%3A%3A]%3A80",
    }


def test_nothing_passed_sets_nothing() -> None:
    assert listen_environment([], 42) == {}


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "\x7f", "ü", "x" * 256])
def test_name_that_others_would_misread_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="HP321"):
        listen_environment([name], 42)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "42"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "41", "LISTEN_FDNAMES": "for:another:process"},
        {"LISTEN_FDS": "0", "LISTEN_PID": "42", "LISTEN_FDNAMES": ""},
    ],
)
def test_listeners_that_are_not_for_us_are_left_alone(environ: dict[str, str]) -> None:
    assert parse_listen_environment(environ, 42) == ()


def test_listeners_without_names_are_unknown() -> None:
    environ = {"LISTEN_FDS": "2", "LISTEN_PID": "42"}
    assert parse_listen_environment(environ, 42) == ((3, "unknown"), (4, "unknown"))
    assert parse_listen_environment(environ | {"LISTEN_FDNAMES": ":web"}, 42) == ((3, "unknown"), (4, "web"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LISTEN_PID", "auto"),
        ("LISTEN_PID", ""),
        ("LISTEN_PID", "-42"),
        ("LISTEN_FDS", "two"),
        ("LISTEN_FDS", "\N{SUPERSCRIPT TWO}"),
        ("LISTEN_FDS", "9" * 10),
        ("LISTEN_FDS", "9" * 5000),
        ("LISTEN_FDNAMES", "only"),
        ("LISTEN_FDNAMES", "a:b:c"),
    ],
)
def test_garbage_is_an_error_that_names_the_variable(variable: str, value: str) -> None:
    environ = {"LISTEN_FDS": "2", "LISTEN_PID": "42", variable: value}
    with pytest.raises(ConfigError, match=f"HP320.*{variable}=") as raised:
        parse_listen_environment(environ, 42)
    assert raised.value.fix.startswith("unset LISTEN_FDS LISTEN_PID LISTEN_PIDFDID")
