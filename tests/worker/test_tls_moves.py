"""Whether a worker lets connections over TLS go, and takes them, and what is left to see of their handshake."""

from __future__ import annotations

import errno
import importlib.util
import logging
import resource
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hotport.errors import StartError
from hotport.kernel import tls as kernel_tls
from hotport.kernel.process import open_descriptors
from hotport.options import Options
from hotport.wire.tlsrecords import NotMovable, Phase, TlsState
from hotport.worker.tls import Tls
from hotport.worker.tlssession import Session
from tests.support import assert_three_lines
from tests.tls_peers import travelled
from tests.tls_support import Pki


@pytest.fixture(autouse=True)
def core_files() -> Iterator[None]:
    """Workers forbid them; this process may have them again."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def options(pki: Pki, tls_handoff: Any = "on", **more: Any) -> Options:
    cert = str(pki.directory / "server.pem")
    if not Path(cert).exists():
        pki.issue("server.pem", "localhost")
    return Options(tls_cert=(cert,), tls_handoff=tls_handoff, **more)


@contextmanager
def serving(options: Options) -> Iterator[Tls]:
    tls = Tls(options, alpn=["http/1.1"])
    try:
        yield tls
    finally:
        tls.close()


def shaken(tls: Tls, client: ssl.SSLContext) -> tuple[Session, ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    """A session whose handshake is done, and its client."""
    session, received, sent = tls.session(), ssl.MemoryBIO(), ssl.MemoryBIO()
    peer = client.wrap_bio(received, sent, server_hostname="localhost")
    for _ in range(3):
        with suppress(ssl.SSLWantReadError):
            peer.do_handshake()
        plain, written = session.receive(sent.read())
        assert plain == b""
        received.write(written)
    assert not session.is_shaking
    return session, peer, received, sent


def test_without_cryptography_three_lines_say_what_to_install(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StartError) as caught:
        Tls(options(pki))
    assert_three_lines(str(caught.value), "HP523")
    assert "pip install 'hotport[tls]'" in caught.value.fix


@pytest.mark.parametrize("suite", [None, "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305"])
def test_an_adopted_connection_goes_on_and_tells_what_its_handshake_has_shown(pki: Pki, suite: str | None) -> None:
    client = pki.client(pki.issue("client.pem", "me@example.org", common_name="Me"))
    client.set_alpn_protocols(["http/1.1"])
    if suite is not None:
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        client.set_ciphers(suite)
    with (
        serving(options(pki, tls_client_ca=str(pki.ca))) as old,
        serving(options(pki, tls_client_ca=str(pki.ca))) as new,
    ):
        session, peer, received, sent = shaken(old, client)
        peer.write(b"question")
        assert session.receive(sent.read()) == (b"question", b"")
        received.write(session.send(b"answer " * 9000))
        adopted = new.adopt(travelled(session.export()))
        assert (session.phase, adopted.phase) == (Phase.FROZEN, Phase.LIVE)
        received.write(adopted.send(b"and more"))
        got = b"".join(iter(lambda: _read(peer), b""))
        assert got == b"answer " * 9000 + b"and more"
        peer.write(b"again")
        assert adopted.receive(sent.read()) == (b"again", b"")
        nothing = object()
        for name in ("cipher", "peercert", "compression"):
            assert adopted.extra(name, nothing) == session.extra(name, nothing)
        assert adopted.can_half_close == session.can_half_close == (suite is None)
        assert (adopted.about.alpn, adopted.about.server_name) == ("http/1.1", "localhost")
        assert adopted.extra("ssl_object", "none") is None
        assert adopted.extra("tls_about", None) is adopted.about
        assert adopted.extra("tls_layer", None) is adopted
        assert adopted.extra("peername", "not here") == "not here"
        assert (adopted.error, adopted.why_not) == (None, "")
        adopted.receive(b"garbage")
        assert isinstance(adopted.error, ConnectionAbortedError)
        assert "no record" in str(adopted.error)


def _read(peer: ssl.SSLObject) -> bytes:
    try:
        return peer.read(1 << 16)
    except ssl.SSLWantReadError:
        return b""


def test_a_client_without_a_certificate_has_none_after_the_move(pki: Pki) -> None:
    with serving(options(pki)) as tls:
        session, *_ = shaken(tls, pki.client())
        adopted = tls.adopt(travelled(session.export()))
        assert adopted.extra("peercert", "none") == session.extra("peercert", "none")


def exported(pki: Pki, **more: Any) -> TlsState:
    with serving(options(pki, **more)) as tls:
        return shaken(tls, pki.client(pki.issue("client.pem", "me@example.org")))[0].export()


def test_a_worker_without_the_option_takes_none(pki: Pki) -> None:
    state = exported(pki)
    with serving(options(pki, "off")) as tls, pytest.raises(NotMovable, match="tls_handoff is off here"):
        tls.adopt(state)


@pytest.mark.parametrize("change", ["the file", "the mode", "none any more"])
def test_a_client_that_other_rules_have_let_in_is_refused(pki: Pki, change: str) -> None:
    state = exported(pki, tls_client_ca=str(pki.ca))
    more: dict[str, Any] = {"tls_client_ca": str(pki.ca)}
    if change == "the file":
        pki.ca.write_bytes(pki.ca.read_bytes() * 2)
    elif change == "the mode":
        more["tls_client_auth"] = "optional"
    else:
        more = {}
    with serving(options(pki, **more)) as tls, pytest.raises(NotMovable, match="has changed"):
        tls.adopt(state)


def test_a_connection_stays_while_something_is_under_way_in_openssl(pki: Pki) -> None:
    with serving(options(pki)) as tls:
        session, peer, _, sent = shaken(tls, pki.client())
        peer.write(b"x")
        session._incoming.write(sent.read())
        with pytest.raises(NotMovable, match="under way"):
            session.export()


def test_a_log_that_cannot_be_made_means_that_connections_stay(
    pki: Pki, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: str) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(kernel_tls, "memory_file", fail)
    with serving(options(pki)) as tls, caplog.at_level(logging.WARNING):
        session, *_ = shaken(tls, pki.client())
        assert session.why_not == "its keys cannot be logged (Function not implemented)"
    assert "will not move" in caplog.text


def test_a_log_that_cannot_be_opened_means_that_connections_stay(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    before = open_descriptors()
    monkeypatch.setattr(kernel_tls.KeyLog, "watch", fail)
    with serving(options(pki)) as tls:
        assert open_descriptors() == before
        session, *_ = shaken(tls, pki.client())
        assert "No such file" in session.why_not


def test_renewed_certificates_are_watched_and_a_worker_that_ends_watches_none(pki: Pki) -> None:
    with serving(options(pki)) as tls:
        early, *_ = shaken(tls, pki.client())
        tls.reload()
        late, *_ = shaken(tls, pki.client())
        tls.close()
        last, *_ = shaken(tls, pki.client())
        assert (early.why_not, late.why_not, last.why_not) == ("", "", "its worker leaves")


def test_secrets_do_not_leave_by_text(pki: Pki) -> None:
    state = exported(pki)
    with serving(options(pki)) as tls:
        adopted = tls.adopt(state)
        for text in (repr(adopted), repr(state), str(msgspec.structs.asdict(state)["about"])):
            assert repr(state.read_secret)[2:12] not in text
