"""Whatever takes its sockets as systemd passes them is served, restarted under load, and stopped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support import Answer, Hammer, Service, ask_line, http_get, need, write_code

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

PERL = """\
use strict; use warnings; use Socket;

my $leaving = 0;
$SIG{TERM} = sub { $leaving = 1 };
open(my $listener, "+<&=", 3) or die "descriptor 3: $!";
die "these descriptors are not for me" unless $ENV{LISTEN_PID} == $$ and $ENV{LISTEN_FDS} == 1;
socket(my $manager, AF_UNIX, SOCK_DGRAM, 0) or die "socket: $!";
send($manager, "READY=1\\nSTATUS=written in Perl\\n", 0, pack_sockaddr_un($ENV{NOTIFY_SOCKET})) or die "send: $!";
until ($leaving) {
    vec(my $readable = "", 3, 1) = 1;
    next unless select($readable, undef, undef, 0.1) > 0;
    accept(my $client, $listener) or next;  # another process was quicker
    sysread($client, my $request, 100);
    syswrite($client, "VERSION $ENV{HOTPORT_GENERATION} $$\\n");
}
"""

C = """\
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static volatile sig_atomic_t leaving;
static void leave(int number) { (void)number; leaving = 1; }

int main(void) {
    struct sigaction action = {.sa_handler = leave};
    sigaction(SIGTERM, &action, NULL);
    if (atoi(getenv("LISTEN_PID")) != getpid() || atoi(getenv("LISTEN_FDS")) != 1) return 9;
    struct sockaddr_un manager = {.sun_family = AF_UNIX};
    strncpy(manager.sun_path, getenv("NOTIFY_SOCKET"), sizeof manager.sun_path - 1);
    int notify = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (sendto(notify, "READY=1", 7, 0, (struct sockaddr *)&manager, sizeof manager) != 7) return 8;
    struct pollfd listener = {.fd = 3, .events = POLLIN};
    while (!leaving) {
        if (poll(&listener, 1, 100) <= 0) continue;
        int client = accept4(3, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0) continue;  /* another process was quicker */
        char text[200];
        if (read(client, text, sizeof text) < 0) perror("read");
        int length = snprintf(text, sizeof text, "VERSION %s %d\\n", getenv("HOTPORT_GENERATION"), (int)getpid());
        if (write(client, text, length) != length) perror("write");
        close(client);
    }
    return 0;
}
"""


def write_perl(directory: Path, version: str) -> tuple[str, ...]:
    (directory / "server.pl").write_text(PERL.replace("VERSION", version))
    return (need("perl"), "server.pl")


def write_c(directory: Path, version: str) -> tuple[str, ...]:
    compiler = need("gcc")
    source, fresh = directory / "server.c", directory / "server.new"
    source.write_text(C.replace("VERSION", version))
    subprocess.run([compiler, "-O", "-o", str(fresh), str(source)], check=True)
    fresh.replace(directory / "server")  # a running program cannot be written to
    return ("./server",)


WSGI = """\
import os

def app(environ, start_response):
    body = f"{version} {{os.environ['HOTPORT_GENERATION']}} {{os.getpid()}}".encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

ASGI = """\
import os

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            event = (await receive())["type"]
            await send({{"type": f"{{event}}.complete"}})
            if event == "lifespan.shutdown":
                return
    body = f"{version} {{os.environ['HOTPORT_GENERATION']}} {{os.getpid()}}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": body}})
"""

# Without --bind: gunicorn looks at LISTEN_FDS only if it has no address of its own.
GUNICORN = (sys.executable, "-m", "gunicorn", "--preload", "--no-control-socket", "--log-level", "warning")


def write_gunicorn_sync(directory: Path, version: str) -> tuple[str, ...]:
    write_code(directory / "app.py", WSGI.format(version=version))
    return (*GUNICORN, "--workers", "2", "app:app")


def write_gunicorn_asgi(directory: Path, version: str) -> tuple[str, ...]:
    write_code(directory / "app.py", ASGI.format(version=version))
    return (*GUNICORN, "-k", "asgi", "app:app")


def ask_http(port: int) -> Answer:
    status, body = http_get(port)
    if status != 200:
        raise ValueError(f"{status}: {body!r}")
    version, generation, pid = body.decode().split()
    return Answer(version, generation, int(pid))


def assert_restarted_under_load(
    service: Service,
    ask: Callable[[int], Answer],
    write: Callable[[Path, str], object],
    *,
    tolerated: frozenset[str] = frozenset(),
) -> None:
    """Two restarts with clients on it: none is refused, reset or cut, and the new code answers."""
    with Hammer(service.port, ask=ask) as hammer:
        hammer.wait_answers(version="one")
        for version, generation in (("two", "2"), ("three", "3")):
            before = service.descendants()
            write(service.directory, version)
            assert service.restart()["outcome"] == "done"
            hammer.wait_answers(version=version)
            assert ask(service.port)[:2] == (version, generation)
            assert not set(before) & set(service.descendants()), "the old generation is gone"
    assert hammer.failures.keys() <= tolerated, hammer.failures


@pytest.mark.parametrize(
    ("write", "ask"),
    [
        (write_perl, ask_line),
        (write_c, ask_line),
        (write_gunicorn_sync, ask_http),
        (write_gunicorn_asgi, ask_http),
    ],
    ids=["perl", "c", "gunicorn_sync", "gunicorn_asgi"],
)
def test_foreign_program_is_restarted_under_load_without_a_loss(
    tmp_path: Path, write: Callable[[Path, str], tuple[str, ...]], ask: Callable[[int], Answer]
) -> None:
    command = write(tmp_path, "one")
    with Service(tmp_path, "--workers", "2", "--", *command).wait_ready() as service:
        assert_restarted_under_load(service, ask, write)
        pids = service.descendants()
        assert service.run("stop").returncode == 0
        assert service.wait() == 0
        assert not any(map(psutil.pid_exists, pids))


def test_status_of_a_foreign_program_is_shown(tmp_path: Path) -> None:
    with Service(tmp_path, "--", *write_perl(tmp_path, "one")).wait_ready() as service:
        (worker,) = service.status()["workers"]
        assert worker["status"] == "written in Perl"
        assert worker["connections"] is None  # it cannot be asked
        assert worker["rss_bytes"] > 0


def test_broken_code_under_gunicorn_aborts_the_restart(tmp_path: Path) -> None:
    with Service(tmp_path, "--", *write_gunicorn_sync(tmp_path, "one")).wait_ready() as service:
        write_code(tmp_path / "app.py", "raise RuntimeError('broken beyond repair')")
        result = service.run("restart")
        assert result.returncode == 4
        assert "exited" in result.stdout
        assert "broken beyond repair" in service.log()
        assert ask_http(service.port).version == "one"


def test_program_that_says_nothing_is_ready_when_it_runs(tmp_path: Path) -> None:
    silent = PERL.replace("READY=1\\n", "")
    (tmp_path / "server.pl").write_text(silent.replace("VERSION", "one"))
    with Service(tmp_path, "--ready", "exec", "--", need("perl"), "server.pl").wait_ready() as service:
        assert_restarted_under_load(
            service,
            ask_line,
            lambda directory, version: (directory / "server.pl").write_text(silent.replace("VERSION", version)),
        )


def test_child_of_a_foreign_program_may_say_ready_for_it(tmp_path: Path) -> None:
    child = PERL.replace("VERSION", "one").replace("$ENV{LISTEN_PID} == $$ and ", "")
    (tmp_path / "child.pl").write_text(child)
    script = f"{need('perl')} child.pl & wait"
    with Service(tmp_path, "--", "/bin/sh", "-c", script).wait_ready() as service:
        assert ask_line(service.port).version == "one"


AIOHTTP = (EXAMPLES / "with_aiohttp.py").read_text()


#: How a connection ends that such a server has accepted, and closed before it has read the request (see
#: Kludex/uvicorn#2757). That is between the server and its clients; what hotport answers for is that nobody is refused.
CLOSED_UNREAD = frozenset({"ConnectionResetError", "BrokenPipeError", "IndexError"})


@pytest.mark.parametrize("example", ["with_uvicorn", "with_hypercorn", "with_aiohttp"])
def test_server_inside_a_worker_is_restarted_under_load_and_nobody_is_refused(tmp_path: Path, example: str) -> None:
    def write(directory: Path, version: str) -> None:
        write_code(directory / "app.py", ASGI.format(version=version))
        if example == "with_aiohttp":  # it has no ASGI application, but a handler
            code = f"import os\nVERSION = {version!r}\n" + AIOHTTP.replace(
                '"hello\\n"', "f\"{VERSION} {os.environ['HOTPORT_GENERATION']} {os.getpid()}\""
            )
            write_code(directory / "with_aiohttp.py", code)

    shutil.copy(EXAMPLES / f"{example}.py", tmp_path)
    write(tmp_path, "one")
    with Service(tmp_path, f"{example}:main", "--workers", "2").wait_ready() as service:
        assert_restarted_under_load(service, ask_http, write, tolerated=CLOSED_UNREAD)
        assert service.status()["last_restart"]["connections"] == {"server_finished": 2}
        result = service.run("stop")
        assert result.returncode == 0, service.log()


WRAPPED = """\
import os, signal, socket

if os.environ["LISTEN_PID"] == str(os.getpid()):
    listener = socket.socket(fileno=3)
else:
    listener = socket.create_server(("127.0.0.1", 0))
    open("address", "w").write("tcp://127.0.0.1:%d" % listener.getsockname()[1])
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
    manager.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
signal.pause()
"""


@pytest.mark.parametrize(("shell", "is_wrapped"), [("{}; exit", True), ("exec {}", False)], ids=["child", "exec"])
def test_program_below_a_wrapper_that_binds_by_itself_is_named(tmp_path: Path, shell: str, is_wrapped: bool) -> None:
    """`sh -c "gunicorn ..."`: ready, and every client of the port waited for ever, without a word."""
    (tmp_path / "wrapped.py").write_text(WRAPPED)
    command = shell.format(f"{sys.executable} wrapped.py")
    with Service(tmp_path, "--", "sh", "-c", command).wait_ready() as service:
        assert service.restart()["outcome"] == "done"  # what was begun for the first worker is over
        told = service.log_events("worker.binds_itself")
        if not is_wrapped:
            assert told == []
            return
        assert told[0]["addresses"][0].startswith("tcp://127.0.0.1:")
        assert told[-1]["addresses"] == [(tmp_path / "address").read_text()]
        assert told[0]["program"].endswith("wrapped.py")
        assert "LISTEN_PID" in told[0]["why"]
