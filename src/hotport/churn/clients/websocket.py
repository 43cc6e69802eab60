"""Numbered messages over WebSockets; websockets speaks the protocol."""

from __future__ import annotations

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.uri import parse_uri

from hotport.churn.classify import Happening, Stage
from hotport.churn.clients.crowd import Crowd, host_of
from hotport.churn.clients.messages import Talker

__all__ = ["WebSocketer"]

#: Close codes of a server that goes away on purpose: 1001 going away, 1012 service restart (RFC 6455, 7.4; IANA).
_TOLD = (1001, 1012)


class WebSocketer(Talker):
    """One WebSocket."""

    __slots__ = ("_has_answer", "_protocol", "_text", "_uri")

    def __init__(self, crowd: Crowd) -> None:
        super().__init__(crowd)
        plan = crowd.site.plan
        scheme = "wss" if plan.target.is_tls else "ws"
        self._uri = parse_uri(f"{scheme}://{host_of(plan.target)}{plan.path}")
        self._text = b""

    def made(self) -> None:
        self._has_answer = False
        self._text = b""
        self._protocol = ClientProtocol(self._uri)
        self._protocol.send_request(self._protocol.connect())
        self._send_all()

    def opening_stage(self) -> Stage:
        return Stage.ANSWERING if self._has_answer else Stage.SENT

    def encode(self, number: int) -> bytes:
        self._protocol.send_text(b"%d" % number)
        return b"".join(self._protocol.data_to_send())

    def fed(self, data: bytes) -> None:
        self._has_answer = True
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Response):
                if self._protocol.handshake_exc is None:
                    self.who = event.headers.get(self.crowd.site.plan.generation_header, "")
                    self.open()
            elif isinstance(event, Frame):
                self._on_frame(event)
            if self.sock is None:
                return
        refusal = self._protocol.handshake_exc
        if refusal is not None:
            status = refusal.response.status_code if isinstance(refusal, InvalidStatus) else refusal
            self.failed(Happening.WRONG, str(status))
            return
        self._send_all()

    def _on_frame(self, frame: Frame) -> None:
        if frame.opcode is Opcode.CLOSE:
            close = self._protocol.close_rcvd
            code = close.code if close is not None else 0
            self._send_all()
            if self.sock is not None:
                self.leave(f"closed with {code}", is_told=code in _TOLD)
        elif frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._text += bytes(frame.data)
            if frame.fin:
                text, self._text = self._text, b""
                self.messages.answered(text, self.who)

    def _send_all(self) -> None:
        self.send(b"".join(self._protocol.data_to_send()))
