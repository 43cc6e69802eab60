"""A bad deploy is taken back, by hand or because it is not well: and nobody's connection notices."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.service.undo_support import Clients, write_version
from tests.support import DEADLINE_S, Service, assert_three_lines, http_get


@contextmanager
def serving(directory: Path, *args: str, workers: int = 2) -> Iterator[Service]:
    write_version(directory, "1")
    options = ("--workers", str(workers), "--handoff", "websocket", "--keep-alive", "1h")
    with Service(directory, "app:app", *options, *args) as service:
        service.wait_ready()
        yield service


def wait_watched(service: Service, step: str) -> None:
    service.wait_until(lambda: (service.status()["watch"] or {}).get("step") == step, step)


def moved(fates: dict[str, int] | None) -> Any:
    assert fates is not None
    return {fate.removeprefix("moved_"): count for fate, count in fates.items() if fate.startswith("moved_")}


def lost(report: Any) -> dict[str, int]:
    fates = [*report["connections"].items(), *(report["connections_back"] or {}).items()]
    return {fate: count for fate, count in fates if fate.startswith(("cut_", "told_", "workers_"))}


@pytest.mark.parametrize("strategy", ["inherit", "rebind"])
@pytest.mark.usefixtures("either_start")
def test_connections_go_to_the_new_generation_and_come_back_when_somebody_undoes_the_restart(
    tmp_path: Path, strategy: str
) -> None:
    newcomers = 0 if strategy == "rebind" else 2  # some would come in its gap
    with (
        serving(tmp_path, "--strategy", strategy) as service,
        Clients(service.port, newcomers=newcomers) as clients,
    ):
        clients.wait("1")
        write_version(tmp_path, "2")
        restart = service.start("restart", "--undo-window", "1h")
        wait_watched(service, "watching")
        clients.wait("2")
        phases = {worker["phase"] for worker in service.status()["workers"] if worker["generation"] == 1}
        assert phases == {"quiesced"}
        undone = service.run("undo", "--json")
        assert undone.returncode == 0, undone.stderr
        clients.wait("1")
        out, err = restart.communicate(timeout=DEADLINE_S)
        assert restart.returncode == 4, err
        assert "hotport undo takes it back" in err
        assert "undone: generation 1 of svc serves on" in out
    report = json.loads(undone.stdout)
    assert report["outcome"] == "undone"
    assert (report["generation"], report["serving"]) == (2, 1)
    assert "hotport undo" in report["error"]
    assert f"of uid {os.getuid()}" in report["error"]
    for fates in (report["connections"], report["connections_back"]):
        assert moved(fates)["websocket"] == 4
        assert 8 <= moved(fates)["http"] <= 8 + newcomers  # some had been answered, and had not closed
    assert lost(report) == {}
    assert not clients.failures


#: What is wrong with a version, the rule that it breaks, and what is said of it.
ILLS = {
    "fails": ('health_errors_max = "10%"', "requests failed; health_errors_max is 0.1"),
    "leaks": ('health_memory_max = "100M"', "MiB of memory; health_memory_max is 100 MiB"),
    "stalls": ('health_lag_max = "700ms"', "health_lag_max"),
    "is sick": ('health_path = "/health"\nhealth_timeout = "1m"', "answered GET /health with 503"),
    "hangs when asked": (
        'health_path = "/health"\nhealth_timeout = "500ms"',
        "did not answer GET /health within 0.5 s",
    ),
}


def test_new_generations_that_are_not_well_are_taken_back_and_no_connection_is_ever_lost(tmp_path: Path) -> None:
    with serving(tmp_path, "--undo-window", "1h") as service, Clients(service.port) as clients:
        for ill, (rule, says) in ILLS.items():
            clients.wait("1")
            (tmp_path / "hotport.toml").write_text(rule)
            write_version(tmp_path, "2", ill, stall_s=2.0)
            report = service.restart(expect=4)
            assert report["outcome"] == "undone"
            assert says in report["error"]
            assert lost(report) == {}
        clients.wait("1")
    assert not clients.failures


def test_new_generation_that_dies_in_its_window_is_taken_back_and_nobody_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path, "--undo-window", "1h") as service:
        restart = service.start("restart", "--json")
        wait_watched(service, "watching")
        new = [worker for worker in service.status()["workers"] if worker["generation"] == 2]
        os.kill(new[0]["pid"], signal.SIGKILL)
        for _ in range(200):  # whoever comes now waits in the queue at most
            with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S):
                pass
        out, _ = restart.communicate(timeout=DEADLINE_S)
        assert restart.returncode == 4
        assert http_get(service.port) == (200, b"1")
    report = json.loads(out)
    assert report["outcome"] == "undone"
    assert report["error"] == f"worker {new[0]['worker']} killed by SIGKILL"
    assert report["connections_back"]["workers_killed"] == 1


@pytest.mark.usefixtures("either_start")
def test_canary_serves_beside_the_old_ones_and_the_others_follow_when_it_has_been_well(tmp_path: Path) -> None:
    health = ("--health-path", "/health", "--health-timeout", "1m")
    with serving(tmp_path, *health) as service, Clients(service.port, websockets=0) as clients:
        clients.wait("1")
        write_version(tmp_path, "2")
        restart = service.start("restart", "--json", "--canary", "1", "--bake", "1h")
        wait_watched(service, "baking")
        phases = sorted((worker["generation"], worker["phase"]) for worker in service.status()["workers"])
        assert phases == [(1, "serving"), (1, "serving"), (2, "serving")]
        old = next(worker for worker in service.status()["workers"] if worker["generation"] == 1)
        os.kill(old["pid"], signal.SIGTERM)  # its connections are for the other old one
        service.wait_until(lambda: bool(service.log_events("worker.retired")), "it has gone")
        assert [each["adopted"] for each in service.status()["workers"] if each["generation"] == 2] == [0]
        kept = service.run("undo", "--keep")
        assert (kept.returncode, kept.stdout) == (0, "generation 2 stays: the other workers start\n")
        clients.wait("2")
        out, _ = restart.communicate(timeout=DEADLINE_S)
        assert restart.returncode == 0
    report = json.loads(out)
    assert report["outcome"] == "done"
    assert {phase["name"]: phase["batch"] for phase in report["phases"]} | {"ready": 2} == {
        "ready": 2,
        "baking": 1,
        "committed": 2,
        "quiesced": 2,
        "draining": 2,
        "retired": 2,
    }
    assert lost(report) == {}
    assert not clients.failures


def test_canary_that_is_not_well_is_taken_back_before_the_others_start(tmp_path: Path) -> None:
    args = ("--canary", "1", "--bake", "1h", "--health-errors-max", "1%", "--health-requests-min", "5")
    with serving(tmp_path, *args) as service, Clients(service.port, newcomers=4) as clients:
        clients.wait("1")
        write_version(tmp_path, "2", "fails")
        report = service.restart(expect=4)
        clients.wait("1")
        spawned = [line["generation"] for line in service.log_events("worker.spawned")]
    assert report["outcome"] == "undone"
    assert "requests failed" in report["error"]
    assert spawned == [1, 1, 2]
    assert lost(report) == {}
    assert not clients.failures


def test_bake_that_ends_well_by_itself_leads_to_the_undo_window(tmp_path: Path) -> None:
    with serving(tmp_path, "--canary", "2", "--bake", "300ms", "--undo-window", "300ms") as service:
        write_version(tmp_path, "2")
        report = service.restart()
        assert http_get(service.port) == (200, b"2")
    names = [phase["name"] for phase in report["phases"]]
    assert names == ["ready", "baking", "committed", "quiesced", "watching", "draining", "retired"]


def test_hup_restarts_with_the_same_window_and_a_stop_ends_it(tmp_path: Path) -> None:
    with serving(tmp_path, "--undo-window", "1h", workers=1) as service:
        service.process.send_signal(signal.SIGHUP)
        wait_watched(service, "watching")
        assert "it is watched for" in service.run("status").stdout
        second = service.run("restart")
        assert second.returncode == 4
        assert_three_lines(
            second.stderr.split("\n", 1)[1] if second.stderr.startswith("asking") else second.stderr, "HP410"
        )
        assert "  try:   hotport undo svc\n" in second.stderr
        assert "hotport undo --keep svc" in second.stderr
        clash = service.run("restart", "--canary", "1", "--phased")
        assert clash.returncode == 4
        assert_three_lines(clash.stderr, "HP305")
        assert "'--bake'" in service.run("restart", "--bake", "soon").stderr
        assert service.stop() == 0
    (report,) = service.log_events("restart.report")
    assert report["outcome"] == "aborted"


def test_undo_after_the_window_is_refused_and_says_when_the_last_restart_ended(tmp_path: Path) -> None:
    with serving(tmp_path, workers=1) as service:
        service.restart()
        refused = service.run("undo")
        for strategy in ("overlap", "rebind"):
            canary = service.run("restart", "--canary", "1", "--strategy", strategy)
            assert canary.returncode == 4
            assert_three_lines(canary.stderr, "HP421")
    assert refused.returncode == 4
    assert_three_lines(refused.stderr, "HP410")
    assert "no restart is in progress or in its undo window" in refused.stderr
    assert "generation 2" in refused.stderr
    assert "ago" in refused.stderr
    assert "--undo-window" in refused.stderr
