"""Connections to OpenSSL go on in our record layer, at any byte, and end as they would with OpenSSL."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from functools import partial

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hotport.wire.tlskeys import PLAIN_BYTES_MAX, TLS12, TLS13, Alert, Content, Keys13, suite_of
from hotport.wire.tlsrecords import (
    BARREN_RECORDS_MAX,
    KEY_UPDATE,
    MAY_READ,
    MAY_WRITE,
    TRANSITIONS,
    Counter,
    Event,
    IllegalTransition,
    NotMovable,
    Phase,
    Records,
    TlsAbout,
    advance,
)
from tests.tls_peers import (
    CBC12,
    CHACHA12,
    GCM12,
    KINDS,
    Client,
    Contexts,
    Observer,
    Server,
    connect,
    deliver,
    observe,
    whole_records,
)

#: What connections of each kind are made of, during the tests of this module.
MADE: dict[str, Contexts] = {}


@pytest.fixture(scope="module", autouse=True)
def all_contexts() -> Iterator[Callable[[str], Contexts]]:
    MADE.update({kind: Contexts(kind) for kind in KINDS})
    yield MADE.__getitem__
    for contexts in MADE.values():
        contexts.close()
    MADE.clear()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def contexts(all_contexts: Callable[[str], Contexts], kind: str) -> Contexts:
    return all_contexts(kind)


@pytest.fixture
def tls13(all_contexts: Callable[[str], Contexts]) -> Contexts:
    return all_contexts("TLSv1.3")


def our_pair(contexts: Contexts) -> tuple[Client, Server]:
    """Both sides on our record layer."""
    client, server = connect(contexts)
    client.take_over(server)
    server.move()
    return client, server


# -- phases -------------------------------------------------------------------------------------------------


def test_nothing_is_written_between_export_and_keep() -> None:
    assert not {Phase.FROZEN, Phase.GONE, Phase.BROKEN, Phase.CLOSED, Phase.CLOSING} & MAY_WRITE
    assert not {Phase.FROZEN, Phase.GONE} & MAY_READ
    assert {phase: event for (phase, event), after in TRANSITIONS.items() if after is Phase.LIVE} == {
        Phase.FROZEN: Event.KEPT
    }
    assert not [pair for pair in TRANSITIONS if pair[0] is Phase.GONE]


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", Event)
def test_pairs_that_are_not_in_the_table_change_nothing(phase: Phase, event: Event) -> None:
    if (phase, event) in TRANSITIONS:
        assert advance(phase, event) is TRANSITIONS[phase, event]
    else:
        with pytest.raises(IllegalTransition, match=str(event)):
            advance(phase, event)


def test_a_frozen_connection_refuses_to_write_until_it_is_kept(contexts: Contexts) -> None:
    client, server = connect(contexts)
    state = server.export()
    for write in (partial(server.session.wrote, b""), partial(server.session.send, b"x"), server.session.receive):
        with pytest.raises(IllegalTransition, match="frozen"):
            write()
    server.session.keep()
    server.send(b"kept")
    deliver(client, server)
    server.move()
    records = server.records
    assert records is not None
    records.export()
    for write in (partial(records.send, b"x"), records.receive):
        with pytest.raises(IllegalTransition, match="frozen"):
            write()
    assert records.close() == b""
    records.keep()
    server.send(b" again")
    deliver(client, server)
    assert client.got == b"kept again"
    records.export()
    records.leave()
    assert records.phase is Phase.GONE
    server.session.leave()
    assert server.session.phase is Phase.GONE
    assert state.write_sequence >= 1


# -- moving -------------------------------------------------------------------------------------------------


def test_a_connection_goes_on_where_openssl_was(contexts: Contexts) -> None:
    client, server = connect(contexts)
    observer = observe(server)
    big = bytes(range(256)) * 200
    for number in range(3):
        client.send(b"question")
        deliver(client, server)
        server.send(b"answer" + big)
        observer.feed(server.wire)
        deliver(client, server)
        if number < 2:
            server.move()
    assert server.got == b"question" * 3
    assert client.got == observer.got == (b"answer" + big) * 3
    assert server.records is not None
    assert server.records.about.alpn == "http/1.1"
    assert server.records.about.server_name == "localhost"


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 20, 30, 40, -1])
def test_a_record_may_be_cut_anywhere_at_the_move(contexts: Contexts, cut: int) -> None:
    client, server = connect(contexts)
    client.send(b"first")
    client.send(b"second")
    server.feed(client.wire[:cut])
    state = server.move()
    assert len(state.pending) < 5 + 24 + len(b"second")
    server.feed(client.wire[cut:])
    assert server.got == b"firstsecond"


def test_whole_records_may_travel(contexts: Contexts) -> None:
    client, server = connect(contexts)
    client.send(b"unread")
    server.session.pending = client.wire  # as when reading is paused
    server.move()
    assert server.got == b"unread"


def test_data_behind_the_handshake_in_one_piece_is_counted(contexts: Contexts) -> None:
    client, server = Client(contexts), Server(contexts)
    client.shake()
    while not client.is_ready:
        wire, client.wire = client.wire, b""
        server.feed(wire)
        wire, server.wire = server.wire, b""
        client.feed(wire)
    client.send(b"early")
    deliver(client, server)
    server.move()
    client.send(b" late")
    server.send(b"answer")
    deliver(client, server)
    assert (server.got, client.got) == (b"early late", b"answer")


def test_no_secret_is_in_the_text_of_a_state(contexts: Contexts) -> None:
    _, server = connect(contexts)
    state = server.export()
    for text in (repr(state), str(state), f"{[state]}", str(state.__rich_repr__())):
        assert "secret" not in text
        assert repr(state.read_secret)[2:20] not in text
    assert state.suite in repr(state)


def test_resumed_sessions_move(contexts: Contexts) -> None:
    first, server = connect(contexts)
    server.send(b"x")
    deliver(first, server)
    client = Client(contexts)
    client.connection.session = first.connection.session
    again = Server(contexts)
    client.shake()
    for _ in range(3):
        deliver(client, again)
    assert client.connection.session_reused
    again.move()
    again.send(b"resumed")
    client.send(b"yes")
    deliver(client, again)
    assert (client.got, again.got) == (b"resumed", b"yes")


@pytest.mark.parametrize("tickets", [0, 1, 5])
def test_session_tickets_are_counted(tickets: int) -> None:
    contexts = Contexts()
    contexts.server.num_tickets = tickets
    client, server = connect(contexts)
    assert server.move().write_sequence == tickets
    server.send(b"x")
    deliver(client, server)
    assert client.got == b"x"
    contexts.close()


def test_a_hello_retry_request_changes_nothing() -> None:
    contexts = Contexts()
    contexts.server.set_ecdh_curve("secp384r1")  # the client guesses another one
    client, server = connect(contexts)
    server.move()
    server.send(b"x")
    deliver(client, server)
    assert client.got == b"x"
    contexts.close()


# -- what cannot move ---------------------------------------------------------------------------------------


def why_not(server: Server) -> str:
    with pytest.raises(NotMovable) as error:
        server.export()
    return str(error.value)


def test_a_connection_cannot_move_during_its_handshake() -> None:
    with pytest.raises(NotMovable, match="its handshake is not done"):
        Counter().freeze(TlsAbout(("", "", 0)))


def test_a_suite_with_cbc_stays() -> None:
    contexts = Contexts(CBC12)
    client, server = connect(contexts)
    client.send(b"x")
    deliver(client, server)
    server.send(b"answer")
    deliver(client, server)
    assert (server.got, client.got) == (b"x", b"answer")
    assert "ECDHE-ECDSA-AES256-SHA384 in TLSv1.2 cannot be counted" in why_not(server)
    contexts.close()


def test_without_a_key_log_a_connection_stays(kind: str) -> None:
    contexts = Contexts(kind)
    contexts.log.watch([])
    client, server = connect(contexts)
    server.send(b"x" * 20000)
    deliver(client, server)
    assert len(client.got) == 20000
    assert why_not(server) == "its keys are not in the key log"
    contexts.close()


def hello_of(client: Client) -> bytes:
    client.shake()
    hello, client.wire = client.wire, b""
    return hello


def test_somebody_elses_handshake_with_the_same_random_changes_no_keys(contexts: Contexts) -> None:
    """Looked up by client random, the secrets of an attacker's handshake would encrypt the victim's data."""
    victim, attacker = Client(contexts), Client(contexts)
    server, attacked = Server(contexts), Server(contexts)
    hello, forged = hello_of(victim), hello_of(attacker)
    server.feed(hello)
    attacked.feed(forged[:11] + hello[11:43] + forged[43:])
    wire, server.wire = server.wire, b""
    victim.feed(wire)
    deliver(victim, server)
    server.move()
    server.send(b"for the victim")
    deliver(victim, server)
    assert victim.got == b"for the victim"


def test_lines_of_another_connection_in_the_log_mean_no_move(contexts: Contexts) -> None:
    client, server = Client(contexts), Server(contexts)
    hello = hello_of(client)
    labels = "CLIENT_RANDOM", "SERVER_TRAFFIC_SECRET_0"
    server.session.hear(hello)
    for random in (hello[11:43].hex(), "0" * 64):
        server.session.shook(b"", "".join(f"{label} {random} {'ab' * 32}\n" for label in labels).encode())
    server = follow(server, contexts, client, hello)
    assert why_not(server) == "its keys are not in the key log"


def follow(server: Server, contexts: Contexts, client: Client, hello: bytes) -> Server:
    """Shake hands with a hello that was counted already."""
    server.session._incoming.write(hello)
    with pytest.raises(ssl.SSLWantReadError):
        server.session._tls.do_handshake()
    server.wire = server.session._outgoing.read()
    server.session.shook(server.wire, contexts.log.read())
    deliver(client, server)
    return server


def test_a_client_that_was_asked_for_a_certificate_later_stays() -> None:
    contexts = Contexts()
    contexts.server.post_handshake_auth = contexts.client.post_handshake_auth = True
    contexts.authority.configure_trust(contexts.server)
    contexts.server.verify_mode = ssl.CERT_OPTIONAL
    client, server = connect(contexts)
    server.session._tls._sslobj.verify_client_post_handshake()  # type: ignore[attr-defined]
    server.send(b"x")
    assert "asked for a certificate" in why_not(server)
    deliver(client, server)
    client.send(b"y")
    deliver(client, server)
    assert (client.got, server.got) == (b"x", b"y")
    assert server.session._tls.getpeercert()
    contexts.close()


def test_a_server_that_has_said_goodbye_stays(contexts: Contexts) -> None:
    _, server = connect(contexts)
    with pytest.raises(ssl.SSLWantReadError):
        server.session._tls.unwrap()
    server.session.wrote(server.session._outgoing.read())
    assert "alert" in why_not(server)


def test_data_that_is_written_with_an_alert_is_counted(all_contexts: Callable[[str], Contexts]) -> None:
    _, server = connect(all_contexts(GCM12))
    keys = server.export().keys[1]
    server.keep()
    server.session.wrote(keys.seal(Content.DATA, b"bye") + keys.seal(Content.ALERT, b"\1\0"), 3)
    assert server.session._write_sequence == keys.sequence
    assert "alert" in why_not(server)


def test_a_session_ticket_after_the_handshake_is_counted(tls13: Contexts) -> None:
    _, server = connect(tls13)
    state = server.export()
    server.session.keep()
    ticket = state.keys[1].seal(Content.HANDSHAKE, b"\x04\0\0\2ok")
    server.session.wrote(ticket)
    assert server.export().write_sequence == state.write_sequence + 1


def test_a_client_that_closes_stays(contexts: Contexts) -> None:
    client, server = connect(contexts)
    client.send(b"bye")
    client.close()
    server.feed(client.wire)
    assert server.got == b"bye"
    assert "alert" in why_not(server)


def test_another_handshake_keeps_a_connection(all_contexts: Callable[[str], Contexts]) -> None:
    client, server = connect(all_contexts(GCM12))
    client.take_over(server)
    assert client.records is not None
    client.wire = client.records._write.seal(Content.HANDSHAKE, b"\1\0\0\0")
    server.feed(client.wire)
    assert "another handshake" in why_not(server)


def test_a_connection_does_not_move_inside_of_a_handshake_message(tls13: Contexts) -> None:
    for is_moved in (False, True):
        client, server = connect(tls13)
        client.take_over(server)
        if is_moved:
            server.move()
        keys = writer(client)
        server.feed(keys.seal(Content.HANDSHAKE, KEY_UPDATE[:3]))
        assert why_not(server) == "a handshake message is under way"
        server.feed(keys.seal(Content.HANDSHAKE, KEY_UPDATE[3:] + b"\0"))
        keys.update()
        server.feed(keys.seal(Content.DATA, b"x"))
        assert server.got == b"x"
        server.move()


def writer(end: Client | Server) -> Keys13:
    assert end.records is not None
    keys = end.records._write
    assert isinstance(keys, Keys13)
    return keys


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\xff\xff\1\2", b"\x80\x05\1\3\1\0\0\0"])
def test_garbage_goes_to_openssl_at_once(contexts: Contexts, garbage: bytes) -> None:
    server = Server(contexts)
    server.feed(garbage)
    assert server.error
    assert server.session.pending == b""
    assert "its client has sent" in server.session.why_not
    client, server = connect(contexts)
    server.feed(garbage + b"and more")
    assert server.error
    assert "its client has sent" in server.session.why_not
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        client.feed(server.wire)


def test_a_forged_record_ends_a_counted_connection(tls13: Contexts) -> None:
    client, server = connect(tls13)
    client.send(b"question")
    server.feed(client.wire[:-1] + b"?")
    assert server.error
    assert "cannot be counted" in why_not(server)
    with pytest.raises(IllegalTransition, match="broken"):
        server.send(b"x")


def test_a_change_cipher_spec_in_between_is_not_counted() -> None:
    counter = Counter()
    counter.is_shaking, counter.why_not = False, ""
    counter._suite = suite_of(TLS13, "TLS_AES_128_GCM_SHA256")
    counter._overhead = 22
    counter._read_secret = bytes(32)
    counter._inspect(b"\x14\x03\x03\0\1\1", is_read=True)
    assert (counter._read_sequence, counter.why_not) == (0, "")


# -- the client's hello -------------------------------------------------------------------------------------


def hello(extensions: bytes, *, random: bytes = b"r" * 32) -> bytes:
    body = b"\3\3" + random + b"\0" + b"\0\2\x13\1" + b"\1\0" + len(extensions).to_bytes(2, "big") + extensions
    return b"\1" + len(body).to_bytes(3, "big") + body


def record(data: bytes, kind: int = Content.HANDSHAKE) -> bytes:
    return bytes((kind,)) + b"\3\1" + len(data).to_bytes(2, "big") + data


NAME = b"\0\0" + b"\0\x0a" + b"\0\x08" + b"\0" + b"\0\5" + b"a.org"


@pytest.mark.parametrize("pieces", [1, 2, 9])
def test_a_server_name_is_read_from_any_number_of_records(pieces: int) -> None:
    counter, data = Counter(), hello(b"\0\x2b\0\0" + NAME + b"\0\1\0\1\2")
    for number in range(pieces):
        wire = record(data[len(data) * number // pieces : len(data) * (number + 1) // pieces])
        counter.hear(wire)
    assert counter.server_name == "a.org"
    assert counter._hello is not None
    assert counter._hello.random == b"r" * 32
    assert counter._hello.fragment_bytes_max == 1024


@pytest.mark.parametrize(
    "wire",
    [
        record(hello(b"")),
        record(hello(b"\0\0\0\x0a\0\x08\1\0\5a.org")),  # of a type that is unknown
        record(hello(b"\0\1\0\1\7")),
        record(hello(NAME.replace(b"a", b"\xe4"))),
        record(b"\1\0\0\4\3\3rr"),
        record(b"\2\0\0\4\3\3rr"),
        record(b"\1\xff\0\0"),
        record(b"\2\0", Content.ALERT),
    ],
)
def test_hellos_without_a_name_or_sense_are_no_accident(wire: bytes) -> None:
    counter = Counter()
    counter.hear(wire)
    counter.hear(record(b"more"))
    assert counter.server_name is None
    assert counter._hello is not None
    assert counter._hello.fragment_bytes_max == PLAIN_BYTES_MAX


def test_a_short_record_limit_of_the_client_is_kept(tls13: Contexts) -> None:
    client, server = connect(tls13)
    state = msgspec.structs.replace(server.export(), fragment_bytes_max=512)
    server.records = Records(state)
    server.send(bytes(2000))
    assert [len(each) for each in whole_records(server.wire)] == [534, 534, 534, 486]
    deliver(client, server)
    assert client.got == bytes(2000)


# -- states that cannot be ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"suite": "TLS_AES_128_CCM_SHA256"}, {"version": 0x0302}, {"fragment_bytes_max": 0}, {"read_sequence": -1}],
)
def test_impossible_states_are_refused(tls13: Contexts, change: dict[str, object]) -> None:
    _, server = connect(tls13)
    with pytest.raises(NotMovable):
        Records(msgspec.structs.replace(server.export(), **change))


def test_without_cryptography_a_connection_is_refused(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    _, server = connect(contexts)
    state = server.export()
    monkeypatch.setitem(__import__("sys").modules, "cryptography.exceptions", None)
    with pytest.raises(NotMovable, match=r"hotport\[tls\]"):
        Records(state)


# -- KeyUpdate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asks", [False, True])
def test_openssl_understands_our_key_updates(tls13: Contexts, asks: bool) -> None:
    client, server = connect(tls13)
    server.move()
    assert server.records is not None
    for number in range(3):
        server.wire += server.records.update_keys(asks=asks)
        server.send(b"a%d" % number)
        deliver(client, server)
        client.send(b"q%d" % number)
        deliver(client, server)
        server.move()
    assert (client.got, server.got) == (b"a0a1a2", b"q0q1q2")


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("has_answered", [False, True])
def test_a_key_update_that_openssl_has_read_is_counted(
    tls13: Contexts, asks: bool, number: int, has_answered: bool
) -> None:
    """OpenSSL answers one with its next write, or when it reads again: that it owes the answer has to travel."""
    client, server = connect(tls13)
    observer = observe(server)
    client.take_over(server)
    assert client.records is not None
    for _ in range(number):
        server.feed(client.records.update_keys(asks=asks))
    client.send(b"question")
    server.feed(client.wire)
    client.wire = b""
    if has_answered:
        server.send(b"answer")
    client.feed(server.wire)
    observer.feed(server.wire)
    server.wire = b""
    assert server.session.key_updates == number + observer.updates
    server.move()
    server.send(b" more")
    observer.feed(server.wire)
    deliver(client, server)
    assert client.got == observer.got == b"answer more"[0 if has_answered else 6 :]
    assert asks <= observer.updates <= asks * number
    assert client.records.key_updates == number + observer.updates


def test_our_layer_answers_many_key_updates_with_one(tls13: Contexts) -> None:
    client, server = our_pair(tls13)
    assert client.records is not None
    for _ in range(BARREN_RECORDS_MAX):
        client.wire += client.records.update_keys(asks=True)
    client.send(b"x")
    deliver(client, server)
    server.move()  # what is owed travels
    server.send(b"y")
    deliver(client, server)
    assert (client.got, server.got) == (b"y", b"x")
    assert client.records.key_updates == BARREN_RECORDS_MAX + 1


def test_keys_are_replaced_before_they_are_worn(tls13: Contexts) -> None:
    client, server = connect(tls13)
    observer = observe(server)
    server.move(records_max=3)
    for size in (1, 1, 1, 5 * PLAIN_BYTES_MAX, 1):
        server.send(b"x" * size)
    observer.feed(server.wire)
    deliver(client, server)
    assert client.got == observer.got == b"x" * (4 + 5 * PLAIN_BYTES_MAX)
    assert observer.updates == 3


# -- ends ---------------------------------------------------------------------------------------------------


def test_goodbyes_go_both_ways(contexts: Contexts) -> None:
    client, server = connect(contexts)
    server.move()
    client.close()
    server.feed(client.wire)
    assert server.records is not None
    assert phase(server) is Phase.HALF_CLOSED
    server.send(b"last words")
    client.wire = server.records.close()
    assert phase(server) is Phase.CLOSED
    assert server.records.close() == b""
    with pytest.raises(IllegalTransition, match="closed"):
        server.send(b"x")
    assert why_not(server) == "it is closed"
    assert server.records.receive(b"ignored") == (b"", b"")


def test_openssl_understands_our_goodbye(contexts: Contexts) -> None:
    client, server = connect(contexts)
    server.move()
    assert server.records is not None
    server.send(b"bye")
    server.wire += server.records.close()
    client._incoming.write(server.wire)
    assert client.connection.read(10) == b"bye"
    assert client.connection.read(10) == b""  # and not SSLEOFError
    assert phase(server) is Phase.CLOSING
    client.close()
    server.feed(client.wire)
    assert phase(server) is Phase.CLOSED


def phase(server: Server) -> Phase:
    assert server.records is not None
    return server.records.phase


def seal(client: Client, content: int, data: bytes) -> bytes:
    assert client.records is not None
    return client.records._write.seal(Content(content), data)


def alert_of(client: Client, server: Server) -> int | None:
    """The alert that the server has sent, as its client sees it."""
    wire, server.wire = server.wire, b""
    if not wire:
        return None
    assert client.records is not None
    content, plain = client.records._read.open(wire)
    assert content == Content.ALERT
    return plain[1]


BAD_13: list[tuple[str, Callable[[Client], bytes], Alert]] = [
    ("garbage", lambda client: b"GET / HTTP/1.1", Alert.UNEXPECTED_MESSAGE),
    ("in clear", lambda client: b"\x15\3\3\0\2\1\0", Alert.UNEXPECTED_MESSAGE),
    ("change cipher spec", lambda client: b"\x14\3\3\0\1\1", Alert.UNEXPECTED_MESSAGE),
    ("too long", lambda client: b"\x17\3\3\x41\1", Alert.RECORD_OVERFLOW),
    ("too much inside", lambda client: seal(client, 23, bytes(PLAIN_BYTES_MAX + 1)), Alert.RECORD_OVERFLOW),
    ("unsealed", lambda client: b"\x17\3\3\0\x20" + bytes(32), Alert.BAD_RECORD_MAC),
    ("sealed change cipher spec", lambda client: seal(client, 20, b"\1"), Alert.UNEXPECTED_MESSAGE),
    ("an alert too short", lambda client: seal(client, 21, b"\1"), Alert.DECODE_ERROR),
    ("empty handshake", lambda client: seal(client, 22, b""), Alert.UNEXPECTED_MESSAGE),
    ("other handshake", lambda client: seal(client, 22, b"\1\0\0\0"), Alert.UNEXPECTED_MESSAGE),
    ("long KeyUpdate", lambda client: seal(client, 22, b"\x18\0\0\2"), Alert.UNEXPECTED_MESSAGE),
    ("two KeyUpdates", lambda client: seal(client, 22, (KEY_UPDATE + b"\0") * 2), Alert.UNEXPECTED_MESSAGE),
    ("odd KeyUpdate", lambda client: seal(client, 22, KEY_UPDATE + b"\2"), Alert.ILLEGAL_PARAMETER),
    (
        "data inside of a message",
        lambda client: seal(client, 22, KEY_UPDATE) + seal(client, 23, b"x"),
        Alert.UNEXPECTED_MESSAGE,
    ),
    (
        "empty records",
        lambda client: b"".join(seal(client, 23, b"") for _ in range(BARREN_RECORDS_MAX + 1)),
        Alert.UNEXPECTED_MESSAGE,
    ),
]


@pytest.mark.parametrize(
    ("bad", "alert"), [(bad, alert) for _, bad, alert in BAD_13], ids=[name for name, *_ in BAD_13]
)
def test_bad_records_are_answered_with_the_right_alert(
    tls13: Contexts, bad: Callable[[Client], bytes], alert: Alert
) -> None:
    client, server = our_pair(tls13)
    client.send(b"before")
    server.feed(client.wire + bad(client) + b"behind")
    assert server.records is not None
    assert server.got == b"before"
    assert phase(server) is Phase.BROKEN
    assert server.records.why
    assert alert_of(client, server) == alert
    assert server.records.close() == b""
    assert server.records.receive(b"more") == (b"", b"")


def test_a_replayed_record_ends_the_connection(contexts: Contexts) -> None:
    client, server = our_pair(contexts)
    client.send(b"once")
    server.feed(client.wire * 2)
    assert server.got == b"once"
    assert alert_of(client, server) == Alert.BAD_RECORD_MAC


def test_openssl_is_told_of_a_forged_record(contexts: Contexts) -> None:
    client, server = connect(contexts)
    server.move()
    client.send(b"question")
    server.feed(client.wire[:-1] + b"?")
    client._incoming.write(server.wire)
    with pytest.raises(ssl.SSLError, match=r"(?i)bad.record.mac"):
        client.connection.read(1)


def test_after_our_goodbye_a_bad_record_is_not_answered(tls13: Contexts) -> None:
    _, server = our_pair(tls13)
    assert server.records is not None
    server.records.close()
    server.feed(b"garbage")
    assert (server.wire, phase(server)) == (b"", Phase.BROKEN)


@pytest.mark.parametrize(
    ("kind_", "alert", "after"),
    [
        ("TLSv1.3", b"\2\x28", Phase.BROKEN),
        ("TLSv1.3", b"\1\x28", Phase.BROKEN),  # its level says nothing (RFC 8446 section 6)
        ("TLSv1.3", b"\1\x5a", Phase.LIVE),  # user_canceled: close_notify follows
        (GCM12, b"\2\x28", Phase.BROKEN),
        (GCM12, b"\1\x28", Phase.LIVE),
    ],
)
def test_alerts_end_a_connection_by_their_meaning(
    all_contexts: Callable[[str], Contexts], kind_: str, alert: bytes, after: Phase
) -> None:
    client, server = our_pair(all_contexts(kind_))
    server.feed(seal(client, 21, alert))
    assert server.records is not None
    assert (phase(server), server.wire) == (after, b"")
    assert bool(server.records.why) == (after is Phase.BROKEN)


def test_renegotiation_is_declined(all_contexts: Callable[[str], Contexts]) -> None:
    client, server = our_pair(all_contexts(CHACHA12))
    server.feed(seal(client, 22, b"\1\0\0\0"))
    assert alert_of(client, server) == Alert.NO_RENEGOTIATION
    client.send(b"as before")
    deliver(client, server)
    assert server.got == b"as before"
    assert server.records is not None
    server.records.close()
    server.feed(seal(client, 22, b"\1\0\0\0"))
    assert (server.wire, phase(server)) == (b"", Phase.BROKEN)


def test_sending_nothing_writes_nothing(contexts: Contexts) -> None:
    _, server = connect(contexts)
    server.send(b"")
    server.move()
    server.send(b"")
    assert server.records is not None
    assert server.records.send(memoryview(b"")) == server.wire == b""
    assert server.records.about.cipher[0]


def test_versions_of_the_test_are_what_they_say(contexts: Contexts, kind: str) -> None:
    _, server = connect(contexts)
    assert server.export().version == (TLS13 if kind == "TLSv1.3" else TLS12)


# -- everything at random -----------------------------------------------------------------------------------

#: OpenSSL ends a connection after 32 KeyUpdates in all, data or not.
OPENSSL_KEY_UPDATES_MAX = 30

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([511, 16384, 16385, 40000]))


class Connection(RuleBasedStateMachine):
    """Data, KeyUpdates and moves in any order, delivered in pieces of any size."""

    kind = "TLSv1.3"

    @initialize(is_ours=st.booleans(), records_max=st.sampled_from([None, 2, 7]))
    def shake(self, is_ours: bool, records_max: int | None) -> None:
        self.client, self.server = connect(MADE[self.kind])
        self.observer: Observer = observe(self.server)
        self.records_max = records_max if self.kind == "TLSv1.3" else None
        if is_ours:
            self.client.take_over(self.server)
        self.asked = b""
        self.answered = b""
        self.serial = self.updates = 0

    def some(self, size: int) -> bytes:
        self.serial += 1
        return (b"%d." % self.serial * size)[:size]

    @rule(size=SIZES)
    def client_sends(self, size: int) -> None:
        data = self.some(size)
        self.asked += data
        self.client.send(data)

    @rule(size=SIZES)
    def server_sends(self, size: int) -> None:
        data = self.some(size)
        self.answered += data
        before = len(self.server.wire)
        self.server.send(data)
        self.observer.feed(self.server.wire[before:])

    @precondition(lambda self: self.client.records is not None and self.updates < OPENSSL_KEY_UPDATES_MAX)
    @rule(asks=st.booleans(), number=st.integers(1, 3))
    def client_updates(self, asks: bool, number: int) -> None:
        assert self.client.records is not None
        if self.kind != "TLSv1.3":
            return
        for _ in range(number):
            self.client.wire += self.client.records.update_keys(asks=asks)
        self.updates += number
        self.client_sends(1)

    @precondition(lambda self: self.kind == "TLSv1.3" and self.server.records is not None)
    @rule(asks=st.booleans())
    def server_updates(self, asks: bool) -> None:
        assert self.server.records is not None
        written = self.server.records.update_keys(asks=asks)
        self.server.wire += written
        self.observer.feed(written)
        self.server_sends(1)

    @precondition(lambda self: self.client.wire)
    @rule(size=st.one_of(st.integers(1, 30), st.just(1 << 20)))
    def reach_the_server(self, size: int) -> None:
        wire, self.client.wire = self.client.wire[:size], self.client.wire[size:]
        before = len(self.server.wire)
        self.server.feed(wire)
        self.observer.feed(self.server.wire[before:])

    @precondition(lambda self: self.server.wire)
    @rule(size=st.one_of(st.integers(1, 30), st.just(1 << 20)))
    def reach_the_client(self, size: int) -> None:
        wire, self.server.wire = self.server.wire[:size], self.server.wire[size:]
        self.client.feed(wire)

    @rule(is_kept=st.booleans())
    def move(self, is_kept: bool) -> None:
        """To another process; or not, since that refuses."""
        if is_kept:
            self.server.export()
            (self.server.records or self.server.session).keep()
        else:
            self.server.move(records_max=self.records_max)

    @invariant()
    def nothing_is_wrong(self) -> None:
        if hasattr(self, "asked"):
            assert self.asked.startswith(self.server.got)
            assert self.answered.startswith(self.client.got)
            assert not self.observer.alerts
            assert not self.server.error

    def teardown(self) -> None:
        if not hasattr(self, "asked"):
            return
        while self.client.wire or self.server.wire:
            if self.client.wire:
                self.reach_the_server(1 << 20)
            if self.server.wire:
                self.reach_the_client(1 << 20)
        assert self.server.got == self.asked
        assert self.client.got == self.observer.got == self.answered
        self.client.close()
        self.server.move()
        self.server.feed(self.client.wire)
        assert self.server.records is not None
        assert phase(self.server) is Phase.HALF_CLOSED


class ConnectionGcm12(Connection):
    kind = GCM12


class ConnectionChacha12(Connection):
    kind = CHACHA12


for machine in (Connection, ConnectionGcm12, ConnectionChacha12):
    machine.TestCase.settings = settings(
        max_examples=20, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )

TestConnection = Connection.TestCase
TestConnectionGcm12 = ConnectionGcm12.TestCase
TestConnectionChacha12 = ConnectionChacha12.TestCase
