"""What holds for any requests in any pieces, and for any bytes at all.

A few seconds by default; for a longer search, in as many examples as wanted::

    HOTPORT_EXAMPLES=20000 pytest tests/adapters/test_http_properties.py -o timeout=0
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hotport.adapters.asgi import State
from tests.adapters.asgi_support import Answers, serving, turns
from tests.adapters.http_edges import EDGES, PROBE, Recorder, Saw

searching = settings(
    max_examples=int(os.environ.get("HOTPORT_EXAMPLES", "100")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # the machine may be
)

Loop = Callable[[], asyncio.AbstractEventLoop]

on_both_loops = pytest.mark.parametrize(
    "loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)

#: More turns of the event loop than any example takes; one that is not through by then hangs.
TURNS_MAX = 5_000

#: States in which it is the client's turn.
RESTING = {State.FRESH, State.HALF_HEAD, State.BODY, State.IDLE, State.CLOSING, State.CLOSED}


class Complaints(logging.Handler):
    """What is in the log from warnings on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@dataclass(frozen=True)
class Ending:
    """What a conversation has come to; it does not depend on how it was cut in pieces."""

    state: State
    #: Of all answers, in order.
    statuses: list[int]
    #: What the application has answered.
    served: list[Saw]


def converse(pieces: list[bytes], loop: Loop) -> Ending:
    """Send the pieces, and leave. Nothing hangs, complains, answers what was not asked, or is left behind."""
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(_converse(pieces))


async def _converse(pieces: list[bytes]) -> Ending:
    complaints, recorder = Complaints(), Recorder()
    logger = logging.getLogger("hotport")
    logger.addHandler(complaints)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.lines.append(str(context)))
    try:
        async with serving(recorder) as rig:
            connection, transport = rig.memory()
            for piece in pieces:
                if not transport.is_closed:
                    connection.data_received(piece)
                    await turns(1)
            await _until(lambda: connection.state in RESTING)
            await turns(3)
            state = State.CLOSING if transport.is_closed else connection.state
            assert not transport.is_aborted
            served = [saw for saw in recorder.seen if not saw.is_cut]
            transport.close()
            await _until(lambda: len(asyncio.all_tasks()) == 1 and not rig.connections.open)
    finally:
        logger.removeHandler(complaints)
    assert complaints.lines == []
    statuses = _read(b"".join(transport.writes), served)
    assert statuses[: len(served)] == [200] * len(served)
    assert [status for status in statuses[len(served) :] if not 400 <= status < 600] == []
    assert len(statuses) - len(served) in ((0, 1) if state is State.CLOSING else (0,))
    return Ending(state, statuses, served)


async def _until(claim: Callable[[], bool]) -> None:
    for _ in range(TURNS_MAX):
        if claim():
            return
        await asyncio.sleep(0)
    raise AssertionError("it hangs")


def _read(data: bytes, served: list[Saw]) -> list[int]:
    """Every answer; there is nothing between or behind them but what precedes an answer that never came."""
    reader, statuses, methods = Answers(), list[int](), [saw.method for saw in served]
    while data:
        answer = reader.feed(data, method=methods.pop(0) if methods else "GET")
        if answer is None:
            assert data == b"HTTP/1.1 100 Continue\r\n\r\n"
            break
        statuses.append(answer.status)
        data, reader.rest = reader.rest, b""
    return statuses


def pieces_of(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[begin:end] for begin, end in itertools.pairwise(places)]


# -- valid requests --------------------------------------------------------------------------------------------

TOKEN = st.text("abcXYZ019-_", min_size=1, max_size=8).map(str.encode)
TEXT = st.binary(max_size=12).map(lambda data: bytes(byte for byte in data if byte >= 32 and byte != 127).strip())
BODY = st.binary(max_size=60) | st.sampled_from([b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"0\r\n\r\n", b"\r\n" * 9])


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, Saw]:
    """A request, and what an application has to see of it."""
    method = draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "PROPFIND"]))
    path = draw(st.text("abc/._~", max_size=8))
    query = draw(st.text("ab=&%?", max_size=5).map(str.encode))
    fields = [(b"Host", b"x")]
    fields += [(b"X-" + name, value) for name, value in draw(st.lists(st.tuples(TOKEN, TEXT), max_size=3))]
    if draw(st.booleans()) and draw(st.booleans()):
        fields += [(b"Connection", b"Upgrade"), (b"Upgrade", b"h2c")]
    body, sent = b"", b""
    match draw(st.sampled_from(["none", "length", "chunked"])):
        case "length":
            body = sent = draw(BODY)
            fields.append((b"Content-Length", b"%d" % len(body)))
        case "chunked":
            fields.append((b"Transfer-Encoding", b"chunked"))
            for chunk in draw(st.lists(BODY.filter(bool), max_size=4)):
                extension = draw(st.sampled_from([b"", b";a", b";a=b", b';a="b c"']))
                sent += b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk)
                body += chunk
            sent += b"0\r\n" + draw(st.sampled_from([b"", b"T: u\r\n", b"T: u\r\nV: w\r\n"])) + b"\r\n"
    target = b"/" + path.encode() + (b"?" + query if query else b"")
    lines = b"".join(b"%b: %b\r\n" % field for field in fields)
    head = b"%b %b HTTP/1.1\r\n%b\r\n" % (method.encode(), target, lines)
    headers = tuple((name.lower(), value) for name, value in fields)
    saw = Saw(method, "/" + path, query, body, raw_path=target.partition(b"?")[0], headers=headers)
    return draw(st.sampled_from([b"", b"", b"\r\n"])) + head + sent, saw


CUTS = st.lists(st.integers(0, 4_000), max_size=8)


@on_both_loops
@searching
@pytest.mark.unmeasured
@given(conversation=st.lists(requests(), min_size=1, max_size=6), cuts=CUTS)
def test_application_sees_the_same_requests_however_they_are_cut(
    conversation: list[tuple[bytes, Saw]], cuts: list[int], loop: Loop
) -> None:
    stream = b"".join(request for request, _ in conversation)
    seen = [saw for _, saw in conversation]
    assert converse(pieces_of(stream, cuts), loop) == Ending(State.IDLE, [200] * len(seen), seen)


# -- anything else ---------------------------------------------------------------------------------------------

#: What makes parsers disagree.
LINES = [b"Content-Length: 3", b"Transfer-Encoding: chunked", b"Host: x", b"Connection: close", b"Expect: 100-continue"]
BITS = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\0",
    b" ",
    b"\t",
    b"\x0b",
    b":",
    b",",
    b";",
    b"0",
    b"-",
    b"+",
    b"\xff",
    b"%",
    b"0\r\n\r\n",
]
UPGRADE = b"Connection: upgrade\r\nUpgrade: x\r\n"
SEEDS = st.sampled_from([*BITS, *(line + b"\r\n" for line in LINES), UPGRADE, b"chunked", b"HTTP/1.1", PROBE])
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "replace", "delete", "repeat", "end"]),
        st.integers(0, 1_000),
        st.integers(1, 30),
        SEEDS | st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=5,
)


def mutated(stream: bytes, mutations: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, place, size, seed in mutations:
        place %= len(stream) + 1
        match kind:
            case "insert":
                stream = stream[:place] + seed + stream[place:]
            case "replace":
                stream = stream[:place] + seed + stream[place + len(seed) :]
            case "delete":
                stream = stream[:place] + stream[place + size :]
            case "repeat":
                stream = stream[: place + size] + stream[place:]
            case "end":
                stream = stream[:place]
    return stream


SHORT = [edge.sent for edge in EDGES if len(edge.sent) < 1_000]


@on_both_loops
@searching
@pytest.mark.unmeasured
@given(
    requests=st.lists(requests().map(lambda pair: pair[0]) | st.sampled_from(SHORT), min_size=1, max_size=3),
    mutations=MUTATIONS,
    cuts=CUTS,
)
def test_any_bytes_end_the_same_however_they_are_cut(
    requests: list[bytes], mutations: list[tuple[str, int, int, bytes]], cuts: list[int], loop: Loop
) -> None:
    stream = mutated(b"".join(requests), mutations)
    whole = converse([stream] if stream else [], loop)
    assert converse(pieces_of(stream, cuts), loop) == whole
