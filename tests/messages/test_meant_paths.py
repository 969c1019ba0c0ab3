"""What is no recipe or no run is refused with what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import e2ediff
from tiny_recipe import tiny


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory but for tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("E2EDIFF_RUNS", raising=False)
    Path("tiny.yaml").write_text(tiny())
    return tmp_path


def refused(code: int, *words: str) -> str:
    done = e2ediff(*words)
    assert done.code == code, done
    return done.err


def test_a_recipe_that_is_not_there_is_refused_with_those_that_are() -> None:
    Path("recipes/ladder").mkdir(parents=True)
    for name in ("quickstart", "dsd_in256", "ladder/l5_ema"):
        Path(f"recipes/{name}.yaml").write_text("e2ediff: 1")
    Path("folder").mkdir()
    for given, meant in {
        "recipes/quickstar.yaml": "recipes/quickstart.yaml",
        "quickstart": "recipes/quickstart.yaml",
        "dsd_in256": "recipes/dsd_in256.yaml",
        "dsd-in256.yml": "recipes/dsd_in256.yaml",
        "elsewhere/tiny.yaml": "tiny.yaml",
        "l5": "recipes/ladder/l5_ema.yaml",
        "recipes": "recipes/dsd_in256.yaml or recipes/quickstart.yaml",
    }.items():
        said = refused(3, "run", given)
        assert said.rstrip().endswith(f"Did you mean {meant}?"), said
    assert refused(3, "run", "unlike.anything").rstrip().endswith("there is no such file.")
    assert refused(3, "run", "folder").rstrip().endswith("is a folder, not a recipe.")


def test_a_run_is_no_recipe_and_a_recipe_no_run() -> None:
    for name in ("quickstart", "other"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "run.json").write_text("{}")
        Path("runs", name, "resolved.yaml").write_text("e2ediff: 1")
    done = e2ediff("run", "runs/quickstart")
    assert done.code == 2
    assert "to continue it: e2ediff run --resume runs/quickstart" in done.err
    said = refused(3, "check", "runs/quickstart")
    assert "is the directory of a run, not a recipe. Give the recipe in it, runs/quick" in said
    for given, words in {
        "tiny.yaml": "A recipe is trained first: e2ediff run tiny.yaml.",
        "quickstart": "Did you mean runs/quickstart?",
        "runs/quickstrat": "Did you mean runs/quickstart?",
    }.items():
        assert words in refused(6, "sample", given)
