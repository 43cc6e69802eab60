"""The table of `http_edges` against uvicorn, which has the same parser: a difference is a decision, with its reason."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import h11
import pytest

from tests.adapters.asgi_support import DEADLINE_S, Answers
from tests.adapters.http_edges import EDGES, PROBE, Edge, Saw

ROOT = Path(__file__).parents[2]

#: What both define; what is not whole has no outcome yet.
COMPARED = [edge for edge in EDGES if edge.outcome != "waits"]

#: Where uvicorn does something else, and why we do not.
DIFFERENCES: Final[dict[str, str]] = {
    name: reason
    for reason, names in {
        "requests in front of a malformed one are answered first: their client may have waited for it": (
            "nonsense-behind",
        ),
        "trailers are no headers (RFC 9110 section 6.5.1): one could add a host or a cookie behind the checks": (
            "trailers",
        ),
        "a value ends before the white space behind it (RFC 9112 section 5)": [
            "length-white-space",
            "value-white-space",
        ],
        "an application would take the encoded body for the body; others disagree on where it ends": [
            "coding-identity-chunked",
            "coding-gzip-chunked",
            "coding-gzip-then-chunked",
            "coding-comma-before",
        ],
        "HTTP/1.0 has no transfer-encoding: a proxy may have taken the body for a request (RFC 9112 section 6.1)": [
            "coding-in-1.0",
            "coding-in-1.0-kept",
        ],
        "a head is bounded, and its client is told so (RFC 6585 section 5)": [
            "value-too-long",
            "value-endless",
            "fields-too-many",
            "fields-tiny",
            "fields-far-too-many",
            "target-too-long",
        ],
        "the host in the target counts (RFC 9112 section 3.2.2): a proxy has routed by it": [
            "absolute-form",
            "absolute-form-port",
            "absolute-form-ipv6",
            "absolute-form-user",
        ],
        "a target without a path has the path / (RFC 9110 section 4.2.3)": [
            "absolute-form-no-path",
            "absolute-form-query",
        ],
        "the request is well-formed, but nothing here does it (RFC 9110 section 15.6.2)": ("authority-form",),
        "anything but one valid host MUST be refused (RFC 9112 section 3.2): who is asked would be a guess": [
            "host-missing",
            "host-twice",
            "host-twice-different",
            "host-twice-in-1.0",
            "host-with-a-space",
            "host-with-a-path",
            "host-with-a-user",
            "host-with-a-bad-port",
            "host-list",
            "host-not-ascii",
            "host-missing-in-absolute-form",
        ],
        "a client of HTTP/1.0 that asks for keep-alive can be given it (RFC 9112 section 9.3)": [
            "1.0-keep-alive",
            "1.0-keep-alive-body",
        ],
        "a version that we do not speak is not answered as if we did (RFC 9110 section 15.6.6)": [
            "0.9-empty-line",
            "0.9-said",
            "2.0",
        ],
        "an upgrade that is declined is a request like others: with its body, and with what comes behind it": [
            "upgrade-unknown",
            "upgrade-body",
            "upgrade-body-begins-with-an-empty-line",
            "upgrade-chunked",
            "upgrade-h2c",
            "upgrade-bad-chunk",
            "upgrade-before-a-refused-one",
        ],
    }.items()
    for name in names
}


@pytest.fixture(scope="module")
def uvicorn() -> Iterator[tuple[str, int]]:
    """Its address; it listens before it runs, so there is nothing to wait for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        options = f"--fd {fd} --http httptools --loop asyncio --ws none --lifespan off --log-level critical"
        # Not less than a second: it is how long requests that it drops keep us waiting.
        command = [sys.executable, "-m", "uvicorn", "tests.adapters.http_edges:recorder", *options.split()]
        # It outlives the test that happens to come first, which the guard must not take it for.
        env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        process = subprocess.Popen([*command, "--timeout-keep-alive", "1"], cwd=ROOT, env=env, pass_fds=[fd])
        try:
            yield listener.getsockname()
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


class Outcome(NamedTuple):
    """What a client gets; of an answer that the server makes itself, the status."""

    answers: list[Saw | int]
    is_probe_answered: bool


def expected(edge: Edge) -> Outcome:
    refusal: list[Saw | int] = [edge.status] if edge.outcome == "refuses" else []
    return Outcome([200 if saw.method == "HEAD" else saw for saw in edge.served] + refusal, edge.outcome == "serves")


def outcome_of(edge: Edge, address: tuple[str, int]) -> Outcome:
    received = b""
    with socket.create_connection(address, DEADLINE_S) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(edge.sent + (PROBE if edge.outcome != "ends" else b""))
        with contextlib.suppress(ConnectionResetError):
            while data := sock.recv(65536):
                received += data
    reader, answers, rows = Answers(), list[Saw | int](), [*edge.served, Saw("GET", "/probe")]
    while received:
        row = rows.pop(0) if rows else Saw("GET", "/nothing")
        try:
            answer = reader.feed(received, method=row.method)
        except h11.RemoteProtocolError:
            answer = None
        if answer is None:
            answers.append(0)  # truncated
            break
        is_told = answer.status == 200 and row.method != "HEAD"
        answers.append(Saw.from_json(answer.body).like(row) if is_told else answer.status)
        received, reader.rest = reader.rest, b""
    last = answers[-1] if answers else None
    if isinstance(last, Saw) and last.path == "/probe":
        return Outcome(answers[:-1], True)
    return Outcome(answers, False)


@pytest.mark.parametrize("edge", COMPARED, ids=lambda edge: edge.name)
def test_edge_is_as_with_uvicorn_or_differs_for_a_reason(edge: Edge, uvicorn: tuple[str, int]) -> None:
    theirs = outcome_of(edge, uvicorn)
    if edge.name in DIFFERENCES:
        assert theirs != expected(edge), "no difference any more: take it off the list"
    else:
        assert theirs == expected(edge)


def test_differences_are_rows_of_the_table() -> None:
    assert not set(DIFFERENCES) - {edge.name for edge in COMPARED}
