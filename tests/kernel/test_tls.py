"""Contexts from files: what is read, and what is said when it cannot be."""

from __future__ import annotations

import fcntl
import os
import resource
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from hotport.errors import StartError
from hotport.kernel.process import forbid_core_files, open_descriptors
from hotport.kernel.tls import KeyLog, ServerContext, describe, load_certificate, verify_clients
from tests.support import assert_three_lines, need
from tests.tls_support import Pki


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def refused(cert: str, key: str | None = None) -> StartError:
    with pytest.raises(StartError) as caught:
        load_certificate(cert, key)
    assert_three_lines(str(caught.value), "HP507")
    assert cert in caught.value.what
    return caught.value


@pytest.mark.parametrize("has_expired", [False, True])
def test_names_and_expiry_are_read_even_of_one_that_has_expired(pki: Pki, has_expired: bool) -> None:
    file = pki.issue("a.pem", "A.example", "*.b.example", "10.0.0.1", has_expired=has_expired)
    found = describe(load_certificate(file, None))
    assert found.names == ("a.example", "*.b.example")
    assert (found.expires_at < 1e9) is has_expired


@pytest.mark.parametrize("kind", list(trustme.KeyType))
def test_keys_of_each_kind_are_taken(tmp_path: Path, kind: trustme.KeyType) -> None:
    file = tmp_path / "a.pem"
    trustme.CA(key_type=kind).issue_cert("a.example", key_type=kind).private_key_and_cert_chain_pem.write_to_path(file)
    assert describe(load_certificate(str(file), None)).names == ("a.example",)


def test_nothing_older_than_tls_1_2_is_spoken(pki: Pki) -> None:
    context = load_certificate(pki.issue("a.pem", "a.example"), None)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.suites["TLS_AES_128_GCM_SHA256"] == 0x1301


def test_the_certificate_itself_is_kept_without_its_chain(tmp_path: Path) -> None:
    leaf = trustme.CA().create_child_ca().issue_cert("a.example")
    file = tmp_path / "a.pem"
    leaf.private_key_and_cert_chain_pem.write_to_path(file)
    assert load_certificate(str(file), None).certificate == leaf.cert_chain_pems[0].bytes().decode()


def test_a_file_that_is_not_there_is_named(pki: Pki, tmp_path: Path) -> None:
    error = refused(str(tmp_path / "none.pem"))
    assert "no such file" in error.cause
    assert error.fix == f"ls -l {tmp_path}/none.pem"
    cert, _ = pki.issue_apart("a", "a.example")
    assert "none.key" in refused(cert, str(tmp_path / "none.key")).cause


def test_a_directory_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    assert "is a directory" in refused(str(tmp_path)).cause


def test_what_is_not_pem_is_refused_with_the_command_that_shows_it(tmp_path: Path) -> None:
    file = tmp_path / "it's.pem"
    file.write_bytes(b"\x30\x82\xff\x00")
    error = refused(str(file))
    assert "PEM" in error.cause
    assert error.fix.startswith("openssl x509 -in '")


def test_a_damaged_certificate_is_refused(pki: Pki, tmp_path: Path) -> None:
    file = Path(pki.issue("a.pem", "a.example"))
    file.write_text(file.read_text().replace("CERTIFICATE-----\nMII", "CERTIFICATE-----\nMIM"))
    assert "OpenSSL cannot use it" in refused(str(file)).cause


def test_a_certificate_without_its_key_is_refused(pki: Pki) -> None:
    cert, key = pki.issue_apart("a", "a.example")
    assert f"no private key in PEM form in {cert}" in refused(cert).cause
    load_certificate(cert, key)


def test_the_key_of_another_certificate_is_refused(pki: Pki, tmp_path: Path) -> None:
    cert, _ = pki.issue_apart("a", "a.example")
    _, other = pki.issue_apart("b", "b.example")
    error = refused(cert, other)
    assert f"{other} belongs to another certificate" in error.cause
    assert "-pubkey" in error.fix
    foreign = trustme.CA(key_type=trustme.KeyType.RSA).issue_cert("c", key_type=trustme.KeyType.RSA)
    foreign.private_key_pem.write_to_path(tmp_path / "rsa.key")
    assert "belongs to another certificate" in refused(cert, str(tmp_path / "rsa.key")).cause


def test_an_encrypted_key_is_refused_without_asking_and_the_command_decrypts_it(pki: Pki) -> None:
    openssl = need("openssl")
    cert, key = pki.issue_apart("a", "a.example")
    plain = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    Path(key).write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    error = refused(cert, key)
    assert "is encrypted" in error.cause
    command = error.fix.replace("openssl pkey", f"{openssl} pkey -passin pass:secret")
    subprocess.run(command, shell=True, check=True)
    load_certificate(cert, f"{key}.plain")


def test_authorities_of_clients_that_cannot_be_read_are_refused(pki: Pki, tmp_path: Path) -> None:
    context = load_certificate(pki.issue("a.pem", "a.example"), None)
    (tmp_path / "empty.pem").write_text("nothing\n")
    for name, cause in (
        ("none.pem", "no such file or directory"),
        ("empty.pem", "it holds no certificate in PEM form"),
    ):
        with pytest.raises(StartError) as caught:
            verify_clients(context, str(tmp_path / name), is_required=True)
        assert_three_lines(str(caught.value), "HP513")
        assert caught.value.cause == cause


# -- the key log --------------------------------------------------------------------------------------------


@pytest.fixture
def log() -> Iterator[KeyLog]:
    log = KeyLog()
    yield log
    log.close()


@pytest.fixture
def context(pki: Pki) -> ServerContext:
    return load_certificate(pki.issue("a.pem", "localhost"), None)


def shake(context: ssl.SSLContext, pki: Pki) -> None:
    """Shake hands in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(to_server, to_client, server_side=True)
    client = pki.client().wrap_bio(to_client, to_server, server_hostname="localhost")
    for end in (client, server) * 3:
        with suppress(ssl.SSLWantReadError):
            end.do_handshake()
    assert client.getpeercert()


def labels(log: KeyLog) -> set[str]:
    return {line.partition(" ")[0] for line in log.read().decode().splitlines()}


def test_secrets_of_a_handshake_are_read_once(log: KeyLog, context: ServerContext, pki: Pki) -> None:
    log.watch([context])
    assert log.read() == b""
    for _ in range(2):
        shake(context, pki)
        assert labels(log) >= {"CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0"}
        assert log.read() == b""


def test_only_the_watched_contexts_are_logged(log: KeyLog, context: ServerContext, pki: Pki) -> None:
    other = load_certificate(pki.issue("b.pem", "localhost"), None)
    log.watch([context])
    log.watch([other])
    shake(context, pki)
    assert log.read() == b""
    shake(other, pki)
    assert labels(log)


def ours() -> list[int]:
    links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in open_descriptors()}
    return [fd for fd, link in links.items() if "hotport-keylog" in link]


def test_no_program_inherits_the_log(log: KeyLog, context: ServerContext) -> None:
    """OpenSSL opens the file to stay open over exec."""
    log.watch([context])
    assert len(ours()) == 2
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in ours())
    assert sorted(log.descriptors()) == ours()  # a forked child has sockets in their place
    log.close()
    log.close()
    assert ours() == []
    assert log.descriptors() == ()


class Unwatchable(ssl.SSLContext):
    """As where /proc is not mounted."""

    @property
    def keylog_filename(self) -> str:
        return ""

    @keylog_filename.setter
    def keylog_filename(self, path: str) -> None:
        raise FileNotFoundError(path)


def test_a_context_that_cannot_be_watched_means_none_is(log: KeyLog, context: ServerContext) -> None:
    with pytest.raises(FileNotFoundError):
        log.watch([context, Unwatchable(ssl.PROTOCOL_TLS_SERVER)])
    assert str(context.keylog_filename) == "None"
    assert len(ours()) == 1


def test_a_process_that_crashes_leaves_no_core_file(tmp_path: Path) -> None:
    code = """
import os, resource
from hotport.kernel.process import forbid_core_files
forbid_core_files()
print(*resource.getrlimit(resource.RLIMIT_CORE))
os.abort()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    soft, hard = map(int, done.stdout.split())
    assert (soft in (0, 1), soft <= hard or hard == resource.RLIM_INFINITY) == (True, True)
    assert done.returncode < 0
    assert list(tmp_path.iterdir()) == []


def test_core_files_can_be_allowed_again() -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        forbid_core_files()
        assert resource.getrlimit(resource.RLIMIT_CORE)[1] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
