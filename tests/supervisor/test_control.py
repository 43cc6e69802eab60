"""What comes over the control socket, from clients of any make and mind."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from hotport.options import WORKERS_MAX
from hotport.supervisor import control
from hotport.supervisor.rundir import RuntimeDirectory
from hotport.wire.messages import (
    Done,
    Failure,
    Report,
    RestartRequest,
    ScaleRequest,
    Status,
    StatusRequest,
    StopRequest,
    UpgradeRequest,
    encode,
)
from tests.supervisor.stage import Nursery, Stage, play
from tests.support import RESTARTS, Hammer, eventually

Play = Callable[[Callable[[Stage], None]], int]

#: Frames that ended the supervisor, made it deaf, or were answered by nothing; and the error that they get.
REFUSED = {
    "a bake for ever": (b'{"type":"restart","canary":1,"bake_s":1e300}', "HP304"),
    "an undo window for ever": (b'{"type":"restart","undo_window_s":1e18}', "HP304"),
    "a window that is negative": (b'{"type":"restart","undo_window_s":-1}', "HP304"),
    "a lame duck for ever": (b'{"type":"stop","lame_duck_s":1e300}', "HP304"),
    "fewer than no canaries": (b'{"type":"restart","canary":-1}', "HP304"),
    "an unknown strategy": (b'{"type":"restart","strategy":"magic"}', "HP304"),
    "a crowd": (b'{"type":"scale","workers":99999999}', "HP304"),
    "one more than the bound": (encode(ScaleRequest(workers=WORKERS_MAX + 1)), "HP304"),
    "no workers": (b'{"type":"scale","workers":0}', "HP304"),
    "a NUL in a path": (b'{"type":"upgrade","python":"/bin/\\u0000sh"}', "HP304"),
    "an empty path": (b'{"type":"upgrade","python":""}', "HP304"),
    "a number that none can hold": (b'{"type":"scale","workers":%s}' % (b"9" * 5000), "HP602"),
    "deep JSON": (b"[" * 60_000, "HP602"),
    "deep JSON in a field that is ignored": (b'{"type":"stop","x":' + b"[" * 60_000, "HP602"),
}


@pytest.fixture
def run(tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> Play:
    return lambda client: play(tmp_path, nursery, monkeypatch, client)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_what_an_option_could_not_be_is_refused_and_nothing_else_happens(run: Play) -> None:
    def client(stage: Stage) -> None:
        stage.wait_serving()
        before = stage.ask(StatusRequest())
        codes = {}
        for name, (payload, code) in REFUSED.items():
            (reply,) = stage.replies(payload)
            codes[name] = reply.code if isinstance(reply, Failure) else reply, code
        assert {name: got for name, (got, code) in codes.items() if got != code} == {}
        after = stage.ask(StatusRequest())
        assert [worker.pid for worker in after.workers] == [worker.pid for worker in before.workers]
        assert (after.stage, after.wanted, after.generation) == ("ready", 1, 1)

    assert run(client) == 0


def test_more_workers_by_signal_are_bounded_too(run: Play) -> None:
    def client(stage: Stage) -> None:
        stage.wait_serving()
        os.kill(os.getpid(), signal.SIGTTIN)
        os.kill(os.getpid(), signal.SIGTTIN)
        stage.wait_serving(2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hotport.supervisor.signals.WORKERS_MAX", 2)
        assert run(client) == 0


def test_an_error_that_was_not_expected_is_told_to_who_asked_and_logged(
    run: Play, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client heard that the service "did not answer"."""

    async def fail(supervisor: object) -> None:
        raise RecursionError("too deep")

    def client(stage: Stage) -> None:
        stage.wait_serving()
        with monkeypatch.context() as patch:
            patch.setattr(control, "describe", fail)
            reply = stage.ask(StatusRequest())
        assert isinstance(reply, Failure)
        assert (reply.code, reply.exit_code) == ("HP642", 1)
        assert "RecursionError (too deep)" in reply.cause
        assert isinstance(stage.ask(StatusRequest()), Status)

    assert run(client) == 0
    told = capfd.readouterr().out
    assert "Traceback (most recent call last)" in told  # in a frame, if another test has imported rich
    assert "too deep" in told


def test_hotport_toml_that_is_nested_too_deeply_is_refused_by_restart_and_by_signal(
    run: Play, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """SIGHUP ended the supervisor with a RecursionError."""

    def client(stage: Stage) -> None:
        stage.wait_serving()
        (tmp_path / "hotport.toml").write_text(f"x = {'[' * 5000}{']' * 5000}")
        reply = stage.ask(RestartRequest())
        assert isinstance(reply, Failure)
        assert reply.code == "HP301"
        os.kill(os.getpid(), signal.SIGHUP)
        told = [""]

        def has_failed() -> bool:
            told[0] += capfd.readouterr().out
            return "request.failed" in told[0]

        eventually(has_failed, "the log says so")
        assert "HP301" in told[0]
        (tmp_path / "hotport.toml").unlink()
        assert isinstance(stage.ask(RestartRequest()), Report)

    assert run(client) == 0


@pytest.mark.soak
def test_nothing_is_left_open_after_take_overs_that_fail_restarts_and_upgrades(run: Play) -> None:
    """300 take-overs that failed left 600 descriptors open; without any left, control.sock was gone."""

    def client(stage: Stage) -> None:
        stage.wait_serving()
        stage.lose_successor()
        assert isinstance(stage.ask(RestartRequest()), Report)
        stage.wait_serving()
        before = descriptors()
        with Hammer(stage.port) as hammer:
            for _ in range(RESTARTS):
                stage.lose_successor()
                reply = stage.ask(RestartRequest())
                assert isinstance(reply, Report), reply
                assert isinstance(stage.ask(UpgradeRequest(python="/bin/false")), Failure)
                assert isinstance(stage.ask(ScaleRequest(workers=2)), Done)
                assert isinstance(stage.ask(ScaleRequest(workers=1)), Done)
            stage.wait_serving()
        assert not hammer.failures
        eventually(lambda: descriptors() <= before, f"no more than {before} descriptors")

    assert run(client) == 0


def test_a_conversation_under_way_outlives_a_take_over_that_fails(run: Play) -> None:
    """The listener was served by the conversation with the supervisor that had gone."""

    def client(stage: Stage) -> None:
        stage.wait_serving()
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(stage.runtime / "control.sock"))
            stage.lose_successor()
            stage.wait_serving()
            payload = encode(StatusRequest())
            silent.sendall(len(payload).to_bytes(4, "big") + payload)
            assert silent.recv(65536)

    assert run(client) == 0


def test_stop_is_answered(run: Play) -> None:
    def client(stage: Stage) -> None:
        stage.wait_serving()
        assert stage.ask(StopRequest()) == Done(detail="stopped")

    assert run(client) == 0


def test_signals_at_the_very_end_find_nothing_to_end(
    run: Play, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that came after the last worker's end killed the supervisor before it had removed its sockets."""
    close = RuntimeDirectory.close

    def close_under_signals(rundir: RuntimeDirectory) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGQUIT)
        close(rundir)

    monkeypatch.setattr(RuntimeDirectory, "close", close_under_signals)
    assert run(Stage.wait_serving) == 0
    assert list((tmp_path / "run" / "svc").iterdir()) == []
