"""What is released works: the distributions are built and checked, and the wheel serves in a fresh environment."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hotport
from tests.support import DEADLINE_S

ROOT = Path(__file__).parent.parent.parent

#: A package index may be slow; each step gets so many times the usual deadline.
INDEX_TIMES = 8

#: An application as its author would write it, for type checkers.
TYPED = """\
import hotport

async def echo(stream: hotport.Stream) -> None:
    async for chunk in stream:
        await stream.send(chunk)

async def main() -> None:
    async with hotport.serve(echo, bind="tcp://127.0.0.1:0") as server:
        reveal_type(server.addresses)
        await server.wait_closed()

hotport.run(echo, workers=2, drain_timeout="5s")
"""

WRONG = 'import hotport\nhotport.run("app:app", workers="two")\nhotport.run("app:app", wrkers=2)\n'


def run(*command: str | Path, cwd: Path, expect: int | None = 0) -> str:
    ours = ("PYTHON", "COVERAGE")  # of this environment, and of the run that is measured
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=INDEX_TIMES * DEADLINE_S
    )
    assert expect is None or done.returncode == expect, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def made_once(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A directory that the processes of a test run share, and whether it is still to be filled; locked meanwhile."""
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place.mkdir(exist_ok=True)
        yield place, not (place / "made").exists()
        (place / "made").touch()


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, and the wheel that was built from it."""
    pytest.importorskip("build", reason="build is not installed (group release)")
    with made_once(tmp_path_factory, "dist") as (directory, is_new):
        probe = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries", "0", "hatchling"]
        if (
            is_new
            and subprocess.run(
                [*probe, "-d", directory / "probe"], capture_output=True, timeout=DEADLINE_S, check=False
            ).returncode
        ):
            pytest.skip("pip reaches no package index: nothing can be built or installed in a fresh environment")
        if is_new:
            run(sys.executable, "-m", "build", "--outdir", directory, ROOT, cwd=directory)
    return directory


@pytest.fixture(scope="module")
def fresh(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of a fresh environment that has the wheel."""
    with made_once(tmp_path_factory, "fresh") as (place, is_new):
        if is_new:
            run(sys.executable, "-m", "venv", place, cwd=place)
            [wheel] = dist.glob("*.whl")
            run(place / "bin" / "pip", "install", "-q", f"hotport[demo] @ {wheel.as_uri()}", cwd=place)
    return place / "bin"


def test_distributions_pass_the_checks_of_the_index(dist: Path) -> None:
    files = [str(path) for path in dist.glob("hotport-*") if path.is_file()]
    assert len(files) == 2
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=dist)
    run(Path(sys.executable).with_name("check-wheel-contents"), *(f for f in files if f.endswith(".whl")), cwd=dist)


def test_distributions_have_what_they_should(dist: Path) -> None:
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    assert wheel.name == f"hotport-{hotport.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert "hotport/py.typed" in names
    assert f"hotport-{hotport.__version__}.data/data/share/man/man1/hotport.1" in names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"hotport"}
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", "tests/support.py"} <= inside
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]  # it stands in hotport/__init__.py alone


def test_wheel_in_a_fresh_environment_runs_the_demo(fresh: Path, tmp_path: Path) -> None:
    run(fresh / "pip", "check", cwd=tmp_path)
    assert run(fresh / "hotport", "--version", cwd=tmp_path) == f"hotport, version {hotport.__version__}\n"
    seen = json.loads(run(fresh / "hotport", "demo", "--restarts", "1", "--connections", "10", "--json", cwd=tmp_path))
    assert [mark["outcome"] for mark in seen["restarts"]] == ["done"]
    assert (fresh.parent / "share/man/man1/hotport.1").is_file()


def test_missing_extra_is_installed_by_the_line_that_the_error_says(dist: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "bare", cwd=tmp_path)
    [wheel] = dist.glob("*.whl")
    run("bare/bin/pip", "install", "-q", wheel, cwd=tmp_path)
    (tmp_path / "app.py").write_text("async def app(scope, receive, send): ...")
    serve = ["bare/bin/hotport", "serve", "--bind", "127.0.0.1:0", "app:app"]
    environment = {**os.environ, "HOTPORT_RUNTIME_DIR": str(tmp_path / "run")}
    refused = subprocess.run(serve, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert refused.returncode == 3
    [line] = [line.partition("try:")[2] for line in refused.stderr.splitlines() if "try:" in line]
    run("sh", "-c", line, cwd=tmp_path)
    run("bare/bin/python", "-c", "import httptools, websockets", cwd=tmp_path)


@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_types_are_seen_from_outside(fresh: Path, tmp_path: Path, checker: str) -> None:
    (tmp_path / "right.py").write_text(TYPED)
    (tmp_path / "wrong.py").write_text(WRONG)
    program = Path(sys.executable).with_name(checker)
    if checker == "mypy":
        command: list[str | Path] = [
            program,
            "--strict",
            "--python-executable",
            fresh / "python",
            "--cache-dir",
            tmp_path / "cache",
        ]
    else:
        (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
        command = [program, "--pythonpath", fresh / "python", "--level", "error"]
    run(*command, "right.py", cwd=tmp_path)
    told = run(*command, "wrong.py", cwd=tmp_path, expect=1)
    assert "wrong.py:2" in told
    assert "wrong.py:3" in told or "wrkers" in told
