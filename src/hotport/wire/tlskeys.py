"""The keys that protect TLS records, one direction at a time: TLS 1.3, and the AEAD suites of TLS 1.2.

`cryptography` (extra ``hotport[tls]``) does the ciphers. It is imported when the first keys are made, so that only
workers that open or seal a record have to load it.

Sources: RFC 8446 sections 5 and 7 (TLS 1.3); RFC 5246 sections 5 and 6 (TLS 1.2), RFC 5288 (AES-GCM in it), RFC 7905
(ChaCha20-Poly1305 in it).
"""

from __future__ import annotations

import enum
import hmac
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

__all__ = [
    "HEADER_BYTES",
    "PLAIN_BYTES_MAX",
    "TLS12",
    "TLS13",
    "Alert",
    "Content",
    "Keys",
    "Keys12",
    "Keys13",
    "RecordError",
    "Suite",
    "expand_label",
    "split_master_secret",
    "suite_of",
]

#: The versions of TLS, as records and messages have them.
TLS12: Final = 0x0303
TLS13: Final = 0x0304

#: Type, version and length (RFC 8446 section 5.1).
HEADER_BYTES: Final = 5

#: The longest content of a record (RFC 8446 section 5.1).
PLAIN_BYTES_MAX: Final = 1 << 14

TAG_BYTES: Final = 16

#: RFC 8446 section 5.5 allows 2^24.5 full records for a key of AES-GCM; half of it leaves room for what is under way.
AES_GCM_RECORDS_MAX: Final = 1 << 23

_header: Final = struct.Struct("!BHH").pack  # type, version, length
_additional12: Final = struct.Struct("!QBHH").pack  # sequence number, type, version, length


class Content(enum.IntEnum):
    """What a record carries."""

    CHANGE_CIPHER_SPEC = 20
    ALERT = 21
    HANDSHAKE = 22
    DATA = 23


class Alert(enum.IntEnum):
    """The alerts that are sent or treated specially (RFC 8446 section 6)."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    RECORD_OVERFLOW = 22
    ILLEGAL_PARAMETER = 47
    DECODE_ERROR = 50
    USER_CANCELED = 90
    NO_RENEGOTIATION = 100  # RFC 5246 section 7.2.2: a warning


class RecordError(Exception):
    """The peer has sent what it must not.

    Attributes:
        alert: What to tell it.
    """

    def __init__(self, alert: Alert, why: str) -> None:
        super().__init__(why)
        self.alert = alert


class Suite(NamedTuple):
    """What a cipher suite does to records.

    Attributes:
        hash: The name of its hash, as `hmac` has it.
        is_gcm: AES-GCM; otherwise ChaCha20-Poly1305.
        explicit_bytes: The part of the nonce that a record carries: AES-GCM in TLS 1.2.
        records_max: After so many records of one key, the next one needs another key; 0 if no number matters.
    """

    hash: str
    is_gcm: bool
    key_bytes: int
    explicit_bytes: int
    records_max: int

    @property
    def fixed_bytes(self) -> int:
        """The part of the nonce that both sides know."""
        return 12 - self.explicit_bytes


_SUITES13: Final = {
    "TLS_AES_128_GCM_SHA256": Suite("sha256", True, 16, 0, AES_GCM_RECORDS_MAX),
    "TLS_AES_256_GCM_SHA384": Suite("sha384", True, 32, 0, AES_GCM_RECORDS_MAX),
    "TLS_CHACHA20_POLY1305_SHA256": Suite("sha256", False, 32, 0, 0),
}

#: By the end of OpenSSL's names: how keys were agreed upon makes no difference to records.
_SUITES12: Final = {
    "AES128-GCM-SHA256": Suite("sha256", True, 16, 8, 0),
    "AES256-GCM-SHA384": Suite("sha384", True, 32, 8, 0),
    "CHACHA20-POLY1305": Suite("sha256", False, 32, 0, 0),
}


def suite_of(version: int, name: str) -> Suite | None:
    """Find a suite by OpenSSL's name; None if its records cannot be opened here (CBC, CCM, ARIA)."""
    if version == TLS13:
        return _SUITES13.get(name)
    return next((suite for end, suite in _SUITES12.items() if name == end or name.endswith(f"-{end}")), None)


def expand_label(hash_name: str, secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label with an empty context (RFC 8446 section 7.1); `size` is at most that of the hash."""
    label = b"tls13 " + label
    return hmac.digest(secret, struct.pack("!HB", size, len(label)) + label + b"\0\x01", hash_name)[:size]


def split_master_secret(suite: Suite, master: bytes, client_random: bytes, server_random: bytes) -> tuple[bytes, bytes]:
    """Derive what `Keys12` needs for the client's and the server's direction (RFC 5246 sections 5 and 6.3)."""
    seed = b"key expansion" + server_random + client_random
    key, fixed = suite.key_bytes, suite.fixed_bytes
    block, step = b"", seed
    while len(block) < 2 * (key + fixed):
        step = hmac.digest(master, step, suite.hash)
        block += hmac.digest(master, step + seed, suite.hash)
    nonces = block[2 * key :]
    return block[:key] + nonces[:fixed], block[key : 2 * key] + nonces[fixed : 2 * fixed]


def _aead(suite: Suite, key: bytes) -> AESGCM | ChaCha20Poly1305:
    from cryptography.hazmat.primitives.ciphers import aead

    return aead.AESGCM(key) if suite.is_gcm else aead.ChaCha20Poly1305(key)


class Keys13:
    """The keys of one direction of a TLS 1.3 connection.

    Args:
        secret: Its traffic secret (RFC 8446 section 7.2).
        sequence: How many records it has protected.
    """

    __slots__ = ("_aead", "_invalid", "_iv", "secret", "sequence", "suite")

    explicit = 0  # nonces of TLS 1.3 are the sequence number's

    def __init__(self, suite: Suite, secret: bytes, sequence: int) -> None:
        from cryptography.exceptions import InvalidTag

        self.suite = suite
        self._invalid = InvalidTag
        self._use(secret, sequence)

    def _use(self, secret: bytes, sequence: int) -> None:
        self.secret, self.sequence = secret, sequence
        self._aead = _aead(self.suite, expand_label(self.suite.hash, secret, b"key", self.suite.key_bytes))
        self._iv = int.from_bytes(expand_label(self.suite.hash, secret, b"iv", 12), "big")

    def update(self) -> None:
        """Derive and use the next keys, as after a KeyUpdate (RFC 8446 section 7.2)."""
        self._use(expand_label(self.suite.hash, self.secret, b"traffic upd", len(self.secret)), 0)

    def seal(self, content: Content, data: bytes) -> bytes:
        """Make the next record; `data` has at most `PLAIN_BYTES_MAX` bytes."""
        header = _header(Content.DATA, TLS12, len(data) + 1 + TAG_BYTES)
        nonce = (self._iv ^ self.sequence).to_bytes(12, "big")
        self.sequence += 1
        return header + self._aead.encrypt(nonce, data + _ENDS[content], header)

    def open(self, record: bytes) -> tuple[int, bytes]:
        """Open the next record; return the type of its content, and the content without padding.

        Raises:
            RecordError: It was not sealed with these keys as this record; it has no content, or too much.
        """
        header, sealed = record[:HEADER_BYTES], record[HEADER_BYTES:]
        if header[0] != Content.DATA:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, f"a record of type {header[0]} in clear")
        try:
            inner = self._aead.decrypt((self._iv ^ self.sequence).to_bytes(12, "big"), sealed, header)
        except self._invalid:
            raise RecordError(Alert.BAD_RECORD_MAC, "a record that was not sealed with this key as the next") from None
        self.sequence += 1
        if len(inner) > PLAIN_BYTES_MAX + 1:
            raise RecordError(Alert.RECORD_OVERFLOW, f"a record of {len(inner)} bytes")
        if not inner or not inner[-1]:
            inner = inner.rstrip(b"\0")
            if not inner:
                raise RecordError(Alert.UNEXPECTED_MESSAGE, "a record without a type")
        return inner[-1], inner[:-1]


class Keys12:
    """The keys of one direction of a TLS 1.2 connection with an AEAD suite; they never change.

    Args:
        secret: The key, and the fixed part of nonces behind it; see `split_master_secret`.
        sequence: How many records it has protected.
        explicit: The next explicit part of a nonce: any that was not used before, counted up from there (RFC 5288).
    """

    __slots__ = ("_aead", "_fixed", "_invalid", "explicit", "secret", "sequence", "suite")

    def __init__(self, suite: Suite, secret: bytes, sequence: int, explicit: int = 0) -> None:
        from cryptography.exceptions import InvalidTag

        self.suite, self.secret, self.sequence, self.explicit = suite, secret, sequence, explicit
        self._aead = _aead(suite, secret[: suite.key_bytes])
        self._fixed = secret[suite.key_bytes :]
        self._invalid = InvalidTag

    def _nonce(self, explicit: bytes) -> bytes:
        if explicit:
            return self._fixed + explicit
        return (int.from_bytes(self._fixed, "big") ^ self.sequence).to_bytes(12, "big")

    def seal(self, content: Content, data: bytes) -> bytes:
        """Make the next record; `data` has at most `PLAIN_BYTES_MAX` bytes."""
        explicit = self.explicit.to_bytes(8, "big") if self.suite.explicit_bytes else b""
        additional = _additional12(self.sequence, content, TLS12, len(data))
        sealed = self._aead.encrypt(self._nonce(explicit), data, additional)
        self.sequence += 1
        self.explicit = self.explicit + 1 & 0xFFFF_FFFF_FFFF_FFFF
        return _header(content, TLS12, len(explicit) + len(sealed)) + explicit + sealed

    def open(self, record: bytes) -> tuple[int, bytes]:
        """Open the next record; return its type and content.

        Raises:
            RecordError: It was not sealed with these keys as this record, or has too much content.
        """
        start = HEADER_BYTES + self.suite.explicit_bytes
        size = max(0, len(record) - start - TAG_BYTES)
        additional = _additional12(self.sequence, record[0], TLS12, size)
        try:
            plain = self._aead.decrypt(self._nonce(record[HEADER_BYTES:start]), record[start:], additional)
        except (self._invalid, ValueError):  # ValueError: not even a whole nonce
            raise RecordError(Alert.BAD_RECORD_MAC, "a record that was not sealed with this key as the next") from None
        self.sequence += 1
        if size > PLAIN_BYTES_MAX:
            raise RecordError(Alert.RECORD_OVERFLOW, f"a record of {size} bytes")
        return record[0], plain


Keys = Keys12 | Keys13

_ENDS: Final = {content: bytes((content,)) for content in Content}
