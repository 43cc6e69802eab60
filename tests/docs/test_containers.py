"""What docker/ shows fits what hotport does; there is no container engine here to try it with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import msgspec
import pytest

from hotport.cli import _group
from hotport.options import Options, parse_duration
from hotport.options.loading import load
from hotport.supervisor.supervisor import ANSWER_TIMEOUT_S

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "docker"
MANIFESTS = sorted((DOCKER / "kubernetes").glob("*.yaml"))

#: Oldest and newest release of Kubernetes for which manifests are checked.
KUBERNETES = ("1.27", "1.33")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile: each instruction and its arguments."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word]


def arguments(instruction: str) -> list[str]:
    return [rest for word, rest in instructions() if word == instruction]


def image_environment() -> dict[str, str]:
    pairs = re.findall(r"(\w+)=(\S*)", arguments("ENV")[-1])
    return {key: value for key, value in pairs if key.startswith("HOTPORT_")}


def options_of(environ: Mapping[str, str]) -> Options:
    """What the image serves with, in this environment."""
    environ = {**image_environment(), **environ}
    return load(file=None, environ=environ, flags={"target": "app:app"}, cwd=DOCKER).options


def stop_s_max(options: Options) -> float:
    """The longest that a stop takes, with a worker that hangs in its start and one that hangs in its drain."""
    drain_s = options.drain_timeout_s + options.kill_timeout_s + ANSWER_TIMEOUT_S + options.kill_timeout_s
    return options.lame_duck_s + options.kill_timeout_s + drain_s


def assert_parses(command: list[str]) -> None:
    """A hotport command line that hotport takes."""
    assert command[0] == "hotport"
    found = _group.get_command(None, command[1])  # type: ignore[arg-type]  # it does not look at the context
    assert found is not None
    found.make_context(command[1], command[2:])


# -- the image ----------------------------------------------------------------------------------------------


def test_every_process_of_the_image_is_started_without_a_shell_and_is_hotport() -> None:
    (entry,), (rest,) = arguments("ENTRYPOINT"), arguments("CMD")
    assert_parses([*json.loads(entry), *json.loads(rest)])
    (check,) = arguments("HEALTHCHECK")
    assert_parses(json.loads(check.partition("CMD ")[2]))
    assert arguments("STOPSIGNAL") == ["SIGTERM"]


def test_the_image_does_not_run_as_root() -> None:
    (user,) = arguments("USER")
    uid, _, gid = user.partition(":")
    assert int(uid) > 0
    assert int(gid) > 0


def test_what_is_copied_is_there_and_not_ignored() -> None:
    patterns = (ROOT / ".dockerignore").read_text().split()
    for rest in arguments("COPY"):
        *sources, _ = rest.split()
        for source in [] if sources[0].startswith("--from=") else sources:
            assert (ROOT / source).exists()
            path = f"/{source}"
            last = [p for p in patterns if fnmatch(path, p.removeprefix("!")) or p.removeprefix("!") == path][-1]
            assert last.startswith("!"), source


def test_the_runtime_directory_is_below_the_volume() -> None:
    (volume,) = arguments("VOLUME")
    assert PurePosixPath(image_environment()["HOTPORT_RUNTIME_DIR"]).parent == PurePosixPath(volume)
    assert options_of({}).bind == ("tcp://0.0.0.0:8000",)


# -- blue and green -----------------------------------------------------------------------------------------


@pytest.fixture
def services() -> Any:
    """The services of the compose file; merge keys as compose reads them."""
    return msgspec.yaml.decode((DOCKER / "compose.yaml").read_bytes())["services"]


def test_one_network_namespace_outlives_both_colours_and_has_the_port(services: Any) -> None:
    assert services.keys() == {"net", "blue", "green"}
    assert [name for name, service in services.items() if "ports" in service] == ["net"]
    for colour in ("blue", "green"):
        assert services[colour]["network_mode"] == "service:net"
        assert services[colour]["depends_on"] == ["net"]
    (port,) = services["net"]["ports"]
    assert port.endswith(":8000")


def test_both_colours_find_each_other(services: Any) -> None:
    (volume,) = arguments("VOLUME")
    for colour in ("blue", "green"):
        assert services[colour]["volumes"] == [f"run:{volume}"]
        assert_parses([*json.loads(arguments("ENTRYPOINT")[0]), *services[colour]["command"]])
        assert "--take-over" in services[colour]["command"]
        assert services[colour]["restart"] == "on-failure"  # one that was taken over has ended well
        assert services[colour]["profiles"] == [colour]  # never both at once
    assert services["blue"]["image"] != services["green"]["image"]


def test_docker_waits_for_a_container_that_drains(services: Any) -> None:
    for colour in ("blue", "green"):
        assert parse_duration(services[colour]["stop_grace_period"]) >= stop_s_max(options_of({}))


# -- Kubernetes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_is_valid(path: Path, version: str) -> None:
    kubernetes_validate.validate(msgspec.yaml.decode(path.read_bytes()), version, strict=True)


def test_a_manifest_that_is_not_valid_is_found() -> None:
    deployment = manifest("deployment")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[-1], strict=True)


def manifest(name: str) -> Any:
    return msgspec.yaml.decode((DOCKER / "kubernetes" / f"{name}.yaml").read_bytes())


def pod() -> Any:
    return manifest("deployment")["spec"]["template"]["spec"]


def pod_options() -> Options:
    return options_of({each["name"]: each["value"] for each in pod()["containers"][0]["env"]})


def test_the_kubelet_waits_for_a_pod_that_stops() -> None:
    assert pod_options().lame_duck_s > 0
    assert pod()["terminationGracePeriodSeconds"] == stop_s_max(pod_options())


def test_a_lame_duck_lasts_longer_than_probes_need_to_see_it() -> None:
    probe = pod()["containers"][0]["readinessProbe"]
    assert pod_options().lame_duck_s > 2 * probe["periodSeconds"] * probe["failureThreshold"]


def test_probes_ask_the_status_port() -> None:
    (container,) = pod()["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert pod_options().status_bind == f"tcp://0.0.0.0:{ports['status']}"
    assert pod_options().bind == (f"tcp://0.0.0.0:{ports['http']}",)
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "status"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/live", "port": "status"}
    assert "preStop" not in container.get("lifecycle", {})  # SIGTERM does it: after a hook it would be a second stop


def test_the_pod_may_run_as_the_user_of_the_image_and_write_where_it_must() -> None:
    (user,), (volume,) = arguments("USER"), arguments("VOLUME")
    context, (container,) = pod()["securityContext"], pod()["containers"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {volume, "/tmp"}


def test_service_and_budget_mean_the_pods_of_the_deployment() -> None:
    labels = manifest("deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("deployment")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("service")["spec"]["selector"] == labels
    assert manifest("poddisruptionbudget")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("service")["spec"]["ports"][0]["targetPort"] == "http"
