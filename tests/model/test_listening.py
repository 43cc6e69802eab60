"""What is odd about a listener."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from msgspec.structs import replace

from hotport.model.listening import Listening, oddities
from hotport.model.port import Ephemeral, Local, State
from hotport.model.process import Origin, Process

NGINX = Process(7, "nginx: master", "www")
ALL = Listening("tcp", "0.0.0.0:8000", Local(ip_address("0.0.0.0")), 8000, holders=(NGINX,), backlog=5)
ONE = Listening("tcp", "127.0.0.1:8000", Local(ip_address("127.0.0.1")), 8000, holders=(Process(8, "node", "www"),))


def odd(one: Listening, *others: Listening) -> list[str]:
    return list(oddities(one, (one, *others), Ephemeral()))


def test_usual_listener_is_not_odd() -> None:
    assert odd(ALL) == []
    workers = replace(ALL, holders=(NGINX, replace(NGINX, pid=9)))
    assert odd(workers) == []
    ours = (Process(1, "python x", "www", stop="hotport stop web"), Process(2, "uv y", "www", generation=3))
    assert odd(replace(ALL, holders=ours)) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"holders": (replace(NGINX, is_suspended=True),), "waited_s": 9.0}, "suspended: it accepts nothing"),
        ({"waited_s": 9.0, "queue": 1}, "nothing is accepted: the first in the queue waits for 9 s"),
        ({"queue": 6}, "the accept queue is full"),
        ({"state": State.BOUND}, "has the port and does not listen (a sleeper)"),
        ({"holders": (NGINX, Process(9, "sleep 9", "www"))}, "held by several programs (pids 7, 9)"),
        ({"holders": (replace(NGINX, origin=Origin(is_left=True)),)}, "left behind: what started it has ended"),
        (
            {"holders": (replace(NGINX, origin=Origin(deleted=("program file",))),)},
            "program file was deleted or replaced",
        ),
        ({"number": 40_000}, "an outgoing connection may take the port while it is down"),
    ],
)
def test_unusual_listener_is_told_in_a_few_words(changes: dict[str, object], text: str) -> None:
    assert odd(replace(ALL, **changes)) == [text]


def test_listener_with_a_narrower_address_takes_connections_away() -> None:
    assert odd(ALL, ONE) == ["127.0.0.1:8000 takes its connections there"]
    assert odd(ONE, ALL) == []
    assert odd(ALL, replace(ONE, holders=(NGINX,))) == []
    assert odd(ALL, replace(ONE, number=8001)) == []
    assert odd(ALL, replace(ONE, local=Local(ip_address("::1"), True))) == []
    assert odd(Listening("unix", "@x", holders=(NGINX,)), ALL) == []
