"""HTTP/1.1 connections: what is read, in which order it is answered, and how it ends.

`Reader` makes requests of the bytes. A connection is always in exactly one `State`; `STATES` says what drain does to
each.
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

from hotport.adapters.asgi.deadlines import Pace
from hotport.adapters.asgi.exchange import CUT, TOO_SLOW, UNTIL_CLOSE, Exchange
from hotport.adapters.asgi.handshake import Resumption, is_handshake
from hotport.adapters.asgi.proxy import forwarded
from hotport.adapters.asgi.reader import END_OF_HEAD, Intake, Reader, Target
from hotport.adapters.asgi.shared import ASGI, Shared, name_client
from hotport.adapters.asgi.spec import Receive, Scope, Send
from hotport.adapters.asgi.states import ANSWERED, HELD, STATES, STREAMING, Manner, State
from hotport.adapters.asgi.tls import tls_extension
from hotport.adapters.asgi.websocket import SPREAD, WebSocketConnection
from hotport.adapters.base import Offer, Ready
from hotport.adapters.handoff import (
    Handoff,
    Stage,
    abort_for_client,
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

OPEN: Final = Intake.OPEN

#: Reading pauses while more of a request's body than this waits for the application.
BODY_HIGH_WATER_BYTES: Final = 64 * 1024

#: No other request is parsed while that many wait for their turn; half of it must be free before parsing goes on.
PIPELINE_MAX: Final = 16

#: Seconds after which a client that was sent away for want of room may come again.
RETRY_AFTER_S: Final = b"1"


class HttpConnection(asyncio.Protocol):
    """One accepted connection; implements `hotport.adapters.base.Connection`.

    Args:
        adopted: What another worker's connection was doing, if this one goes on with it.
        unread: Bytes that were read there and not consumed.
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
        "_is_advancing",
        "_is_attached",
        "_is_draining",
        "_is_flushed",
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
        #: There while the transport's write buffer is too full; set when it is not.
        self.writable: asyncio.Event | None = None
        self.has_eof = False
        self.is_closed = False
        #: Who is connected with whom, if the acceptor knows.
        self.endpoints: tuple[Any, Any] | None = None
        self.is_proxied = False
        self.sock: socket.socket | None = None
        #: The tick at which it has waited too long for its client (`Deadlines`).
        self.due = 0

        #: Requests behind the current one, in order; the last of them may be arriving.
        self._pipeline: deque[Exchange] = deque()
        #: Keeps what was not parsed: there is no room for another request, others have their turn, or requests are
        #: parked. Reading pauses meanwhile, so it is one read at most (some if it is parked).
        self._reader = Reader(self, shared, self._pipeline)
        self._reader.head = unread
        self._is_turn_due = False  # `_take_turn` will be called

        #: The oldest request without a whole answer; its application runs.
        self._current: Exchange | None = None
        #: Status and reason for input that is no request; its turn comes after everything that was one.
        self._refusal: tuple[int, str, bool] | None = None

        self._is_attached = False  # there is a transport
        self._is_advancing = False
        self._has_served = False
        #: Made when the client takes its time: whether it sends its body, and whether it reads, fast enough.
        self._sending_pace: Pace | None = None
        self._reading_pace: Pace | None = None
        self._is_reading_paused = False
        self._is_draining = False
        self._has_announced_close = False  # the head of the last answer is written
        self._has_said_goodbye = False  # all of the last answer is written
        self._is_flushed = False  # nothing was left to send when we last looked
        self.handoff: Handoff | None = None
        self._fate = Fate.FINISHED
        shared.registry.opened(self)

    # -- what the worker asks ------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What the connection is doing; read off the facts, so that it cannot disagree with them."""
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
            return State.IN_FLIGHT  # it begins in the next turn
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
        """What no request was made of, raw: a head that has not arrived whole, and what was not parsed behind it."""
        return self._reader.head + self._reader.rest

    @property
    def held_bytes(self) -> int:
        unsent = self.transport.get_write_buffer_size() if self._is_attached else 0
        return self._waiting_bytes() + len(self._reader.head) + len(self._reader.rest) + unsent

    def drain(self) -> None:
        """Let the next answer that has no request behind it be the last."""
        if end_handoff(self):
            self._is_draining = True

    def stay(self) -> None:
        if end_handoff(self):
            self._is_draining = False

    def cut(self) -> Fate:
        """Close now, as `STATES` says. Cancels the application; waits for nothing."""
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
            fate = Fate.CUT_STREAMING  # the answer is whole for us, but not yet for the client

        current = self._current
        if manner is Manner.REFUSE and current is not None:
            current.log(503)
        for exchange in (current, *self._pipeline):
            if exchange is not None:
                exchange.leave(CUT)
                if exchange.task is not None:
                    exchange.task.cancel()
        if not self._is_attached:
            self.is_closed = True  # connection_made sees to it
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
        """The client waits for nothing but the answer to a request of which at most a part has come.

        What there is of it is known byte by byte.
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
        """Every plain connection can move. Its requests are answered first, without a word about closing.

        What TLS knows of a connection cannot be had from OpenSSL. Those are drained from a random moment on, so that
        not all clients shake hands at once.
        """
        if self._is_attached and self.is_tls:
            self.handoff = None  # there may be one from before anybody knew that it speaks TLS
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
        if not self.is_at_safe_point and self._reader.intake is OPEN and not self.has_eof:  # after its end it stays
            self._reader.intake = Intake.PARKED
        return self.handoff.offer(self, self.transport)

    def hold(self) -> None:
        """Stop reading: what the client sends waits in the kernel."""
        self._pause_reading()

    def pack(self) -> Offer:
        """Pack the bytes of unanswered requests, and how long the client may still wait."""
        state = HttpState(self._has_served, self.shared.deadlines.left_s(self))
        self.due = 0
        return make_offer(self.transport, self.endpoints, self.is_proxied, state, self.unconsumed)

    def keep(self) -> None:
        if self.handoff is not None:
            self.handoff.keep(self)

    def resume(self, was_offered: bool) -> None:
        """Read on: parse what was parked, and wait for the client again."""
        if self.is_closed or not self._is_attached:
            return
        if was_offered:
            self._wait(self.shared.head_ticks if self.unconsumed else self.shared.keep_alive_ticks)
        if self._reader.intake is Intake.PARKED:
            self._reader.intake = OPEN
        if self._reader.rest:
            self._pause_reading()
        self.transport.set_write_buffer_limits()
        self.resume_reading_if_room()

    def release(self) -> None:
        self.is_closed = True
        self.transport.abort()  # closes the descriptor, and nothing else: the connection lives on

    def why_here(self) -> str:
        if self._is_attached and self.is_tls:
            return f"{self.state.value}, TLS"
        return f"{self.state.value}, slow to read" if self.is_at_safe_point else self.state.value

    # -- what the transport says ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a full one: it was made for a stream socket
        self._is_attached = True
        if self.is_closed:  # cut before it was attached
            self.abort()
            return
        shared = self.shared
        shared.deadlines.add(self)
        self._wait(shared.head_ticks)
        info = transport.get_extra_info
        tls = tls_extension(transport)
        self._scheme = "http" if tls is None else "https"
        self._extensions = shared.extensions if tls is None else {**shared.extensions, "tls": tls}
        peer, server = self.endpoints or (info("peername"), info("sockname"))
        self._client = _client_address(peer)
        self._server = _server_address(server)
        self._is_trusted = shared.trusted.peer(peer)
        if self.adopted is not None:
            self._go_on_adopted(self.adopted)
        if self.handoff is not None:  # the worker began to leave before there was a transport
            shared.registry.tell(self)

    def _go_on_adopted(self, adopted: HttpState | Resumption) -> None:
        """Take up what another worker's connection was doing."""
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
                self.due = due  # its time has begun there

    def connection_lost(self, exc: Exception | None) -> None:
        end_for_client(self, self.handoff)
        self.is_closed = True
        self._end_watches()
        self._end_requests()
        self._reader.close()
        self.handoff = None  # what is closed is at no safe point
        self.resume_writing()
        self.shared.registry.closed(self, self._fate)

    def _end_watches(self) -> None:
        """Leave `Deadlines`: it ends, or goes on as another object."""
        deadlines = self.shared.deadlines
        deadlines.discard(self)
        deadlines.paused.discard(self)
        for pace in (self._sending_pace, self._reading_pace):
            if pace is not None:
                pace.discard()
        self._sending_pace = self._reading_pace = None

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
        """The client sends no more. It may still read (shutdown(2), SHUT_WR), so whole requests are answered."""
        if self.handoff is not None:  # it ends here
            self.drain()
        self.has_eof = True
        if self._reader.rest and self._scheme == "http":
            return True  # it came before the end; `_work` goes on from here
        return self._end_input()

    def _end_input(self) -> bool:
        """Everything that has come is parsed: True if something of it is still to be answered."""
        reader = self._reader
        reader.head = reader.rest = b""
        if self._pipeline and reader.arriving is self._pipeline[-1]:
            self._pipeline.pop()
            reader.arriving = None
        if self._pipeline and self._current is None:  # they begin in the next turn
            return self._scheme == "http"
        if self._current is None or reader.arriving is not None or self._has_said_goodbye:
            return False
        self._current.wake()
        return self._scheme == "http"  # TLS transports cannot stay half open

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        if reader.intake is not OPEN and reader.arriving is None:
            if reader.intake is Intake.PARKED:
                reader.rest += data
                if len(reader.rest) > BODY_HIGH_WATER_BYTES:
                    self._pause_reading()
            return
        # Nearly all requests come like this: one read, which is one head, and nothing waits before it. Then nothing
        # half-read can be left behind it, so it may go through the parser in one piece.
        size = len(data)
        if (
            self._current is None
            and reader.arriving is None
            and not reader.head
            and not reader.rest
            and data.endswith(END_OF_HEAD)
            and data.rfind(END_OF_HEAD, 0, -1) < 0  # half as long as looking from the front
            and (
                size <= self.shared.small_head_bytes
                or (size <= self.shared.options.head_max_bytes and data.count(b"\n") <= self.shared.head_lines_max)
            )
        ):
            reader.parse(data)
            if self._pipeline:  # let the application run, now that the parser is not in the midst of anything
                self._advance()
            return
        reader.rest = reader.rest + data if reader.rest else data
        if self._is_reading_paused:  # transports begin to read after `connection_made`, and those of TLS may go on
            self.transport.pause_reading()
        if not self._is_turn_due:
            self._work()

    def _take_turn(self) -> None:
        """Go on where the turn before this one has ended."""
        self._is_turn_due = False
        if self.is_closed or self._has_said_goodbye or stands_still(self.handoff):
            return
        if self.handoff is not None and self.handoff.stage is Stage.WANTED and self.is_at_safe_point:
            return  # it leaves, and takes the rest with it
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
        """Parse what has come, and begin requests: as far as there is room, for `TURN_S`. The rest waits."""
        reader = self._reader
        had_begun = bool(reader.head) or not self._has_served
        until = perf_counter() + TURN_S
        while reader.rest:
            room_bytes = self.shared.options.connection_buffer_bytes - self._waiting_bytes()
            reader.read(until, room_bytes, 0 if self.writable is not None else PIPELINE_MAX)
            # Now that the parser is not in the midst of anything: applications may answer at once.
            if self._current is None and self._pipeline:
                self._advance()
            if (reader.intake is not OPEN and reader.arriving is None) or not self._has_room():
                break
            if perf_counter() >= until:
                break
        if reader.intake is Intake.UPGRADED:
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
        self.resume_reading_if_room()  # also if it was the turn before this one that has paused it
        if self._current is None:
            if reader.arriving is not None:  # a body that nobody reads
                self._wait(self.shared.keep_alive_ticks)
            elif reader.head and not had_begun:
                self._wait(self.shared.head_ticks)
        if self.handoff is not None:
            self.handoff.come_to_rest(self)

    # -- room ----------------------------------------------------------------------------------------------

    def _waiting_bytes(self) -> int:
        """What waits for the application, about as much as it takes of memory."""
        waiting = 0 if self._current is None else len(self._current.body)
        for exchange in self._pipeline:
            waiting += exchange.held_bytes + len(exchange.body)
        return waiting

    def _has_room(self) -> bool:
        """Whether to read on, as far as this connection's part of memory is concerned.

        Each reason why not ends with something that calls `resume_reading_if_room`: an answer, a ``receive()``, or
        the client's taking what was sent to it.
        """
        if len(self._pipeline) > PIPELINE_MAX // 2:
            return False
        arriving = self._reader.arriving
        if arriving is None:
            if self.writable is not None:
                return False  # it asks, and does not read what it has asked for
        elif len(arriving.body) > BODY_HIGH_WATER_BYTES:
            return False
        return self._waiting_bytes() <= self.shared.options.connection_buffer_bytes

    # -- what the reader says ------------------------------------------------------------------------------

    def on_request(
        self,
        method: str,
        version: str,
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
        return Exchange(
            self,
            shared.application,
            {
                "type": "http",
                "asgi": ASGI,
                "http_version": version,
                "method": method,
                "scheme": scheme,
                "path": shared.root_path + path,
                "raw_path": shared.raw_root_path + raw_path,
                "query_string": query,
                "root_path": shared.root_path,
                "headers": headers,
                "client": client,
                "server": self._server,
                "state": shared.state.copy(),
                "extensions": self._extensions.copy(),
            },
            keeps_alive,
            version == "1.0",
        )

    def on_body_due(self) -> None:
        """Watch that the body of a request arrives in time."""
        timeout_s = self.shared.options.body_timeout_s
        if timeout_s:
            if self._sending_pace is None:
                self._sending_pace = self.shared.pace(timeout_s, self._arrived_bytes, self._on_slow_body)
            self._sending_pace.start()

    def on_upgrade(self, exchange: Exchange, behind: bytes) -> bool:
        """Continue as a WebSocket if one is asked for and no other request waits; decline any other upgrade."""
        if self._current is not None or self._pipeline[0] is not exchange or not is_handshake(exchange.scope):
            return False
        self._pipeline.clear()
        self.is_closed = self._has_said_goodbye = True  # here; it goes on as another object
        self._resume_reading()
        self._end_watches()
        WebSocketConnection(self, exchange, behind)
        return True

    def refuse(self, status: int, why: str) -> None:
        """Read no further; say why when everything before it is answered."""
        log.info("refused with %d: %s; it came from %s", status, why, name_client(self._client))
        broken = self._reader.stop()
        if self.adopted is not None:  # a handshake that was answered long ago: the client would not understand
            self.abort()
            return
        if broken is not None:  # its body; otherwise it has not become an exchange
            broken.log(status if broken.stage < STREAMING else broken.status)
            broken.leave()
            if self._pipeline:
                self._pipeline.pop()
            elif broken.stage == ANSWERED:
                self._linger()  # another answer would be taken for that of the next request
                return
            elif broken.stage >= STREAMING:
                self.truncate()
                return
            elif broken is self._current:
                self._current = None
        self._refusal = (status, why, broken is not None)
        if self._current is None:
            self._advance()

    # -- requests and answers ------------------------------------------------------------------------------

    def _advance(self, *, ending: int = 0) -> None:
        """Go on to what is next. An application may answer before it has begun to wait: then to what is after it.

        Args:
            ending: Applications that have given their answer just now, in whose last ``send()`` we are.
        """
        shared = self.shared
        registry = shared.registry
        self._is_advancing = True
        until = 0.0
        while self._current is None and self._pipeline:
            if len(self._pipeline) > 1:
                if not until:
                    until = perf_counter() + TURN_S
                elif perf_counter() >= until:
                    self._pause_reading()
                    self._take_turn_soon()
                    break
            self._current = exchange = self._pipeline.popleft()
            self.due = 0
            registry.requests += 1
            if registry.requests == registry.requests_max:
                registry.has_reached_requests_max()
            if shared.access is not None:
                exchange.began = perf_counter()
            if 0 < shared.options.concurrency_max <= len(shared.running) - ending:
                exchange.application = _overloaded
            shared.running.add(exchange)
            exchange.task = shared.run(exchange.run(), context=shared.variables.copy())
            if exchange.stage == HELD:
                exchange.open_soon()
        self._is_advancing = False
        if self._refusal is not None and self._current is None and not self._pipeline and not self._has_said_goodbye:
            self._answer_refusal(*self._refusal)

    def announce_close(self, exchange: Exchange) -> bool:
        """Whether the head of this answer, which is about to be written, must say that it is the last."""
        if exchange.keeps_alive and not ((self._is_draining or self.has_eof) and not self._has_request_behind()):
            return False
        self._has_announced_close = True
        self._reader.intake = Intake.CLOSED
        if self._reader.arriving is None:
            self._reader.rest = b""
        return True

    def _has_request_behind(self) -> bool:
        reader = self._reader
        if self._pipeline or reader.head or reader.rest or self._refusal is not None:
            return True
        return reader.arriving is None and not self.has_eof and self._has_unread()

    def answered(self, exchange: Exchange) -> None:
        """The current answer is written whole: go on to what is next."""
        self._current = None
        self._has_served = True
        if self._has_announced_close:
            if self._is_draining and exchange.keeps_alive and not self.has_eof:
                self._fate = Fate.TOLD_TO_CLOSE
            if exchange.client_keeps_alive or self._reader.arriving is not None:
                self._linger()
            else:
                self._close()  # the client has sent its last byte, and said so
            return
        if self._pipeline or self._refusal is not None:
            if not self._is_advancing:
                self._advance(ending=1)
        elif self.has_eof and not self._reader.rest:
            self._close()
            return
        else:
            shared = self.shared
            ticks = shared.head_ticks if self._reader.head else shared.keep_alive_ticks
            self.due = shared.deadlines.now + ticks if ticks else 0  # as `_wait` does; a call has its price
            if self.handoff is not None and self.handoff.come_to_rest(self):
                return
        if self._is_reading_paused:
            self.resume_reading_if_room()

    def _answer_refusal(self, status: int, why: str, is_logged: bool) -> None:
        if self.shared.access is not None and not is_logged:
            self.shared.access.refused(self._client, status)
        self.transport.write(self.shared.refusal(status, why))
        self._linger()

    # -- flow ----------------------------------------------------------------------------------------------

    def _pause_reading(self) -> None:
        if not self._is_reading_paused:
            self._is_reading_paused = True
            self.transport.pause_reading()
            self.shared.deadlines.paused.add(self)

    def resume_reading_if_room(self) -> None:
        """Read on if neither bodies nor requests take too much; but first, parse what was read before."""
        if not self._is_reading_paused or not self._has_room():
            return
        if not self._reader.rest and not (self._pipeline and self._current is None):
            self._resume_reading()
        elif self._reader.intake is OPEN or self._reader.arriving is not None:
            self._take_turn_soon()

    def _resume_reading(self) -> None:
        if self._is_reading_paused and not self.transport.is_closing():
            self._is_reading_paused = False
            self.transport.resume_reading()
            self.shared.deadlines.paused.discard(self)
            if self._reader.arriving is not None and self._sending_pace is not None:
                self._sending_pace.start()  # it could not send

    def hung_up(self, *, is_gone: bool) -> None:
        """The client has left, or sends no more, while nothing is read from it."""
        if stands_still(self.handoff):
            return
        if is_gone:
            self.abort()
        elif self._current is not None and not self._current.is_ended:
            self._current.is_ended = True
            self._current.wake()

    def ask_for_body(self) -> None:
        """Let a client that asked whether its body is wanted send it (RFC 9110 section 10.1.1)."""
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._sending_pace is not None:
            self._sending_pace.start()

    def _arrived_bytes(self) -> int | None:
        """What has come of the body that arrives; None while the client must not or cannot send it."""
        arriving = self._reader.arriving
        return None if arriving is None or arriving.expects_continue or self._is_reading_paused else arriving.received

    def _on_slow_body(self) -> None:
        self._fate = Fate.CUT_SLOW_BODY
        self.refuse(408, "the request body arrived too slowly")

    def see_client_read(self) -> None:
        """See to it that the client takes what waits for it in time."""
        if self._reading_pace is None:
            timeout_s = self.shared.options.send_timeout_s
            if not timeout_s or self.is_closed:
                return
            self._reading_pace = self.shared.pace(timeout_s, self._taken_bytes, self._on_slow_reader)
        if not self._reading_pace.due:
            self._reading_pace.start()

    def _taken_bytes(self) -> int | None:
        """What the client has taken; None while nothing waits for it.

        An answer under way that is not held up waits for its application.
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
        reset_for_client(self, self.transport)  # or the kernel would hold for minutes what it has

    async def flush(self) -> None:
        """Return when everything that was written is in the kernel, or the client has left."""
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
        """Wait for the client, but no longer than that; 0 is for ever."""
        self.due = self.shared.deadlines.now + ticks if ticks else 0

    def abort(self) -> None:
        """End now."""
        abort_for_client(self, self.transport, self.handoff)

    def expire(self) -> None:
        """The client has had its time; but not while an answer is on its way, or something has come just now."""
        state = self.state
        if state is State.HALF_HEAD:
            if self._reader.rest or self._reader.intake is Intake.PARKED:
                self._wait(self.shared.head_ticks)  # it may be here whole: nobody has looked
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
        """The client has not closed; it had the time, unless it is still reading."""
        if not self.transport.is_closing():
            self._close()
        elif (was_flushed := self._is_flushed) and not self._has_unsent():
            self.abort()  # the client has had everything, and does not say goodbye
        else:
            # TLS has a buffer below the one that it tells of. If the kernel has nothing to send, it is empty; seen
            # twice, because an event loop that was held up looks at its timers before it goes on sending.
            self._is_flushed = not was_flushed and not self._has_unsent()
            self.see_client_read()
            self._wait(self.shared.linger_ticks)

    def truncate(self) -> None:
        """End so that the answer that has begun does not look whole."""
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
            if self._scheme == "https":  # which waits for the client's goodbye
                self._wait(self.shared.linger_ticks)

    def _linger(self) -> None:
        """Say the end of our side, and throw away what comes until the client closes; it has `LINGER_S` for that."""
        can_end = self.transport.can_write_eof()
        if self.has_eof or (not can_end and self._reader.arriving is None):
            self._close()  # TLS cannot end one side; its own goodbye will do unless a body is on its way
            return
        if can_end:
            try:
                self.transport.write_eof()
            except OSError:  # the stock event loop shuts the socket down at once, and the client may be gone
                self._close()
                return
        self._end_requests()
        self._resume_reading()
        self._wait(self.shared.linger_ticks)

    def _end_requests(self) -> None:
        """Stop reading, and drop every request without a whole answer."""
        self._has_said_goodbye = True
        self._reader.stop()
        for exchange in (self._current, *self._pipeline):
            if exchange is not None:
                exchange.leave()
        self._pipeline.clear()
        self._current = self._refusal = None


async def _overloaded(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers in place of the application while it has as much to do as it may."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", RETRY_AFTER_S)]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": b"too many requests are under way\n"})


def _client_address(peername: Any) -> tuple[str, int] | None:
    return (peername[0], peername[1]) if isinstance(peername, tuple) else None


def _server_address(sockname: Any) -> tuple[str, int | None] | None:
    if isinstance(sockname, tuple):
        return (sockname[0], sockname[1])
    return (os.fsdecode(sockname), None) if sockname else None
