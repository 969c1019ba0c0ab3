"""The command line in this process: its exit code and what it writes."""

from __future__ import annotations

import contextlib
import io
import tomllib
from importlib.util import find_spec
from pathlib import Path

import attrs
import pytest

from e2ediff.cli import main

PLUGINS = Path(__file__).parents[2] / "plugins"
OURS = ",".join(
    entry
    for project in sorted(PLUGINS.glob("*/pyproject.toml"))
    for entry in tomllib.loads(project.read_text())["project"]["entry-points"]["e2ediff"]
)
"""The plugins of this repository by their entry points, as E2EDIFF_BLOCK takes them."""


def needs(*distributions: str) -> pytest.MarkDecorator:
    """Skips a test unless these plugins of the repository are there, and names those missing."""
    lost = [f"plugins/{d}" for d in distributions if find_spec(d.replace("-", "_")) is None]
    return pytest.mark.skipif(bool(lost), reason=f"needs `pip install {' '.join(lost)}`")


needs_dsd = needs("e2ediff-dsd")


@attrs.frozen
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def e2ediff(*words: object) -> Done:
    """Run a command; an exception that a user would see as a traceback is raised here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())


def trained(folder: Path, recipe: str) -> Path:
    """The run of a recipe, trained in this folder."""
    (folder / "tiny.yaml").write_text(recipe)
    done = e2ediff("run", folder / "tiny.yaml", "--out", folder / "run")
    assert done.code == 0, done.err
    return folder / "run"
