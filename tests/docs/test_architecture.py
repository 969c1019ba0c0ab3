"""What the page of the architecture says of one step and of one image is true of the code."""

from __future__ import annotations

import ast
import io
import re
import sys
from pathlib import Path

import attrs
import pytest

import e2ediff
from e2ediff import hookimpl
from e2ediff.host.plugins import load
from e2ediff.parts.objectives import Detached
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

RUNNING = Path(e2ediff.__file__).parent  # perhaps installed elsewhere
CORE = Path(__file__).parents[2] / "e2ediff"
PAGE = CORE.parent / "docs" / "explanation" / "architecture.md"
CALLS: list[str] = []


@attrs.frozen(kw_only=True)
class Traced(Detached):
    """`detached`, which notes the calls in which a training step reaches it."""

    def terms(self, nets, batch, draw, phase):
        """As `detached`'s."""
        frame, found = sys._getframe(), []
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(RUNNING):
                found.append(f"{path.relative_to(RUNNING)} {frame.f_code.co_qualname}")
            frame = frame.f_back
        if any(name.endswith("Engine._train") for name in found):
            CALLS[:] = found[::-1]
        return super().terms(nets, batch, draw, phase)


class Plugin:
    """Makes `traced` known."""

    __name__ = "traced"

    @hookimpl
    def register(self, add):
        add("objectives", "traced", Traced)


def test_the_loop_is_five_calls_from_an_objective_s_terms(tiny_recipe, tmp_path) -> None:
    """Those of the network module that torch puts between are left out."""
    CALLS.clear()
    quiet = Progress(io.StringIO())
    lines = ["steps=1", "diagnostics=[]", "objective=traced"]
    train(load(Plugin()), tiny_recipe, lines, str(tmp_path / "run"), progress=quiet)
    loop = CALLS.index("train/engine.py Engine._train")
    assert [*CALLS[loop:], "the objective's terms"] == [
        "train/engine.py Engine._train",
        "step/update.py Update.__call__",
        "step/parallel.py Parallel.backward",
        "step/step.py Step.forward",
        "step/step.py Step.terms",
        "the objective's terms",
    ]


def defined_in(path: Path) -> set[str]:
    """Functions, classes and methods of a file, the last with their class."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            names = [n.name for n in inner if isinstance(n, ast.FunctionDef)]
            found |= {name for n in names for name in (n, f"{node.name}.{n}")}
    return found


@pytest.mark.parametrize(("title", "lines"), [("One training step", 8), ("One sampled image", 6)])
def test_every_file_and_name_that_the_page_follows_is_there(title, lines) -> None:
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    steps = re.findall(r"^\d+\. (.*)$", section, re.MULTILINE)
    assert len(steps) == lines
    everywhere = set[str]().union(*(defined_in(f) for f in CORE.rglob("*.py")))
    for step in steps:
        words = re.findall(r"`([^`]+)`", step)
        files = [CORE / word for word in words if word.endswith(".py")]
        assert files or "`Engine`" in step or "`Update.__call__`" in step, step
        assert all(file.is_file() for file in files), step
        names = [w for w in words if not w.endswith(".py")]
        assert [name for name in names if name not in everywhere] == [], step
