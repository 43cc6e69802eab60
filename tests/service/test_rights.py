"""Workers of another user: no process that loads application code is ever root's."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hotport.kernel import procfs
from hotport.kernel.users import Identity, find_closed, find_identity
from tests.service.test_metrics import scrape
from tests.service.test_proxy import nginx
from tests.service.test_status_port import StatusPort
from tests.support import (
    DEADLINE_S,
    Service,
    assert_three_lines,
    eventually,
    need,
    read_response,
    watching_pid,
    write_code,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of other users")

#: Notes who it is whenever it is imported, and answers with its version and pid.
APP = """
import json, os

def who():
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return {{
        "pid": os.getpid(), "uids": os.getresuid(), "gids": os.getresgid(), "groups": os.getgroups(),
        "capabilities": int(status["CapEff"], 16) | int(status["CapPrm"], 16),
        "environment": {{key: os.environ.get(key) for key in ("HOME", "USER", "LOGNAME", "XDG_RUNTIME_DIR")}},
    }}

with open("imports", "a") as file:
    file.write(json.dumps(who()) + "\\n")

async def app(scope, receive, send):
    if scope["type"] != "http":
        raise RuntimeError("only http")
    body = f"{version} {{os.getpid()}} {{os.getuid()}}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({{"type": "http.response.start", "status": 200, "headers": headers}})
    await send({{"type": "http.response.body", "body": body}})
"""

#: Blocks its event loop when it is asked for that.
BLOCKING = """async def app(scope, receive, send):
    if scope.get("path") == "/block":
        import time
        time.sleep(1000)"""

#: Idle connections stay, however slow the machine is.
KEEPING = ("--keep-alive", "10m")

#: Of processes of other users, in the same place: it serves a line.
USERS = [name for name in ("www-data", "nobody", "daemon") if any(each.pw_name == name for each in pwd.getpwall())]


@pytest.fixture
def user() -> Identity:
    if not USERS:
        pytest.skip("there is no user www-data, nobody or daemon")
    return find_identity(USERS[0])


@pytest.fixture
def other(user: Identity) -> Identity:
    if len(USERS) < 2:
        pytest.skip("there is one user only")
    return find_identity(USERS[1])


@pytest.fixture
def place(user: Identity) -> Iterator[Path]:
    """A directory that others can enter, as `tmp_path` is none, with the application."""
    directory = Path(tempfile.mkdtemp(prefix="hp", dir="/tmp"))
    directory.chmod(0o755)
    imports = directory / "imports"
    imports.touch()
    imports.chmod(0o666)
    write_code(directory / "app.py", APP.format(version="v1"))
    try:
        yield directory
    finally:
        left = [path for path in directory.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]
        shutil.rmtree(directory)
        assert not left


@pytest.fixture
def prefix(user: Identity, tmp_path: Path) -> tuple[str, ...]:
    """What a service runs under so that other users reach this interpreter: it may lie in a closed home directory.

    Then a mount namespace has an open directory in its place, with only the interpreter in it.
    """
    import hotport

    wants = [(sys.executable, os.X_OK), (os.path.dirname(hotport.__file__), os.R_OK | os.X_OK)]
    closed = find_closed(user, wants)
    if closed is None:
        return ()
    base = Path(sys.base_prefix).resolve()
    if not base.is_relative_to(closed.part):
        pytest.skip(f"{user.name} cannot reach {closed.path}")
    aside = tmp_path / "python"
    script = f"""
        mkdir -p {aside} && mount --bind {base} {aside} && mount -t tmpfs -o mode=755 none {closed.part} &&
        mkdir -p {base} && mount --bind {aside} {base} && exec "$@"
    """
    unshare = (need("unshare"), "--mount", "--propagation", "private")
    prefix = (*unshare, "sh", "-c", textwrap.dedent(script), "sh")
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip(f"{user.name} cannot reach {closed.path}, and mount namespaces cannot be made here")
    return prefix


@contextmanager
def serving(
    place: Path, prefix: Sequence[str], *args: str, name: str = "svc", env: dict[str, str] | None = None
) -> Iterator[Service]:
    with Service(place, "app:app", *args, name=name, prefix=tuple(prefix), env=env) as service:
        yield service.wait_ready()


def imports(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "imports").read_text().splitlines()]


def assert_workers_are(service: Service, user: Identity) -> None:
    """All live processes below the supervisor are that user's, by the kernel's word."""
    found = {pid: procfs.user_of(pid) for pid in service.descendants()}
    assert found
    assert set(found.values()) == {user.uid}, found


def assert_imported_by(place: Path, user: Identity, least: int) -> None:
    """The application was imported by that user alone, whatever process did it, and by as many as said."""
    found = imports(place)
    assert len(found) >= least
    for each in found:
        assert each["uids"] == [user.uid] * 3
        assert each["gids"] == [user.gid] * 3
        assert set(each["groups"]) == set(user.groups)
        assert each["capabilities"] == 0


def get(where: str | tuple[str, int]) -> tuple[str, int, int]:
    """Version, pid and uid that answer at an address or a socket file."""
    with socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(where)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        status, body = read_response(sock)
    assert status == 200
    version, pid, uid = body.decode().split()
    return version, int(pid), int(uid)


def connect_as(user: Identity, path: Path) -> str:
    """What a process of that user gets when it connects to a socket file: an errno's name, or nothing."""
    code = f"""
        import errno, os, socket, sys
        os.setgroups({list(user.groups)}); os.setresgid(*[{user.gid}] * 3); os.setresuid(*[{user.uid}] * 3)
        try:
            socket.socket(socket.AF_UNIX).connect({str(path)!r})
        except OSError as error:
            print(errno.errorcode[error.errno])
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def low_address() -> str:
    """An address of the loopback network whose port 80 is free."""
    pid = os.getpid()
    host = f"127.80.{pid >> 8 & 255}.{pid & 255 or 1}"
    with socket.socket() as probe, suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, 80))
        return host
    pytest.skip("port 80 is in use")


@pytest.mark.measured
def test_no_process_that_loads_the_application_is_root_at_any_moment(
    place: Path, prefix: Sequence[str], user: Identity
) -> None:
    host = low_address()
    options = ("--user", user.name, "--workers", "2", "--bind", f"{host}:80", "--bind", f"unix:{place}/app.sock")
    env = {"XDG_RUNTIME_DIR": "/run/user/0", "HOME": "/root"}
    with serving(place, prefix, *options, env=env) as service:
        assert get((host, 80))[0] == "v1"
        assert_workers_are(service, user)
        supervisor = service.process.pid
        assert procfs.user_of(supervisor) == 0

        write_code(place / "app.py", APP.format(version="v2"))
        assert service.restart()["outcome"] == "done"
        assert get((host, 80))[0] == "v2"
        assert_workers_are(service, user)

        upgraded = service.run("upgrade", "svc")
        assert upgraded.returncode == 0, upgraded.stderr
        assert service.status()["pid"] == supervisor
        write_code(place / "app.py", APP.format(version="v3"))
        assert service.restart()["outcome"] == "done"
        assert get((host, 80))[0] == "v3"
        assert_workers_are(service, user)

        workers = service.worker_pids()
        service.kill()
        assert get((host, 80))[1] in workers  # orphans serve
        with serving(place, prefix, *options, env=env) as next_one:
            assert sorted(next_one.worker_pids()) == sorted(workers)  # adopted
            os.kill(workers[0], signal.SIGKILL)
            eventually(lambda: workers[0] not in next_one.worker_pids(), "it is replaced")
            next_one.wait_serving(2)
            assert next_one.run("scale", "3", "svc").returncode == 0
            write_code(place / "app.py", APP.format(version="v4"))
            assert next_one.restart()["outcome"] == "done"
            assert get((host, 80))[0] == "v4"
            assert {pid for pid in next_one.descendants() if procfs.user_of(pid) != user.uid} == set()
            assert get(f"{place}/app.sock")[2] == user.uid
            assert next_one.stop() == 0
    assert_imported_by(place, user, least=2 + 2 + 2 + 1 + 1 + 3)
    environment = {"HOME": user.home, "USER": user.name, "LOGNAME": user.name, "XDG_RUNTIME_DIR": None}
    assert all(each["environment"] == environment for each in imports(place))


def test_the_supervisor_needs_only_the_capabilities_that_the_page_names(
    place: Path, prefix: Sequence[str], user: Identity
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "rights.md").read_text()
    named = sorted(set(re.findall(r"CAP_(\w+)", page[page.index("| capability |") : page.index("So whatever")])))
    bounds = "-all," + ",".join(f"+{name.lower()}" for name in named)
    bounded = (*prefix, need("setpriv"), "--bounding-set", bounds)
    path = place / "app.sock"
    options = ("--user", user.name, "--bind", f"{low_address()}:80", "--bind", f"unix:{path}")
    with serving(place, bounded, *options) as service:
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        assert int(re.findall(r"CapEff:\s*(\w+)", status)[0], 16).bit_count() == len(named)
        assert service.restart()["outcome"] == "done"
        path.unlink()
        eventually(path.exists, "the socket file is bound again")
        workers = service.worker_pids()
        service.kill()
        with serving(place, bounded, *options) as next_one:
            assert next_one.worker_pids() == workers
            assert next_one.restart()["outcome"] == "done"
            assert_workers_are(next_one, user)
            assert next_one.stop() == 0


def test_files_of_a_service_are_closed_to_other_users_and_to_its_workers(
    place: Path, prefix: Sequence[str], user: Identity, other: Identity
) -> None:
    with serving(place, prefix, "--user", user.name) as service:
        control, notify = service.runtime / "control.sock", service.runtime / f"notify-{user.uid}.sock"
        (worker,) = (service.runtime / f"user-{user.uid}").glob("worker-*.sock")
        assert connect_as(user, control) == "EACCES"
        assert connect_as(user, worker) == ""
        for path in (control, worker):
            assert connect_as(other, path) == "EACCES"
        assert stat.S_IMODE(notify.stat().st_mode) == 0o600
        for user_or_other in (user, other):
            closed = find_closed(user_or_other, [(str(service.runtime), os.W_OK)])
            assert closed is not None
            assert find_closed(user_or_other, [(str(service.runtime), os.R_OK)]) is not None


def test_a_proxy_of_the_same_group_connects_to_the_socket_file_and_no_other_user(
    place: Path, prefix: Sequence[str], user: Identity, other: Identity
) -> None:
    path = place / "app.sock"
    with serving(place, prefix, "--user", user.name, "--bind", f"unix:{path}") as service:
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o660, user.uid, user.gid)
        assert connect_as(user, path) == ""
        assert connect_as(other, path) == "EACCES"

        (place / "hotport.toml").write_text(f'socket_mode = "0620"\nsocket_group = "{other.gid}"\n')
        assert service.restart()["outcome"] == "done"
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o620, user.uid, other.gid)
        assert connect_as(other, path) == ""

        path.unlink()  # and so after somebody has removed it
        eventually(path.exists, "it is bound again")
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o620, other.gid)


def test_nginx_of_the_sockets_group_is_a_proxy_while_the_service_restarts(
    place: Path, prefix: Sequence[str], user: Identity, other: Identity
) -> None:
    """nginx runs as the first user, the application as the second."""
    path = place / "web.sock"
    group = grp.getgrgid(user.gid).gr_name
    args = ("--user", other.name, "--socket-group", group, "--bind", f"unix:{path}")
    with serving(place, prefix, *args) as service, nginx(place, f"unix:{path}", "127.0.0.1:9", user=user.name) as port:
        for version in ("v1", "v2"):
            write_code(place / "app.py", APP.format(version=version))
            if version == "v2":
                assert service.restart()["outcome"] == "done"
            assert get(("127.0.0.1", port))[::2] == (version, other.uid)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ('user = "no-such-user"', "HP430"),
        ('user = "{user}"\ngroup = "no-such-group"', "HP431"),
        ('user = "{user}"\nsocket_group = "no-such-group"', "HP431"),
        ('user = "{user}"\napp_dir = "closed"', "HP433"),
    ],
)
def test_a_restart_with_a_user_that_cannot_be_had_is_refused_and_loses_nothing(
    place: Path, prefix: Sequence[str], user: Identity, options: str, code: str
) -> None:
    (place / "closed").mkdir(mode=0o700)
    (place / "hotport.toml").write_text(f'user = "{user.name}"\n')
    with serving(place, prefix) as service:
        before = get(("127.0.0.1", service.port))
        (place / "hotport.toml").write_text(options.format(user=user.name))
        refused = service.run("restart", "svc")
        assert refused.returncode == 4
        assert_three_lines(refused.stderr[refused.stderr.index("HP") :], code)
        assert get(("127.0.0.1", service.port)) == before
        (place / "hotport.toml").write_text(f'user = "{user.name}"\n')
        assert service.restart()["outcome"] == "done"


@pytest.mark.parametrize(
    ("args", "code", "exit_code"),
    [
        (("--user", "no-such-user"), "HP430", 2),
        (("--user", "{user}", "--group", "no-such-group"), "HP431", 2),
        (("--user", "{user}", "--app-dir", "closed"), "HP433", 3),
        (("--group", "{user}"), "HP305", 2),
    ],
)
def test_a_start_with_a_user_that_cannot_be_had_binds_nothing(
    place: Path, prefix: Sequence[str], user: Identity, args: Sequence[str], code: str, exit_code: int
) -> None:
    (place / "closed").mkdir(mode=0o700)
    words = [word.format(user=user.name) for word in args]
    with Service(place, "app:app", "--bind", f"unix:{place}/app.sock", *words, prefix=tuple(prefix)) as service:
        assert service.wait() == exit_code
        assert_three_lines(service.log()[service.log().index("HP") :], code)
    assert not (place / "app.sock").exists()
    assert "service.starting" not in service.log()


def test_the_user_changes_with_a_restart_and_back(
    place: Path, prefix: Sequence[str], user: Identity, other: Identity
) -> None:
    options = place / "hotport.toml"
    with serving(place, prefix) as service:
        port = service.port
        assert get(("127.0.0.1", port))[2] == 0
        for now in (user, other, user):
            options.write_text(f'user = "{now.name}"\n')
            assert service.restart()["outcome"] == "done"
            assert get(("127.0.0.1", port))[2] == now.uid
            assert_workers_are(service, now)
        options.write_text("")
        assert service.restart()["outcome"] == "done"
        assert get(("127.0.0.1", port))[2] == 0
        assert service.stop() == 0


def test_connections_move_to_the_next_generation_of_the_same_user(
    place: Path, prefix: Sequence[str], user: Identity
) -> None:
    with serving(place, prefix, "--user", user.name, *KEEPING) as service:
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as sock:
            answers = []
            for version in ("v1", "v2"):
                write_code(place / "app.py", APP.format(version=version))
                if version == "v2":
                    assert service.restart()["connections"] == {"moved_http": 1}
                sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                answers.append(read_response(sock)[1].split()[0])
        assert answers == [b"v1", b"v2"]


def test_connections_of_roots_workers_move_to_those_of_a_user_and_back_they_finish(
    place: Path, prefix: Sequence[str], user: Identity
) -> None:
    options = place / "hotport.toml"
    with (
        serving(place, prefix, "--drain-timeout", "1", *KEEPING) as service,
        socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as sock,
    ):
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_response(sock)[1].split()[2] == b"0"
        options.write_text(f'user = "{user.name}"\n')
        assert service.restart()["connections"] == {"moved_http": 1}
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert int(read_response(sock)[1].split()[2]) == user.uid
        options.write_text("")
        assert "moved_http" not in service.restart()["connections"]
        assert "handoff.declined" not in service.log()


def test_a_worker_of_the_user_that_hangs_is_explained_and_replaced(
    place: Path, prefix: Sequence[str], user: Identity
) -> None:
    blocking = APP.format(version="v1").replace("async def app(scope, receive, send):", BLOCKING)
    write_code(place / "app.py", blocking)
    args = (
        "--user",
        user.name,
        "--workers",
        "2",
        "--hang-report",
        "1s",
        "--hang-timeout",
        "3s",
        "--drain-timeout",
        "1",
    )
    with serving(place, prefix, *args) as service:
        before = service.worker_pids()
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as sock:
            sock.sendall(b"GET /block HTTP/1.1\r\nHost: x\r\n\r\n")
            eventually(lambda: bool(set(before) - set(service.worker_pids())), "it is replaced")
        service.wait_serving(2)
        (told,) = service.log_events("worker.hung")
        assert f"{place}/app.py" in told["stack"]
        assert_workers_are(service, user)


def test_a_take_over_keeps_the_user(place: Path, prefix: Sequence[str], user: Identity) -> None:
    with serving(place, prefix, "--user", user.name, *KEEPING) as old:
        port = old.port
        bind = ("--bind", f"127.0.0.1:{port}")
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as sock:
            write_code(place / "app.py", APP.format(version="v2"))
            with serving(place, prefix, "--user", user.name, "--take-over", *bind) as new:
                assert old.wait() == 0
                sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert read_response(sock)[1].split()[0] == b"v2"
                assert_workers_are(new, user)
                assert new.stop() == 0
    assert_imported_by(place, user, least=2)


def test_files_that_disappear_come_back(place: Path, prefix: Sequence[str], user: Identity) -> None:
    with serving(place, prefix, "--user", user.name) as service:
        shutil.rmtree(service.runtime)
        eventually(lambda: (service.runtime / "control.sock").exists(), "the directory is restored")
        eventually(lambda: len(list(service.runtime.glob("user-*/worker-*.sock"))) == 1, "the worker listens again")
        assert service.restart()["outcome"] == "done"
        assert_workers_are(service, user)


def test_a_program_of_another_user_poses_as_a_worker_in_vain(
    place: Path, prefix: Sequence[str], other: Identity
) -> None:
    """Its environment says what it likes; root would start what it says."""
    service = Service(place, "app:app", prefix=tuple(prefix))
    with service:
        service.wait_ready()
        spec = procfs.environment(service.worker_pids()[0])
        forged = {**spec, "PWD": "/", "HOTPORT_WORKER": spec["HOTPORT_WORKER"].replace('"worker":1', '"worker":7')}
        service.kill()
        liar = subprocess.Popen(
            ["/bin/sleep", "1000"], env=forged, user=other.uid, group=other.gid, extra_groups=[], process_group=0
        )
        try:
            with serving(place, prefix) as next_one:
                assert liar.pid not in next_one.worker_pids()
                assert next_one.stop() == 0
        finally:
            liar.kill()
            liar.wait()


def test_a_foreign_program_runs_as_the_user_too(place: Path, prefix: Sequence[str], user: Identity) -> None:
    code = """
        import os, socket
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
        notify.close()
        listener = socket.socket(fileno=3)
        while True:
            with listener.accept()[0] as client:
                client.recv(1000)
                body = f"f {os.getpid()} {os.getuid()}"
                client.sendall(f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
    """
    write_code(place / "foreign.py", textwrap.dedent(code))
    program = (sys.executable, "foreign.py")
    with Service(place, "--user", user.name, "--settle", "0", "--", *program, prefix=tuple(prefix)) as service:
        service.wait_ready()
        assert get(("127.0.0.1", service.port))[2] == user.uid
        assert service.restart()["outcome"] == "done"
        workers = service.worker_pids()
        service.kill()
        args = ("--user", user.name, "--settle", "0", "--", *program)
        with Service(place, *args, prefix=tuple(prefix)) as next_one:
            next_one.wait_ready()
            assert next_one.worker_pids() == workers


def test_workers_forked_from_one_import_are_the_users_too(place: Path, prefix: Sequence[str], user: Identity) -> None:
    with serving(place, prefix, "--user", user.name, "--preload", "--workers", "2") as service:
        assert_workers_are(service, user)
        write_code(place / "app.py", APP.format(version="v2"))
        assert service.restart()["outcome"] == "done"
        assert get(("127.0.0.1", service.port))[::2] == ("v2", user.uid)
        victim = service.worker_pids()[0]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: victim not in service.worker_pids(), "it is replaced")
        service.wait_serving(2)
        assert_workers_are(service, user)
        workers = service.worker_pids()
        service.kill()
        with serving(place, prefix, "--user", user.name, "--preload", "--workers", "2") as next_one:
            assert sorted(next_one.worker_pids()) == sorted(workers)
            assert next_one.run("scale", "3", "svc").returncode == 0
            assert_workers_are(next_one, user)
            assert next_one.stop() == 0
    assert_imported_by(place, user, least=3)


def test_commands_around_a_restart_are_of_the_user_of_its_workers_and_end_with_the_supervisor(
    place: Path, prefix: Sequence[str], user: Identity
) -> None:
    who = "sh -c 'echo \"$(id -u) $(id -G) $USER\" > /dev/stdout; grep CapEff /proc/self/status'"
    sleep = "sh -c 'cat /dev/stdin > /dev/null && exec sleep 1000'"
    with serving(place, prefix, "--user", user.name, "--before-start", who, "--after-restart", sleep) as service:
        assert service.restart()["outcome"] == "done"
        for line in service.log_events("before_start.succeeded"):
            ids, capabilities = line["output"].splitlines()
            uid, *groups, name = ids.split()
            assert (uid, set(groups), name) == (str(user.uid), {*map(str, (user.gid, *user.groups))}, user.name)
            assert int(capabilities.split()[1], 16) == 0
        service.wait_until(lambda: bool(service.log_events("after_restart.began")), "it runs")
        pid = service.log_events("after_restart.began")[0]["program_pid"]
        eventually(lambda: b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes(), "it has read the report")
        assert_workers_are(service, user)
        with watching_pid(pid) as wait_ended:
            service.kill()
            wait_ended()
        with serving(place, prefix, "--user", user.name) as next_one:  # adopts the workers
            assert next_one.stop() == 0


def test_commands_around_a_restart_run_as_the_user(place: Path, prefix: Sequence[str], user: Identity) -> None:
    told = place / "imports"  # which every user may write to
    told.write_text("")
    command = [sys.executable, "-c", f"import os, sys; print(*os.getresuid(), file=open({str(told)!r}, 'a'))"]
    (place / "hotport.toml").write_text(
        f"user = '{user.name}'\nbefore_start = {json.dumps(command)}\nafter_restart = {json.dumps(command)}\n"
    )
    write_code(
        place / "app.py", APP.format(version="v1").replace('with open("imports", "a")', 'with open("/dev/null", "a")')
    )
    with serving(place, prefix) as service:
        assert service.restart()["outcome"] == "done"
        eventually(lambda: len(told.read_text().splitlines()) == 3, "two generations were prepared, a restart was told")
    assert set(told.read_text().split()) == {str(user.uid)}


def test_worker_of_another_user_that_hangs_tells_where(place: Path, prefix: Sequence[str], user: Identity) -> None:
    write_code(
        place / "app.py",
        APP.format(version="v1").replace("    body = ", "    import time; time.sleep(900)\n    body = "),
    )
    bounds = ("--hang-report", "300ms", "--drain-timeout", "100ms", "--kill-timeout", "100ms")
    with serving(place, prefix, "--user", user.name, *bounds) as service:
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            eventually(lambda: bool(service.log_events("worker.hung")), "it is found")
        (hung,) = service.log_events("worker.hung")
        assert (hung["at"], hung["why"]) == ("app.py:18 in app", "its event loop is blocked")


def test_workers_count_in_files_that_they_cannot_reach(place: Path, prefix: tuple[str, ...], user: Identity) -> None:
    counting = "from prometheus_client import Counter\nCounter('jobs', 'x').inc()\n"
    write_code(place / "app.py", counting + APP.format(version="v1"))
    args = ("--user", user.name, "--app-metrics", "--status-bind", "127.0.0.1:0")
    with serving(place, prefix, *args) as service:
        port = StatusPort(service)
        where = ("127.0.0.1", service.port)
        get(where)
        service.restart()
        get(where)
        found = scrape(port)
        assert found["hotport_http_requests_total{method=GET,status=2xx}"] == 2
        assert found["jobs_total{}"] == 2
        counters = [path.stat() for path in (service.runtime / "counters").iterdir()]
        assert {(each.st_uid, each.st_mode & 0o077) for each in counters} == {(0, 0)}
