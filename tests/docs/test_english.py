"""What a reader meets first is said plainly: the first lines of docstrings, and the texts of errors."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from docs.generate import error_sites

SOURCE = Path(__file__).parent.parent.parent / "src" / "hotport"

#: Where there is a term: "no client", "another process", "the remaining connections", "continue", "the fate of".
RIDDLES = re.compile(
    r"\b(nobody|somebody|anybody|whoever|affairs?|what is left|goes? on|lives? on|in vain|bec[ao]mes? of)\b",
    re.IGNORECASE,
)


def first_lines() -> Iterator[tuple[str, str]]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, (ast.get_docstring(node) or "").partition("\n")[0]


def test_first_lines_of_docstrings_hold_no_riddles() -> None:
    found = [(name, line) for name, line in first_lines() if RIDDLES.search(line)]
    assert found == []


def test_errors_hold_no_riddles() -> None:
    texts = [(site.code, text) for site in error_sites() for text in (site.what, site.cause, site.fix, site.note)]
    assert [(code, text) for code, text in texts if RIDDLES.search(text)] == []
