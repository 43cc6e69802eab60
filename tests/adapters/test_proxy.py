"""Whom an ASGI application takes for its client when proxies speak for it, and where it believes to be mounted."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hotport.adapters.asgi.proxy import HOPS_MAX, forwarded
from hotport.adapters.asgi.spec import Receive, Scope, Send
from hotport.trust import Trusted
from tests.adapters.asgi_support import respond, serving

PEER = ("10.0.0.1", 5000)
TRUSTED = Trusted(["10.0.0.0/8", "2001:db8:ffff::1"])


def client_of(*hops: str, trusted: Trusted = TRUSTED, client: tuple[str, int] | None = PEER) -> tuple[str, int] | None:
    headers = [(b"host", b"x"), *((b"x-forwarded-for", line.encode("latin-1")) for line in hops)]
    return forwarded(headers, client, "http", trusted)[0]


@pytest.mark.parametrize(
    ("hops", "client"),
    [
        (["192.0.2.1"], ("192.0.2.1", 0)),
        (["192.0.2.1, 10.1.1.1"], ("192.0.2.1", 0)),
        (["192.0.2.1 ,\t10.1.1.1,2001:db8:ffff::1"], ("192.0.2.1", 0)),
        (["192.0.2.1", "10.1.1.1"], ("192.0.2.1", 0)),
        (["10.3.3.3, 10.1.1.1"], ("10.3.3.3", 0)),
        (["192.0.2.1:4711"], ("192.0.2.1", 4711)),
        (["2001:db8::1"], ("2001:db8::1", 0)),
        (["2001:DB8:0::1"], ("2001:db8::1", 0)),
        (["[2001:db8::1]"], ("2001:db8::1", 0)),
        (["[2001:db8::1]:4711"], ("2001:db8::1", 4711)),
        (["::ffff:192.0.2.1"], ("192.0.2.1", 0)),
        (["192.0.2.1, ::ffff:10.1.1.1"], ("192.0.2.1", 0)),
    ],
)
def test_the_client_is_the_nearest_hop_that_is_not_trusted(hops: Sequence[str], client: tuple[str, int]) -> None:
    assert client_of(*hops) == client


@pytest.mark.parametrize("spoof", ["127.0.0.1", "10.0.0.9", "198.51.100.7, 10.0.0.9", "[::1]:1", "garbage"])
def test_what_a_client_sends_itself_is_behind_what_the_proxy_has_seen(spoof: str) -> None:
    assert client_of(f"{spoof}, 192.0.2.1") == ("192.0.2.1", 0)
    assert client_of(spoof, "192.0.2.1") == ("192.0.2.1", 0)


@pytest.mark.parametrize(
    "garbage",
    [
        *("", "unknown", "_hidden", "192.0.2", "192.0.2.1:", "192.0.2.1:x", "192.0.2.1:65536", "192.0.2.1:-1"),
        *("[192.0.2.1]", "[2001:db8::1", "[2001:db8::1]x", "[2001:db8::1]:", "[", "2001:db8::1]", "192.0.2.1:\xb2"),
        *("192.0.2.1%1", "fe80::1%eth0", "0:" * 40, "192.0.2.1:" + "0" * 90),
        *("192.0.2.1 10.0.0.1", "for=192.0.2.1", '"[2001:db8::1]"', "192.0.2.1:00000080", "\xff"),
    ],
)
def test_garbage_ends_the_walk(garbage: str) -> None:
    assert client_of(garbage) == PEER
    assert client_of(f"192.0.2.1, {garbage}") == PEER
    assert client_of(f"192.0.2.1, {garbage}, 10.1.1.1") == ("10.1.1.1", 0)
    assert client_of(f"192.0.2.1, {garbage}, 10.1.1.1", client=None) == ("10.1.1.1", 0)


def test_whoever_trusts_everybody_takes_the_farthest() -> None:
    assert client_of("198.51.100.7, 192.0.2.1", trusted=Trusted("*")) == ("198.51.100.7", 0)


def test_the_walk_is_bounded() -> None:
    near = ", ".join(f"10.1.{n // 256}.{n % 256}" for n in range(HOPS_MAX))
    assert client_of(f"192.0.2.1, {near}") == ("192.0.2.1", 0)
    assert client_of(f"192.0.2.1, 10.2.2.2, {near}") == ("10.1.0.0", 0)


@given(st.text(st.characters(max_codepoint=255), max_size=40))
@example(",,,")
def test_no_text_breaks_it(text: str) -> None:
    found = client_of(text)
    assert found is not None
    assert 0 <= found[1] <= 65535


@pytest.mark.parametrize(
    ("scheme", "said", "result"),
    [
        ("http", ["https"], "https"),
        ("http", [" HTTPS "], "https"),
        ("http", ["wss"], "https"),
        ("https", ["http"], "http"),
        ("https", ["ws"], "http"),
        ("ws", ["https"], "wss"),
        ("ws", ["wss"], "wss"),
        ("wss", ["http"], "ws"),
        ("http", ["gopher"], "http"),
        ("https", [""], "https"),
        ("http", ["http, https"], "https"),
        ("http", ["https, http"], "http"),
        ("http", ["https", "http"], "http"),
        ("https", ["https, gopher"], "https"),
    ],
)
def test_the_scheme_is_what_the_nearest_proxy_says(scheme: str, said: list[str], result: str) -> None:
    headers = [(b"x-forwarded-proto", each.encode()) for each in said]
    assert forwarded(headers, PEER, scheme, TRUSTED) == (PEER, result)


def test_nothing_else_is_believed() -> None:
    headers = [
        (b"host", b"x"),
        (b"forwarded", b"for=192.0.2.1;proto=https"),
        (b"x-forwarded-host", b"evil"),
        (b"x-real-ip", b"192.0.2.1"),
    ]
    assert forwarded(headers, PEER, "http", TRUSTED) == (PEER, "http")


# -- over connections ---------------------------------------------------------------------------------------

FORWARDED = b"X-Forwarded-For: 198.51.100.7, 192.0.2.1\r\nX-Forwarded-Proto: https\r\n"


async def tell(scope: Scope, receive: Receive, send: Send) -> None:
    keys = ("client", "scheme", "root_path", "path", "server")
    told = {key: scope[key] for key in keys} | {"raw_path": scope["raw_path"].decode()}
    await respond(send, json.dumps(told).encode())


@pytest.mark.anyio
async def test_a_trusted_peer_is_believed_for_each_request_anew() -> None:
    async with serving(tell, trusted_proxy=["127.0.0.1"]) as rig:
        client, _ = await rig.connect()
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n" + FORWARDED + b"\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n")
        first, second = json.loads((await client.answer()).body), json.loads((await client.answer()).body)
    assert (first["client"], first["scheme"]) == (["192.0.2.1", 0], "https")
    assert (second["client"][0], second["scheme"]) == ("127.0.0.1", "http")


@pytest.mark.anyio
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
async def test_a_peer_that_is_not_trusted_is_not_believed(family: socket.AddressFamily) -> None:
    async with serving(tell, trusted_proxy=["10.0.0.0/8"]) as rig:
        client, _ = await rig.connect(family=family)
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n" + FORWARDED + b"\r\n")
        told = json.loads((await client.answer()).body)
    assert told["scheme"] == "http"
    assert told["client"] is None or told["client"][0] == "127.0.0.1"


@pytest.mark.anyio
async def test_a_peer_on_a_unix_socket_is_believed_if_it_is_trusted() -> None:
    async with serving(tell, trusted_proxy=["unix"]) as rig:
        client, _ = await rig.connect(family=socket.AF_UNIX)
        await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n" + FORWARDED + b"\r\n")
        told = json.loads((await client.answer()).body)
    assert (told["client"], told["scheme"]) == (["192.0.2.1", 0], "https")


@pytest.mark.anyio
async def test_paths_begin_with_the_root_path() -> None:
    async with serving(tell, root_path="/api") as rig:
        client, _ = await rig.connect()
        await client.send(b"GET /a%20b?c HTTP/1.1\r\nHost: x\r\n\r\n")
        told = json.loads((await client.answer()).body)
    assert (told["root_path"], told["path"], told["raw_path"]) == ("/api", "/api/a b", "/api/a%20b")
