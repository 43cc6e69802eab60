"""One directory with every application in it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

APPS = Path(__file__).parent / "apps"

#: What `/file` sends: more than any buffer on the way holds.
BIG_FILE = random.Random(1).randbytes(3_000_000)

STATIC_TEXT = b"".join(b"line %d\n" % number for number in range(1000))


def lay_out(directory: Path) -> Path:
    """Fill a directory with the applications and what they serve."""
    for path in APPS.glob("*.py"):
        shutil.copy(path, directory)
    (directory / "big.bin").write_bytes(BIG_FILE)
    (directory / "static").mkdir()
    (directory / "static" / "lines.txt").write_bytes(STATIC_TEXT)
    return directory


@pytest.fixture
def apps(tmp_path: Path) -> Path:
    """A directory of the test's own, with every application in it."""
    return lay_out(tmp_path)
