"""Print `name==version` for the lowest version of each dependency that pyproject.toml allows.

Without the packages that are too large to install twice, or that one of them decides.
"""

import re
import tomllib
from pathlib import Path

LEFT_OUT = {"torch", "torchvision", "xformers"}

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
for line in project["project"]["dependencies"]:
    name, version = re.fullmatch(r"([\w.-]+)>=([\w.]+)(?:\s*;.*)?", line).groups()
    if name not in LEFT_OUT:
        print(f"{name}=={version}")
