"""Records are sealed and opened as the RFCs have it."""

from __future__ import annotations

import pytest

from hotport.wire.tlskeys import (
    HEADER_BYTES,
    PLAIN_BYTES_MAX,
    TLS12,
    TLS13,
    Alert,
    Content,
    Keys12,
    Keys13,
    RecordError,
    Suite,
    expand_label,
    split_master_secret,
    suite_of,
)

# RFC 8448 section 3: the simple 1-RTT handshake
CLIENT_SECRET = bytes.fromhex("9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5")
SERVER_SECRET = bytes.fromhex("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643")
DATA = bytes(range(0x32))
CLIENT_DATA = bytes.fromhex(
    "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b62974e1f5a6292a2"
    "977014bd1e3deae63aeebb21694915e4"
)
SERVER_DATA = bytes.fromhex(
    "17030300432e937e11ef4ac740e538ad36005fc4a46932fc3225d05f82aa1b36e30efaf97d90e6dffc602dcb501a59a8fcc49c4bf2e5f0a2"
    "1c0047c2abf332540dd032e167c2955d"
)
CLIENT_CLOSE = bytes.fromhex("1703030013c9872760655666b74d7ff1153efd6db6d0b0e3")
SERVER_CLOSE = bytes.fromhex("1703030013b58fd67166ebf599d24720cfbe7efa7a8864a9")


def suite13(name: str = "TLS_AES_128_GCM_SHA256") -> Suite:
    suite = suite_of(TLS13, name)
    assert suite is not None
    return suite


def test_keys_are_those_of_rfc_8448() -> None:
    assert expand_label("sha256", CLIENT_SECRET, b"key", 16).hex() == "17422dda596ed5d9acd890e3c63f5051"
    assert expand_label("sha256", CLIENT_SECRET, b"iv", 12).hex() == "5b78923dee08579033e523d9"


def test_records_are_those_of_rfc_8448() -> None:
    client, server = Keys13(suite13(), CLIENT_SECRET, 0), Keys13(suite13(), SERVER_SECRET, 1)  # behind a ticket
    assert client.seal(Content.DATA, DATA) == CLIENT_DATA
    assert client.seal(Content.ALERT, b"\1\0") == CLIENT_CLOSE
    assert server.seal(Content.DATA, DATA) == SERVER_DATA
    assert server.seal(Content.ALERT, b"\1\0") == SERVER_CLOSE
    reader = Keys13(suite13(), CLIENT_SECRET, 0)
    assert reader.open(CLIENT_DATA) == (Content.DATA, DATA)
    assert reader.open(CLIENT_CLOSE) == (Content.ALERT, b"\1\0")


SUITES = [
    (TLS13, "TLS_AES_128_GCM_SHA256"),
    (TLS13, "TLS_AES_256_GCM_SHA384"),
    (TLS13, "TLS_CHACHA20_POLY1305_SHA256"),
    (TLS12, "ECDHE-RSA-AES128-GCM-SHA256"),
    (TLS12, "AES256-GCM-SHA384"),
    (TLS12, "ECDHE-ECDSA-CHACHA20-POLY1305"),
]


def keys(version: int, name: str, sequence: int = 0) -> Keys12 | Keys13:
    suite = suite_of(version, name)
    assert suite is not None
    if version == TLS13:
        return Keys13(suite, bytes(48 if suite.hash == "sha384" else 32), sequence)
    return Keys12(suite, bytes(suite.key_bytes + suite.fixed_bytes), sequence, (1 << 64) - 1)


@pytest.mark.parametrize(("version", "name"), SUITES)
def test_a_record_opens_once_in_its_turn_and_unchanged(version: int, name: str) -> None:
    writer, reader = keys(version, name), keys(version, name)
    first, second = writer.seal(Content.DATA, b"first"), writer.seal(Content.HANDSHAKE, b"second")
    for wrong in (second, first[:-1] + bytes((first[-1] ^ 1,)), first[:HEADER_BYTES], first[: HEADER_BYTES + 9]):
        with pytest.raises(RecordError) as error:
            reader.open(wrong)
        assert error.value.alert == Alert.BAD_RECORD_MAC
    assert reader.open(first) == (Content.DATA, b"first")
    with pytest.raises(RecordError):
        reader.open(first)
    assert reader.open(second) == (Content.HANDSHAKE, b"second")
    assert (writer.sequence, reader.sequence) == (2, 2)


@pytest.mark.parametrize(("version", "name"), SUITES)
def test_a_record_holds_as_much_as_allowed_and_no_more(version: int, name: str) -> None:
    writer, reader = keys(version, name), keys(version, name)
    assert reader.open(writer.seal(Content.DATA, bytes(PLAIN_BYTES_MAX)))[1] == bytes(PLAIN_BYTES_MAX)
    with pytest.raises(RecordError) as error:
        reader.open(writer.seal(Content.DATA, b"x" * (PLAIN_BYTES_MAX + 1)))
    assert error.value.alert == Alert.RECORD_OVERFLOW


def padded(content: int, data: bytes, zeros: int) -> bytes:
    """A record of TLS 1.3 with padding (RFC 8446 section 5.4)."""
    writer = Keys13(suite13(), CLIENT_SECRET, 0)
    inner = data + bytes((content,)) + bytes(zeros)
    header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
    return header + writer._aead.encrypt(writer._iv.to_bytes(12, "big"), inner, header)


def test_padding_is_removed() -> None:
    assert Keys13(suite13(), CLIENT_SECRET, 0).open(padded(23, b"x\0", 300)) == (Content.DATA, b"x\0")
    assert Keys13(suite13(), CLIENT_SECRET, 0).open(padded(21, b"\1\0", 1)) == (Content.ALERT, b"\1\0")


@pytest.mark.parametrize("inner", [0, 5])
def test_a_record_of_padding_alone_is_refused(inner: int) -> None:
    with pytest.raises(RecordError) as error:
        Keys13(suite13(), CLIENT_SECRET, 0).open(padded(0, b"", inner))
    assert error.value.alert == Alert.UNEXPECTED_MESSAGE


def test_a_record_in_clear_is_refused() -> None:
    with pytest.raises(RecordError) as error:
        Keys13(suite13(), CLIENT_SECRET, 0).open(b"\x15\x03\x03\0\x02\1\0")
    assert error.value.alert == Alert.UNEXPECTED_MESSAGE


def test_an_update_changes_keys_on_both_sides_alike() -> None:
    writer, reader = Keys13(suite13(), CLIENT_SECRET, 5), Keys13(suite13(), CLIENT_SECRET, 5)
    before = writer.secret
    writer.update()
    assert (writer.sequence, writer.secret != before) == (0, True)
    record = writer.seal(Content.DATA, b"x")
    with pytest.raises(RecordError):
        reader.open(record)
    reader.update()
    assert reader.open(record)[1] == b"x"


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (TLS13, "TLS_AES_128_CCM_SHA256"),
        (TLS12, "ECDHE-ECDSA-AES128-CCM8"),
        (TLS12, "ECDHE-ECDSA-AES128-SHA256"),
        (TLS12, "ECDHE-ARIA128-GCM-SHA256"),
        (TLS12, "TLS_AES_128_GCM_SHA256"),
    ],
)
def test_other_suites_are_unknown(version: int, name: str) -> None:
    assert suite_of(version, name) is None


def test_explicit_nonces_count_up_and_wrap() -> None:
    writer = keys(TLS12, "AES128-GCM-SHA256")
    records = [writer.seal(Content.DATA, b"") for _ in range(3)]
    assert [record[5:13].hex() for record in records] == ["f" * 16, "0" * 16, "0" * 15 + "1"]


def test_a_master_secret_makes_keys_of_the_right_size() -> None:
    for version, name in SUITES:
        suite = suite_of(version, name)
        assert suite is not None
        ours, theirs = split_master_secret(suite, b"m" * 48, b"c" * 32, b"s" * 32)
        assert len(ours) == len(theirs) == suite.key_bytes + suite.fixed_bytes
        assert ours != theirs
