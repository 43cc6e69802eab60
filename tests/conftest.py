"""A test leaves nothing behind: no descriptor, no process, no socket file, no signal handler."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import psutil
import pytest
import trio  # noqa: F401  it hands hypothesis its random source, which must happen before `collect` freezes it
import uvloop

from tests.support import RESTARTS, SLOWNESS, collect, repetition

#: Thousands of interpreters are started; where byte code is forbidden, each would compile all of hotport.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

#: A shell has commands in the background ignore these, and nohup(1) the last one, which they would pass on to all that
#: they start (POSIX, 2.11).
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)

#: Without `explain`, which reruns a failure a hundred times slower to comment on it: one that was found in ten seconds
#: was never shown, as the test was ended meanwhile, by its time.
PHASES = tuple(phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain)
hypothesis.settings.register_profile("hotport", deadline=None, phases=PHASES)  # these machines are noisy
hypothesis.settings.load_profile("hotport")

#: How long the kernel may take to end what was killed a moment ago.
VANISH_S = 5.0 * SLOWNESS

#: In the environment of whatever the tests of this run start; another checkout may run a test of the same name.
RUN = "PYTEST_RUN_ID"


#: On which of the event loops tasks take their first step when they are made, as applications may want it. (uvloop 0.23
#: calls the factory as it is from Python 3.13.3 on, and fails on 3.13.0 to 3.13.2.)
EAGER = os.environ.get("HOTPORT_TEST_EAGER", "").split(",") if sys.version_info >= (3, 12) else []


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Callable[[], asyncio.AbstractEventLoop]]]:
    """Async tests run on both event loops."""
    make = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}[request.param]

    def make_eager() -> asyncio.AbstractEventLoop:
        loop = make()
        loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]  # since Python 3.12
        return loop

    return "asyncio", {"loop_factory": make_eager if request.param in EAGER else make}


@pytest.fixture(autouse=True, scope="session")
def pipe_of_libuv() -> None:
    """libuv's first loop opens a pipe for signals that the process keeps; no test is to blame for it."""
    uvloop.new_event_loop().close()


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault(RUN, f"{os.getpid()}-{time.time_ns()}")  # processes of pytest-xdist inherit it
    config.addinivalue_line("markers", "slow: takes more than half a minute; leave it out with -m 'not slow'")
    config.addinivalue_line("markers", "measured: the processes that it starts run with coverage")
    config.addinivalue_line("markers", "unmeasured: it repeats what other tests measure, and runs without coverage")
    config.addinivalue_line("markers", "soak: what it repeats, `make soak` repeats more often")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test may take longer where everything is slower, and what repeats for as long as it repeats."""
    if config.getoption("timeout") is None:
        allowed_s = float(config.getini("timeout")) * SLOWNESS
        for item in items:
            if item.get_closest_marker("timeout") is None:
                times = repetition(RESTARTS) if item.get_closest_marker("soak") is not None else 1.0
                item.add_marker(pytest.mark.timeout(allowed_s * times))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Measure only the processes of tests that ask for it: coverage costs a process as much as its own start."""
    with pytest.MonkeyPatch.context() as environment, ExitStack() as later:
        if not item.get_closest_marker("measured"):
            environment.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        if item.get_closest_marker("unmeasured") and "coverage" in sys.modules:
            coverage = sys.modules["coverage"].Coverage.current()
            if coverage is not None:
                coverage.stop()
                later.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # `start` sets its own
                later.callback(coverage.start)
        return (yield)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaks; set up first, so that everything else is gone when it looks."""
    collect()  # garbage of an earlier test must not be counted as ours
    directory = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    descriptors, handlers, pids = _descriptors(), _handlers(), _pids()
    yield
    collect()
    left = _processes_of(request.node.nodeid, _pids() - pids)
    _, alive = psutil.wait_procs(left, VANISH_S)
    told = [f"{process.pid} {' '.join(process.cmdline())}" for process in alive]
    for process in alive:
        process.kill()  # so that it does not disturb the next test
    assert not told, f"processes are left: {told}"
    assert _descriptors() == descriptors
    assert _handlers() == handlers
    if directory is not None:
        assert not _socket_files(directory)


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found


def _handlers() -> dict[int, object]:
    # SIGALRM is pytest-timeout's.
    return {number: signal.getsignal(number) for number in signal.valid_signals() - {signal.SIGALRM}}


def _pids() -> set[int]:
    return set(map(int, filter(str.isdigit, os.listdir("/proc"))))


def _processes_of(test: str, pids: set[int]) -> list[psutil.Process]:
    """Those of `pids` that were started by this test, by whomever they were adopted since.

    pytest names the running test in its environment, we name the run, and every process that is started inherits that.
    """
    marks = f"{RUN}={os.environ[RUN]}\0".encode(), f"PYTEST_CURRENT_TEST={test} ".encode()
    found = []
    for pid in pids:
        with contextlib.suppress(OSError, psutil.Error):  # it has ended, or is not ours
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            if pid != os.getpid() and all(mark in environment for mark in marks):
                found.append(psutil.Process(pid))
    return found


def _socket_files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]
