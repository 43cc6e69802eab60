"""How long new code takes to serve.

From sending the request for a restart to hearing that it is committed, by the client's clock, beside what a bare
interpreter of the same version needs, from its fork on, to import the modules that a ready worker has, in the same
order. In pairs, alternating; the first pair is dropped. Nothing else of a worker's life is in the bare one: the ratio
is what hotport, the event loop and the application's startup add.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Goal, Samples, arguments, save, show
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import Progress, Reply, RestartRequest, decode, encode
from tests.support import DEADLINE_S, Service, http_get

RATIO: Final = 1.5

#: Says which modules are loaded, so that both sides import the same.
APPLICATION: Final = """\
import sys
{imports}


async def app(scope, receive, send):
    assert scope["type"] == "http"
    body = "\\n".join(sys.modules).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": body}})
"""

APPLICATIONS: Final = {
    "plain ASGI": "",
    "Starlette": "from starlette.applications import Starlette\n"
    "from starlette.responses import JSONResponse\n"
    "from starlette.routing import Route",
}


def main() -> int:
    """Measure and report; the exit code does not depend on the goals."""
    options = arguments(__doc__, name="restart.json", rounds=15).parse_args()
    samples: dict[str, Samples] = {}
    goals = []
    modules: dict[str, int] = {}
    for name, imports in APPLICATIONS.items():
        ready, commit, bare, count = measure(imports, options.rounds)
        ratio = commit.to(bare)
        modules[name] = count
        samples |= {f"{name}: ready ms": ready, f"{name}: commit ms": commit, f"{name}: bare import ms": bare}
        samples[f"{name}: ratio"] = ratio
        goals.append(Goal(f"{name}, {count} modules: commit to bare import", ratio.median, at_most=RATIO))
    show(f"{options.rounds} rounds", samples)
    print()
    save(options.output, method=(__doc__ or "").strip(), samples=samples, goals=goals, modules=modules)
    return 0


def measure(imports: str, rounds: int) -> tuple[Samples, Samples, Samples, int]:
    """Milliseconds to ready, to the commit, and to import; and how many modules that are."""
    ready, commit, bare = Samples(), Samples(), Samples()
    with tempfile.TemporaryDirectory(prefix="hotport-bench-") as name:
        directory = Path(name)
        (directory / "app.py").write_text(APPLICATION.format(imports=imports))
        options = ("--settle", "0", "--log-level", "warning", "--lifespan", "off")
        with Service(directory, "app:app", *options) as service:
            service.wait_ready()
            loaded = http_get(service.port)[1].decode().split("\n")
            code = _import_all(loaded, directory)
            for number in range(rounds + 1):
                reached = _restart(service)
                elapsed = _run(code, directory)
                if number:  # the first pair warms up
                    ready.append(reached["restart.ready"])
                    commit.append(reached["restart.committed"])
                    bare.append(elapsed)
    return ready, commit, bare, len(loaded)


def _restart(service: Service) -> dict[str, float]:
    """Restart, and wait for the end; milliseconds from the request to each piece of news."""
    heard: dict[str, float] = {}
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(str(service.runtime / "control.sock"))
        decoder = FrameDecoder()
        began = time.perf_counter()
        sock.sendall(encode_frame(encode(RestartRequest())))
        while data := sock.recv(65536):
            for reply in (decode(payload, Reply) for payload in decoder.feed(data)):
                if isinstance(reply, Progress):
                    heard[reply.event] = (time.perf_counter() - began) * 1000
    return heard


def _import_all(loaded: Sequence[str], directory: Path) -> str:
    """A program that imports these modules in this order, as far as they can be imported by their names.

    Packages that a worker keeps out, although some library imports them where they are installed, are kept out here
    as well (`hotport.observe.logs` does so with rich): the bare interpreter must not import more.
    """
    wanted = [name for name in loaded if not name.startswith("__")]
    probe = (
        "import importlib, sys\n"
        "sys.modules.update(dict.fromkeys(sys.argv[1].split()))\n"
        "found = []\n"
        "for name in sys.argv[2].split():\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError: continue\n"
        "    found.append(name)\n"
        "print(*found)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    absent: set[str] = set()
    roots = {name.partition(".")[0] for name in loaded}
    while True:
        found, everything = subprocess.run(
            [sys.executable, "-P", "-c", probe, " ".join(absent), " ".join(wanted)],
            env=_environment(directory),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        more = set(everything.split()) - roots - absent
        if not more:
            break
        absent |= more
    lines = [f"import {name}" for name in found.split()]
    keep_out = f"import sys; sys.modules.update(dict.fromkeys({sorted(absent)!r}))"
    return "\n".join([keep_out, *lines, "import os", "os._exit(0)"])  # taking an interpreter apart is no part of it


def _run(code: str, directory: Path) -> float:
    """Milliseconds from fork to exit."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", code], env=_environment(directory), check=True)
    return (time.perf_counter() - began) * 1000


def _environment(directory: Path) -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{directory}{os.pathsep}{inherited}" if inherited else str(directory)}


if __name__ == "__main__":
    sys.exit(main())
