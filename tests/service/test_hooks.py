"""What is done once a generation: before its workers start, and after its restart."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import (
    LINE_APP,
    Gate,
    Hammer,
    Service,
    ask_line,
    assert_three_lines,
    eventually,
    watching_pid,
    write_code,
)

#: Notes when and where it was run, beside what the release says.
NOTE = 'echo "$HOTPORT_GENERATION $PWD $FROM_FILE $(cat release)" >> "$NOTES"'


def script(*lines: str) -> str:
    return shlex.join(["sh", "-c", "\n".join(lines)])


@contextmanager
def serving(directory: Path, *args: str, version: str = "1", **options: str) -> Iterator[Service]:
    """A service whose ``hotport.toml`` has these options."""
    write_code(directory / "app.py", LINE_APP.format(version=version))
    configure(directory, **options)
    with Service(directory, "app:app", *args, env={"NOTES": str(directory / "notes")}) as service:
        service.wait_ready()
        yield service


def configure(directory: Path, **options: str) -> None:
    (directory / "hotport.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items()))


def notes(directory: Path) -> list[str]:
    path = directory / "notes"
    return path.read_text().splitlines() if path.exists() else []


def wait_notes(directory: Path, count: int) -> list[str]:
    """The notes, once there are so many."""
    eventually(lambda: len(notes(directory)) >= count, f"{count} notes")
    assert len(notes(directory)) == count
    return notes(directory)


# -- before_start


@pytest.mark.parametrize(
    "args", [(), ("--phased",), ("--canary", "1", "--bake", "10ms")], ids=["all", "phased", "canary"]
)
def test_it_runs_once_in_the_new_release_and_not_for_workers_that_come_later(
    tmp_path: Path, args: tuple[str, ...]
) -> None:
    for number in (41, 42):
        release = tmp_path / str(number)
        release.mkdir()
        (release / "release").write_text(f"release {number}")
        (release / ".env").write_text(f"FROM_FILE=file{number}\n")
        write_code(release / "app.py", LINE_APP.format(version=str(number)))
        configure(release, before_start=script(NOTE), env_file=".env")
    current = tmp_path / "current"
    current.symlink_to("41")
    env = {"NOTES": str(tmp_path / "notes")}
    with Service(tmp_path, "app:app", "--workers", "2", "--settle", "0", cwd=current, env=env) as service:
        service.wait_ready()
        assert wait_notes(tmp_path, 1) == [f"1 {tmp_path}/41 file41 release 41"]
        current.unlink()
        current.symlink_to("42")
        os.kill(ask_line(service.port).pid, signal.SIGKILL)
        service.wait_serving(2)
        service.run("scale", "3")
        service.wait_serving(3)
        report = service.restart(*args)
        assert [phase["name"] for phase in report["phases"]].count("prepared") == 1
        assert wait_notes(tmp_path, 2)[1] == f"2 {tmp_path}/42 file42 release 42"
        assert ask_line(service.port).version == "42"
    assert len(notes(tmp_path)) == 2


def test_programs_beside_the_interpreter_of_the_workers_are_found(tmp_path: Path) -> None:
    bin_ = tmp_path / "venv" / "bin"
    bin_.mkdir(parents=True)
    (bin_ / "migrate").write_text('#!/bin/sh\necho migrated > "$NOTES"\n')
    (bin_ / "migrate").chmod(0o755)
    (bin_ / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (bin_ / "python").chmod(0o755)
    with serving(tmp_path, before_start="migrate", python="venv/bin/python"):
        assert notes(tmp_path) == ["migrated"]


def test_failure_aborts_the_restart_with_its_output_and_the_old_generation_serves(tmp_path: Path) -> None:
    with serving(tmp_path, before_start="true") as service, Hammer(service.port) as hammer:
        write_code(tmp_path / "app.py", LINE_APP.format(version="2"))
        configure(tmp_path, before_start=script("echo adding a column", "echo no such table: users >&2", "exit 3"))
        report = service.restart(expect=4)
        assert report["outcome"] == "aborted"
        error = report["error"]
        assert error.startswith("HP406 cannot prepare generation 2 of svc\n  cause: before_start exited 3")
        assert "adding a column\n         no such table: users\n  try:   cd " in error
        [line] = service.log_events("before_start.failed")
        assert "no such table: users" in line["exception"]
        configure(tmp_path, before_start="no-such-program")
        report = service.restart(expect=4)
        assert_three_lines(report["error"], "HP550")
        configure(tmp_path)
        service.restart()
        hammer.wait_answers(5, "2")
        assert not hammer.failures


@pytest.mark.parametrize("how", ["late", "undo", "stop"])
def test_its_process_group_ends_when_it_is_late_or_unwanted(tmp_path: Path, how: str) -> None:
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    with serving(tmp_path, "--before-start-timeout", "300ms" if how == "late" else "1h") as service:
        stubborn = script("trap '' TERM", "sleep 1000 & echo $! $$ > pids", "echo waiting for a lock", "wait", "wait")
        configure(tmp_path, before_start=stubborn, kill_timeout="100ms")
        with service.start("restart", "--json") as restart:
            child, leader = map(int, pids.read_text().split())
            with watching_pid(child) as wait_child, watching_pid(leader) as wait_leader:
                if how == "undo":
                    assert service.run("undo").returncode == 0
                elif how == "stop":
                    assert service.stop() == 0
                wait_child()
                wait_leader()
            out, _ = restart.communicate()
            assert restart.returncode == 4
        error = json.loads(out)["error"]
        assert "waiting for a lock" in error
        why = {"late": "did not end in time", "undo": "hotport undo", "stop": "the service is stopping"}[how]
        assert why in error
        assert ("before_start_timeout is 300ms" in error) is (how == "late")
        if how != "stop":
            assert ask_line(service.port).generation == "1"


def test_it_does_not_outlive_a_supervisor_that_is_killed_and_adoption_does_not_run_it_again(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    with serving(tmp_path) as service:
        port = service.port
        configure(tmp_path, before_start=script("echo $$ > pids", "exec sleep 1000"))
        with service.start("restart") as restart:
            with watching_pid(int(pids.read_text())) as wait_ended:
                service.kill()
                wait_ended()
            restart.communicate()
        configure(tmp_path, before_start=script(NOTE))
        with Service(
            tmp_path, "app:app", "--bind", f"127.0.0.1:{port}", env={"NOTES": str(tmp_path / "notes")}
        ) as next_:
            next_.wait_ready()
            assert ask_line(port).generation == "1"
            assert notes(tmp_path) == []
            next_.restart()
            assert len(notes(tmp_path)) == 1


def test_lost_workers_are_replaced_while_it_runs(tmp_path: Path) -> None:
    """Migrations take minutes; meanwhile a crash used to leave a service with fewer workers."""
    gate = Gate(tmp_path)
    with serving(tmp_path, "--workers", "2") as service:
        configure(tmp_path, before_start=script("cat gate"))
        with service.start("restart", "--json") as restart:
            service.wait_until(lambda: bool(service.log_events("before_start.began")), "it runs")
            victim = ask_line(service.port).pid
            os.kill(victim, signal.SIGKILL)
            service.wait_until(lambda: victim not in service.worker_pids(), "it is gone")
            service.wait_serving(2)
            assert {worker["generation"] for worker in service.status()["workers"]} == {1}
            gate.open()
            out, _ = restart.communicate()
        assert json.loads(out)["outcome"] == "done"
        assert service.status()["generation"] == 2


def test_service_whose_first_generation_cannot_be_prepared_says_why_and_ends(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="1"))
    with Service(tmp_path, "app:app", "--before-start", script("echo no database", "exit 1")) as service:
        assert service.wait() == 3
        tail = service.log().partition("\nHP406 ")[2]
        assert "cannot prepare generation 1 of svc\n  cause: before_start exited 1" in tail
        assert "no database" in tail
        assert not service.log_events("worker.spawned")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_first_preparation_ends_with_the_service(tmp_path: Path, number: int) -> None:
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    write_code(tmp_path / "app.py", LINE_APP.format(version="1"))
    waiting = script("trap '' TERM" if number == signal.SIGQUIT else ":", "echo $$ > pids", "sleep 1000")
    with Service(tmp_path, "app:app", "--before-start", waiting, "--kill-timeout", "1h") as service:
        with watching_pid(int(pids.read_text())) as wait_ended:
            service.process.send_signal(number)
            wait_ended()
        assert service.wait() == 0


# -- after_restart


def test_it_reads_the_report_of_every_restart(tmp_path: Path) -> None:
    tell = script('cat >> "$NOTES"', 'echo >> "$NOTES"', "echo $HOTPORT_GENERATION")
    with serving(tmp_path, after_restart=tell) as service:
        assert notes(tmp_path) == []
        done = service.restart()
        assert json.loads(wait_notes(tmp_path, 1)[0]) == done
        write_code(tmp_path / "app.py", "raise RuntimeError('broken')")
        aborted = service.restart(expect=4)
        assert json.loads(wait_notes(tmp_path, 2)[1]) == aborted
        service.wait_until(lambda: len(service.log_events("after_restart.succeeded")) == 2, "it is logged")
        assert [line["output"] for line in service.log_events("after_restart.succeeded")] == ["2", "2"]


@pytest.mark.parametrize(
    ("command", "timeout", "why"),
    [
        (script("echo no network", "exit 5"), "30s", "exited 5"),
        (script("echo hanging", "exec sleep 1000"), "100ms", "it did not end in time"),
        ("no-such-program", "30s", None),
    ],
    ids=["fails", "hangs", "is not there"],
)
def test_its_failure_is_only_logged(tmp_path: Path, command: str, timeout: str, why: str | None) -> None:
    with serving(tmp_path, after_restart=command, after_restart_timeout=timeout) as service:
        assert service.restart()["outcome"] == "done"
        assert service.restart()["outcome"] == "done"
        service.wait_until(lambda: len(service.log_events("after_restart.failed")) == 2, "both are logged")
        line = service.log_events("after_restart.failed")[0]
        assert line.get("why") == why
        assert ("no network" in line["exception"]) or ("hanging" in line["exception"]) or ("HP550" in line["exception"])


def wait_for(service: Service, event: str, count: int = 1) -> None:
    service.wait_until(lambda: len(service.log_events(event)) >= count, event)


def test_restarts_do_not_wait_for_it_and_a_stop_does(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with serving(tmp_path, after_restart=script("cat gate", 'cat >> "$NOTES"', 'echo >> "$NOTES"')) as service:
        for _ in range(3):
            service.restart()
        assert len(service.log_events("after_restart.began")) == 1, "one at a time"
        with watching_pid(service.process.pid) as wait_ended:
            service.process.send_signal(signal.SIGTERM)
            wait_for(service, "worker.retired", 4)
            for number in (1, 2, 3):
                wait_for(service, "after_restart.began", number)
                gate.open()
                wait_for(service, "after_restart.succeeded", number)
            wait_ended()
        assert service.wait() == 0
        assert [json.loads(line)["generation"] for line in notes(tmp_path)] == [2, 3, 4]


@pytest.mark.parametrize("is_hurried", [True, False])
def test_a_stop_waits_for_it_no_longer_than_its_time(tmp_path: Path, is_hurried: bool) -> None:
    options = {"after_restart_timeout": "1h" if is_hurried else "300ms", "kill_timeout": "100ms"}
    with serving(tmp_path, after_restart=script("trap '' TERM", "sleep 1000 & wait; wait"), **options) as service:
        service.restart()
        wait_for(service, "after_restart.began")
        [line] = service.log_events("after_restart.began")
        with watching_pid(line["program_pid"]) as wait_ended:
            service.process.send_signal(signal.SIGTERM)
            if is_hurried:
                wait_for(service, "worker.retired", 2)
                service.process.send_signal(signal.SIGTERM)
            wait_ended()
        assert service.wait() == 0


def test_an_upgrade_waits_for_it(tmp_path: Path) -> None:
    """The next supervisor would not know of it, and it could run for ever."""
    gate = Gate(tmp_path)
    with serving(tmp_path, after_restart=script("cat gate", "echo told")) as service:
        service.restart()
        wait_for(service, "after_restart.began")
        with service.start("upgrade") as upgrade:
            gate.open()
            upgrade.communicate()
        assert upgrade.returncode == 0
        [line] = service.log_events("after_restart.succeeded")
        assert line["output"] == "told"
        assert ask_line(service.port).generation == "2"
