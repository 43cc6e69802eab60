"""The TLS extension: what applications are told about their connection (ASGI TLS extension 0.2)."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import anyio
import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

import hotport
from hotport.adapters.asgi.tls import _distinguished_name
from tests.adapters.asgi_support import respond
from tests.support import DEADLINE_S
from tests.tls_support import Pki, connect
from tests.worker.test_tls import port_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


async def told(pki: Pki, clients: list[tuple[str, ssl.SSLContext]], **options: Any) -> list[dict[str, Any]]:
    """What the application is told of connections; two requests each, told apart by what it does to the first."""
    found: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["scheme"] == "https"
        found.append(scope["extensions"].pop("tls"))
        await respond(send, b"")

    def ask(port: int, name: str, context: ssl.SSLContext) -> None:
        with connect(port, context, name) as client:
            for _ in range(2):
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(4096).startswith(b"HTTP/1.1 200")

    with anyio.fail_after(DEADLINE_S):
        async with hotport.serve(app, bind="127.0.0.1:0", lifespan="off", **options) as server:
            for name, context in clients:
                await anyio.to_thread.run_sync(ask, port_of(server), name, context)
    assert found[0::2] == found[1::2]
    return found[0::2]


def first_certificate(file: str) -> str:
    text = Path(file).read_text()
    end = "-----END CERTIFICATE-----\n"
    return text[text.index("-----BEGIN CERTIFICATE") : text.index(end) + len(end)]


async def test_an_application_is_told_which_certificate_and_ciphers_were_used(pki: Pki) -> None:
    files = (pki.issue("a.pem", "localhost"), pki.issue("b.pem", "b.example"))
    old = pki.client()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256")
    one, two, three = await told(
        pki, [("localhost", pki.client()), ("b.example", pki.client()), ("localhost", old)], tls_cert=files
    )
    assert set(one) == {
        *("server_cert", "client_cert_chain", "client_cert_name", "client_cert_error", "tls_version", "cipher_suite")
    }
    assert one["server_cert"] == first_certificate(files[0])
    assert two["server_cert"] == first_certificate(files[1])
    assert (one["client_cert_chain"], one["client_cert_name"], one["client_cert_error"]) == ([], None, None)
    assert (one["tls_version"], one["cipher_suite"]) == (0x0304, 0x1302)  # TLS_AES_256_GCM_SHA384
    assert three["tls_version"] == 0x0303
    assert three["cipher_suite"] in (0xC02B, 0xC02F)


async def test_an_application_is_told_who_the_client_is(pki: Pki) -> None:
    server, client = pki.issue("a.pem", "localhost"), pki.issue("client.pem", "c.example", common_name='Müller, "Jo"')
    [found] = await told(pki, [("localhost", pki.client(client))], tls_cert=server, tls_client_ca=str(pki.ca))
    assert found["client_cert_chain"][0] == first_certificate(client)
    name = x509.load_pem_x509_certificate(first_certificate(client).encode()).subject
    assert found["client_cert_name"] == name.rfc4514_string()
    assert found["client_cert_error"] is None


async def test_without_tls_there_is_no_such_extension() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["scheme"], "tls" in scope["extensions"]))
        await respond(send, b"")

    async with (
        hotport.serve(app, bind="127.0.0.1:0", lifespan="off") as server,
        await anyio.connect_tcp("127.0.0.1", port_of(server)) as client,
    ):
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await client.receive()
    assert seen == [("http", False)]


LONG_NAMES = {
    "commonName": NameOID.COMMON_NAME,
    "countryName": NameOID.COUNTRY_NAME,
    "domainComponent": NameOID.DOMAIN_COMPONENT,
    "localityName": NameOID.LOCALITY_NAME,
    "organizationName": NameOID.ORGANIZATION_NAME,
    "organizationalUnitName": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "stateOrProvinceName": NameOID.STATE_OR_PROVINCE_NAME,
    "streetAddress": NameOID.STREET_ADDRESS,
    "userId": NameOID.USER_ID,
}


@pytest.mark.parametrize("text", ["x", " x ", "#1", "a+b", 'a,b;c"d', "<a>", "back\\slash ", "  ", "Ä", "a=b", "# #"])
def test_names_are_written_as_an_independent_library_does(text: str) -> None:
    parts: list[tuple[tuple[str, str], ...]] = [(("countryName", "DE"),)]
    parts += [((name, text),) for name in LONG_NAMES if name != "countryName"]
    parts.append((("commonName", "one"), ("userId", text)))
    name = x509.Name(
        [x509.RelativeDistinguishedName([x509.NameAttribute(LONG_NAMES[n], t) for n, t in part]) for part in parts]
    )
    assert _distinguished_name(tuple(parts)) == name.rfc4514_string()


def test_attributes_without_a_short_name_keep_theirs() -> None:
    parts = ((("emailAddress", "a@b"),), (("1.2.3.4", "x"),), (("commonName", "nul\0"),))
    assert _distinguished_name(parts) == "CN=nul\\00,1.2.3.4=x,emailAddress=a@b"
