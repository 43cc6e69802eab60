from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from hotport.errors import ConfigError, KernelError
from hotport.kernel.process import describe_exit, open_descriptors, reap, send_signal
from hotport.kernel.spawn import Child, spawn
from hotport.kernel.users import Identity

PATH = {"PATH": os.environ["PATH"]}

# What the child says about itself, as JSON into the file that its first argument names.
WITNESS = """
import json, os, sys
fds = {}
for name in os.listdir("/proc/self/fd"):
    try:
        fds[name] = os.readlink("/proc/self/fd/" + name)
    except FileNotFoundError:
        pass  # the descriptor that lists
said = {
    "fds": fds,
    "pid": os.getpid(),
    "pgid": os.getpgid(0),
    "cwd": os.getcwd(),
    "argv": sys.argv[2:],
    "environ": dict(os.environ),
}
with open(sys.argv[1], "w") as file:
    json.dump(said, file)
"""


def wait(child: Child) -> int:
    """The exit status; the pidfd says when."""
    try:
        select.select([child.pidfd], [], [])
        status = reap(child.pid)
        assert status is not None
        return status
    finally:
        os.close(child.pidfd)


@pytest.fixture
def said(tmp_path: Path) -> Any:
    """Spawn the witness and return what it said."""

    def run(
        *arguments: str,
        environment: Mapping[str, str] = PATH,
        cwd: str = "/",
        listeners: Sequence[int] = (),
        listen_names: Sequence[str] = (),
        is_successor: bool = False,
    ) -> dict[str, Any]:
        path = tmp_path / "said.json"
        # -I -S: nothing but the script opens files, so that every descriptor was inherited.
        child = spawn(
            [sys.executable, "-I", "-S", "-c", WITNESS, str(path), *arguments],
            environment=environment,
            cwd=cwd,
            listeners=listeners,
            listen_names=listen_names,
            is_successor=is_successor,
        )
        assert wait(child) == 0
        answer = json.loads(path.read_text())
        assert answer["pid"] == child.pid
        return dict(answer)

    return run


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]


def link(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


@contextmanager
def descriptors_at(places: Mapping[int, int]) -> Iterator[None]:
    """Put sources (values) at chosen descriptors (keys), and put back what was there."""
    with ExitStack() as stack:
        saved = {}
        for place in places:
            try:
                saved[place] = fcntl.fcntl(place, fcntl.F_DUPFD_CLOEXEC, 100)
            except OSError:
                stack.callback(os.close, place)
        for place, copy in saved.items():
            stack.callback(os.close, copy)
            stack.callback(os.dup2, copy, place, os.get_inheritable(place))
        moved = {place: fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, 100) for place, source in places.items()}
        for place, copy in moved.items():
            os.dup2(copy, place, inheritable=False)
            os.close(copy)
        yield


def test_child_has_standard_streams_and_listeners_and_nothing_else(said: Any, sockets: list[socket.socket]) -> None:
    listeners = [sock.fileno() for sock in sockets]
    answer = said(listeners=listeners, listen_names=["a", "b", "c"])
    assert answer["fds"] == {
        "0": "/dev/null",
        "1": link(1),
        "2": link(2),
        "3": link(listeners[0]),
        "4": link(listeners[1]),
        "5": link(listeners[2]),
    }


def test_child_without_listeners_has_standard_streams_only(said: Any) -> None:
    answer = said()
    assert set(answer["fds"]) == {"0", "1", "2"}
    assert not [key for key in answer["environ"] if key.startswith("LISTEN_")]


def test_descriptors_that_are_inheritable_by_mistake_do_not_leak(said: Any, sockets: list[socket.socket]) -> None:
    """A leaked listener keeps its port taken, and clients hanging, after the server has gone."""
    sockets[0].set_inheritable(True)
    high = fcntl.fcntl(sockets[0].fileno(), fcntl.F_DUPFD, 900)
    try:
        answer = said(listeners=[sockets[1].fileno()], listen_names=["web"])
    finally:
        os.close(high)
    assert set(answer["fds"]) == {"0", "1", "2", "3"}
    assert answer["fds"]["3"] == link(sockets[1].fileno())


@pytest.mark.parametrize("order", [(3, 4), (4, 3), (5, 3, 4), (4, 5, 3), (5, 4, 3), (3, 3), (4, 4), (0, 1, 2)])
def test_sources_may_lie_where_targets_go(order: tuple[int, ...], tmp_path: Path, sockets: list[socket.socket]) -> None:
    """Sources at 0 to 5, where the child has its own streams and targets, in every awkward order."""
    path = tmp_path / "links"
    expected = [link(sockets[place % 3].fileno()) for place in order]
    names = [f"l{place}" for place in order]
    script = 'for fd in "$@"; do readlink /proc/$$/fd/$fd; done > "$OUT"'
    targets = [str(fd) for fd in range(3, 3 + len(order))]
    with descriptors_at({place: sockets[place % 3].fileno() for place in order}):
        child = spawn(
            ["sh", "-c", script, "sh", *targets],
            environment=PATH | {"OUT": str(path)},
            cwd="/",
            listeners=order,
            listen_names=names,
        )
        status = wait(child)
    assert status == 0
    assert path.read_text().splitlines() == expected


def test_passing_leaves_our_own_descriptors_as_they_were(said: Any, sockets: list[socket.socket]) -> None:
    before = {fd: (link(fd), os.get_inheritable(fd)) for fd in open_descriptors()}
    said(listeners=[sockets[2].fileno(), sockets[0].fileno()], listen_names=["c", "a"])
    assert {fd: (link(fd), os.get_inheritable(fd)) for fd in open_descriptors()} == before


def test_listen_variables_are_right_for_the_child(said: Any, sockets: list[socket.socket]) -> None:
    inherited = {"LISTEN_PID": "1", "LISTEN_FDS": "9", "LISTEN_FDNAMES": "old", "LISTEN_PIDFDID": "7"}
    answer = said(
        environment=PATH | inherited,
        listeners=[sockets[0].fileno(), sockets[1].fileno()],
        listen_names=["web", "tcp%3A//0.0.0.0%3A80"],
    )
    listen = {key: value for key, value in answer["environ"].items() if key.startswith("LISTEN_")}
    assert listen == {
        "LISTEN_PID": str(answer["pid"]),
        "LISTEN_FDS": "2",
        "LISTEN_FDNAMES": "web:tcp%3A//0.0.0.0%3A80",
    }


def test_variables_of_our_own_activation_are_not_passed_on(said: Any) -> None:
    answer = said(environment=PATH | {"LISTEN_PID": "1", "LISTEN_FDS": "9", "LISTEN_PIDFDID": "7"})
    assert not [key for key in answer["environ"] if key.startswith("LISTEN_")]


def test_child_gets_exactly_the_given_environment_arguments_and_directory(said: Any, tmp_path: Path) -> None:
    answer = said("a b", "", "ü", environment={"GIVEN": "1", "LC_ALL": "C.UTF-8"}, cwd=str(tmp_path))
    answer["environ"].pop("COVERAGE_PROCESS_CONFIG", None)  # added by coverage's patch of exec
    assert answer["environ"] == {"GIVEN": "1", "LC_ALL": "C.UTF-8"}
    assert answer["argv"] == ["a b", "", "ü"]
    assert answer["cwd"] == str(tmp_path)


def test_child_leads_a_process_group_of_its_own(said: Any) -> None:
    answer = said()
    assert answer["pgid"] == answer["pid"] != os.getpgid(0)


def test_signals_that_we_ignore_block_or_handle_are_default_in_the_child(tmp_path: Path) -> None:
    """A shell's `nohup` or a handler of ours must not make a worker deaf."""
    path = tmp_path / "status"
    changed: dict[int, signal.Handlers | Callable[[int, object], None]] = {
        signal.SIGTERM: signal.SIG_IGN,
        signal.SIGINT: signal.SIG_IGN,
        signal.SIGPIPE: signal.SIG_IGN,
        signal.SIGUSR1: signal.SIG_IGN,
        signal.SIGRTMIN + 3: signal.SIG_IGN,
        signal.SIGHUP: lambda *_: None,
    }
    saved = {number: signal.signal(number, handler) for number, handler in changed.items()}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
    try:
        child = spawn(
            ["sh", "-c", 'exec cat /proc/self/status > "$OUT"'],
            environment=PATH | {"OUT": str(path)},
            cwd="/",
        )
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGUSR2, signal.SIGTERM}
        assert wait(child) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in saved.items():
            signal.signal(number, handler)
    status = dict(line.split(":\t", 1) for line in path.read_text().splitlines())
    # 32 and 33 are glibc's own: we cannot change them, and whoever started us may have left them ignored.
    ours = sum(1 << (number - 1) for number in signal.valid_signals())
    assert int(status["SigIgn"], 16) & ours == 0
    assert int(status["SigBlk"], 16) == 0


def test_exit_status_is_kept_although_our_parent_ignored_sigchld() -> None:
    """Started by a program that ignores SIGCHLD, the kernel would reap workers before we look."""
    saved = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert wait(spawn(["sh", "-c", "exit 7"], environment=PATH, cwd="/")) == 7
    finally:
        signal.signal(signal.SIGCHLD, saved)


def test_signal_between_fork_and_exec_kills_the_child_and_leaves_us_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Our handler must not run in the child, and the child must not survive a SIGTERM that it was sent."""
    handled: list[int] = []
    wakeup, written = os.pipe()
    os.set_blocking(written, False)
    os.set_blocking(wakeup, False)
    fork = os.fork

    def fork_and_terminate() -> int:
        if (pid := fork()) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    monkeypatch.setattr(os, "fork", fork_and_terminate)
    saved = signal.signal(signal.SIGTERM, lambda number, _: handled.append(number))
    wakeup_saved = signal.set_wakeup_fd(written)
    try:
        child = spawn(["sleep", "1000"], environment=PATH, cwd="/")
        assert describe_exit(wait(child)) == "killed by SIGTERM"
        with pytest.raises(BlockingIOError):
            os.read(wakeup, 1)  # the child has our wakeup pipe until it execs
    finally:
        signal.set_wakeup_fd(wakeup_saved)
        signal.signal(signal.SIGTERM, saved)
        os.close(wakeup)
        os.close(written)
    assert handled == []


def test_signal_to_us_during_fork_is_handled_once_and_by_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that runs in the child as well would, say, stop the service twice."""
    handled: list[int] = []
    fork = os.fork

    def terminate_and_fork() -> int:
        signal.raise_signal(signal.SIGTERM)  # to this thread: a process of xdist has another
        return fork()

    monkeypatch.setattr(os, "fork", terminate_and_fork)
    saved = signal.signal(signal.SIGTERM, lambda *_: handled.append(os.getpid()))
    try:
        assert wait(spawn(["true"], environment=PATH, cwd="/")) == 0
    finally:
        signal.signal(signal.SIGTERM, saved)
    assert handled == [os.getpid()]


def test_exception_from_a_signal_handler_leaves_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork
    started: list[int] = []

    def fork_and_interrupt() -> int:
        if pid := fork():
            started.append(pid)
            signal.raise_signal(signal.SIGINT)
        return pid

    monkeypatch.setattr(os, "fork", fork_and_interrupt)
    saved = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            spawn(["sleep", "1000"], environment=PATH, cwd="/")
    finally:
        signal.signal(signal.SIGINT, saved)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_pidfd_is_the_child_and_is_not_inheritable() -> None:
    child = spawn(["sleep", "1000"], environment=PATH, cwd="/")
    assert not os.get_inheritable(child.pidfd)
    assert send_signal(child.pidfd, signal.SIGTERM)
    assert wait(child) == -signal.SIGTERM


def test_program_is_found_on_the_path_of_the_given_environment(tmp_path: Path) -> None:
    for name, code in (("first", 11), ("second", 12)):
        (tmp_path / name).mkdir()
        program = tmp_path / name / "only-here"
        program.write_text(f"#!/bin/sh\nexit {code}\n")
        program.chmod(0o755)
    environment = {"PATH": f"/nowhere:{tmp_path}/second:{tmp_path}/first"}
    assert wait(spawn(["only-here"], environment=environment, cwd="/")) == 12
    assert wait(spawn(["first/only-here"], environment={}, cwd=str(tmp_path))) == 11
    assert wait(spawn(["./only-here"], environment={}, cwd=str(tmp_path / "second"))) == 12


def written(path: Path, text: str, mode: int) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


FAILURES: dict[str, tuple[list[str], str, str, int, str]] = {
    "not on PATH": (["no-such"], ".", "HP550", errno.ENOENT, "it is in no directory of PATH=/bin"),
    "no such file": (["./no-such"], ".", "HP550", errno.ENOENT, "there is no file"),
    "no interpreter": (["./orphan"], ".", "HP550", errno.ENOENT, "the interpreter that its first line names"),
    "not executable": (["./plain"], ".", "HP550", errno.EACCES, "it is not executable"),
    "no program": (["./script"], ".", "HP550", errno.ENOEXEC, "a script without a #! line"),
    "NUL in an argument": (["true", "a\0b"], ".", "HP550", errno.EINVAL, "embedded null byte"),
    "too long": (["true", "x" * (3 << 20)], ".", "HP550", errno.E2BIG, "too long"),
    "no directory": (["true"], "gone", "HP551", errno.ENOENT, "cannot be entered"),
    "a file for a directory": (["true"], "plain", "HP551", errno.ENOTDIR, "cannot be entered"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failed_start_says_why_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    """The guard in conftest.py finds a zombie or a descriptor that is left."""
    for file, text, mode in (
        ("plain", "exit 0\n", 0o644),
        ("script", "no first line\n", 0o755),
        ("orphan", "#!/gone/venv/bin/python\n", 0o755),
    ):
        (tmp_path / file).write_text(text)
        (tmp_path / file).chmod(mode)
    argv, cwd, code, number, cause = FAILURES[name]
    with pytest.raises(KernelError) as raised:
        spawn(argv, environment={"PATH": "/bin"}, cwd=str(tmp_path / cwd))
    assert (raised.value.code, raised.value.errno) == (code, number)
    assert cause in raised.value.cause


def test_closed_listener_cannot_be_passed() -> None:
    fd = max(open_descriptors()) + 100
    with pytest.raises(KernelError, match="HP211") as raised:
        spawn(["true"], environment=PATH, cwd="/", listeners=[fd], listen_names=["gone"])
    assert raised.value.errno == errno.EBADF


def test_bad_listener_name_starts_nothing(sockets: list[socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    with pytest.raises(ConfigError, match="HP321"):
        spawn(["true"], environment=PATH, cwd="/", listeners=[sockets[0].fileno()], listen_names=["a:b"])


def test_no_descriptor_left_is_an_error_that_says_so() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_descriptors()) + 1, hard))
    filler = []
    try:
        while True:
            try:
                filler.append(os.dup(0))
            except OSError:
                break
        with pytest.raises(KernelError, match="HP210") as raised:
            spawn(["true"], environment=PATH, cwd="/")
    finally:
        for fd in filler:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised.value.errno == errno.EMFILE
    assert "RLIMIT_NOFILE" in raised.value.cause


@pytest.mark.parametrize(("function", "number"), [("fork", errno.EAGAIN), ("pidfd_open", errno.EMFILE)])
def test_refused_fork_or_pidfd_leaves_nothing(function: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(KernelError, match="HP210") as raised:
        spawn(["sleep", "1000"], environment=PATH, cwd="/")
    assert raised.value.errno == number


def printed(script: str, tmp_path: Path) -> str:
    """What a Python program of its own prints."""
    output = tmp_path / "output"
    with output.open("wb") as file:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", script],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1)],
        )
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return output.read_text()


def test_exit_handlers_and_buffers_of_ours_do_not_run_in_a_child_that_fails(tmp_path: Path) -> None:
    """A failing start would otherwise print our buffered output twice and run our shutdown in the child."""
    script = """
import atexit
from hotport.errors import KernelError
from hotport.kernel.spawn import spawn
atexit.register(print, "leaving")
print("buffered")
try:
    spawn(["no-such-program"], environment={}, cwd="/")
except KernelError as error:
    print(error.code)
"""
    assert printed(script, tmp_path) == "buffered\nHP550\nleaving\n"


def test_child_has_all_standard_streams_although_we_have_none(tmp_path: Path) -> None:
    """Without them its first open file became its stdout, and a print of the application went into it."""
    script = """
import os
from hotport.kernel.spawn import spawn
kept = os.dup(1)
for fd in range(3):
    os.close(fd)
show = ["sh", "-c", 'for fd in 0 1 2; do readlink /proc/$$/fd/$fd; done > out']
child = spawn(show, environment=dict(os.environ), cwd=CWD)
os.dup2(kept, 1)
print(os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1]))
"""
    assert printed(script.replace("CWD", repr(str(tmp_path))), tmp_path) == "0\n"
    assert (tmp_path / "out").read_text().splitlines() == ["/dev/null", str(tmp_path / "out"), "/dev/null"]


def test_successor_has_our_stdin_and_process_group(said: Any) -> None:
    answer = said(is_successor=True)
    assert answer["fds"]["0"] == link(0)
    assert answer["pgid"] == os.getpgid(0)


def test_signals_are_ignored_if_that_is_wanted_and_no_others() -> None:
    """Ours would stay ignored through exec."""
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    heard, said = os.pipe()
    try:
        with descriptors_at({1: said}):
            os.set_inheritable(1, True)
            child = spawn(["grep", "SigIgn", "/proc/self/status"], environment=PATH, cwd="/", ignored={signal.SIGHUP})
            assert wait(child) == 0
        ignored = int(os.read(heard, 1000).split()[1], 16)
        # Nobody can set those that libc keeps for itself (signal(7): 32 and 33), and CI may start us with one ignored.
        assert {number for number in signal.valid_signals() if ignored >> (number - 1) & 1} == {signal.SIGHUP}
    finally:
        signal.signal(signal.SIGUSR2, before)
        os.close(heard)
        os.close(said)


def test_orphan_is_nobodys_child_and_has_its_listeners(sockets: list[socket.socket], tmp_path: Path) -> None:
    """systemd kills a main process that is not its own child instead of waiting for it."""
    path = tmp_path / "said.json"
    child = spawn(
        [sys.executable, "-I", "-S", "-c", WITNESS, str(path)],
        environment=PATH,
        cwd="/",
        listeners=[sockets[0].fileno()],
        listen_names=["web"],
        is_successor=True,
        is_orphan=True,
    )
    try:
        with pytest.raises(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)
        assert select.select([child.pidfd], [], [], 30)[0]
    finally:
        os.close(child.pidfd)
    answer = json.loads(path.read_text())
    assert answer["pid"] == child.pid
    assert answer["environ"]["LISTEN_PID"] == str(child.pid)
    assert reap(child.pid) is None


def test_orphan_that_cannot_be_started_is_an_error_and_leaves_nothing() -> None:
    before, children = open_descriptors(), psutil.Process().children()
    with pytest.raises(KernelError, match="HP550"):
        spawn(["no-such-program"], environment=PATH, cwd="/", is_successor=True, is_orphan=True)
    assert psutil.Process().children() == children
    assert open_descriptors() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of other users")
def test_program_is_another_users_from_its_first_moment_on(tmp_path: Path) -> None:
    told, tell = os.pipe()
    os.set_inheritable(tell, True)
    identity = Identity(65534, 65533, (65532, 65533))
    code = "id -u; id -g; id -G; grep -E '^Cap(Prm|Eff|Amb)' /proc/self/status"
    try:
        out = os.dup(1)
        os.dup2(tell, 1)
        try:
            child = spawn(["sh", "-c", code], environment=PATH, cwd="/", identity=identity)
        finally:
            os.dup2(out, 1)
            os.close(out)
        assert wait(child) == 0
        os.close(tell)
        with open(told, closefd=False) as file:
            uid, gid, groups, *capabilities = file.read().splitlines()
    finally:
        os.close(told)
    assert (uid, gid, sorted(groups.split())) == ("65534", "65533", ["65532", "65533"])
    assert {line.split()[1] for line in capabilities} == {"0" * 16}
    with pytest.raises(KernelError, match="HP551"):
        spawn(["true"], environment=PATH, cwd=str(closed(tmp_path)), identity=identity)


def closed(directory: Path) -> Path:
    directory.chmod(0o700)
    return directory


def test_user_that_cannot_be_had_is_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(identity: Identity) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr("hotport.kernel.spawn.assume", refuse)
    with pytest.raises(KernelError, match="HP552") as raised:
        spawn(["true"], environment=PATH, cwd="/", identity=Identity(1, 1))
    assert raised.value.errno == errno.EPERM


def test_streams_are_given_wherever_their_descriptors_lie(tmp_path: Path, sockets: list[socket.socket]) -> None:
    (tmp_path / "in").write_text("what it reads")
    script = """
        cat; echo said; echo complained >&2
        readlink /proc/$$/fd/3 | cut -d: -f1
        test -e /proc/$$/fd/4 || echo no more
    """
    heard, said = os.pipe()
    with open(tmp_path / "in") as source, descriptors_at({0: source.fileno(), 3: said}):
        child = spawn(
            ["sh", "-c", script],
            environment=PATH,
            cwd="/",
            listeners=[sockets[0].fileno()],
            listen_names=["web"],
            streams={0: 0, 1: 3, 2: 3},
        )
        assert wait(child) == 0
    os.close(said)
    with open(heard, "rb") as file:
        assert file.read() == b"what it readssaid\ncomplained\nsocket\nno more\n"


def test_child_that_ends_with_us_does_so_when_we_are_killed(tmp_path: Path) -> None:
    """A migration went on after its supervisor was killed, beside that of the next one."""
    script = """
import os, sys
from hotport.kernel.spawn import spawn
print(spawn(["sleep", "1000"], environment=dict(os.environ), cwd="/", ends_with_us=True).pid, flush=True)
sys.stdin.read()
"""
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert not select.select([pidfd], [], [], 0)[0]
            parent.kill()
            assert select.select([pidfd], [], [], 30)[0], "it outlives its parent"
        finally:
            os.close(pidfd)
