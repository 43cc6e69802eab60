from __future__ import annotations

from typing import Any

import pytest

from hotport.options import Options
from hotport.trust import Trusted, parse_host


@pytest.mark.parametrize(
    ("entries", "peer", "is_trusted"),
    [
        ([], ("127.0.0.1", 1), False),
        ([], "", False),
        (["127.0.0.1"], ("127.0.0.1", 1), True),
        (["127.0.0.1"], ("127.0.0.2", 1), False),
        (["127.0.0.1"], ("::ffff:127.0.0.1", 1, 0, 0), True),
        (["::ffff:192.0.2.1"], ("192.0.2.1", 1), True),
        (["2001:DB8:0::1"], ("2001:db8::1", 1, 0, 0), True),
        (["fe80::1"], ("fe80::1%eth0", 1, 0, 2), True),
        (["10.0.0.0/8"], ("10.255.0.1", 1), True),
        (["10.0.0.0/8"], ("11.0.0.1", 1), False),
        (["10.0.0.0/8"], ("::ffff:10.0.0.1", 1, 0, 0), True),
        (["10.0.0.0/8", "2001:db8::/32"], ("2001:db8:1::", 1, 0, 0), True),
        (["127.0.0.1"], "", False),
        (["unix"], "", True),
        (["unix"], b"\0abstract", True),
        (["unix"], ("127.0.0.1", 1), False),
        (["*"], ("203.0.113.9", 1), True),
        (["*"], "", True),
        (["*", "unix"], None, False),
    ],
)
def test_only_listed_peers_are_trusted(entries: list[str], peer: Any, is_trusted: bool) -> None:
    assert Trusted(entries).peer(peer) is is_trusted


def test_by_default_proxies_on_this_machine_are_trusted() -> None:
    trusted = Trusted(Options().trusted_proxy)
    assert all(trusted.peer(peer) for peer in [("127.0.0.1", 1), ("::1", 1, 0, 0), ""])
    assert not trusted.peer(("192.168.0.1", 1))


@pytest.mark.parametrize("text", ["", "localhost", "1.2.3", "01.2.3.4", "[::1]", "1.2.3.4:80", "_hidden", "unknown"])
def test_what_is_no_address_is_nobody(text: str) -> None:
    assert parse_host(text) is None
    assert not Trusted(["127.0.0.1", "unix"]).peer((text, 1))


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("localhost", "an address, a network like"),
        ("", "an address, a network like"),
        ("10.0.0.0/33", "an address, a network like"),
        ("10.0.0.1/8", "the network is 10.0.0.0/8"),
    ],
)
def test_an_entry_that_is_none_says_what_would_be(entry: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Trusted(["127.0.0.1", entry])
