from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotport.errors import RestartError, visible
from hotport.wire.messages import Failure

SOURCE = Path(__file__).parent.parent / "src" / "hotport"


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


#: What a fix may begin with: a program or a call of ours; else it is an option, a variable, or ``key = value``.
COMMANDS = {
    *("await", "cat", "cd", "chmod", "chown", "command", "df", "file", "from", "getent", "grep", "head", "hotport"),
    *("iconv", "id", "ip", "kill", "ls", "mkdir", "namei", "netstat", "openssl", "pip", "ps", "ss", "sudo", "sysctl"),
    *("systemctl", "ulimit", "umask", "unset"),
}

#: Words that stand for something that is known when the error is raised, or else belongs into the note.
PLACEHOLDER = re.compile(r"\b(COMMAND|DIR|FILE|NAME|PATTERN|PID|PROGRAM|TARGET)\b")


def fixes() -> Iterator[tuple[str, str]]:
    """Every text of the source that becomes the fix of an error, with ``{}`` for what is filled in, and its place."""
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        functions = {node.name: node.args.args for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            found: list[ast.expr] = []
            match node:
                case ast.Call(func=ast.Name(id="_Why"), args=[_, fix, *_]):
                    found = [fix]
                case ast.Call(func=func, args=args, keywords=keywords):
                    names = [each.arg for each in functions.get(getattr(func, "id", ""), [])]
                    given = [*zip(names, args, strict=False), *((each.arg, each.value) for each in keywords)]
                    found = [value for name, value in given if name == "fix"]
                case ast.Assign(targets=[ast.Name(id="fix")], value=value):
                    found = [value]
                case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                    found = [value for name, value in zip(names, values, strict=False) if ast.unparse(name) == "fix"]
            for expression in found:
                for text in texts(expression):
                    yield text, f"{path.relative_to(SOURCE)}:{expression.lineno}"


def texts(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
        case ast.IfExp(body=body, orelse=orelse):
            yield from texts(body)
            yield from texts(orelse)


def is_pasteable(fix: str) -> bool:
    first = fix.lstrip("(").split()[0]
    is_option = re.match(r"(--[a-z-]+|\{\}) \S", fix) is not None or fix in {"--watch", "--insecure"}
    is_value = re.match(r"[\w{}]+ ?= ?\S", fix) is not None
    is_ours = first.startswith("hotport.") or fix.startswith("{} -m pip install ")
    return first in COMMANDS or is_option or is_value or is_ours


def test_what_to_try_can_be_pasted_and_prose_is_in_the_note() -> None:
    found = [(text, where) for text, where in fixes() if text]
    assert len(found) > 100
    assert [pair for pair in found if not is_pasteable(pair[0])] == []
    prose = re.compile(PLACEHOLDER.pattern + "|, (and|or) |; (see|or) |, then ")
    assert [pair for pair in found if prose.search(pair[0])] == []


def test_every_error_says_what_to_do() -> None:
    def is_silent(call: ast.Call) -> bool:
        given = {each.arg for each in call.keywords}
        return {"cause"} <= given and not given & {"fix", "note"}

    calls = [
        (node, path)
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error")
    ]
    assert [f"{path}:{node.lineno}" for node, path in calls if is_silent(node)] == []


@pytest.mark.parametrize(
    ("fix", "note", "rest"),
    [
        ("ls", "", "\n  try:   ls"),
        ("", "wait", "\n  note:  wait"),
        ("ls", "wait", "\n  try:   ls\n  note:  wait"),
    ],
)
def test_an_error_shows_what_it_has(fix: str, note: str, rest: str) -> None:
    error = RestartError("HP410", "not now", cause="a test", fix=fix, note=note, serving=1)
    assert str(error) == f"HP410 not now\n  cause: a test{rest}"
    sent = Failure(code="HP410", what="not now", cause="a test", fix=fix, note=note, exit_code=4)
    assert str(sent.error()) == str(error)
