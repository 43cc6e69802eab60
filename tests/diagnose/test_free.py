"""Freeing an address: the plan, as values; carried out on real processes of this test's own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from msgspec.structs import replace

from hotport.address import TcpAddress, UnixAddress
from hotport.diagnose import free as module
from hotport.diagnose.diagnosis import Diagnosis, diagnose
from hotport.diagnose.free import free, plan
from hotport.errors import ConfigError
from hotport.kernel.port import ourselves
from hotport.model.bind import CHOICES, Can, judge, judge_name, remedies
from hotport.model.port import Asker, Local, Port, ReuseOptions, Sockets, State, UnixName
from hotport.model.process import Process

HERE = Local(ip_address("127.0.0.1"))
ROOT = Asker(0, "root", may_bind_low=True)
NGINX = Process(7, "nginx", "www")
LISTEN = Sockets(State.LISTEN, HERE, uid=0, options=ReuseOptions(), holders=(NGINX,), backlog=128)
TIME_WAIT = Sockets(State.TIME_WAIT, HERE, count=3, is_held=False, is_timed=True, ends_in_s=42)


def on(*sockets: Sockets, asker: Asker = ROOT, number: int = 8000) -> Diagnosis:
    port = Port(f"tcp://127.0.0.1:{number}", "tcp", HERE, number, sockets=sockets)
    answers = {name: judge(port, asker, options) for name, options in CHOICES.items()}
    answer = answers["reuseaddr"]
    return Diagnosis(port.address, asker, answer.can, "reuseaddr", answers, tuple(remedies(port, answer)), (), port)


def named(name: UnixName) -> Diagnosis:
    answer = judge_name(name)
    return Diagnosis(name.address, ROOT, answer.can, "none", {"none": answer}, (), (), name)


@pytest.mark.parametrize(
    ("diagnosis", "texts"),
    [
        (on(), []),
        (
            on(LISTEN),
            ["send SIGTERM to pid 7 (nginx)", "send SIGKILL to those that have not ended; their connections are cut"],
        ),
        (on(replace(LISTEN, holders=(replace(NGINX, stop="systemctl stop web"),))), ["run `systemctl stop web`"]),
        (
            on(replace(LISTEN, holders=(replace(NGINX, is_suspended=True),))),
            [
                "send SIGTERM and SIGCONT to pid 7 (nginx)",
                "send SIGKILL to those that have not ended; their connections are cut",
            ],
        ),
        (on(TIME_WAIT), ["wait until the kernel forgets old connections, 42 s"]),
        (
            on(Sockets(State.FIN_WAIT1, HERE, uid=0, is_held=False, backlog=9, peers=("10.0.0.9:5",))),
            ["run `ss -K sport = :8000`: connections without a process are reset"],
        ),
        (
            on(Sockets(State.ESTABLISHED, HERE, uid=0, options=ReuseOptions(), holders=(NGINX,), is_outgoing=True)),
            [
                "run `sysctl -w net.ipv4.ip_local_reserved_ports=8000 && ss -K state established sport = :8000`: "
                "its program connects again, from another port"
            ],
        ),
        (named(UnixName("unix:a.sock", "a.sock", "socket")), ["remove the socket file a.sock"]),
        (
            named(UnixName("unix:a.sock", "a.sock", "socket", holders=(NGINX,), is_held=True)),
            [
                "send SIGTERM to pid 7 (nginx)",
                "send SIGKILL to those that have not ended; their connections are cut",
                "remove the socket file a.sock",
            ],
        ),
    ],
)
def test_plan_goes_from_the_gentlest_step_to_the_last(diagnosis: Diagnosis, texts: list[str]) -> None:
    assert [step.text for step in plan(diagnosis, untouchable={1})] == texts


@pytest.mark.parametrize(
    ("diagnosis", "cause"),
    [
        (on(LISTEN), "pid 7 (nginx, user www) runs this command, or is process 1"),
        (on(replace(LISTEN, holders=())), "a process that may not be looked at holds it"),
        (on(number=80, asker=Asker(5, "eve", may_bind_low=False)), "ports below 1024 need"),
        (named(UnixName("unix:a", "a", "something else")), "no socket"),
    ],
)
def test_what_cannot_be_freed_is_refused_before_anything_is_ended(diagnosis: Diagnosis, cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(diagnosis, untouchable={1, 7})
    assert caught.value.code == "HP134"
    assert cause in (caught.value.cause or "")


@contextmanager
def serving(code: str = "signal.pause()") -> Iterator[tuple[subprocess.Popen[bytes], TcpAddress]]:
    program = f"""
import signal, socket
s = socket.create_server(("127.0.0.1", 0))
print(s.getsockname()[1], flush=True)
{code}
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield process, TcpAddress("127.0.0.1", int(process.stdout.readline()))
        finally:
            process.kill()


def freed(address: TcpAddress | UnixAddress, *, agrees: bool = True) -> Diagnosis:
    def look() -> Diagnosis:
        return diagnose(address, ourselves())

    return free(look(), look, agrees=lambda _: agrees)


def test_process_that_ends_when_it_is_told_to_is_not_killed(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as (process, address):
        assert freed(address, agrees=False).free == Can.NO
        assert freed(address).free == Can.YES
        assert process.wait() == -signal.SIGTERM
    assert capsys.readouterr().err.startswith(f"1. send SIGTERM to pid {process.pid} (")


def test_process_that_does_not_listen_to_sigterm_is_killed_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TERM_S", 0.01)
    with serving("signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True)\nwhile True: signal.pause()") as (
        process,
        address,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        assert freed(address).free == Can.YES
        assert process.wait() == -signal.SIGKILL


def test_suspended_process_ends_by_itself_after_it_goes_on() -> None:
    with serving() as (process, address):
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert freed(address).free == Can.YES
        assert process.wait() == -signal.SIGTERM


def test_process_that_closes_the_port_and_lives_on_is_left_alone() -> None:
    with serving(
        "signal.signal(signal.SIGTERM, lambda *_: s.close()); print(flush=True)\nwhile True: signal.pause()"
    ) as (
        process,
        address,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        assert freed(address).free == Can.YES
        assert process.poll() is None


def test_nothing_is_ended_if_other_processes_hold_the_port_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (process, address):
        before = diagnose(address, ourselves())
        other = on(replace(LISTEN, holders=(replace(NGINX, pid=process.pid + 1),)))
        with pytest.raises(ConfigError, match="HP134"):
            free(before, lambda: other, agrees=lambda _: True)
        assert process.poll() is None


def test_this_very_process_is_not_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ConfigError, match="HP134"):
        freed(TcpAddress("127.0.0.1", server.getsockname()[1]))


def test_socket_file_is_removed_after_its_server_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "a b.sock"
    program = f"import signal, socket; s = socket.socket(1); s.bind({str(path)!r}); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert freed(UnixAddress(str(path))).free == Can.YES
    assert not path.exists()


def test_command_that_fails_or_takes_too_long_is_the_last_step(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving() as (process, address):
        found = diagnose(address, ourselves())
        for command, limit_s, words in (("exit 3", 60.0, "exit code 3"), ("exec sleep 1000", 0.01, "has not ended")):
            step = module.Step("run it", limit_s, command)
            monkeypatch.setattr(module, "plan", lambda *_, step=step, **__: (step,))
            assert free(found, lambda: diagnose(address, ourselves()), agrees=lambda _: True).free == Can.NO
            assert words in capfd.readouterr().err
        assert process.poll() is None


def test_process_of_another_user_is_not_ours_to_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise PermissionError

    monkeypatch.setattr(module, "send_signal", refuse)
    with serving() as (_, address), pytest.raises(ConfigError, match="HP134"):
        freed(address)
