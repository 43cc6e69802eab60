"""Stacks as faulthandler writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotport.wire.stack import Frame, Stack

OURS = "/srv/venv/lib/python3.11/site-packages/hotport"

#: Of `faulthandler.dump_traceback` in a signal handler, with another thread.
ALL = b"""\
Thread 0x00007f0b6a3eb6c0 (most recent call first):
  File "/srv/shop/jobs.py", line 11 in work
  File "/usr/lib/python3.11/concurrent/futures/thread.py", line 58 in run
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

Current thread 0x00007f0b6c645b80 (most recent call first):
  File "/srv/venv/lib/python3.11/site-packages/hotport/kernel/stacks.py", line 70 in _tell_stacks
  File "/usr/lib/python3.11/re/__init__.py", line 166 in match
  File "/srv/shop/app.py", line 34 in handler
  File "/srv/venv/lib/python3.11/site-packages/hotport/adapters/asgi/exchange.py", line 208 in run
  File "<frozen runpy>", line 198 in _run_module_as_main
"""

#: Of the handler that faulthandler installs, without the other threads.
ONE = b"""\
Stack (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait
  File "/srv/other/app.py", line 7 in <module>
"""

#: As Python 3.14 names threads.
NAMED = b"""\
Thread 0x00007f0b6a3eb6c0 [Thread-1] (most recent call first):
  <no Python frame>

Current thread 0x00007f0b6c645b80 [python] (most recent call first):
  File "/srv/shop/app.py", line ??? in handler
  ...
"""


def test_thread_with_the_event_loop_comes_first_without_the_handler() -> None:
    stack = Stack.parse(ALL, hidden="_tell_stacks")
    assert [thread[0].name for thread in stack.threads] == ["match", "work"]
    assert stack.threads[0][1] == Frame("/srv/shop/app.py", "34", "handler")
    assert stack.text.splitlines()[:2] == [
        "Current thread 0x00007f0b6c645b80 (most recent call first):",
        '  File "/usr/lib/python3.11/re/__init__.py", line 166 in match',
    ]
    assert stack.text.splitlines()[5:7] == ["", "Thread 0x00007f0b6a3eb6c0 (most recent call first):"]
    assert stack.is_whole


def test_nothing_is_hidden_that_is_no_handler() -> None:
    assert Stack.parse(ALL).threads[0][0].name == "_tell_stacks"
    assert Stack.parse(ONE, hidden="_tell_stacks").threads[0][0].name == "wait"


def test_place_is_the_innermost_line_of_the_application() -> None:
    assert Stack.parse(ALL, hidden="_tell_stacks").place(OURS, "/srv/shop") == "app.py:34 in handler"
    assert Stack.parse(ONE).place(OURS, "/srv/shop") == "/srv/other/app.py:7 in <module>"
    assert Stack.parse(NAMED).place(OURS, "/srv/shop/") == "app.py:??? in handler"


def test_place_is_in_another_thread_if_that_one_is_waited_for() -> None:
    assert Stack.parse(ALL).place(OURS, "/srv/shop", is_waiting=True) == "jobs.py:11 in work"


def test_place_without_a_line_of_the_application_is_the_innermost_line() -> None:
    library = ONE.replace(b"/srv/other/app.py", b"/srv/venv/lib/python3.11/site-packages/starlette/routing.py")
    assert Stack.parse(library).place(OURS, "/srv/shop") == "/usr/lib/python3.11/threading.py:327 in wait"
    assert Stack.parse(library).place("/srv/hotport/src/hotport", "/srv/hotport") == (
        "/usr/lib/python3.11/threading.py:327 in wait"
    )
    ours = b'Stack (most recent call first):\n  File "/srv/hotport/src/hotport/a.py", line 1 in a\n'
    assert Stack.parse(ours).place("/srv/hotport/src/hotport", "/srv/hotport") == "src/hotport/a.py:1 in a"


@pytest.mark.parametrize("data", [b"", b"\n", b"nothing of the kind", b"  File out of place\n"])
def test_what_is_no_stack_has_no_place(data: bytes) -> None:
    assert Stack.parse(data) == Stack()
    assert Stack().place(OURS, "/srv/shop") == ""


@pytest.mark.parametrize(
    ("data", "is_whole"),
    [
        (ALL, True),
        (ONE, False),
        (NAMED, True),
        (ALL.removesuffix(b"in _run_module_as_main\n"), False),
        (ALL[:200], False),
    ],
)
def test_stack_is_whole_when_the_outermost_call_has_come(data: bytes, is_whole: bool) -> None:
    assert Stack.parse(data).is_whole is is_whole


def test_text_is_bounded_and_ends_with_a_whole_line() -> None:
    long = b"Stack (most recent call first):\n" + b'  File "/a.py", line 1 in ' + b"f" * 480 + b"\n"
    text = Stack.parse(long + long.partition(b"\n")[2] * 100).text
    assert len(text) < 16 * 1024 + 10
    assert text.endswith("f" * 480 + "\n...")


@given(st.binary(max_size=200) | st.lists(st.sampled_from([*ALL.splitlines(keepends=True), b"\xff\n"])).map(b"".join))
def test_whatever_comes_is_parsed(data: bytes) -> None:
    stack = Stack.parse(data, hidden="_tell_stacks")
    assert stack.text.isascii()
    assert isinstance(stack.place(OURS, "/srv/shop"), str)
