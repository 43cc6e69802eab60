"""WebSocket connections, from the handshake request that an `HttpConnection` has read.

The websockets library parses and renders frames. A connection is always in exactly one state; `WEBSOCKET_STATES` says
what drain does in each. Drain closes with 1012 at random moments, and leaves the last tenth of its window to closing
handshakes. A connection closed like this counts as ``told_to_close``, but as ``cut_websocket`` if the client had not
taken our close frame at the end of the wait.

The application gets ``websocket.disconnect`` when the closing handshake is over, or has failed. Its code is that of
the first close frame of either side: 1005 for an empty one, and 1006 if there was none.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from enum import Enum
from time import monotonic, perf_counter
from typing import Any, Final, Protocol

from websockets.exceptions import ProtocolError
from websockets.frames import Opcode
from websockets.protocol import State as ProtocolState

from hotport.adapters.asgi import requestid
from hotport.adapters.asgi.deadlines import Pace
from hotport.adapters.asgi.exchange import CUT, Exchange, Requesting
from hotport.adapters.asgi.frames import Assembly, Cutter, Violation
from hotport.adapters.asgi.handshake import Resumption, render_answer
from hotport.adapters.asgi.session import Session
from hotport.adapters.asgi.shared import name_client
from hotport.adapters.asgi.spec import Message
from hotport.adapters.asgi.states import ANSWERED, STREAMING, WEBSOCKET_STATES, Manner
from hotport.adapters.asgi.states import WebSocketState as State
from hotport.adapters.base import Connection, Offer, Ready
from hotport.adapters.handoff import (
    Handoff,
    abort_for_client,
    bound,
    end_for_client,
    end_handoff,
    make_offer,
    prepare,
    reset_for_client,
    stands_still,
    taken_bytes,
)
from hotport.adapters.turns import LONG_READ_BYTES, TURN_S
from hotport.model.fates import Fate
from hotport.wire.envelope import WebSocketState, encode_state

__all__ = ["SPREAD", "WebSocketConnection"]

log = logging.getLogger("hotport.error")

#: The part of the drain window over which drain closes WebSockets; the rest is for closing handshakes.
SPREAD: Final = 0.9

#: Reading pauses while more bytes than this have come before the handshake's answer: a client should send none.
EARLY_BYTES_MAX: Final = 64 * 1024

#: An uncompressed frame up to this size is read at once.
SHORT_BYTES_MAX: Final = 16 * 1024

#: The close reason for 1012.
RESTART: Final = "service restart"

#: Why a session has ended although its client is connected, for the log.
STUCK: Final = "the client takes too little of what is sent to it"

#: The close code and reason of a resumed WebSocket that is refused, by the status that a new one would get.
REFUSALS: Final = {403: (1008, "not resumed"), 503: (1012, RESTART)}

CONNECTING: Final = ProtocolState.CONNECTING
OPEN: Final = ProtocolState.OPEN
PING: Final = Opcode.PING
TEXT: Final = Opcode.TEXT
BINARY: Final = Opcode.BINARY


class _Wait(Enum):
    """What `WebSocketConnection.due` is the deadline of."""

    NOTHING = "nothing"
    PING = "the time to ask whether the client is there"
    PONG = "the time in which it should answer"
    CLOSE = "the rest of its life"


class Before(Connection, Requesting, Protocol):
    """The connection on which the handshake was read."""

    is_proxied: bool

    @property
    def adopted(self) -> object:
        """A `Resumption` if another process has answered the handshake."""


class WebSocketConnection(asyncio.Protocol):
    """A WebSocket on a connection whose handshake request an `HttpConnection` has read.

    It replaces the `HttpConnection` as the transport's protocol and in the registry before `__init__` returns.

    Args:
        request: The handshake, as an exchange that was not begun.
        early: Bytes that have come behind the request's head.
    """

    kind = "websocket"
    moved_fate = Fate.MOVED_WEBSOCKET

    __slots__ = (
        "_answer",
        "_assembly",
        "_buffer_bytes",
        "_close_if_kept",
        "_cutter",
        "_drain_timer",
        "_early",
        "_export",
        "_fate",
        "_gone_due",
        "_has_agreed",
        "_has_heard",
        "_has_said_goodbye",
        "_is_behind",
        "_is_bounded",
        "_is_closed",
        "_is_draining",
        "_is_in_detail",
        "_is_movable",
        "_is_proxied",
        "_is_resuming",
        "_is_scheduled",
        "_pong",
        "_protocol",
        "_queue_low",
        "_queue_max",
        "_reading_pace",
        "_session",
        "_untaken",
        "_waits_for",
        "due",
        "endpoints",
        "handoff",
        "has_eof",
        "is_reading_paused",
        "shared",
        "sock",
        "transport",
        "writable",
    )

    def __init__(self, before: Before, request: Exchange, early: bytes) -> None:
        self.shared = before.shared
        self.transport = before.transport
        #: None unless the transport's write buffer is too full; set when there is room again.
        self.writable = before.writable
        self.has_eof = before.has_eof

        options = self.shared.options
        self._queue_max = options.ws_queue
        self._queue_low = options.ws_queue // 4
        self._buffer_bytes = options.connection_buffer_bytes
        self._early = early  # kept until the handshake is answered
        #: Unread frames.
        self._cutter = Cutter(options.ws_message_max_bytes)
        #: The incomplete message.
        self._assembly: Assembly | None = None
        #: The answer to the newest ping while writing is paused; older pings need no answer (RFC 6455 section 5.5.3).
        self._pong = b""

        #: Whether even a short frame must wait: the handshake is not answered, reading is paused, or a part of a frame
        #: has come.
        self._is_in_detail = True
        self._is_behind = False  # the cutter has more to read, when there is room or in the next turn
        self._is_scheduled = False  # for the next turn
        #: The untaken input when the client was last seen to be gone, and the tick at which to give up if unchanged.
        self._untaken: object = None
        self._gone_due = 0
        self._reading_pace: Pace | None = None  # made when writing is first paused
        self.is_reading_paused = False
        self._is_draining = False
        self._has_heard = False  # received anything since the last ping
        self._has_said_goodbye = False  # nothing more will be written
        self._is_bounded = False  # the closing is bounded
        self._is_closed = False
        self._drain_timer: asyncio.TimerHandle | None = None
        self._waits_for = _Wait.NOTHING
        self.due = 0
        self._fate = Fate.FINISHED

        self.sock = before.sock
        self.endpoints, self._is_proxied = before.endpoints, before.is_proxied
        self._is_movable = self.shared.handshakes.all_movable
        self._has_agreed = False  # the application has called `movable()`
        #: Exports the application's state.
        self._export: Callable[[], Any] | None = None
        self.handoff: Handoff | None = None
        self._close_if_kept: tuple[int, str] | None = None
        resumption = before.adopted if isinstance(before.adopted, Resumption) else None
        #: Another process has answered the client; the application has not accepted yet.
        self._is_resuming = resumption is not None

        request.connection = self
        self._session = Session(self, request, resumption.state.application if resumption is not None else None)
        self.transport.set_protocol(self)
        self.shared.deadlines.add(self)
        if self.writable is not None:
            self._see_client_read()
        if resumption is None:
            self._shake_hands()
        else:
            self._resume(resumption)
        self.shared.registry.replace(before, self)

    def __str__(self) -> str:
        return str(self._session)

    # -- called by the worker, and the state that moves to another process ---------------------------------

    @property
    def state(self) -> State:
        """The connection's state, derived from its other attributes."""
        if self._is_closed:
            return State.CLOSED
        if self._is_established:
            return State.OPEN
        if self._has_said_goodbye or self._protocol.state is not CONNECTING:
            return State.CLOSING
        return State.DENYING if self._session.denial.stage == STREAMING else State.CONNECTING

    @property
    def _is_established(self) -> bool:
        """Whether the client has its 101, and may take messages."""
        return self._protocol.state is OPEN and not self._has_said_goodbye

    @property
    def is_open(self) -> bool:
        """Whether messages may be sent."""
        return self._protocol.state is OPEN and not self._has_said_goodbye and not self._is_resuming

    @property
    def is_connecting(self) -> bool:
        """Whether the handshake is unanswered, or a denial is incomplete."""
        return (self._protocol.state is CONNECTING or self._is_resuming) and not self._has_said_goodbye

    @property
    def undelivered(self) -> tuple[Message, ...]:
        """Complete messages that the application has not received, oldest first."""
        return tuple(self._session.undelivered)

    @property
    def is_mid_message(self) -> bool:
        """Whether a fragmented message has begun and not ended."""
        return self._assembly is not None

    @property
    def is_resumed(self) -> bool:
        """Whether another process has already answered the handshake that the application is to answer."""
        return self._is_resuming

    @property
    def is_between_frames(self) -> bool:
        """Whether all received bytes are read, so that a new parser could continue with the next ones.

        The library's parser never holds a part of a frame: it is fed whole ones.
        """
        return self.is_open and self._cutter.is_between_frames

    @property
    def held_bytes(self) -> int:
        arriving = 0 if self._assembly is None else self._assembly.size
        unread = len(self._early) + len(self._cutter.rest)
        return self._session.waiting_bytes + arriving + unread + self.transport.get_write_buffer_size()

    def drain(self) -> None:
        """Close with 1012 at a random moment, so that not all clients reconnect at once."""
        if not end_handoff(self):
            return
        self._is_draining = True
        if self._is_established and self._drain_timer is None:
            delay_s = random.random() * SPREAD * self.shared.registry.draining.remaining_s()
            self._drain_timer = self.shared.loop.call_later(delay_s, self._tell_to_close)

    def stay(self) -> None:
        if end_handoff(self):
            self._is_draining = False

    def cut(self) -> Fate:
        """Close now as `WEBSOCKET_STATES` says, and cancel the application; waits for nothing."""
        row = WEBSOCKET_STATES[self.state]
        if row.manner is Manner.NOTHING:
            return self._fate
        if stands_still(self.handoff):
            self._has_said_goodbye = True
            self._session.end(1012, RESTART)
            self.transport.abort()
            return Fate.CUT_OFFERED
        fate = row.fate or self._fate
        if self._session.disconnect is None:
            self._session.why_gone = CUT
        if self._session.task is not None:
            self._session.task.cancel()
        self._stop_timers()
        self._is_bounded = True
        self._wait(_Wait.CLOSE, self.shared.linger_ticks)
        match row.manner:
            case Manner.GOODBYE:
                self._protocol.fail(1012, RESTART)
                self._flush()
                return fate
            case Manner.REFUSE:
                self.refuse(503, "")
                return fate
            case Manner.TRUNCATE:
                self._session.end(1006, "")
                self.truncate()
                return fate
        if self.transport.get_write_buffer_size():  # everything is written, but the client has not got all of it
            fate = Fate.CUT_STREAMING if self._protocol.close_sent is None else Fate.CUT_WEBSOCKET
        self._end()
        self._has_said_goodbye = True
        self.transport.close()
        return fate

    # -- handing it off ------------------------------------------------------------------------------------

    @property
    def is_at_safe_point(self) -> bool:
        """Whether the connection is between two frames and two messages, and the application waits in ``receive()``.

        The next process's application also gets to a ``receive()``. Undelivered messages move with the connection.
        """
        return self.is_open and not self.is_mid_message and self._session.is_receiving and self.is_between_frames

    def make_movable(self, export: Callable[[], Any] | None = None) -> None:
        """Allow the WebSocket to move to another process, from the application's next ``receive()`` on.

        Args:
            export: Called at a safe point; returns the ``state`` for the other process's application, or None to be
                called again after another message.

        Raises:
            RuntimeError: It is too late: compression with context takeover was negotiated.
        """
        self._export = export
        if self._is_movable:
            self._has_agreed = True
            return
        if self._protocol.state is CONNECTING and not self._has_said_goodbye:
            self._negotiate(is_movable=True)
        elif self._protocol.extensions:
            raise RuntimeError("a WebSocket is made movable before 'websocket.accept', or it is not compressed")
        self._is_movable = self._has_agreed = True

    @property
    def will_move(self) -> bool:
        return self.handoff is not None

    def prepare_handoff(self, ready: Ready) -> bool:
        """Prepare a WebSocket whose application has agreed, unless its TLS cannot move."""
        if self._is_established and (not self._is_movable or bound(self.transport)):
            return False
        self._is_draining = False
        self._stop_drain_timer()
        prepare(self, self.shared.registry, ready)
        return True

    def come_to_rest(self) -> None:
        """Report the connection if it is at a safe point."""
        if self.handoff is not None:
            self.handoff.come_to_rest(self)

    def offer(self) -> Offer | None:
        return None if self.handoff is None or not self.is_open else self.handoff.offer(self, self.transport)

    def hold(self) -> None:
        """Stop reading: what the client sends waits in the kernel."""
        self._pause_reading()

    def pack(self) -> Offer | None:
        """Pack the handshake, undelivered messages, and the application's exported state."""
        exported = None
        if self._export is not None:
            exported = self._export()
            encode_state(exported)
            if exported is None:
                return None
        self.writable = asyncio.Event()  # `send` waits
        scope = self._session.denial.scope
        query = scope["query_string"]
        state = WebSocketState(
            target=scope["raw_path"][len(self.shared.raw_root_path) :] + (b"?" + query if query else b""),
            headers=scope["headers"],
            subprotocol=self._answer.headers.get("Sec-WebSocket-Protocol", ""),
            extensions=self._answer.headers.get("Sec-WebSocket-Extensions", ""),
            undelivered=[m["text"] if "text" in m else m["bytes"] for m in self._session.hold()],
            waits_for=self._waits_for.name,
            wait_s=self.shared.deadlines.left_s(self),
            has_heard=self._has_heard,
            application=exported,
        )
        self.due = 0
        return make_offer(self.transport, self.endpoints, self._is_proxied, state)

    def keep(self) -> None:
        if self.handoff is not None:
            self.handoff.keep(self, self.transport)

    def resume(self, was_offered: bool) -> None:
        """Let the application receive and send again, and resume pings."""
        if self._is_closed:
            return
        if was_offered:
            self._wait(_Wait.PING, self.shared.ws_ping_ticks)
            self._session.let_go()
        self.transport.set_write_buffer_limits()
        if was_offered:  # else the transport calls it when there is room
            self.resume_writing()
        self.resume_reading_if_room()
        if self._close_if_kept is not None:  # the application has ended meanwhile
            self.close(*self._close_if_kept)

    def release(self) -> None:
        """Close the descriptor, and tell the application 1012; the client sees nothing."""
        self._is_closed = self._has_said_goodbye = True
        self._session.end(1012, RESTART)
        self.resume_writing()
        self._stop_timers()
        self._forget()
        self.transport.abort()  # closes our descriptor only: another process owns the connection

    def why_here(self) -> str:
        if not self._is_established:
            return self.state.value
        if why := bound(self.transport):
            return f"open, {why}"
        if not self._is_movable:
            return "open, its application has not agreed to move"
        if self.is_at_safe_point:
            return "open, slow to read"
        return "open, its application is busy" if self.is_between_frames else "open, half a message"

    # -- called by the transport ---------------------------------------------------------------------------

    def connection_lost(self, exc: Exception | None) -> None:
        end_for_client(self, self.handoff)
        if exc is not None and self._protocol.close_rcvd is None:
            self._fate = Fate.FINISHED  # the client has left on its own
        self._is_closed = self._has_said_goodbye = True
        self._end()
        self._stop_timers()
        self._forget()
        self.shared.deadlines.discard(self)
        self.shared.registry.closed(self, self._fate)

    def _forget(self) -> None:
        """Free memory early: the connection and its application form a cycle, which delays their collection."""
        self._drop_unread()
        self._early = self._pong = b""
        self._protocol.extensions = []  # zlib's windows
        self.shared.deadlines.paused.discard(self)
        if self._reading_pace is not None:
            self._reading_pace.discard()
            self._reading_pace = None

    def _drop_unread(self) -> None:
        self._cutter.clear()
        self._assembly = None
        self._is_behind = False

    def pause_writing(self) -> None:
        self.writable = asyncio.Event()
        self._see_client_read()

    def resume_writing(self) -> None:
        if self.writable is not None:
            self.writable.set()
            self.writable = None
            if self._reading_pace is not None:
                self._reading_pace.stop()
        if self._pong:
            pong, self._pong = self._pong, b""
            if self._is_established and not self.transport.is_closing():
                self.transport.write(pong)
        if self.handoff is not None:
            self.handoff.come_to_rest(self)

    def eof_received(self) -> bool:
        """End the WebSocket at the client's end: it cannot stay half-open."""
        self.has_eof = True
        self._end()
        self._bound()
        self._has_said_goodbye = True
        return False

    def data_received(self, data: bytes) -> None:
        self._has_heard = True
        # Nearly every read is exactly one short frame (RFC 6455 section 5.2) that can be read at once.
        # 125 compressed bytes inflate to at most 129,000.
        size = len(data)
        if size < 132:
            is_one_frame = size > 1 and data[1] - 0x80 + 6 == size
        else:
            is_one_frame = (
                data[1] == 0xFE
                and size <= SHORT_BYTES_MAX
                and (data[2] << 8 | data[3]) + 8 == size
                and not data[0] & 0x40
            )
        if not is_one_frame or self._is_in_detail:
            self._receive(data)
            return
        protocol = self._protocol
        protocol.receive_data(data)
        if events := protocol.events:
            self._on_frame(events.pop())
        if protocol.writes:
            self._flush()
        if self.handoff is not None:
            self.handoff.come_to_rest(self)

    def _receive(self, data: bytes) -> None:
        """Receive data that is not exactly one short frame, or must wait."""
        if self._has_said_goodbye:
            return
        if self._protocol.state is CONNECTING:
            self._early += data
            if len(self._early) > EARLY_BYTES_MAX:
                self._pause_reading()
            return
        self._cutter.add(data)
        if not self._is_behind:
            self._read()
            if len(data) >= LONG_READ_BYTES and not self.is_reading_paused and not self._has_said_goodbye:
                self._go_on_in_next_turn()

    def _read(self) -> None:
        """Read frames while there is room for their messages, for `TURN_S` at most."""
        protocol, cutter = self._protocol, self._cutter
        ends = monotonic() + TURN_S
        self._is_behind = True
        while not self._is_full:
            try:
                data = cutter.next(0 if self._assembly is None else self._assembly.size)
            except Violation as error:
                protocol.fail(error.code, error.reason)
                data = None
            if data is None:
                self._is_behind = False
                break
            protocol.receive_data(data)
            if protocol.events:
                frame: Any = protocol.events.pop()
                if cutter.is_compressed and frame.opcode < Opcode.CLOSE:
                    cutter.inflated(len(data), len(frame.data))
                self._on_frame(frame)
            if protocol.eof_sent:  # the closing handshake is over, or has failed
                break
            if monotonic() >= ends:
                self._go_on_in_next_turn()
                break
        else:
            self._pause_reading()
        if protocol.eof_sent:
            self._drop_unread()
        else:
            cutter.settle()
        if protocol.writes:
            self._flush()
        self._is_in_detail = self.is_reading_paused or not cutter.is_between_frames
        self.resume_reading_if_room()
        if self.handoff is not None:
            self.handoff.come_to_rest(self)

    @property
    def _is_full(self) -> bool:
        """Whether the limits on undelivered messages are reached."""
        session = self._session
        return (
            len(session.undelivered) >= self._queue_max
            or session.waiting_bytes + self._unasked_bytes > self._buffer_bytes
        )

    @property
    def _unasked_bytes(self) -> int:
        """Size of a message that arrives in parts while the application, which is busy, has not asked for it.

        16 KiB may inflate to 16 MiB: what the application works on is enough.
        """
        session = self._session
        if self._assembly is None or session.is_receiving or session.has_finished or not self._is_established:
            return 0
        return self._assembly.size

    def _go_on_in_next_turn(self) -> None:
        """Pause reading, and continue after the other connections' turns."""
        self._is_behind = True
        self._pause_reading()
        if not self._is_scheduled:
            self._is_scheduled = True
            self.shared.turns.wait(self._go_on)

    def _go_on(self) -> None:
        self._is_scheduled = False
        if self._is_behind and not self._has_said_goodbye and not stands_still(self.handoff):
            self._read()

    def _on_frame(self, frame: Any) -> None:
        opcode = frame.opcode
        if opcode is TEXT or opcode is BINARY:
            is_text = opcode is TEXT
            if not frame.fin:
                self._assembly = Assembly(is_text=is_text)
                self._assemble(frame.data, is_last=False)
                return
            data = bytes(frame.data)
            if len(data) > self.shared.options.ws_message_max_bytes:
                self._refuse_large()
                return
            if not is_text:
                self._deliver("bytes", data)
                return
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                self._refuse_text(error)
                return
            self._deliver("text", text)
        elif opcode is Opcode.CONT:
            self._assemble(frame.data, is_last=frame.fin)
        elif opcode is PING:
            if self.writable is not None:  # replace an older answer; the library appends the pong to its writes
                self._pong = self._protocol.writes.pop()
        elif opcode is Opcode.PONG:
            self._on_pong()

    def _assemble(self, data: bytes, *, is_last: bool) -> None:
        """Add a part to the incomplete message."""
        assembly = self._assembly
        assert assembly is not None  # the library refuses a continuation without a message
        try:
            assembly.add(data, is_last=is_last)
        except UnicodeDecodeError as error:
            self._refuse_text(error)
            return
        if assembly.size > self.shared.options.ws_message_max_bytes:
            self._refuse_large()
        elif is_last:
            self._assembly = None
            content = assembly.content()
            self._deliver("text" if isinstance(content, str) else "bytes", content)

    def _deliver(self, kind: str, content: str | bytes) -> None:
        """Deliver a complete message."""
        session = self._session
        if session.disconnect is None:
            session.deliver(kind, content)
            if len(session.undelivered) >= self._queue_max or session.waiting_bytes > self._buffer_bytes:
                self._pause_reading()

    def _refuse_text(self, error: UnicodeDecodeError) -> None:
        self._protocol.fail(1007, f"{error.reason} at position {error.start}")

    def _refuse_large(self) -> None:
        self._protocol.fail(1009, f"a message of more than {self.shared.options.ws_message_max_bytes} bytes")

    # -- clients that leave unnoticed, or do not read ------------------------------------------------------

    def hung_up(self, *, is_gone: bool) -> None:
        """Abort once the client has left and the application takes no more of what it had sent."""
        if self._is_closed or stands_still(self.handoff):
            return
        cutter, now = self._cutter, self.shared.deadlines.now
        untaken = (len(self._session.undelivered), len(cutter.rest), cutter.place, cutter.left)
        if untaken != self._untaken:
            self._untaken = untaken
            self._gone_due = now + self.shared.linger_ticks
        elif now >= self._gone_due:
            self._give_up()
            self.abort()

    def _see_client_read(self) -> None:
        """Enforce `send_timeout` on unsent data."""
        timeout_s = self.shared.options.send_timeout_s
        if self._reading_pace is None and timeout_s and not self._is_closed:
            self._reading_pace = self.shared.pace(timeout_s, self._taken_bytes, self._on_slow_reader)
        if self._reading_pace is not None:
            self._reading_pace.start()

    def _taken_bytes(self) -> int | None:
        return None if self.writable is None or stands_still(self.handoff) else taken_bytes(self.transport, self.sock)

    def _on_slow_reader(self) -> None:
        """Reset a client that takes too little of what is sent to it."""
        client = name_client(self._session.scope["client"])
        log.info("closed because %s: %s; it came from %s", STUCK, self._session, client)
        self._fate = Fate.CUT_SLOW_READER
        self._session.why_gone = STUCK
        self._give_up()
        reset_for_client(self, self.transport)  # else the kernel would retry unsent bytes for minutes

    def _give_up(self) -> None:
        self._end()
        self._has_said_goodbye = True

    # -- the handshake -------------------------------------------------------------------------------------

    def _shake_hands(self) -> None:
        """Negotiate the handshake, and run the application if the request is valid."""
        if self.shared.takes_times:
            self._session.denial.began = perf_counter()
        if not self._negotiate(is_movable=self._is_movable):
            return
        shared = self.shared
        if shared.concurrency_max and len(shared.running) >= shared.concurrency_max:
            self.refuse(503, "too many requests are under way")
            return
        self._run()

    def _negotiate(self, *, is_movable: bool) -> bool:
        """Negotiate the handshake; False if it was refused."""
        negotiation = self.shared.handshakes.negotiate(self._session.denial.scope, is_movable=is_movable)
        self._protocol = negotiation.protocol
        if negotiation.answer is not None:
            self._answer = negotiation.answer
            return True
        if negotiation.why:
            self.refuse(negotiation.status, negotiation.why)
        else:
            self._log(negotiation.status)
            self._count(negotiation.status)
            self._flush()
        return False

    def _resume(self, resumption: Resumption) -> None:
        """Continue another process's WebSocket; the application gets ``websocket.connect`` as for a new one."""
        state = resumption.state
        self._protocol, self._answer = resumption.protocol, resumption.answer
        self._is_movable = True
        self._is_in_detail = False
        self._has_heard = state.has_heard
        waits_for = _Wait[state.waits_for]
        ticks = self.shared.deadlines.ticks(state.wait_s) if state.wait_s else 0
        self._session.denial.request = None  # the process that answered it has logged it
        self._wait(waits_for, ticks or (self.shared.ws_ping_ticks if waits_for is _Wait.PING else 0))
        for content in state.undelivered:
            kind = "text" if isinstance(content, str) else "bytes"
            self._session.deliver(kind, content)
        self._run()

    def _run(self) -> None:
        shared, session = self.shared, self._session
        shared.registry.count_request()
        shared.running.add(session)
        context = shared.variables.copy()
        if shared.makes_ids:
            requestid.bind(context, session.scope["state"])
        session.task = shared.run(session.run(), context=context)

    def accept(self, subprotocol: str | None, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Answer the handshake, and open the WebSocket.

        Raises:
            RuntimeError: The answer would be malformed, or the client would have to refuse it.
        """
        if self._is_resuming:
            self._is_resuming = False  # the other process has answered the client
            if not self._has_agreed:
                self.shared.handshakes.warn_of_state(self._session)
            return
        offered = self._session.scope["subprotocols"]
        render_answer(self._answer, offered, subprotocol, headers, has_server=self.shared.options.server_header)
        self._protocol.send_response(self._answer)
        self._count(101)
        self._flush()
        self._log(101)
        self._wait(_Wait.PING, self.shared.ws_ping_ticks)
        if self._is_draining or self.handoff is not None:
            self.shared.registry.tell(self)
        self._is_in_detail = self.is_reading_paused
        early, self._early = self._early, b""
        if early:
            self.data_received(early)
        self.resume_reading_if_room()

    def refuse(self, status: int, why: str) -> None:
        """Answer the handshake with `status`; if another answer has begun, truncate it recognisably."""
        session = self._session
        if self._is_resuming:
            self._is_resuming = False
            self.close(*REFUSALS.get(status, (1011, "")))
            return
        if session.denial.stage < STREAMING:
            self._count(status)
        session.end(1006, "")
        if session.denial.stage == STREAMING:
            self.truncate()
        elif session.denial.stage != ANSWERED:
            self._log(status)
            self.transport.write(self.shared.refusal(status, why))
            self._say_goodbye()

    # -- called by the answer that denies a handshake, as of an `HttpConnection` ---------------------------

    def announce_close(self, exchange: Exchange) -> bool:
        """True: an answer in place of a WebSocket is the last one."""
        return True

    def answered(self, exchange: Exchange) -> None:
        """End the connection after a completely written denial."""
        self._log(exchange.status)
        self._session.has_finished = True
        self._session.end(1006, "")
        self._say_goodbye()

    def _log(self, status: int) -> None:
        """Write the handshake's answer to the access log."""
        self._session.denial.log(status)

    def _count(self, status: int) -> None:
        """Count the handshake in the metrics, unless that is done, or another process has answered it."""
        denial = self._session.denial
        if denial.began:
            denial.count(status)
            denial.began = 0.0

    def truncate(self) -> None:
        """Abort, so that the unfinished denial does not look complete: it has a length, or chunks."""
        self._has_said_goodbye = True
        self.abort()

    # -- messages ------------------------------------------------------------------------------------------

    def send_message(self, text: str | None, data: bytes | None) -> None:
        """Write one message as one frame."""
        protocol = self._protocol
        if data is not None:
            protocol.send_binary(data)
        elif text is not None:
            protocol.send_text(text.encode())
        else:
            raise RuntimeError("'websocket.send' has neither bytes nor text")
        self.transport.write(b"".join(protocol.data_to_send()))

    def _flush(self) -> None:
        """Write the library's output; end our side if it has sent its end."""
        protocol = self._protocol
        data = b"".join(protocol.data_to_send())
        if data:
            self.transport.write(data)
        if protocol.eof_sent and not self._has_said_goodbye:
            self._end()
            self._say_goodbye()

    def _pause_reading(self) -> None:
        if not self.is_reading_paused:
            self.is_reading_paused = self._is_in_detail = True
            self._untaken = None
            self.transport.pause_reading()
            self.shared.deadlines.paused.add(self)

    def resume_reading_if_room(self) -> None:
        """Resume reading if few enough messages are undelivered; read earlier bytes first."""
        session = self._session
        if (
            not self.is_reading_paused
            or self._early
            or len(session.undelivered) > self._queue_low
            or session.waiting_bytes > self._buffer_bytes // 4
            or session.waiting_bytes + self._unasked_bytes > self._buffer_bytes
        ):
            return
        if self._is_behind:
            self._go_on_in_next_turn()
        else:
            self._resume_reading()

    def _resume_reading(self) -> None:
        if self.is_reading_paused and not stands_still(self.handoff):
            self.is_reading_paused = False
            self._is_in_detail = not self._cutter.is_between_frames
            self.shared.deadlines.paused.discard(self)
            if not self.transport.is_closing():
                self.transport.resume_reading()

    # -- pings ---------------------------------------------------------------------------------------------

    def _wait(self, what: _Wait, ticks: int) -> None:
        """Replace the current wait; 0 ticks is for ever."""
        self._waits_for = what
        self.due = self.shared.deadlines.now + ticks if ticks else 0

    def abort(self) -> None:
        """Close at once."""
        abort_for_client(self, self.transport, self.handoff)

    def expire(self) -> None:
        """Handle the end of the current wait."""
        match self._waits_for:
            case _Wait.PING:
                self._ping()
            case _Wait.PONG:
                self._expire_pong()
            case _Wait.CLOSE:
                self._expire_closing()

    def _ping(self) -> None:
        """Ping the client; any input counts as an answer."""
        self._has_heard = False
        self._protocol.send_ping(b"")
        self._flush()
        self._wait(_Wait.PONG, self.shared.ws_pong_ticks)

    def _on_pong(self) -> None:
        if self._waits_for is _Wait.PONG:
            self._wait(_Wait.PING, self.shared.ws_ping_ticks)

    def _expire_pong(self) -> None:
        """Fail a silent connection; wait again if bytes have come, or reading is paused."""
        if self._has_heard or self.is_reading_paused:
            self._has_heard = False
            self._wait(_Wait.PONG, self.shared.ws_pong_ticks)
        else:
            self._protocol.fail(1011, "keepalive ping timeout")
            self._flush()

    # -- endings -------------------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake, if the WebSocket is open; while it stands still, if no process takes it.

        Raises:
            RuntimeError: There is no such code, or the reason is too long for a close frame.
        """
        if stands_still(self.handoff):
            self._close_if_kept = (code, reason)
        elif self._is_established:
            try:
                self._protocol.send_close(code, reason)
            except ProtocolError as error:
                raise RuntimeError(f"cannot close with {code} {reason!r}: {error}") from None
            self._flush()
            self._bound()

    def _tell_to_close(self) -> None:
        self._fate = Fate.TOLD_TO_CLOSE
        self.close(1012, RESTART)

    def _expire_closing(self) -> None:
        """Abort: the client has not completed the closing handshake, or not closed, in time."""
        if self._fate is Fate.TOLD_TO_CLOSE and self.transport.get_write_buffer_size():
            self._fate = Fate.CUT_WEBSOCKET
        self._give_up()
        self.abort()

    def _end(self) -> None:
        """End the session, with the code and reason of the first close frame of either side."""
        received, sent = self._protocol.close_rcvd, self._protocol.close_sent
        first = received if sent is None or self._protocol.close_rcvd_then_sent else sent
        self._session.end(1006 if first is None else int(first.code), "" if first is None else first.reason)
        self.resume_writing()  # wakes waiting senders, which then see the end

    def _say_goodbye(self) -> None:
        """End our sending side, and discard input until the client closes."""
        self._has_said_goodbye = True
        self._early = b""
        self._drop_unread()
        self._bound()
        self._resume_reading()
        if not self.has_eof and self.transport.can_write_eof():
            try:
                self.transport.write_eof()
            except OSError:  # asyncio's event loop shuts the socket down at once, and the client may have left
                self.transport.close()
        else:
            self.transport.close()

    def _bound(self) -> None:
        """Bound the rest of the closing; only the first call counts."""
        if not self._is_bounded:
            self._is_bounded = True
            self._stop_timers()
            self._wait(_Wait.CLOSE, self.shared.ws_close_ticks)

    def _stop_timers(self) -> None:
        self._wait(_Wait.NOTHING, 0)
        self._stop_drain_timer()

    def _stop_drain_timer(self) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None
