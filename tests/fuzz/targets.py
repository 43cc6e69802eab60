"""What is fuzzed: for each byte path some seeds, and one function of the bytes that raises if they break a promise.

The same function is driven by atheris (coverage-guided) and by `tests.fuzz.mutate` (where atheris is not installed).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
import re
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec

from hotport.adapters.asgi.exchange import Exchange
from hotport.adapters.asgi.http import HttpConnection
from hotport.adapters.asgi.reader import Reader
from hotport.adapters.asgi.session import Session
from hotport.adapters.asgi.spec import Receive, Scope, Send
from hotport.adapters.asgi.states import State
from hotport.adapters.asgi.websocket import WebSocketConnection
from hotport.errors import ControlError
from hotport.wire import envelope, frames, messages, proxyprotocol
from tests.adapters.asgi_support import MemoryTransport, Rig, read_body, respond

__all__ = ["TARGETS", "OneInput", "Target"]

OneInput: TypeAlias = Callable[[bytes], None]

#: More turns of the event loop than any input needs until it is the client's turn; beyond that something hangs.
TURNS_MAX: Final = 2000

#: What may wait on behalf of one connection, in bytes as `held_bytes` counts them; infinite while it has no budget.
BUDGET_BYTES = float("inf")

#: From what is written until the transport asks to write no more, as asyncio's transports have it.
HIGH_WATER_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """A byte path.

    Attributes:
        seeds: Inputs to begin with.
        opened: Makes what the path needs, and ends it.
    """

    seeds: Callable[[], list[bytes]]
    opened: Callable[[], AbstractContextManager[OneInput]]


def pieces_of(data: bytes, rng: random.Random) -> list[bytes]:
    """The data as reads could bring it: whole, byte by byte, or cut in up to eight places."""
    match rng.randrange(4):
        case 0:
            return [data]
        case 1 if len(data) <= 1000:
            return [data[i : i + 1] for i in range(len(data))]
    places = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 9)))})
    return [data[begin:end] for begin, end in itertools.pairwise(places)]


# -- connections ------------------------------------------------------------------------------------------------

#: Things whose references `held_bytes` follows, and things that it counts; everything else belongs to all connections.
HOLDERS: Final = frozenset({HttpConnection, Reader, WebSocketConnection, Exchange, Session, tuple, list, deque, dict})
HELD: Final = frozenset({bytes, bytearray, memoryview, str, int, float}) | HOLDERS

#: Looking is dear: it is done after one of so many pieces, and after the last one.
LOOK_EVERY: Final = 16


def held_bytes(connection: object) -> int:
    """About how many bytes of memory wait in what only this connection refers to; independent of attributes' names."""
    seen: set[int] = set()
    total, waiting = 0, [connection]
    while waiting:
        found = waiting.pop()
        kind = type(found)
        if kind not in HELD or id(found) in seen:
            continue
        seen.add(id(found))
        total += found.__sizeof__()
        if kind in HOLDERS:
            waiting += gc.get_referents(found)
    return total


class FuzzTransport(MemoryTransport):
    """A client that reads everything, or nothing; then the transport's buffer fills up."""

    def __init__(self, protocol: HttpConnection, *, is_read: bool) -> None:
        self._is_read = is_read
        super().__init__(protocol)

    def write(self, data: Any) -> None:
        if self.is_closed:
            return
        super().write(data)
        if not self._is_read:
            before, self.unsent_bytes = self.unsent_bytes, self.unsent_bytes + len(self.writes[-1])
            if before <= HIGH_WATER_BYTES < self.unsent_bytes:
                self._protocol.pause_writing()

    def receive_eof(self) -> None:
        """The client has sent its last byte, as transports pass it on."""
        if not self._protocol.eof_received():
            self.close()


class Complaints(logging.Handler):
    """What is in the log from warnings on, and what the event loop got as an exception."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception handler of the event loop."""
        error = context.get("exception")
        self.lines.append(f"{context['message']}: {error!r}")

    def check(self) -> None:
        found, self.lines = self.lines, []
        assert not found, "\n".join(found)


class Served:
    """One adapter, on an event loop of its own, for any number of connections one after the other."""

    def __init__(self, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.complaints = Complaints()
        self.loop.set_exception_handler(self.complaints.note)
        self.logger = logging.getLogger("hotport")
        self.logger.addHandler(self.complaints)
        self.rng = random.Random()
        self.most_held = 0
        self.reading = self.answering = self.receiving = 0
        self.rig = self.loop.run_until_complete(self._open(options))

    async def _open(self, options: dict[str, Any]) -> Rig:
        rig = Rig(self.application, **options)
        await rig.adapter.startup()
        return rig

    def close(self) -> None:
        self.loop.run_until_complete(self.rig.adapter.shutdown())
        self.loop.close()
        self.logger.removeHandler(self.complaints)

    async def application(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._talk(receive, send)
            return
        if self.reading:
            body = await read_body(receive)
            if body.endswith(b"<disconnected>"):
                return
        if self.answering:
            await asyncio.sleep(0)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(3):
                await send({"type": "http.response.body", "body": bytes(30_000), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        else:
            await respond(send, b"hello")

    async def _talk(self, receive: Receive, send: Send) -> None:
        await receive()
        await asyncio.sleep(0)  # what comes meanwhile is early
        await send({"type": "websocket.accept"})
        if not self.receiving:
            return  # closes with 1000
        while (event := await receive())["type"] == "websocket.receive":
            kind = "bytes" if event.get("bytes") is not None else "text"
            assert isinstance(event[kind], bytes if kind == "bytes" else str)
            if self.answering:
                await send({"type": "websocket.send", kind: event[kind]})
            elif self.receiving > 1:
                await asyncio.sleep(0)

    async def converse(self, pieces: Sequence[bytes], *, is_read: bool, ends: bool) -> tuple[object, list[bytes]]:
        """Send the pieces as the connection reads them, and leave.

        Returns:
            The state in which it was the client's turn, and the statuses of all final answers.
        """
        connection = self.rig.adapter.connection()
        transport = FuzzTransport(connection, is_read=is_read)
        for number, piece in enumerate(pieces, 1):
            if not await self._settles(lambda: transport.is_closed or transport.is_reading()):
                break  # the application waits for a client that reads: the rest stays in the kernel
            if transport.is_closed:
                break
            transport.get_protocol().data_received(piece)
            if number % LOOK_EVERY == 0 or number == len(pieces):
                self._check_budget(transport)
            await asyncio.sleep(0)
        if is_read:
            assert await self._settles(lambda: _rests(transport)), f"no rest: {_state(transport)}"
            await asyncio.sleep(0)
        state = State.CLOSING if transport.is_closed else _state(transport)
        statuses = re.findall(rb"HTTP/1\.1 ([2-5]\d\d) ", b"".join(transport.writes))
        if ends and not transport.is_closed:
            transport.receive_eof()
            await asyncio.sleep(0)
        transport.close()
        assert await self._settles(lambda: len(asyncio.all_tasks()) == 1), "a task is left"
        assert await self._settles(lambda: not self.rig.connections.open), "a connection is left"
        self.complaints.check()
        return state, statuses

    def _check_budget(self, transport: FuzzTransport) -> None:
        held = held_bytes(transport.get_protocol()) + transport.unsent_bytes
        self.most_held = max(self.most_held, held)
        assert held <= BUDGET_BYTES, f"{held} bytes wait for one connection"

    async def _settles(self, claim: Callable[[], bool]) -> bool:
        for _ in range(TURNS_MAX):
            if claim():
                return True
            await asyncio.sleep(0)
        return False


def _state(transport: FuzzTransport) -> object:
    protocol: Any = transport.get_protocol()
    return protocol.state


def _rests(transport: FuzzTransport) -> bool:
    state = _state(transport)
    return transport.is_closed or not (state is State.IN_FLIGHT or state is State.STREAMING)


@contextmanager
def _served(one: Callable[[Served, bytes], None], **options: Any) -> Iterator[OneInput]:
    served = Served(**options)

    def one_input(data: bytes) -> None:
        one(served, data)

    try:
        yield one_input
    finally:
        served.close()


def _http(served: Served, data: bytes) -> None:
    """Two bytes say how the application and the client behave and how it is cut; the rest is what the client sends."""
    if len(data) < 3:
        return
    how, stream = data[0], data[2:]
    served.reading, served.answering, served.receiving = how & 1, how & 2, 1
    is_read, ends = not how & 4, bool(how & 8)

    def converse(pieces: Sequence[bytes]) -> tuple[object, list[bytes]]:
        return served.loop.run_until_complete(served.converse(pieces, is_read=is_read, ends=ends))

    cut = converse(pieces_of(stream, random.Random(data[1])))
    if is_read and served.reading and b"pgrade" not in stream:  # an answer before its body has come depends on when
        whole = converse([stream])
        assert _judged(cut) == _judged(whole), f"{cut} in pieces, {whole} as a whole"


def _judged(ending: tuple[object, list[bytes]]) -> tuple[object, list[bytes]]:
    """What does not depend on the pieces: of a head that is too large and malformed, either may be seen first."""
    state, statuses = ending
    return state, [b"4xx" if status.startswith(b"4") else status for status in statuses]


UPGRADE: Final = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
DEFLATE: Final = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"


def _websocket(served: Served, data: bytes) -> None:
    """Likewise, behind a handshake."""
    if len(data) < 3:
        return
    how, stream = data[0], data[2:]
    served.receiving, served.answering = how & 3, how & 4
    handshake = UPGRADE + (DEFLATE if how & 8 else b"") + b"\r\n"
    pieces = pieces_of(stream, random.Random(data[1]))
    pieces = [handshake + pieces[0], *pieces[1:]] if how & 16 else [handshake, *pieces]
    served.loop.run_until_complete(served.converse(pieces, is_read=not how & 32, ends=bool(how & 64)))


def _http_seeds() -> list[bytes]:
    get = b"GET /a?b=%20c HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n"
    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello"
    chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nT: u\r\n\r\n"
    streams = [
        get,
        post,
        chunked,
        get * 3,
        b"GET / HTTP/1.0\r\n\r\n",
        b"HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        b"GET http://a:80/ HTTP/1.1\r\nHost: b\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\nContent-Length: 3\r\n\r\nabc" + get,
        UPGRADE + DEFLATE + b"\r\n" + _frame(0x81, b"hello"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 200 + b"\r\n",
        chunked.replace(b"5;a=b\r\nhello", b"1\r\nx\r\n" * 50 + b"1\r\nx"),
        post + chunked + get,
    ]
    return [bytes([how, number]) + stream for number, stream in enumerate(streams) for how in (0, 1, 3, 11)]


def _frame(first: int, data: bytes, mask: bytes = bytes(4)) -> bytes:
    """A client's frame; the mask of zeros leaves the payload as it is."""
    size = len(data)
    if size < 126:
        length = bytes([0x80 | size])
    elif size < 65536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    return bytes([first]) + length + mask + data


def _deflated(data: bytes) -> bytes:
    """One message's payload (RFC 7692 section 7.2.1)."""
    deflater = zlib.compressobj(wbits=-12)
    return (deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


def _websocket_seeds() -> list[bytes]:
    text, binary, close = _frame(0x81, "h\u00e4llo".encode()), _frame(0x82, bytes(300)), _frame(0x88, b"\x03\xe8bye")
    streams = [
        text + binary + close,
        _frame(0x01, b"a") + _frame(0x89, b"ping") + _frame(0x00, b"") * 3 + _frame(0x80, b"b"),
        _frame(0x8A, b"pong") * 4 + _frame(0x89, bytes(125)) * 4,
        _frame(0x88, b""),
        close * 2,
        _frame(0x88, b"\x03"),
        _frame(0x81, b"\xff\xfe"),
        _frame(0x83, b"reserved"),
        _frame(0x80, b"no beginning"),
        _frame(0x82, bytes(70_000))[:200],
        b"\x82\xff" + b"\xff" * 8 + bytes(4),
        b"\x81\x05hello",  # not masked
        _frame(0xC1, _deflated(b"hello" * 100)) * 2,
        _frame(0xC2, _deflated(bytes(60_000))) * 8,
        _frame(0xC2, _deflated(bytes(1_000_000))),
        _frame(0x41, _deflated(b"hello")) + _frame(0x80, b""),
        _frame(0xC1, b"\x00\x00\xff\xff"),
    ]
    return [bytes([how, number]) + stream for number, stream in enumerate(streams) for how in (0, 1, 13, 14, 29, 45)]


# -- the PROXY protocol -------------------------------------------------------------------------------------------


def _proxy(data: bytes) -> None:
    """A header is found as soon as it is whole, is the same whatever follows, and an error stays one."""
    found = _parsed(data)
    if found is None:
        assert len(data) < proxyprotocol.HEADER_BYTES_MAX
    if isinstance(found, proxyprotocol.ProxyHeader):
        assert found.size <= min(len(data), proxyprotocol.HEADER_BYTES_MAX)
        assert _parsed(data[: found.size]) == found
        assert _parsed(data[: found.size - 1]) is None
    has_failed = False
    for end in range(min(len(data), 300)):
        before = _parsed(data[:end])
        has_failed = has_failed or isinstance(before, str)
        assert before is None or type(before) is type(found), f"{before} at {end}, then {found}"
    assert isinstance(found, str) or not has_failed


def _parsed(data: bytes) -> proxyprotocol.ProxyHeader | str | None:
    try:
        return proxyprotocol.parse_proxy_header(data)
    except proxyprotocol.ProxyHeaderError as error:
        return str(error)


def _proxy_seeds() -> list[bytes]:
    signature = b"\r\n\r\n\0\r\nQUIT\n"
    v4, v6 = bytes([192, 0, 2, 1, 192, 0, 2, 2, 1, 2, 0, 80]), bytes(32) + b"\x01\x02\x00\x50"
    return [
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1025 80\r\nGET / HTTP/1.1\r\n",
        b"PROXY TCP6 2001:db8::1 ::ffff:192.0.2.2 65535 0\r\n",
        b"PROXY UNKNOWN whatever\r\n",
        b"PROXY TCP4 " + b"1" * 100,
        signature + b"\x21\x11\x00\x0c" + v4,
        signature + b"\x21\x21\x00\x24" + v6,
        signature + b"\x21\x11\x00\x14" + v4 + b"\x01\x00\x05hello",
        signature + b"\x21\x31\x00\xd8" + bytes(216),
        signature + b"\x20\x00\x00\x00",
        signature + b"\x21\x00\x00\x03\x04\x00\x00",
        signature + b"\x21\x11\xff\xff",
    ]


# -- what processes say to each other -----------------------------------------------------------------------------


def _envelope(data: bytes) -> None:
    """Anything is a frame or a control error; what was understood once is understood again, and is the same."""
    head, payload = data[: envelope.HEADER_BYTES], data[envelope.HEADER_BYTES :]
    if len(head) < envelope.HEADER_BYTES:
        return
    with suppress(ControlError):
        frame, size = envelope.parse_header(head)
        assert 0 <= size <= envelope.FRAME_BYTES_MAX
        assert envelope.encode_frame(frame)[0] == head[0]
    with suppress(ControlError):
        found = [each for each in envelope.decode_batch(payload) if each is not None]
        for each in found:
            assert len(each.endpoints) == 2
        with suppress(TypeError):  # some of what is read cannot be written: maps whose keys are lists
            packed = envelope.encode_frame(envelope.Frame.BATCH, [envelope.pack(each) for each in found])
            again = [each for each in envelope.decode_batch(packed[envelope.HEADER_BYTES :]) if each is not None]
            assert envelope.encode_frame(envelope.Frame.BATCH, list(map(envelope.pack, again))) == packed
    with suppress(ControlError):
        ack = envelope.decode_ack(payload)
        assert envelope.decode_ack(envelope.encode_frame(envelope.Frame.ACK, ack)[envelope.HEADER_BYTES :]) == ack
    with suppress(ControlError):
        assert envelope.decode_count(payload) >= 0


def _envelope_seeds() -> list[bytes]:
    peer, own = ("192.0.2.1", 5), ("192.0.2.2", 80)
    exported = {"a": [1, None, 2.5, b"\xff", "\u00e4"], "b": {}}
    web = envelope.WebSocketState(
        b"/a?b", [(b"host", b"x")], "chat", "permessage-deflate", ["a", b"b"], "PING", 2.5, True, exported
    )
    states: list[envelope.State] = [
        envelope.HttpState(True, 2.5),
        web,
        envelope.StreamState(exported),
        envelope.ProtocolState(b"state"),
    ]
    envelopes = [envelope.Envelope(peer, own, False, b"GET", state) for state in states]
    packed = [envelope.pack(each) for each in envelopes]
    deep = b"\x91" * 5000 + b"\x90"
    return [
        *(envelope.encode_frame(envelope.Frame.BATCH, [each]) for each in packed),
        envelope.encode_frame(envelope.Frame.BATCH, packed),
        envelope.encode_frame(envelope.Frame.ACK, envelope.Ack([0, 2], 7)),
        envelope.encode_frame(envelope.Frame.GO),
        envelope.encode_frame(envelope.Frame.REST, 12),
        b"\x01" + len(deep).to_bytes(4, "big") + deep,
    ]


#: Every closed set of messages that is read.
KINDS: Final[tuple[Any, ...]] = (messages.Order, messages.Word, messages.Request, messages.Reply, messages.TakenOver)


def _frames(data: bytes) -> None:
    """However a stream is cut, the same payloads come out; each is a message or a control error."""
    if len(data) < 2:
        return
    stream = data[1:]
    whole, cut = _payloads([stream]), _payloads(pieces_of(stream, random.Random(data[0])))
    assert whole == cut
    assert whole[1] in ("", "HP610")
    for payload in whole[0]:
        for kind in KINDS:
            with suppress(ControlError):
                said = messages.decode(payload, kind)
                assert repr(messages.decode(messages.encode(said), kind)) == repr(said)


def _payloads(pieces: Sequence[bytes]) -> tuple[list[bytes], str]:
    """What came out, and how it ended."""
    decoder, found = frames.FrameDecoder(), list[bytes]()
    try:
        for piece in pieces:
            try:
                found += decoder.feed(piece)
            except frames.FrameError:
                with suppress(frames.FrameError):
                    found += decoder.feed(b"")
                    return found, "it reads on"
                raise
    except frames.FrameError as error:
        return [], error.code
    return found, ""


def _frames_seeds() -> list[bytes]:
    own = [
        messages.encode(value)
        for value in (
            messages.Hello(pid=1, service="web", generation=2, worker=3),
            messages.Accepting(at_s=1.5, fates={"finished": 3}),
            messages.RestartRequest(phased=True, strategy="inherit"),
            messages.StopRequest(now=True),
            messages.Done(detail="done"),
            messages.Failure(code="HP602", what="a", cause="b", fix="c", exit_code=1),
            messages.TakenOver(workers=("worker-1.1.sock",), addresses=("tcp://127.0.0.1:80",)),
        )
    ]
    tags = [
        msgspec.json.encode({"type": kind.__struct_config__.tag})
        for union in (messages.Order, messages.Word, messages.Request, messages.Reply)
        for kind in _members(union)
    ]
    streams = [frames.encode_frame(payload) for payload in [*own, *tags, b"[" * 3000, b"", b"{}", b"\xff"]]
    return [b"\x01" + stream for stream in [*streams, b"".join(streams[:7]), b"\xff\xff\xff\xff", streams[0][:-1]]]


def _members(union: types.UnionType) -> tuple[Any, ...]:
    return union.__args__


@contextmanager
def _pure(one: OneInput) -> Iterator[OneInput]:
    yield one


TARGETS: Final[dict[str, Target]] = {
    "http": Target(_http_seeds, lambda: _served(_http, head_max_bytes=2048, body_max_bytes=100_000)),
    "websocket": Target(_websocket_seeds, lambda: _served(_websocket, ws_message_max_bytes=65536, ws_queue=4)),
    "proxy": Target(_proxy_seeds, lambda: _pure(_proxy)),
    "envelope": Target(_envelope_seeds, lambda: _pure(_envelope)),
    "frames": Target(_frames_seeds, lambda: _pure(_frames)),
}
