"""Bar charts for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.text import Text

__all__ = ["bars"]

BLOCKS: Final = " ▁▂▃▄▅▆▇█"


def bars(columns: Sequence[tuple[float, str]], rows: int = 3) -> list[Text]:
    """Columns of a height and a colour, the highest one as high as there are rows."""
    top = max((height for height, _ in columns), default=0) or 1
    lines = []
    for row in reversed(range(rows)):
        line = Text("  ")
        for height, style in columns:
            level = round(height / top * rows * 8) - row * 8
            line.append(BLOCKS[min(8, max(0, level))], style=style)
        lines.append(line)
    return lines
