"""A plugin that is one file, given with `--plugin`: used by every command, recorded, asked for."""

from __future__ import annotations

import json
import os

import pytest
from command_line import e2ediff

FILE = '''
"""An objective in a file of one's own."""

import attrs
from e2ediff import hookimpl
from e2ediff.parts.objectives import Detached


@attrs.frozen(kw_only=True)
class Mine(Detached):
    """Detached, with an option."""

    strength: float = 1.0


@hookimpl
def register(add):
    add("objectives", "mine", Mine)
    add("metrics", "gap", "e2ediff.parts.metrics:FID")
'''
MINE = ("--set", "objective=mine", "--set", "steps=4", "--set", "objective.strength=2.0")


@pytest.fixture
def folder(tmp_path, tiny_text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("E2EDIFF_PLUGIN_FILES", "E2EDIFF_RUNS"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    (tmp_path / "my_objective.py").write_text(FILE)
    return tmp_path


@pytest.fixture
def run(folder):
    done = e2ediff("run", "tiny.yaml", "--plugin", "my_objective.py", *MINE, "--out", "run")
    assert done.code == 0, done.err
    return folder / "run"


def test_a_run_records_the_file_s_hash_and_keeps_a_copy(run) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["plugins"]["my_objective"].startswith("sha256:")
    assert (run / "plugins" / "my_objective.py").read_text() == FILE
    assert "E2EDIFF_PLUGIN_FILES" not in os.environ, "for the length of the command alone"


@pytest.mark.parametrize(
    "words",
    [
        ("run", "tiny.yaml", *MINE, "--out", "run", "--resume"),
        ("sample", "run", "--count", "2"),
        ("reconstruct", "run", "--count", "2"),
        ("eval", "run", "--count", "8", "--features", "random_projection", "--metrics", "fid"),
    ],
    ids=lambda words: words[0],
)
def test_what_uses_the_run_asks_for_the_file_again(run, words) -> None:
    done = e2ediff(*words)
    assert done.code == 4
    assert done.err.startswith(
        "error: run was trained with the plugin file my_objective.py: add --plugin "
        "my_objective.py. The run keeps a copy as it was then, run/plugins/my_objective.py"
    )
    for file in ("my_objective.py", "run/plugins/my_objective.py"):
        done = e2ediff(*words, "--plugin", file)
        assert done.code == 0, done.err
    (run.parent / "my_objective.py").write_text(FILE + "\n# changed\n")
    done = e2ediff(*words, "--plugin", "my_objective.py")
    assert done.code == 4
    assert "my_objective.py has changed since run began" in done.err
    assert "Give the run's copy, --plugin run/plugins/my_objective.py" in done.err


def test_resuming_the_newest_run_asks_for_the_file_and_not_for_its_parts(folder) -> None:
    """As with --out: the run is found by the recipe's name."""
    words = ("run", "tiny.yaml", *MINE)
    assert e2ediff(*words, "--plugin", "my_objective.py").code == 0
    done = e2ediff(*words, "--resume")
    assert done.code == 4
    assert done.err.startswith(
        "error: runs/tiny was trained with the plugin file my_objective.py: add --plugin "
        "my_objective.py. "
    )
    assert e2ediff(*words, "--resume", "--plugin", "my_objective.py").code == 0


@pytest.mark.usefixtures("forks")
def test_check_ablate_parts_and_the_kit_take_the_file(folder) -> None:
    for words, said in (
        (("check", "tiny.yaml", *MINE), "objective   mine"),
        (("parts", "objectives", "mine"), "strength: float = 1.0"),
        (("plugins", "list"), "objectives: mine; metrics: gap"),
    ):
        assert e2ediff(*words).code != 0 or words[0] == "plugins"
        done = e2ediff(*words, "--plugin", "my_objective.py")
        assert done.code == 0, done.err
        assert said in done.out
    ablate = ("ablate", "tiny.yaml", "--vary", "objective=mine,detached", "--set", "steps=2")
    done = e2ediff(*ablate, "--seeds", "0", "--out", "group", "--plugin", "my_objective.py")
    assert done.code == 0, done.err
    (cell,) = [p for p in (folder / "group" / "runs").iterdir() if "mine" in p.name]
    (one,) = cell.rglob("run.json")
    assert (one.parent / "plugins" / "my_objective.py").exists(), "its processes had the file"


def test_a_file_that_is_wrong_is_named_with_its_line(folder) -> None:
    check = ("check", "tiny.yaml", "--plugin")
    (folder / "raises.py").write_text("import attrs\n\nraise ValueError('no')\n")
    (folder / "syntax.py").write_text("import attrs\ndef (:\n")
    (folder / "nothing.py").write_text("x = 3\n")
    (folder / "my-objective.py").write_text(FILE)
    for file, said in (
        ("raises.py", f"{folder / 'raises.py'}:3: ValueError: no"),
        ("syntax.py", f"{folder / 'syntax.py'}:2: SyntaxError: invalid syntax"),
        ("nothing.py", "plugin 'nothing': has no hook: no function is marked with"),
        ("my-objective.py", "name a plugin file like a Python module: my_objective.py"),
        ("gone.py", "--plugin gone.py: there is no such file"),
    ):
        done = e2ediff(*check, file)
        assert (done.code, said in done.err) == (4, True), done.err
        assert done.err.count("\n") == 1


def test_the_conformance_kit_checks_a_file(folder) -> None:
    done = e2ediff("plugins", "check", "my_objective.py", "--part", "nothing")
    assert (done.code, "has no part 'nothing'" in done.err) == (4, True)
