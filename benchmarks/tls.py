"""What TLS costs: hotport beside other ASGI servers, and beside an earlier hotport if its sources are there.

One worker each, all of its threads on one core; the load generator runs on another. TLS 1.3, with a key on P-256. Each
row starts its own servers and loads them in turns: of its rounds the first is dropped, and every other one goes through
the servers backwards. Ratios are made round by round, of what is done in a second of the server's processor time.

`keep-alive` has 100 bytes in each answer, `body` 16 KiB; `handshakes` are connections of one request each, without
resumption; `memory` is what an idle connection that had one request adds to the server's resident memory.
"""

from __future__ import annotations

import shlex
import ssl
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

import trustme

from benchmarks.common import Goal, Samples, arguments, save, show, wrk
from benchmarks.http import CONNECTIONS, Row, Run, Server, compared, launched, rates
from tests.tls_support import connect

#: The name of a hotport whose sources are given with ``--before``.
BEFORE: Final = "before"

APPLICATIONS: Final = """\
SMALL, LARGE = bytes(100), bytes(16384)


def answering(body):
    async def app(scope, receive, send):
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


small, large = answering(SMALL), answering(LARGE)
"""

_HOTPORT: Final = "--tls-cert {cert} --lifespan off --log-level warning"

#: What follows ``hotport serve``, or ``python -m``; the application comes behind it.
COMMANDS: Final[Mapping[str, str]] = {
    "hotport": _HOTPORT,
    BEFORE: _HOTPORT,
    "uvicorn": "uvicorn --loop uvloop --http httptools --ws none --lifespan off --no-access-log --log-level warning"
    " --port 0 --ssl-certfile {cert} --ssl-keyfile {cert}",
    "granian": "granian --interface asgi --no-access-log --log-level warning --port 0"
    " --ssl-certificate {chain} --ssl-keyfile {key} --http 1",
    "hypercorn": "hypercorn --worker-class uvloop --log-level warning --bind 127.0.0.1:0"
    " --certfile {cert} --keyfile {cert}",
}

RATE: Final = ("requests/CPU s",)


def load(server: Server, seconds: float, *, close: bool = False) -> tuple[float, int]:
    """Requests a second, and how many that were."""
    return wrk(server.port, seconds=seconds, connections=CONNECTIONS, close=close, scheme="https")


def memory(run: Run) -> dict[str, Samples]:
    """What an idle connection costs; a server that has had connections is no longer the same, so each starts anew."""
    found: dict[str, Samples] = defaultdict(Samples)
    for number, name in run.turns():
        if number == 0:
            continue
        with run.start(name) as server, ExitStack() as stack:
            before = server.rss_bytes()
            for _ in range(run.idle):
                stack.enter_context(_asked(server.port))
            found[f"{name} KiB"].append((server.rss_bytes() - before) / 1024 / run.idle)
    return found


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


CONTEXT: Final = _context()


def _asked(port: int) -> ssl.SSLSocket:
    """A connection that has had an answer of 100 bytes."""
    client = connect(port, CONTEXT)
    client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(bytes(100)):
        more = client.recv(65536)
        assert more, answer
        answer += more
    return client


def _ask(port: int) -> tuple[int, bytes]:
    with connect(port, CONTEXT) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = client.recv(65536)
        return int(answer.split()[1]), answer


ROWS: Final[Mapping[str, Row]] = {
    "keep-alive": Row(
        app="apps:small",
        measure=partial(rates, load=load),
        compare=RATE,
        goals={BEFORE: 1.0, "granian": 1.2, "uvicorn": 1.2},
    ),
    "body": Row(app="apps:large", measure=partial(rates, load=load), compare=RATE, goals={BEFORE: 1.0}),
    "handshakes": Row(
        app="apps:small", measure=partial(rates, load=partial(load, close=True)), compare=RATE, goals={BEFORE: 1.0}
    ),
    "memory": Row(app="apps:small", measure=memory, compare=("KiB",), goals={BEFORE: 1.0}, is_cost=True),
}


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    parser = arguments(__doc__, name="tls.json", rounds=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement [default: 2]")
    parser.add_argument("--idle", type=int, default=1000, help="connections whose memory is measured [default: 1000]")
    parser.add_argument("--before", type=Path, metavar="SRC", help="the src directory of an earlier hotport")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument(
        "--servers", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="SERVER", help=", ".join(COMMANDS)
    )
    options = parser.parse_args()
    names = [name for name in options.servers if name != BEFORE or options.before is not None]
    samples: dict[str, Samples] = {}
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory(prefix="hotport-bench-") as directory:
        files = _certificate(Path(directory))
        for name in options.only:
            row = ROWS[name]
            start = partial(started, row=row, before=options.before, files=files)
            found = row.measure(Run(names, options.rounds, options.seconds, start, options.idle))
            goals += compared(name, row, found, names)
            found = {f"{name}: {key}": values for key, values in found.items()}
            show(f"{options.rounds} rounds of {options.seconds:g} s", found)
            print(flush=True)
            samples |= found
    save(
        options.output,
        method=(__doc__ or "").strip(),
        samples=samples,
        goals=goals,
        seconds=options.seconds,
        servers=names,
    )
    return 0


def _certificate(directory: Path) -> dict[str, str]:
    leaf = trustme.CA().issue_cert("localhost", key_type=trustme.KeyType.ECDSA)
    cert, chain, key = directory / "both.pem", directory / "cert.pem", directory / "key.pem"
    leaf.private_key_and_cert_chain_pem.write_to_path(cert)
    leaf.cert_chain_pems[0].write_to_path(chain)
    leaf.private_key_pem.write_to_path(key)
    return {"cert": str(cert), "chain": str(chain), "key": str(key)}


def started(name: str, row: Row, before: Path | None, files: Mapping[str, str]) -> AbstractContextManager[Server]:
    """Start a server that serves a row's application."""
    command = [part.format(**files) for part in shlex.split(COMMANDS[name])]
    command = [row.app, *command] if name in ("hotport", BEFORE) else [*command, row.app]
    src = before if name == BEFORE else None
    return launched(name, {"apps.py": APPLICATIONS}, command, src=src, ask=_ask)


if __name__ == "__main__":
    sys.exit(main())
