"""`hotport why`, in networks of its own, about programs that nobody here wrote."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.netns import fill, isolated
from hotport.model.bind import Can
from tests.net.cells import STRANGER
from tests.support import DEADLINE_S, HOTPORT, eventually, need

PORT = 20_000
TRACED = "bind,listen,connect,sendto,sendmsg,sendmmsg"

#: May read the interpreter wherever it lies, and nothing else that root may.
AS_STRANGER = (
    *("env", "--unset=COVERAGE_PROCESS_CONFIG", "--unset=COVERAGE_PROCESS_START"),
    *("setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"),
    *(f"--{name}=-all,+dac_read_search" for name in ("inh-caps", "ambient-caps", "bounding-set")),
)


def why(*args: str, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit code and page."""
    done = subprocess.run(
        [*prefix, *HOTPORT, "why", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd="/",
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def facts(*args: str, prefix: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    code, text = why(*args, "--json", prefix=prefix)
    found: dict[str, Any] = json.loads(text)
    return code, found


@contextmanager
def running(*command: str, ready: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """A program, once it does what `ready` looks for."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not ready():  # programs of other people do not say when they listen
                assert time.monotonic() < deadline
                assert process.poll() is None, f"{command[0]} has ended"
            yield process
        finally:
            process.kill()


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), DEADLINE_S):
        return True
    return False


# -- programs of other people ---------------------------------------------------------------------------------------


def test_http_server_of_python_is_named_and_so_is_what_it_leaves() -> None:
    found = isolated(http_server)
    assert found["serving"][0] == Can.NO
    assert re.match(
        r"pid \d+ \(\S*python\S* -m http\.server .*\) is listening on 0\.0\.0\.0:20000", found["serving"][1]
    )
    assert found["after"][0] == Can.UNKNOWN
    assert "in TIME_WAIT on 127.0.0.1:20000" in found["after"][1]
    assert found["probed"] == Can.YES  # it has set SO_REUSEADDR


def http_server() -> dict[str, Any]:
    result: dict[str, Any] = {}
    command = (sys.executable, "-m", "http.server", str(PORT), "--directory", "/var/empty")
    with running(*command, ready=lambda: answers(PORT)) as process:
        _, found = facts(str(PORT))
        result["serving"] = found["free"], f"{found['answers']['reuseaddr']['who']}"
        with socket.create_connection(("127.0.0.1", PORT)) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while client.recv(65536):  # it closes first
                pass
        process.terminate()
        process.wait(DEADLINE_S)
        _, found = facts(str(PORT))
        result["after"] = found["free"], found["answers"]["reuseaddr"]["who"]
        result["probed"] = facts(str(PORT), "--probe")[1]["free"]
    return result


def test_listener_that_leaked_into_sleep_is_told() -> None:
    code, found = isolated(leaked_listener)
    assert code == 1
    assert re.match(r"pid \d+ \(sleep 1000, user root.*\) is listening on", found["answers"]["none"]["who"])
    (risk,) = (risk for risk in found["risks"] if risk.startswith("no process accepts"))
    assert "clients hang" in risk


def leaked_listener() -> tuple[int, dict[str, Any]]:
    with ExitStack() as stack:
        server = socket.create_server(("127.0.0.1", PORT))
        with server:
            heir = subprocess.Popen(["sleep", "1000"], pass_fds=[server.fileno()])
        stack.enter_context(heir)
        stack.callback(heir.kill)
        client = stack.enter_context(socket.create_connection(("127.0.0.1", PORT)))
        # What has to be old is the connection, and nothing but time makes it so: the client's own data would not do.
        client.settimeout(1.2)
        with suppress(TimeoutError):
            client.recv(1)
        return facts(str(PORT))


def test_haproxy_and_its_reuseport_group_are_named() -> None:
    haproxy = need("haproxy")
    code, text, risks = isolated(lambda: proxied(haproxy))
    assert code == 1
    assert "haproxy" in text
    assert any("can join by SO_REUSEPORT" in risk for risk in risks)


def proxied(haproxy: str) -> tuple[int, str, list[str]]:
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as file:
        file.write(
            "defaults\n mode http\n timeout client 9s\n timeout server 9s\n timeout connect 9s\n"
            f"frontend f\n bind 127.0.0.1:{PORT}\n http-request return status 200\n"
        )
        file.flush()
        with running(haproxy, "-db", "-f", file.name, ready=lambda: answers(PORT)):
            code, found = facts(str(PORT))
            return code, found["answers"]["none"]["who"], found["risks"]


def test_redis_is_named() -> None:
    redis = need("redis-server")
    command = (redis, "--port", str(PORT), "--bind", "127.0.0.1", "--save", "", "--dir", "/tmp")

    def look() -> tuple[int, str]:
        with running(*command, ready=lambda: answers(PORT)):
            code, found = facts(str(PORT))
            return code, found["answers"]["none"]["who"]

    code, who = isolated(look)
    assert code == 1
    assert "redis-server" in who


def test_nginx_and_its_workers_are_named() -> None:
    nginx = need("nginx")

    def look() -> tuple[int, int]:
        with tempfile.TemporaryDirectory() as directory:
            config = Path(directory, "nginx.conf")
            kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
            places = " ".join(f"{kind}_temp_path {directory}/{kind};" for kind in kinds)
            config.write_text(
                f"daemon off; user root; pid {directory}/pid; events {{}} worker_processes 2;\n"
                f"http {{ access_log off; {places} server {{ listen 127.0.0.1:{PORT}; return 204; }} }}\n"
            )
            with running(nginx, "-e", "stderr", "-c", str(config), ready=lambda: answers(PORT)) as process:
                code, found = facts(str(PORT))
                process.terminate()  # the master ends its workers
                process.wait(DEADLINE_S)
                return code, len(found["facts"]["sockets"][0]["holders"])

    code, holders = isolated(look)
    assert (code, holders) == (1, 3)


# -- another user ---------------------------------------------------------------------------------------------------


def test_stranger_sees_what_can_be_known_of_a_service_of_root() -> None:
    need("setpriv")
    code, text, mine = isolated(strange_look)
    assert code == mine == 1
    assert "a process of user root" in text
    assert "that we may not look at is listening on" in text
    assert "pid not permitted" in text
    assert "not read" in text
    assert "root (CAP_SYS_PTRACE) sees them all" in text


def strange_look() -> tuple[int, str, int]:
    with socket.create_server(("127.0.0.1", PORT)):
        code, text = why(str(PORT), prefix=AS_STRANGER)
        return code, " ".join(text.split()), why(str(PORT))[0]


def test_low_port_is_refused_to_a_stranger_by_the_capability_and_not_by_the_listener() -> None:
    need("setpriv")

    def look() -> tuple[int, str]:
        with socket.create_server(("127.0.0.1", 80)):
            return why("127.0.0.1:80", prefix=AS_STRANGER)

    code, text = isolated(look)
    assert code == 1
    assert "EACCES" in text.splitlines()[0]
    assert "ip_unprivileged_port_start" in text


def test_root_of_a_user_namespace_alone_may_not_bind_low_ports() -> None:
    unshare = need("unshare")
    if subprocess.run([unshare, "-Ur", "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("no user namespaces here")
    bind = "import socket; socket.socket().bind(('127.0.0.1', 80))"
    for networks, code in (("-Ur", 1), ("-Urn", 0)):
        tried = subprocess.run(
            [unshare, networks, sys.executable, "-c", bind], stderr=subprocess.DEVNULL, timeout=DEADLINE_S, check=False
        )
        assert (tried.returncode, why("127.0.0.1:80", prefix=(unshare, networks))[0]) == (code, code)


# -- nothing is touched ---------------------------------------------------------------------------------------------


def test_nothing_is_bound_and_nothing_is_sent_unless_it_is_asked_for() -> None:
    need("strace")
    looked, probed = isolated(traced)
    assert "AF_INET" not in looked
    assert "bind(" not in looked
    # What is left is a question to the kernel, and libc's to its cache of user names.
    assert all("nlmsg_type" in line or "/nscd/" in line for line in looked.splitlines())
    assert len(re.findall(rf"bind\(\d+, {{sa_family=AF_INET, sin_port=htons\({PORT}\)", probed)) == 4
    assert "listen(" not in probed


def traced() -> tuple[str, str]:
    with socket.create_server(("127.0.0.1", PORT)), tempfile.NamedTemporaryFile("r") as file:
        trace = ("strace", "-qq", "-f", "-e", f"trace={TRACED}", "-e", "signal=none", "-o", file.name)
        found = []
        for options in ((), ("--probe",)):
            why(f"127.0.0.1:{PORT}", *options, prefix=trace)
            found.append("\n".join(line.partition(" ")[2].strip() for line in file.read().splitlines()))
        return found[0], found[1]


def test_many_in_time_wait_are_counted_and_not_listed() -> None:
    found = isolated(crowded)
    assert found["count"] == 3000
    assert 0 < found["ends_in_s"] <= 61


def crowded() -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", PORT)) as listener:
        fill(listener, 3000)
    _, found = facts(str(PORT))
    (left,) = found["facts"]["sockets"]
    return {"count": left["count"], "ends_in_s": left["ends_in_s"]}


def test_unix_socket_of_another_network_is_not_called_a_leftover(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as server:
            server.bind(str(path))
            if kind != socket.SOCK_DGRAM:
                server.listen()
                server.setblocking(False)
            code, text = why(f"unix:{path}", prefix=(need("unshare"), "-n"))
            assert code == 1
            assert "is bound to" in text
            assert "look outside of this container" in " ".join(text.split())
            if kind != socket.SOCK_DGRAM:
                with pytest.raises(BlockingIOError):
                    server.accept()
        assert "is left from a server that is gone" in " ".join(why(f"unix:{path}")[1].split())
        path.unlink()


def test_stranger_who_may_not_ask_for_a_socket_is_told_so() -> None:
    need("setpriv")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory, "a.sock")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
        path.chmod(0o755)
        found = [facts(f"unix:{path}", prefix=prefix)[1]["facts"] for prefix in ((), AS_STRANGER)]
    assert [one["is_held"] for one in found] == [False, False]
    assert [len(one["unread"]) for one in found] == [0, 1]


# -- where it is printed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closing", [">&-", ">&- 2>&-", "| true"])
def test_verdict_outlives_its_reader(closing: str) -> None:
    script = f'set -o pipefail; "$@" {closing}'
    for args in (("why", "127.0.0.1:80"), ("why", "127.0.0.1:80", "--json"), ("why", "--explain", "TIME_WAIT")):
        done = subprocess.run(
            ["bash", "-c", script, "bash", *HOTPORT, *args], capture_output=True, timeout=DEADLINE_S, check=False
        )
        assert (done.returncode, done.stderr) == (0, b""), args


def test_page_at_a_terminal_is_coloured_unless_somebody_minds() -> None:
    pages = []
    for environment in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}):
        terminal, theirs = os.openpty()
        command = [*HOTPORT, "why", "127.0.0.1:80"]
        inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        subprocess.run(command, stdout=theirs, timeout=DEADLINE_S, check=True, env={**inherited, **environment})
        pages.append(os.read(terminal, 65536).splitlines()[0])
        os.close(theirs)
        os.close(terminal)
    assert pages == [b"tcp://127.0.0.1:80 is \x1b[32mfree\x1b[0m", *[b"tcp://127.0.0.1:80 is free"] * 2]


# -- watching -------------------------------------------------------------------------------------------------------


def test_watch_ends_when_the_process_in_the_way_does() -> None:
    code, text = isolated(watched)
    assert code == 0
    assert "pid" in text
    assert "is listening on 127.0.0.1:20000" in text
    assert "tcp://127.0.0.1:20000 is free" in text


def watched() -> tuple[int, str]:
    with socket.create_server(("127.0.0.1", PORT)) as server:
        holder = subprocess.Popen(["sleep", "1000"], pass_fds=[server.fileno()])
    with holder:
        command = [*HOTPORT, "why", f"127.0.0.1:{PORT}", "--watch"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            first = process.stderr.readline()
            holder.kill()
            out, words = process.communicate(timeout=DEADLINE_S)
            return process.returncode, first + words + out


def test_watch_at_a_terminal_is_one_line_and_ends_with_control_c() -> None:
    code, text = isolated(interrupted)
    assert code == 130
    assert text.startswith("\r\x1b[K")
    assert "is listening on 127.0.0.1:20000" in text
    assert "\n" not in text


def interrupted() -> tuple[int, str]:
    terminal, theirs = os.openpty()
    environment = {**os.environ, "COLUMNS": "200"}
    with socket.create_server(("127.0.0.1", PORT)):
        command = [*HOTPORT, "why", f"127.0.0.1:{PORT}", "--watch"]
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
            text = os.read(terminal, 65536).decode()
            process.send_signal(signal.SIGINT)
            code = process.wait(DEADLINE_S)
    os.close(theirs)
    os.close(terminal)
    return code, text


# -- keys -----------------------------------------------------------------------------------------------------------


def at_a_terminal(*args: str, asked: str, key: bytes, is_raw: bool = False) -> tuple[int, str]:
    """Run `hotport why` at a terminal, press a key when it asks for one; exit code and all that it printed."""
    terminal, theirs = os.openpty()
    command = [*HOTPORT, "why", *args]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd="/") as process:
        os.close(theirs)
        text = ""
        with suppress(OSError):  # EIO: it has ended
            while data := os.read(terminal, 65536):
                text += data.decode()
                if key and asked in text:
                    if is_raw:  # what is typed before that is dropped
                        eventually(lambda: not termios.tcgetattr(terminal)[3] & termios.ICANON, "it reads keys")
                    os.write(terminal, key)
                    key = b""
        code = process.wait(DEADLINE_S)
    os.close(terminal)
    return code, text


@pytest.mark.parametrize(("key", "code", "pages"), [(b"p", 0, 2), (b"q", 3, 1), (b"\x03", 3, 1)])
def test_what_cannot_be_read_is_asked_for_by_one_key(key: bytes, code: int, pages: int) -> None:
    def look() -> tuple[int, str]:
        with socket.create_server(("127.0.0.1", PORT)) as server:
            fill(server, 3)
        return at_a_terminal(f"127.0.0.1:{PORT}", asked="p: bind for a moment", key=key, is_raw=True)

    found, text = isolated(look)
    assert (found, text.count("bind and listen by user root")) == (code, pages), text
    assert ("(tried)" in text) == (pages == 2)


@pytest.mark.parametrize(("key", "code"), [(b"y\n", 0), (b"n\n", 1)])
def test_port_is_freed_after_asking(key: bytes, code: int) -> None:
    def look() -> tuple[int, str]:
        with socket.create_server(("127.0.0.1", PORT)) as server:
            holder = subprocess.Popen(["sleep", "1000"], pass_fds=[server.fileno()])
        with holder:
            try:
                return at_a_terminal(f"127.0.0.1:{PORT}", "--free", asked="Take them?", key=key)
            finally:
                holder.kill()

    found, text = isolated(look)
    assert found == code, text
    assert "1. send SIGTERM to pid " in text
    assert (f"{PORT} is \x1b[32mfree" in text) == (code == 0)


def test_everything_that_listens_is_listed_without_an_address() -> None:
    def look() -> tuple[str, list[dict[str, Any]]]:
        with socket.create_server(("127.0.0.1", PORT)) as server:
            client = socket.create_connection(("127.0.0.1", PORT))
            with client:
                listed = json.loads(why("--json")[1])["listening"]
                page = why()[1]
                server.accept()[0].close()
        return page, [one for one in listed if one["protocol"] == "tcp"]

    page, (one,) = isolated(look)
    assert (one["place"], one["queue"]) == (f"127.0.0.1:{PORT}", 1)
    row = next(line for line in page.splitlines() if line.startswith(f"tcp://127.0.0.1:{PORT} "))
    assert "1 of 128" in row


# -- what is no port ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("70000",), 2, "HP112 ':70000' is not an address"),
        (("0",), 2, "HP132 there is nothing to explain about tcp://0.0.0.0:0"),
        ((":http",), 2, "HP112 ':http' is not an address"),
        (("nowhere.invalid:80",), 2, "HP102 "),
        (("fd://3",), 2, "HP132 there is nothing to explain about fd://3"),
        (("192.0.2.1:80",), 1, "not free: EADDRNOTAVAIL"),
        (("80", "--user", "no-such-user"), 2, "HP133 there is no user 'no-such-user'"),
        (("80", "--user", "4294967295"), 2, "HP133 there is no user '4294967295'"),
        (("80", "--user", "0", "--probe"), 2, "--probe binds as you"),
        (("80", "--watch", "--probe"), 2, "--watch looks every second"),
        (("unix:a.sock", "--user", "0"), 2, "are about ports"),
        (("unix:a.sock", "--probe"), 2, "are about ports"),
        (("--watch",), 2, "Give an ADDRESS"),
        (("80", "--yes"), 2, "--yes belongs to --free"),
        (("80", "--free", "--watch"), 2, "--free waits by itself"),
        (("80", "--free"), 2, "there is no terminal: give --yes"),
        (("--explain", "nonsense"), 2, "HP135 there is no text about 'nonsense'"),
    ],
    ids=str,
)
def test_bad_input_is_told_in_words(args: tuple[str, ...], code: int, words: str) -> None:
    found, text = why(*args)
    assert found == code
    assert words in text


def test_sandbox_without_netlink_is_told_with_a_way_out() -> None:
    program = (
        "import socket, sys\n"
        "real = socket.socket\n"
        "class Sandboxed(real):\n"
        "    def __init__(self, family=-1, *args, **kwargs):\n"
        "        if family == socket.AF_NETLINK: raise PermissionError(1, 'Operation not permitted')\n"
        "        super().__init__(family, *args, **kwargs)\n"
        "socket.socket = Sandboxed\n"
        "from hotport.cli import main\n"
        "sys.argv[0] = 'hotport'\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "why", "8000"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 3
    assert done.stderr.startswith("HP130 cannot ask the kernel for its sockets: EPERM")
    assert "Traceback" not in done.stderr


def test_other_systems_are_told_that_the_rules_are_those_of_linux() -> None:
    program = "import sys; sys.platform = 'darwin'; from hotport.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "why", "8000"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 2
    assert "HP131 cannot explain a port here" in done.stderr


def test_explanation_needs_no_address() -> None:
    code, text = why("--explain", "time_wait")
    assert code == 0
    assert "twice the maximum segment lifetime" in text


def test_network_without_an_interface_takes_any_address_as_the_kernel_does() -> None:
    script = f"""
import socket
from hotport.address import TcpAddress
from hotport.kernel.port import read_port
with socket.socket() as sock:
    sock.bind(("192.0.2.1", {PORT}))
print(read_port(TcpAddress("192.0.2.1", {PORT}), ("192.0.2.1", {PORT})).is_local)
"""
    done = subprocess.run(
        [need("unshare"), "-n", sys.executable, "-c", script], capture_output=True, timeout=DEADLINE_S, check=False
    )
    assert (done.stdout, done.stderr) == (b"True\n", b"")


def link_local() -> Iterator[str]:
    """Our own addresses that need an interface, with it."""
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        host, *_, name = line.split()
        if host.startswith("fe80"):
            yield f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(host))}%{name}"


def test_link_local_address_is_free_on_its_own_interface_only() -> None:
    here = next(link_local(), None)
    if here is None:
        pytest.skip("no interface has a link-local address")
    host = here.partition("%")[0]
    for options in ((), ("--probe",)):
        asked = [facts(f"[{text}]:{PORT}", *options)[1] for text in (here, f"{host}%lo", host)]
        assert [found["answers"]["none"]["error"] for found in asked] == ["", "EADDRNOTAVAIL", "EINVAL"]


def test_answer_for_another_user_is_judged_by_that_user() -> None:
    def look() -> list[str]:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            server.bind(("127.0.0.1", PORT))
            server.listen()
            return [facts(str(PORT), "--user", str(user))[1]["answers"]["reuseport"]["can"] for user in (0, STRANGER)]

    assert isolated(look) == [Can.YES, Can.NO]
    assert os.geteuid() == 0
