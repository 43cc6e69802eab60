"""HTTP/1.1 connections: reading, the order of answers, and endings.

`Reader` parses requests. A connection is always in exactly one `State`; `STATES` says what drain does in each.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import random
import socket
import termios
from collections import deque
from time import perf_counter
from typing import Any, Final

from hotport.adapters.asgi import requestid
from hotport.adapters.asgi.deadlines import Pace
from hotport.adapters.asgi.exchange import CLIENT_LEFT, CUT, TOO_SLOW, UNTIL_CLOSE, Exchange
from hotport.adapters.asgi.handshake import Resumption, is_handshake
from hotport.adapters.asgi.proxy import forwarded
from hotport.adapters.asgi.reader import END_OF_HEAD, Intake, Reader, Target
from hotport.adapters.asgi.shared import Shared, name_client
from hotport.adapters.asgi.spec import Receive, Scope, Send
from hotport.adapters.asgi.states import ANSWERED, HELD, STATES, STREAMING, Manner, State
from hotport.adapters.asgi.tls import tls_extension
from hotport.adapters.asgi.websocket import SPREAD, WebSocketConnection
from hotport.adapters.base import Offer, Ready
from hotport.adapters.counts import NO_ANSWER
from hotport.adapters.handoff import (
    Handoff,
    Stage,
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
from hotport.adapters.turns import TURN_S
from hotport.kernel.sockets import unsent_bytes
from hotport.model.fates import Fate
from hotport.wire.envelope import HttpState

__all__ = ["HttpConnection"]

log = logging.getLogger("hotport.error")

# Looking one of them up in its enumeration takes longer than a call.
OPEN: Final = Intake.OPEN
CLOSED: Final = Intake.CLOSED
PARKED: Final = Intake.PARKED
UPGRADED: Final = Intake.UPGRADED
FINISHED: Final = Fate.FINISHED

#: Reading pauses while more of a request's body than this waits for the application.
BODY_HIGH_WATER_BYTES: Final = 64 * 1024

#: Parsing pauses while so many requests wait for their turn, and resumes when half of them are done.
PIPELINE_MAX: Final = 16

#: Seconds after which a client that was refused for overload may retry.
RETRY_AFTER_S: Final = b"1"


class HttpConnection(asyncio.Protocol):
    """One accepted connection; implements `hotport.adapters.base.Connection`.

    Args:
        adopted: The state of another worker's connection that this one continues.
        unread: Bytes that the other worker has read and not consumed.
    """

    kind = "http"
    moved_fate = Fate.MOVED_HTTP

    __slots__ = (
        "_client",
        "_current",
        "_extensions",
        "_fate",
        "_has_announced_close",
        "_has_said_goodbye",
        "_has_served",
        "_is_attached",
        "_is_beginning",
        "_is_draining",
        "_is_reading_paused",
        "_is_trusted",
        "_is_turn_due",
        "_pipeline",
        "_reader",
        "_reading_pace",
        "_refusal",
        "_scheme",
        "_sending_pace",
        "_server",
        "adopted",
        "due",
        "endpoints",
        "handoff",
        "has_eof",
        "is_closed",
        "is_proxied",
        "shared",
        "sock",
        "transport",
        "writable",
    )

    def __init__(self, shared: Shared, adopted: HttpState | Resumption | None = None, unread: bytes = b"") -> None:
        self.shared = shared
        self.adopted = adopted
        self.transport: asyncio.Transport  # from connection_made on
        #: None unless the transport's write buffer is too full; set when there is room again.
        self.writable: asyncio.Event | None = None
        self.has_eof = False
        self.is_closed = False
        #: The addresses of both ends, if the acceptor knows them.
        self.endpoints: tuple[Any, Any] | None = None
        self.is_proxied = False
        self.sock: socket.socket | None = None
        #: The tick at which waiting for the client ends, or the time of the current request (`Deadlines`).
        self.due = 0

        #: Requests behind the current one, in order; the last may still be arriving.
        self._pipeline: deque[Exchange] = deque()
        #: Keeps unparsed bytes while there is no room for another request, while other connections have their turn, or
        #: while requests are parked. Reading pauses meanwhile, so it keeps one read at most (several if parked).
        self._reader = Reader(self, shared, self._pipeline)
        self._reader.head = unread
        self._is_turn_due = False  # `_take_turn` will be called

        #: The oldest request without a complete answer; its application runs.
        self._current: Exchange | None = None
        #: Status and reason for refused input; it is answered after all requests before it.
        self._refusal: tuple[int, str, bool] | None = None

        self._is_attached = False  # there is a transport
        self._is_beginning = False
        self._has_served = False
        #: The minimum rates of the client's sending and reading; made on demand.
        self._sending_pace: Pace | None = None
        self._reading_pace: Pace | None = None
        self._is_reading_paused = False
        self._is_draining = False
        self._has_announced_close = False  # the head of the last answer is written
        self._has_said_goodbye = False  # the last answer is completely written
        self.handoff: Handoff | None = None
        self._fate = FINISHED
        shared.registry.opened(self)

    # -- called by the worker ------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The connection's state, derived from its other attributes."""
        if self.is_closed:
            return State.CLOSED
        if self._has_said_goodbye:
            return State.CLOSING
        current = self._current
        if current is not None:
            if current.stage >= STREAMING:
                return State.STREAMING
            return State.BODY if self._reader.arriving is current else State.IN_FLIGHT
        if self._pipeline:
            return State.IN_FLIGHT  # its application starts in the next turn
        if self._reader.arriving is not None:
            return State.SURPLUS
        if self._reader.head or self._reader.rest:
            return State.HALF_HEAD
        return State.IDLE if self._has_served else State.FRESH

    @property
    def is_tls(self) -> bool:
        """Whether bytes that are written go through a cipher."""
        return self._scheme == "https"

    @property
    def unconsumed(self) -> bytes:
        """The raw bytes of no request yet: an incomplete head, and the unparsed bytes behind it."""
        return self._reader.head + self._reader.rest

    @property
    def held_bytes(self) -> int:
        unsent = self.transport.get_write_buffer_size() if self._is_attached else 0
        return self._waiting_bytes() + len(self._reader.head) + len(self._reader.rest) + unsent

    def drain(self) -> None:
        """Make the next answer that has no request behind it the last."""
        if end_handoff(self):
            self._is_draining = True

    def stay(self) -> None:
        if end_handoff(self):
            self._is_draining = False

    def cut(self) -> Fate:
        """Close now as `STATES` says, and cancel the application; waits for nothing."""
        state = self.state
        if state is State.CLOSED:
            return self._fate
        if stands_still(self.handoff):
            self._close()
            return Fate.CUT_OFFERED
        if state in (State.FRESH, State.IDLE) and self._has_unread():
            state = State.HALF_HEAD
        manner, fate = STATES[state].manner, STATES[state].fate or self._fate
        if manner in (Manner.CLOSE, Manner.NOTHING) and self._is_attached and self.transport.get_write_buffer_size():
            fate = Fate.CUT_STREAMING  # the answer is written, but the client has not got all of it

        current = self._current
        if manner is Manner.REFUSE and current is not None:
            current.log(503)
            current.leave(CUT, 503)
        for exchange in (current, *self._pipeline):
            if exchange is not None:
                exchange.leave(CUT)
                if exchange.task is not None:
                    exchange.task.cancel()
        if not self._is_attached:
            self.is_closed = True  # `connection_made` closes it
        elif manner is Manner.REFUSE:
            self._answer_refusal(503, "", is_logged=current is not None)
        elif manner is Manner.TRUNCATE:
            self.truncate()
        else:
            self._close()
        return fate

    # -- handing it off ------------------------------------------------------------------------------------

    @property
    def is_at_safe_point(self) -> bool:
        """Whether no request is complete but unanswered, and every unconsumed byte is known.

        Only a part of the next request's head may have come.
        """
        return (
            self._is_attached
            and self._current is None
            and self._reader.arriving is None
            and not self._pipeline
            and self._refusal is None
            and not self._has_said_goodbye
            and not self.has_eof
        )

    @property
    def will_move(self) -> bool:
        return self.handoff is not None

    def prepare_handoff(self, ready: Ready) -> bool:
        """Prepare every connection but those whose TLS cannot move; its requests are answered first.

        Answers say no ``Connection: close``. The others start to drain at random moments, so that not all clients
        repeat their TLS handshakes at once.
        """
        if self._is_attached and bound(self.transport):
            self.handoff = None  # may be set since before TLS was detected, or could not move
            draining = self.shared.registry.draining
            if not self._is_draining and draining.is_set():
                delay_s = random.random() * SPREAD * draining.remaining_s()
                self.shared.loop.call_later(delay_s, self.drain)
            return True
        self._is_draining = False
        prepare(self, self.shared.registry, ready)
        return True

    def offer(self) -> Offer | None:
        if self.handoff is None or self.is_closed or self._has_said_goodbye:
            return None
        if not self.is_at_safe_point and self._reader.intake is OPEN and not self.has_eof:  # at its end it stays here
            self._reader.intake = PARKED
        return self.handoff.offer(self, self.transport)

    def hold(self) -> None:
        """Stop reading: what the client sends waits in the kernel."""
        self._pause_reading()

    def pack(self) -> Offer:
        """Pack unconsumed bytes, and the rest of the wait for the client."""
        state = HttpState(self._has_served, self.shared.deadlines.left_s(self))
        self.due = 0
        return make_offer(self.transport, self.endpoints, self.is_proxied, state, self.unconsumed)

    def keep(self) -> None:
        if self.handoff is not None:
            self.handoff.keep(self, self.transport)

    def resume(self, was_offered: bool) -> None:
        """Resume reading: parse parked bytes, and wait for the client again."""
        if self.is_closed or not self._is_attached:
            return
        if was_offered:
            self._wait(self.shared.head_ticks if self.unconsumed else self.shared.keep_alive_ticks)
        if self._reader.intake is PARKED:
            self._reader.intake = OPEN
        if self._reader.rest:
            self._pause_reading()
        self.transport.set_write_buffer_limits()
        self.resume_reading_if_room()

    def release(self) -> None:
        self.is_closed = True
        self.transport.abort()  # closes our descriptor only: another process owns the connection

    def why_here(self) -> str:
        if self._is_attached and (why := bound(self.transport)):
            return f"{self.state.value}, {why}"
        return f"{self.state.value}, slow to read" if self.is_at_safe_point else self.state.value

    # -- called by the transport ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a full transport: it was made for a stream socket
        self._is_attached = True
        if self.is_closed:  # cut before it was attached
            self.abort()
            return
        shared = self.shared
        shared.deadlines.add(self)
        if shared.head_ticks:
            self.due = shared.deadlines.now + shared.head_ticks
        tls = tls_extension(transport)
        self._scheme = "http" if tls is None else "https"
        self._extensions = shared.extensions if tls is None else {**shared.extensions, "tls": tls}
        info = transport.get_extra_info
        peer, server = self.endpoints or (info("peername"), info("sockname"))
        # An address of IPv4 is what ASGI wants.
        self._client = peer if type(peer) is tuple and len(peer) == 2 else _client_address(peer)
        self._server = server if type(server) is tuple and len(server) == 2 else _server_address(server)
        self._is_trusted = shared.trusted.peer(peer)
        if self.adopted is not None:
            self._go_on_adopted(self.adopted)
        if self.handoff is not None:  # the worker began to leave before there was a transport
            shared.registry.tell(self)

    def _go_on_adopted(self, adopted: HttpState | Resumption) -> None:
        """Continue another worker's connection."""
        reader = self._reader
        unread, reader.head = reader.head, b""
        if isinstance(adopted, Resumption):
            reader.parse(adopted.handshake)
            return
        self.adopted = None
        self._has_served = adopted.has_served
        self._wait(self.shared.deadlines.ticks(adopted.wait_s) if adopted.wait_s else 0)
        if unread:
            due = self.due
            self.data_received(unread)
            if reader.head and self._current is None:
                self.due = due  # the wait for the head has begun in the other worker

    def connection_lost(self, exc: Exception | None) -> None:
        end_for_client(self, self.handoff)
        self.is_closed = True
        self._end_watches()
        if self._current is not None or not self._has_said_goodbye:
            self._end_requests()
        self._reader.close()
        self.handoff = None  # a closed connection is at no safe point
        if self.writable is not None:
            self.writable.set()
            self.writable = None
        self.shared.registry.closed(self, self._fate)

    def _end_watches(self) -> None:
        """Leave `Deadlines`, when the connection ends or another object continues it."""
        deadlines = self.shared.deadlines
        deadlines.discard(self)
        if self._is_reading_paused:
            deadlines.paused.discard(self)
        if self._sending_pace is not None:
            self._sending_pace.discard()
            self._sending_pace = None
        if self._reading_pace is not None:
            self._reading_pace.discard()
            self._reading_pace = None

    def pause_writing(self) -> None:
        self.writable = asyncio.Event()
        self.see_client_read()

    def resume_writing(self) -> None:
        if self.writable is not None:
            self.writable.set()
            self.writable = None
        if self._reading_pace is not None and not self._has_said_goodbye:
            self._reading_pace.stop()
        if self.handoff is not None and self.handoff.come_to_rest(self):
            return
        self.resume_reading_if_room()

    def eof_received(self) -> bool:
        """Answer complete requests after the client's end: it may still read (shutdown(2), SHUT_WR)."""
        if self.handoff is not None:  # it does not move any more
            self.drain()
        self.has_eof = True
        if self._reader.rest and self.transport.can_write_eof():  # otherwise the transport closes, whatever is returned
            return True  # unparsed bytes came before the end; `_work` parses them
        return self._end_input()

    def _end_input(self) -> bool:
        """Handle the client's end after all its bytes are parsed; True if an answer is still due."""
        reader = self._reader
        reader.head = reader.rest = b""
        if self._pipeline and reader.arriving is self._pipeline[-1]:
            self._pipeline.pop()
            reader.arriving = None
        if self._pipeline and self._current is None:  # their applications start in the next turn
            return True
        if self._current is None or reader.arriving is not None or self._has_said_goodbye:
            return False
        self._current.wake()
        return True

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if reader.intake is not OPEN and reader.arriving is None:
            if reader.intake is PARKED:
                reader.rest += data
                if len(reader.rest) > BODY_HIGH_WATER_BYTES:
                    self._pause_reading()
            return
        # Nearly all requests come as one read that is exactly one head, with nothing waiting before it. Then no partial
        # head can follow, so the read is parsed in one piece.
        size = len(data)
        if (
            self._current is None
            and reader.arriving is None
            and not reader.head
            and not reader.rest
            and data[-4:] == END_OF_HEAD
            and data.rfind(END_OF_HEAD, 0, -1) < 0  # takes half the time of a search from the front
            and (
                size <= self.shared.small_head_bytes
                or (size <= self.shared.options.head_max_bytes and data.count(b"\n") <= self.shared.head_lines_max)
            )
        ):
            reader.whole_head = data
            reader.parse(data)
            if self._pipeline:  # run the application now, outside the parser's callbacks
                self._begin(self._pipeline.popleft())
            return
        arriving = reader.arriving
        if (
            arriving is not None
            and arriving is self._current
            and arriving.length is not None
            and arriving.received + size < arriving.length
            and not reader.rest
            and not self._is_reading_paused
        ):  # amid a body of known length: nothing can end or begin in it
            reader.parse(data)
            if not self._has_room():
                self._pause_reading()
            return
        reader.rest = reader.rest + data if reader.rest else data
        if self._is_reading_paused:  # transports start reading after `connection_made`, and TLS ones may continue
            self.transport.pause_reading()
        if not self._is_turn_due:
            self._work()

    def _take_turn(self) -> None:
        """Continue the work of the turn before."""
        self._is_turn_due = False
        if self.is_closed or self._has_said_goodbye or stands_still(self.handoff):
            return
        if self.handoff is not None and self.handoff.stage is Stage.WANTED and self.is_at_safe_point:
            return  # the connection moves, with the unparsed bytes
        if self._current is None and self._pipeline:
            self._advance()
        if self._reader.rest:
            self._work()
        else:
            self.resume_reading_if_room()

    def _take_turn_soon(self) -> None:
        if not self._is_turn_due:
            self._is_turn_due = True
            self.shared.turns.wait(self._take_turn)

    def _work(self) -> None:
        """Parse received bytes and start requests, within the room and for `TURN_S`; the rest waits."""
        reader = self._reader
        had_begun = bool(reader.head) or not self._has_served
        until = perf_counter() + TURN_S
        while reader.rest:
            room_bytes = self.shared.options.connection_buffer_bytes - self._waiting_bytes()
            reader.read(until, room_bytes, 0 if self.writable is not None else PIPELINE_MAX)
            # Outside the parser's callbacks: applications may answer at once.
            if self._current is None and self._pipeline:
                self._advance()
            if (reader.intake is not OPEN and reader.arriving is None) or not self._has_room():
                break
            if perf_counter() >= until:
                break
        if reader.intake is UPGRADED:
            if reader.rest:
                self.transport.get_protocol().data_received(reader.rest)  # type: ignore[attr-defined]
            return
        if self.is_closed or self._has_said_goodbye:
            return
        if self.has_eof and not reader.rest and not self._end_input():
            self._close()
            return
        if reader.rest or not self._has_room():
            self._pause_reading()
        self.resume_reading_if_room()  # also if an earlier turn has paused it
        if self._current is None:
            if reader.arriving is not None:  # a body that no application reads
                self._wait(self.shared.keep_alive_ticks)
            elif reader.head and not had_begun:
                self._wait(self.shared.head_ticks)
        if self.handoff is not None:
            self.handoff.come_to_rest(self)

    # -- room ----------------------------------------------------------------------------------------------

    def _waiting_bytes(self) -> int:
        """About how many bytes of memory waiting requests take."""
        waiting = 0 if self._current is None else len(self._current.body)
        for exchange in self._pipeline:
            waiting += exchange.held_bytes + len(exchange.body)
        return waiting

    def _has_room(self) -> bool:
        """Whether this connection's share of memory allows to read more.

        Each reason against it ends with a call of `resume_reading_if_room`: after an answer, after a ``receive()``, or
        when the client has taken what was sent to it.
        """
        if len(self._pipeline) > PIPELINE_MAX // 2:
            return False
        arriving = self._reader.arriving
        if arriving is None:
            if self.writable is not None:
                return False  # the client sends requests, but does not read the answers
        elif len(arriving.body) > BODY_HIGH_WATER_BYTES:
            return False
        return self._waiting_bytes() <= self.shared.options.connection_buffer_bytes

    # -- called by the reader ------------------------------------------------------------------------------

    def on_request(
        self,
        method: str,
        is_http10: bool,
        target: Target,
        headers: list[tuple[bytes, bytes]],
        fields: dict[bytes, bytes],
        keeps_alive: bool,
    ) -> Exchange:
        """Build the exchange and its scope."""
        shared = self.shared
        path, raw_path, query, _ = target
        client, scheme = self._client, self._scheme
        if self._is_trusted and (b"x-forwarded-for" in fields or b"x-forwarded-proto" in fields):
            client, scheme = forwarded(headers, client, scheme, shared.trusted)
        scope = shared.scope.copy()
        if is_http10:
            scope["http_version"] = "1.0"
        scope["method"] = method
        scope["scheme"] = scheme
        scope["path"] = shared.root_path + path
        scope["raw_path"] = shared.raw_root_path + raw_path
        scope["query_string"] = query
        scope["headers"] = headers
        scope["client"] = client
        scope["server"] = self._server
        scope["state"] = state = shared.state.copy()
        if shared.makes_ids:
            given = fields.get(requestid.FIELD) if self._is_trusted else None
            scope["headers"], state[requestid.KEY] = requestid.identify(headers, given)
        scope["extensions"] = self._extensions.copy()
        return Exchange(self, shared.application, scope, keeps_alive, is_http10)

    def on_body_due(self) -> None:
        """Enforce `body_timeout` on the request's body."""
        timeout_s = self.shared.options.body_timeout_s
        if timeout_s:
            if self._sending_pace is None:
                self._sending_pace = self.shared.pace(timeout_s, self._arrived_bytes, self._on_slow_body)
            self._sending_pace.start()

    def on_upgrade(self, exchange: Exchange, behind: bytes) -> bool:
        """Switch to a WebSocket if the request asks for one and no other request waits; decline other upgrades."""
        if self._current is not None or self._pipeline[0] is not exchange or not is_handshake(exchange.scope):
            return False
        self._pipeline.clear()
        self.is_closed = self._has_said_goodbye = True  # of this object; a `WebSocketConnection` continues
        self._resume_reading()
        self._end_watches()
        WebSocketConnection(self, exchange, behind)
        return True

    def refuse(self, status: int, why: str) -> None:
        """Stop reading, and answer with `status` after all requests before."""
        log.info("refused with %d: %s; it came from %s", status, why, name_client(self._client))
        broken = self._reader.stop()
        if self.adopted is not None:  # its handshake was answered elsewhere: the client would not understand
            self.abort()
            return
        if broken is not None:  # its body is broken; otherwise there is no exchange
            broken.log(status if broken.stage < STREAMING else broken.status)
            broken.leave(CLIENT_LEFT, status if broken.stage < STREAMING else NO_ANSWER)
            if self._pipeline:
                self._pipeline.pop()
            elif broken.stage == ANSWERED:
                self._linger()  # the client would take another answer for that of its next request
                return
            elif broken.stage >= STREAMING:
                self.truncate()
                return
            elif broken is self._current:
                self._current = None
                self.due = 0
        self._refusal = (status, why, broken is not None)
        if self._current is None:
            self._advance()

    # -- requests and answers ------------------------------------------------------------------------------

    def _advance(self, *, ending: int = 0) -> None:
        """Start the next request; also those behind it, while applications answer in their first step.

        Args:
            ending: The number of applications whose last ``send()`` calls this.
        """
        until = 0.0
        while self._current is None and self._pipeline:
            if len(self._pipeline) > 1:
                if not until:
                    until = perf_counter() + TURN_S
                elif perf_counter() >= until:
                    self._pause_reading()
                    self._take_turn_soon()
                    break
            self._begin(self._pipeline.popleft(), ending)
        if self._refusal is not None and self._current is None and not self._pipeline and not self._has_said_goodbye:
            self._answer_refusal(*self._refusal)

    def _begin(self, exchange: Exchange, ending: int = 0) -> None:
        """Run the application for a request. With tasks that begin at once, it may have answered when this returns."""
        shared = self.shared
        registry = shared.registry
        self._current = exchange
        ticks = shared.request_ticks
        self.due = shared.deadlines.now + ticks if ticks else 0
        registry.requests = requests = registry.requests + 1
        if requests == registry.requests_max:
            registry.has_reached_requests_max()
        if shared.takes_times:
            exchange.began = perf_counter()
        running = shared.running
        if shared.concurrency_max and len(running) - ending >= shared.concurrency_max:
            exchange.application = _overloaded
        running.add(exchange)
        self._is_beginning = True
        context = shared.variables.copy()
        if shared.makes_ids:
            requestid.bind(context, exchange.scope["state"])
        exchange.task = shared.run(exchange.run(), context=context)
        self._is_beginning = False
        if exchange.stage == HELD:
            exchange.open_soon()

    def announce_close(self, exchange: Exchange) -> bool:
        """Whether the head about to be written must say that this answer is the last."""
        if exchange.keeps_alive and not ((self._is_draining or self.has_eof) and not self._has_request_behind()):
            return False
        self._has_announced_close = True
        self._reader.intake = CLOSED
        if self._reader.arriving is None:
            self._reader.rest = b""
        return True

    def _has_request_behind(self) -> bool:
        reader = self._reader
        if self._pipeline or reader.head or reader.rest or self._refusal is not None:
            return True
        return reader.arriving is None and not self.has_eof and self._has_unread()

    def answered(self, exchange: Exchange) -> None:
        """Continue with the next request, or close: the current answer is completely written."""
        self._current = None
        self._has_served = True
        if self._has_announced_close:
            self.due = 0
            if self._is_draining and exchange.keeps_alive and not self.has_eof:
                self._fate = Fate.TOLD_TO_CLOSE
            if exchange.client_keeps_alive or self._reader.arriving is not None:
                self._linger()
            else:
                self._close()  # the client has announced that this was its last request
            return
        if self._pipeline or self._refusal is not None:
            self.due = 0
            if not self._is_beginning:
                self._advance(ending=1)
        elif self.has_eof and not self._reader.rest:
            self.due = 0
            self._close()
            return
        else:
            shared = self.shared
            ticks = shared.head_ticks if self._reader.head else shared.keep_alive_ticks
            self.due = shared.deadlines.now + ticks if ticks else 0  # as in `_wait`, without a call
            if self.handoff is not None and self.handoff.come_to_rest(self):
                return
        if self._is_reading_paused:
            self.resume_reading_if_room()

    def _answer_refusal(self, status: int, why: str, is_logged: bool) -> None:
        if not is_logged:
            if self.shared.access is not None:
                self.shared.access.refused(self._client, status)
            if self.shared.count_request is not None:
                self.shared.count_request("", status, perf_counter())
        self.transport.write(self.shared.refusal(status, why))
        self._linger()

    # -- flow ----------------------------------------------------------------------------------------------

    def _pause_reading(self) -> None:
        if not self._is_reading_paused:
            self._is_reading_paused = True
            self.transport.pause_reading()
            self.shared.deadlines.paused.add(self)

    def resume_reading_if_room(self) -> None:
        """Resume reading if there is room; parse earlier bytes first."""
        if not self._is_reading_paused or not self._has_room():
            return
        if not self._reader.rest and not (self._pipeline and self._current is None):
            self._resume_reading()
        elif self._reader.intake is OPEN or self._reader.arriving is not None:
            self._take_turn_soon()

    def _resume_reading(self) -> None:
        if self._is_reading_paused and not self.transport.is_closing() and not stands_still(self.handoff):
            self._is_reading_paused = False
            self.transport.resume_reading()
            self.shared.deadlines.paused.discard(self)
            if self._reader.arriving is not None and self._sending_pace is not None:
                self._sending_pace.start()  # the client could not send during the pause

    def hung_up(self, *, is_gone: bool) -> None:
        """Handle the client's reset or end while reading is paused."""
        if stands_still(self.handoff):
            return
        if is_gone:
            self.abort()
        elif self._current is not None and not self._current.is_ended:
            self._current.is_ended = True
            self._current.wake()

    def ask_for_body(self) -> None:
        """Answer 100 Continue to a client that expects it before it sends its body (RFC 9110 section 10.1.1)."""
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._sending_pace is not None:
            self._sending_pace.start()

    def _arrived_bytes(self) -> int | None:
        """How many body bytes have arrived; None while the client must not or cannot send."""
        arriving = self._reader.arriving
        return None if arriving is None or arriving.expects_continue or self._is_reading_paused else arriving.received

    def _on_slow_body(self) -> None:
        self._fate = Fate.CUT_SLOW_BODY
        self.refuse(408, "the request body arrived too slowly")

    def see_client_read(self) -> None:
        """Enforce `send_timeout` on unsent data."""
        if self._reading_pace is None:
            timeout_s = self.shared.options.send_timeout_s
            if not timeout_s or self.is_closed:
                return
            self._reading_pace = self.shared.pace(timeout_s, self._taken_bytes, self._on_slow_reader)
        if not self._reading_pace.due:
            self._reading_pace.start()

    def _taken_bytes(self) -> int | None:
        """How many bytes the client has taken; None while no bytes wait for it.

        An answer whose sending is not blocked waits for its application instead.
        """
        current = self._current
        unsent = self.transport.get_write_buffer_size()
        if current is not None:
            waits = self.writable is not None or current.is_blocked
        else:
            waits = bool(unsent) or (self.is_tls and self._has_said_goodbye and self._has_unsent())
        if not waits:
            return None
        return taken_bytes(self.transport, self.sock)

    def _on_slow_reader(self) -> None:
        log.info("cut: the client takes too little of what is sent to it; it is %s", name_client(self._client))
        self._fate = Fate.CUT_SLOW_READER
        for exchange in (self._current, *self._pipeline):
            if exchange is not None:
                exchange.leave(TOO_SLOW)
        self._end_requests()
        reset_for_client(self, self.transport)  # else the kernel would hold unsent bytes for minutes

    async def flush(self) -> None:
        """Wait until everything that was written is in the kernel, or the client has left."""
        self.transport.set_write_buffer_limits(high=0)
        if self.writable is not None:
            await self.writable.wait()
        if not self.is_closed:
            self.transport.set_write_buffer_limits()

    def _has_unread(self) -> bool:
        """Whether bytes of the client wait in the kernel (tcp(7), SIOCINQ)."""
        if self.sock is None:
            return False
        try:
            return fcntl.ioctl(self.sock, termios.FIONREAD, bytes(4)) != bytes(4)
        except (OSError, ValueError):  # closed
            return False

    def _has_unsent(self) -> bool:
        """Whether bytes for the client wait in the kernel, or are not acknowledged."""
        return self.sock is not None and unsent_bytes(self.sock) > 0

    # -- endings -------------------------------------------------------------------------------------------

    def _wait(self, ticks: int) -> None:
        """Wait for the client for at most so many ticks; 0 is for ever."""
        self.due = self.shared.deadlines.now + ticks if ticks else 0

    def abort(self) -> None:
        """Close at once."""
        abort_for_client(self, self.transport, self.handoff)

    def expire(self) -> None:
        """End the wait for the client, or extend it while an answer is being sent or unread bytes have come.

        While an application runs, the client is not waited for: it is the request that has taken too long.
        """
        if self._current is not None:
            self._current.time_out()
            return
        state = self.state
        if state is State.HALF_HEAD:
            if self._reader.rest or self._reader.intake is PARKED:
                self._wait(self.shared.head_ticks)  # the rest may be among the unparsed bytes
            else:
                self.refuse(408, "the request head did not arrive in time")
        elif self.transport.get_write_buffer_size():
            self.see_client_read()
            self._wait(self.shared.linger_ticks)
        elif state is State.CLOSING:
            self._expire_closing()
        elif self._has_unread():
            self._wait(self.shared.keep_alive_ticks)
        else:
            self._fate = Fate.IDLE_CLOSED
            self._close()

    def _expire_closing(self) -> None:
        """Abort a connection that the client has not closed in time, unless the client still reads."""
        if not self.transport.is_closing():
            self._close()
        elif not self._has_unsent():
            self.abort()  # the client has got everything, and does not close
        else:
            self.see_client_read()
            self._wait(self.shared.linger_ticks)

    def truncate(self) -> None:
        """End the connection so that the unfinished answer does not look complete."""
        current = self._current
        self._end_requests()
        if current is not None and current.framing == UNTIL_CLOSE:
            reset_for_client(self, self.transport)  # a close would be its regular end
        else:
            self.abort()

    def _close(self) -> None:
        """Close when everything written is flushed."""
        self._end_requests()
        if not self.transport.is_closing():
            if self.transport.get_write_buffer_size():
                self.see_client_read()
            self.transport.close()
            if self._scheme == "https":  # the transport waits for the client's close_notify
                self._wait(self.shared.linger_ticks)

    def _linger(self) -> None:
        """End our sending side, and discard input until the client closes, for `LINGER_S` at most."""
        can_end = self.transport.can_write_eof()
        if self.has_eof or (self.is_tls and self._reader.arriving is None):
            self._close()  # a TLS transport discards input by itself until the client says goodbye
            return
        if can_end:
            try:
                self.transport.write_eof()
            except OSError:  # asyncio's event loop shuts the socket down at once, and the client may have left
                self._close()
                return
        self._end_requests()
        self._resume_reading()
        self._wait(self.shared.linger_ticks)

    def _end_requests(self) -> None:
        """Stop reading, and drop all requests without a complete answer."""
        self._has_said_goodbye = True
        self._reader.stop()
        if self._current is not None:
            self.due = 0
        for exchange in (self._current, *self._pipeline):
            if exchange is not None:
                exchange.leave()
        self._pipeline.clear()
        self._current = self._refusal = None


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 503 in place of the application while `concurrency_max` requests run."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", RETRY_AFTER_S)]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b"too many requests are under way\n"})


def _client_address(peername: Any) -> tuple[str, int] | None:
    return (peername[0], peername[1]) if isinstance(peername, tuple) else None


def _server_address(sockname: Any) -> tuple[str, int | None] | None:
    if isinstance(sockname, tuple):
        return (sockname[0], sockname[1])
    return (os.fsdecode(sockname), None) if sockname else None
