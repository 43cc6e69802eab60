"""Print the lowest versions that ``pyproject.toml`` allows of what hotport itself needs, as constraints for pip."""

from __future__ import annotations

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for extra in (project["dependencies"], *project["optional-dependencies"].values()):
    for requirement in extra:
        if not requirement.startswith("hotport"):
            name, bound = requirement.split(">=")
            print(f"{name}=={bound}")
