"""What thirty installed plugins cost each command, in CPU seconds of all its processes.

    python benchmarks/thirty_plugins.py

Each plugin registers an objective: as a class, so that its module imports torch, or as text that
is imported when a recipe names it.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
PLAIN = ["--set", "requires=[]", "--set", "objective=detached"]
COMMANDS = {
    "--help": ["--help"],
    "plugins list": ["plugins", "list"],
    "check": ["check", str(RECIPE), *PLAIN],
    "check, one named": ["check", str(RECIPE), *PLAIN[:2], "--set", "objective=part_7"],
}
PART = """import attrs
from e2ediff.parts.objectives import Detached

@attrs.frozen(kw_only=True)
class Mine(Detached):
    "An objective."
"""
HOOK = """
from e2ediff import hookimpl

@hookimpl
def register(add):
    add("objectives", "part_{i}", {target})
"""


def install(site: Path, *, text: bool) -> None:
    """Thirty distributions, with a module each and, for a class given as text, a second one."""
    for i in range(30):
        name = f"plug_{i}"
        if text:
            (site / f"{name}_objective.py").write_text(PART)
            module = HOOK.format(i=i, target=f'"{name}_objective:Mine"')
        else:
            module = PART + HOOK.format(i=i, target="Mine")
        (site / f"{name}.py").write_text(module)
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[e2ediff]\n{name} = {name}\n")


def seconds(words: list[str], site: str) -> float:
    """CPU seconds of a command and its processes, with plugins from this folder."""
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "e2ediff", *words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Five rounds, of which the median and the range are printed."""
    with tempfile.TemporaryDirectory() as none, tempfile.TemporaryDirectory() as classes, \
            tempfile.TemporaryDirectory() as texts:  # fmt: skip
        install(Path(classes), text=False)
        install(Path(texts), text=True)
        sites = {"none": none, "30 as classes": classes, "30 as text": texts}
        for command, words in COMMANDS.items():
            found: dict[str, list[float]] = {name: [] for name in sites}
            for _ in range(5):
                for name, site in sites.items():
                    if name != "none" or "part_7" not in " ".join(words):
                        found[name].append(seconds(words, site))
            for name, times in found.items():
                if times:
                    span = f"({min(times):.2f}-{max(times):.2f})"
                    print(f"{command:<18}{name:<15}{statistics.median(times):.2f} {span}")


if __name__ == "__main__":
    main()
