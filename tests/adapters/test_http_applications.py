"""Applications that do what they should not, as a table: what their client gets, and the one line in the log."""

from __future__ import annotations

import array
import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Final, Literal

import h11
import pytest

from hotport.adapters.asgi import State
from hotport.adapters.asgi.spec import Application, Message, Receive, Scope, Send
from tests.adapters.asgi_support import respond, serving, turns, until

pytestmark = pytest.mark.anyio

ERROR: Final = b"Internal Server Error"


@dataclass(frozen=True, slots=True)
class Deed:
    """A row: an application, what its client gets, and what stands in the log, if anything does."""

    name: str
    does: Application
    #: An answer after which the connection stays open, or one that does not look whole.
    answer: tuple[int, bytes] | Literal["truncated"]
    log: str | None = None
    method: str = "GET"


def start(status: Any = 200, *headers: Any) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: Any, more_body: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more_body}


def sends(*messages: Message) -> Application:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


def fails(name: str, log: str, *messages: Message) -> Deed:
    """Nothing of the answer is written yet when these messages go wrong."""
    return Deed(name, sends(*messages), (500, ERROR), log)


def breaks(name: str, log: str, *messages: Message) -> Deed:
    """A part of it is."""
    return Deed(name, sends(*messages), "truncated", log)


def works(name: str, answer: bytes, *messages: Message, status: int = 200, method: str = "GET") -> Deed:
    return Deed(name, sends(*messages), (status, answer), method=method)


def raises(error: BaseException, *messages: Message) -> Application:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await sends(*messages)(scope, receive, send)
        raise error

    return app


async def goes_on_after_an_error(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start(404))
    with pytest.raises(RuntimeError):
        await send(start(200))
    await send(body(b"a", True))
    with pytest.raises(RuntimeError):
        await send(start(200))
    await send(body(b"b"))


async def receives_after_the_end(scope: Scope, receive: Receive, send: Send) -> None:
    await respond(send, b"ok")
    assert [await receive(), await receive()] == [{"type": "http.disconnect"}] * 2


async def receives_twice(scope: Scope, receive: Receive, send: Send) -> None:
    assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
    waiting = asyncio.ensure_future(receive())
    await turns(3)
    assert not waiting.done()  # the client is still there
    await respond(send, b"ok")
    assert await waiting == {"type": "http.disconnect"}


async def changes_what_it_has_sent(scope: Scope, receive: Receive, send: Send) -> None:
    data = bytearray(b"a" * 3_000_000)  # more than the kernel takes at once
    await send(start())
    sending = asyncio.ensure_future(send(body(data)))
    await asyncio.sleep(0)
    data[:] = b"b" * len(data)
    await sending


async def sends_in_drops(scope: Scope, receive: Receive, send: Send) -> None:
    await send(start())
    for _ in range(5_000):
        await send(body(b"x", True))
    await send(body(b""))


def before(what: str) -> str:
    return f"RuntimeError: {what!r} was sent where 'http.response.start' was expected"


def within(what: str) -> str:
    return f"RuntimeError: {what!r} was sent where 'http.response.body' was expected"


def behind(what: str) -> str:
    return f"RuntimeError: {what!r} was sent after the end of the answer"


def no_status(status: object) -> str:
    return f"RuntimeError: {status!r} is not the status of a final answer"


LENGTH_2: Final = (b"content-length", b"2")

DEEDS: Final = [
    # -- order
    fails("body-first", before("http.response.body"), body(b"x")),
    fails("start-twice", within("http.response.start"), start(), start()),
    fails("unknown-message", before("http.response.nonsense"), {"type": "http.response.nonsense"}),
    fails("websocket-message", before("websocket.accept"), {"type": "websocket.accept"}),
    fails("message-without-type", "KeyError: 'type'", {"status": 200}),
    breaks("start-in-the-body", within("http.response.start"), start(), body(b"a", True), start()),
    Deed(
        "body-after-the-end",
        sends(start(), body(b"ok"), body(b"more")),
        (200, b"ok"),
        behind("http.response.body"),
    ),
    Deed("start-after-the-end", sends(start(), body(b"ok"), start()), (200, b"ok"), behind("http.response.start")),
    Deed("going-on-after-an-error", goes_on_after_an_error, (404, b"ab")),
    # -- status
    fails("status-missing", "KeyError: 'status'", {"type": "http.response.start"}),
    fails("status-of-text", no_status("200"), start("200"), body(b"")),
    fails("status-none", no_status(None), start(None), body(b"")),
    fails("status-interim", no_status(100), start(100), body(b"")),
    fails("status-upgrade", no_status(101), start(101), body(b"")),
    fails("status-of-two-digits", no_status(99), start(99), body(b"")),
    fails("status-of-four-digits", no_status(1000), start(1000), body(b"")),
    # -- fields
    fails("value-with-a-line-break", "the header field b'x' contains a line break", start(200, (b"x", b"a\r\nb: c"))),
    fails("value-with-a-line-feed", "the header field b'x' contains a line break", start(200, (b"x", b"a\nb: c"))),
    fails("value-with-a-nul", "the header field b'x' contains a line break or a NUL", start(200, (b"x", b"a\0b"))),
    fails("name-with-a-space", "b'x y' is not the name of a header field", start(200, (b"x y", b"a"))),
    fails("empty-name", "b'' is not the name of a header field", start(200, (b"", b"a"))),
    fails("value-with-a-return", "the header field b'x' contains a line break", start(200, (b"x", b"a\rb"))),
    fails("name-with-a-line-break", "b'x\\r\\ny' is not the name of a header field", start(200, (b"x\r\ny", b"a"))),
    fails("name-of-text", "is a pair of byte strings, not ('x', b'a')", start(200, ("x", b"a"))),
    fails("value-of-text", "is a pair of byte strings, not (b'x', 'a')", start(200, (b"x", "a"))),
    fails("value-of-int", "is a pair of byte strings, not (b'x', 1)", start(200, (b"x", 1))),
    fails(
        "length-of-text", "RuntimeError: '2' is not a content-length", start(200, (b"content-length", "2")), body(b"ok")
    ),
    fails("length-of-int", "RuntimeError: 2 is not a content-length", start(200, (b"content-length", 2)), body(b"ok")),
    fails("length-negative", "RuntimeError: b'-1' is not a content-length", start(200, (b"content-length", b"-1"))),
    fails("length-empty", "RuntimeError: b'' is not a content-length", start(200, (b"content-length", b""))),
    fails("length-blank", "RuntimeError: b' 2' is not a content-length", start(200, (b"Content-Length", b" 2"))),
    works("fields-as-lists", b"ok", start(200, [b"x", b"y"]), body(b"ok")),
    works("fields-none", b"ok", {"type": "http.response.start", "status": 200, "headers": None}, body(b"ok")),
    works("fields-missing", b"ok", {"type": "http.response.start", "status": 200}, body(b"ok")),
    works("chunked-said", b"ok", start(200, (b"transfer-encoding", b"chunked")), body(b"ok")),
    works("length-and-chunked-said", b"ok", start(200, (b"transfer-encoding", b"chunked"), LENGTH_2), body(b"ok")),
    # -- body
    fails(
        "body-longer", "RuntimeError: the body is longer than its content-length", start(200, LENGTH_2), body(b"abc")
    ),
    fails(
        "body-shorter", "RuntimeError: the body is shorter than its content-length", start(200, LENGTH_2), body(b"a")
    ),
    fails("body-absent", "RuntimeError: the body is shorter", start(200, LENGTH_2), {"type": "http.response.body"}),
    breaks(
        "body-longer-later",
        "RuntimeError: the body is longer than its content-length",
        start(200, LENGTH_2),
        body(b"a", True),
        body(b"bc", True),
    ),
    breaks(
        "body-shorter-later",
        "RuntimeError: the body is shorter than its content-length",
        start(200, LENGTH_2),
        body(b"a", True),
        body(b""),
    ),
    fails("body-none", "RuntimeError: a body is a byte string, not NoneType", start(), body(None)),
    fails("body-of-text", "RuntimeError: a body is a byte string, not str", start(), body("text")),
    fails("body-of-int", "RuntimeError: a body is a byte string, not int", start(), body(5)),
    breaks("body-none-later", "RuntimeError: a body is a byte string", start(), body(b"a", True), body(None)),
    works("body-missing", b"", start(), {"type": "http.response.body"}),
    works("body-bytearray", b"abc", start(), body(bytearray(b"ab"), True), body(bytearray(b"c"))),
    works("body-memoryview", b"abc", start(), body(memoryview(b"ab"), True), body(memoryview(b"c"))),
    works("body-memoryview-of-words", b"\1\0\2\0", start(), body(memoryview(array.array("h", [1, 2])))),
    works("body-memoryview-with-gaps", b"ac", start(200, LENGTH_2), body(memoryview(b"abcd")[::2])),
    works("body-of-204", b"", start(204), body(b"dropped"), status=204),
    works("body-of-204-in-pieces", b"", start(204, LENGTH_2), body(b"dro", True), body(b"pped"), status=204),
    works("body-of-304", b"", start(304), body(b"dropped"), status=304),
    works("body-of-head", b"", start(200, LENGTH_2), body(b"dropped"), method="HEAD"),
    Deed("body-in-drops", sends_in_drops, (200, b"x" * 5_000)),
    Deed("body-changed-later", changes_what_it_has_sent, (200, b"a" * 3_000_000)),
    # -- endings
    fails("nothing", "the application returned without an answer: GET /"),
    fails("start-only", "the application returned without an answer: GET /", start()),
    breaks("half", "the application returned without the end of its answer: GET /", start(), body(b"a", True)),
    Deed("raising", raises(ValueError("no")), (500, ERROR), "ValueError: no"),
    Deed("raising-behind-the-start", raises(ValueError("no"), start(404)), (500, ERROR), "ValueError: no"),
    Deed("raising-halfway", raises(ValueError("no"), start(), body(b"a", True)), "truncated", "ValueError: no"),
    Deed("raising-after-the-end", raises(ValueError("no"), start(), body(b"ok")), (200, b"ok"), "ValueError: no"),
    Deed("exiting", raises(SystemExit(1)), (500, ERROR), "SystemExit: 1"),
    Deed("cancelled", raises(asyncio.CancelledError()), (500, ERROR), "the application was cancelled: GET /"),
    Deed(
        "cancelled-halfway",
        raises(asyncio.CancelledError(), start(), body(b"a", True)),
        "truncated",
        "the application was cancelled: GET /",
    ),
    Deed("cancelled-after-the-end", raises(asyncio.CancelledError(), start(), body(b"ok")), (200, b"ok")),
    Deed("receiving-after-the-end", receives_after_the_end, (200, b"ok")),
    Deed("receiving-twice", receives_twice, (200, b"ok")),
]


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.name)
async def test_whatever_an_application_does_its_client_is_told_and_so_is_the_log(
    deed: Deed, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/probe":
            await respond(send, b"probe")
        else:
            await deed.does(scope, receive, send)

    async with serving(app) as rig:
        client, connection = await rig.connect()
        await client.send(deed.method.encode() + b" / HTTP/1.1\r\nHost: x\r\n\r\n")
        if deed.answer == "truncated":
            with pytest.raises((h11.RemoteProtocolError, ConnectionResetError)):
                await client.answer(deed.method)
            await until(lambda: connection.state is State.CLOSED)
        else:
            answer = await client.answer(deed.method)
            assert (answer.status, answer.body, answer.says_close) == (*deed.answer, False)
            await client.send(b"GET /probe HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await client.answer()).body == b"probe"
        await until(lambda: not rig.adapter._shared.running)  # type: ignore[union-attr]
    told = [f"{record.getMessage()}: {error_of(record)}" for record in caplog.records if record.levelno > logging.INFO]
    assert len(told) == (0 if deed.log is None else 1), told
    assert (deed.log or "") in "".join(told)


async def test_what_was_written_of_a_broken_answer_arrives_also_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ValueError("no more")

    monkeypatch.setattr("hotport.adapters.handoff.has_forked", lambda: True)
    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await client.read_to_end()).endswith(b"\r\n\r\n4\r\nhalf\r\n")


def error_of(record: logging.LogRecord) -> str:
    error = record.exc_info and record.exc_info[1]
    return f"{type(error).__name__}: {error}" if error else ""


async def test_task_that_an_application_leaves_behind_cannot_answer_any_more(caplog: pytest.LogCaptureFixture) -> None:
    left: list[asyncio.Task[None]] = []
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def later() -> None:
            await gate.wait()
            await respond(send, b"late")

        left.append(asyncio.create_task(later()))

    async with serving(app) as rig:
        client, connection = await rig.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await client.answer()).status == 500
        gate.set()
        with pytest.raises(RuntimeError, match="was sent after the end of the answer"):
            await left[0]
        assert connection.state is State.IDLE
    assert len([record for record in caplog.records if record.levelno > logging.INFO]) == 1


@pytest.mark.parametrize("ending", ["returns", "raises"])
async def test_application_that_gives_up_when_told_of_a_disconnect_is_not_blamed(
    ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An upload that ended with its connection was logged as the application's error, if the end was read early."""
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        while (await receive())["type"] != "http.disconnect":
            pass
        if ending == "raises":
            raise RuntimeError("ClientDisconnect")

    async with serving(app) as rig:
        client, connection = await rig.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        client.end()
        await until(lambda: connection.has_eof)
        gate.set()
        answer = await client.answer()  # it may still read
        assert (answer.status, answer.says_close) == (500, True)
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


async def test_cut_while_trailers_are_due_truncates_the_answer() -> None:
    """The 503 of the cut was written into the body, as if it were a chunk."""
    is_due = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**start(), "trailers": True})
        await send(body(b"ok"))
        is_due.set()
        await asyncio.Event().wait()

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await is_due.wait()
        assert connection.state is State.STREAMING
        connection.cut()
        assert transport.is_aborted
        assert b" 503 " not in b"".join(transport.writes)
        await turns()
