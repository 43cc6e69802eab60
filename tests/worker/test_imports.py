"""What takes the time of an import is measured, and leaves no trace."""

from __future__ import annotations

import importlib
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest

from hotport.worker.imports import IMPORTS, measured_imports

BOOTSTRAP: Any = importlib._bootstrap


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(IMPORTS + 5):
        (tmp_path / f"measured_{number}.py").write_text("sum(range(100))\n")
    names = ", ".join(f"measured_{number}" for number in range(IMPORTS + 5))
    (tmp_path / "measured_slow.py").write_text(f"sum(range(300000))\nimport {names}\n")
    (tmp_path / "measured_app.py").write_text("import measured_slow\n")
    (tmp_path / "measured_broken.py").write_text("1/0\n")
    (tmp_path / "measured_breaks.py").write_text("import measured_broken\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


def forget() -> None:
    for name in [name for name in sys.modules if name.startswith("measured_")]:
        del sys.modules[name]


def test_slowest_modules_are_found_with_their_own_time_and_in_order() -> None:
    try:
        with measured_imports() as found:
            importlib.import_module("measured_app")
            thread = threading.Thread(target=importlib.import_module, args=["measured_0"])
            thread.start()
            thread.join()
    finally:
        forget()
    assert len(found) == IMPORTS
    assert [each.at_s for each in found] == sorted(each.at_s for each in found)
    slow = next(each for each in found if each.name == "measured_slow")
    assert slow.own_ms == max(each.own_ms for each in found)
    nested = [each for each in found if each.name not in ("measured_app", "measured_slow")]
    assert all(each.ms == each.own_ms for each in nested)
    assert sum(each.ms for each in nested) <= slow.ms


def test_measuring_does_not_show_in_tracebacks_and_ends_with_the_block() -> None:
    load = BOOTSTRAP._load_unlocked
    told = []
    for is_measured in (True, False):
        try:
            if is_measured:
                with measured_imports():
                    assert BOOTSTRAP._load_unlocked is not load
                    importlib.import_module("measured_breaks")
            else:
                importlib.import_module("measured_breaks")
        except ZeroDivisionError as error:
            told.append(
                [frame.name for frame in traceback.extract_tb(error.__traceback__) if "measured" in frame.filename]
            )
            files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
            assert not any(file.endswith("worker/imports.py") for file in files)
        finally:
            forget()
    assert BOOTSTRAP._load_unlocked is load
    assert told[0] == told[1] == ["<module>", "<module>"]


def test_python_without_that_function_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(BOOTSTRAP, "_load_unlocked")
    with measured_imports() as found:
        pass
    assert found == []


def test_function_that_the_application_has_replaced_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = BOOTSTRAP._load_unlocked
    monkeypatch.setattr(BOOTSTRAP, "_load_unlocked", before)
    own = lambda spec: before(spec)  # noqa: E731
    with measured_imports():
        BOOTSTRAP._load_unlocked = own
    assert BOOTSTRAP._load_unlocked is own
