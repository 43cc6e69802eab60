"""TLS of one connection that another worker has accepted, with records of our own in place of OpenSSL's."""

from __future__ import annotations

from typing import Any

from hotport.wire.tlskeys import TLS13
from hotport.wire.tlsrecords import Phase, Records

__all__ = ["Adopted"]


class Adopted(Records):
    """The server's side of an adopted connection; the counterpart of `hotport.worker.tlssession.Session`."""

    __slots__ = ()

    is_shaking = False

    @property
    def error(self) -> Exception | None:
        """What has ended the connection, once its phase is BROKEN."""
        return ConnectionAbortedError(f"TLS has failed: {self.why}") if self.phase is Phase.BROKEN else None

    @property
    def can_half_close(self) -> bool:
        """Whether one direction may end before the other; TLS 1.2 ends both at once (RFC 5246 section 7.2.1)."""
        return self.version == TLS13

    def extra(self, name: str, default: Any) -> Any:
        """See `asyncio.BaseTransport.get_extra_info`; there is no ``ssl_object``, and `default` for other names."""
        about = self.about
        match name:
            case "tls_layer":
                return self
            case "tls_about":
                return about
            case "cipher":
                return tuple(about.cipher)
            case "peercert":
                return about.peercert if about.peercert is None else _frozen(about.peercert)
            case "compression" | "ssl_object" | "sslcontext":
                return None
        return default


def _frozen(peercert: dict[str, Any]) -> dict[str, Any]:
    """Restore the tuples of `ssl.SSLObject.getpeercert`, which travel as lists."""
    return {name: _tuples(value) for name, value in peercert.items()}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
