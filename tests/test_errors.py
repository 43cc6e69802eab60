from __future__ import annotations

import json
import os

import pytest

from hotport.errors import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, \u00e4\u65e5\U0001f600\n\twith a break", "plain, \u00e4\u65e5\U0001f600\n\twith a break"),
        ("\x1b[31mred\x07\r\x7f\x00", "\\u001b[31mred\\u0007\\u000d\\u007f\\u0000"),
        ("\x9b2J", "\\u009b2J"),
        ("a\u202egpj.exe\u2028b", "a\\u202egpj.exe\\u2028b"),
        (os.fsdecode(b"caf\xe9"), "caf\\udce9"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown
    visible(text).encode()


def test_json_that_is_made_visible_is_the_same() -> None:
    value = {"text": "\x9b\x7f\u202e"}
    assert json.loads(visible(json.dumps(value, ensure_ascii=False))) == value
