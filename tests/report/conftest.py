"""An ablation that was made once: two cells that train and one whose data are missing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from command_line import Done, e2ediff
from drawing import drawing
from forked import forked_runs

HOSTILE = "<script>alert(1)</script>"


@attrs.frozen
class Made:
    """The ablation's directory, the words that made it, and how the command ended."""

    path: Path
    words: tuple[str, ...]
    done: Done


@pytest.fixture(scope="module", autouse=True)
def warm() -> Iterator[None]:
    """Commands are forks here; `test_plugin_files` starts those of ablations as a user does."""
    with forked_runs():
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_text) -> Made:
    """2 cells x 2 seeds that train, and a cell that fails in both seeds; not to be changed."""
    folder = tmp_path_factory.mktemp("ablation")
    text = tiny_text.replace("steps: 12", "steps: 8").replace("preview: 1000", "preview: 4")
    (folder / "tiny.yaml").write_text(text)
    broken = f"{{name: image_folder, root: '{HOSTILE}', size: 16, classes: 4}}"
    words = (
        "ablate",
        "tiny.yaml",
        "--vary",
        f"objective=coupled,detached,detached+data={broken}",
        "--seeds",
        "0,1",
        "--threads",
        "1",
    )
    with forked_runs(), drawing(), contextlib.chdir(folder):
        done = e2ediff(*words)
    return Made(folder / "groups" / "tiny", words, done)


@pytest.fixture
def group(made, tmp_path, monkeypatch) -> Path:
    """A copy of it in an otherwise empty working directory, at groups/tiny."""
    shutil.copytree(made.path.parents[1], tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return Path("groups/tiny")
