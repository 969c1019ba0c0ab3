"""`e2ediff run --resume RUN` needs nothing but the run's directory, and is the same run.

Changes given with --set are kept with the run, so that the next resume needs none of them.
"""

from __future__ import annotations

import shutil
import signal
import uuid
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from command_line import Done, e2ediff
from PIL import Image
from tiny_recipe import tiny

from e2ediff import hookimpl
from e2ediff.host.plugins import load
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.train.session import train

CHANGES = ("seed=3", "optimizer={name: adamw, lr: 0.002, schedule: linear}")
PLUGIN = '''
import attrs
from e2ediff import hookimpl
from e2ediff.parts.objectives import Detached

@attrs.frozen(kw_only=True)
class Mine(Detached):
    """An objective in a file."""

@hookimpl
def register(add):
    add("objectives", "mine", Mine)
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A recipe, the run that never stopped, and one that was stopped after 3 of 6 steps."""
    place = tmp_path_factory.mktemp("made")
    (place / "tiny.yaml").write_text("# mine\n" + tiny(steps="6"))

    @hookimpl
    def step_ended(run, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    stopper = load(SimpleNamespace(__name__="stopper", step_ended=step_ended))
    recipe = place / "tiny.yaml"
    assert train(load(), recipe, CHANGES, place / "whole").exit_code == 0
    assert train(stopper, recipe, CHANGES, place / "cut").exit_code == 75
    return place


@pytest.fixture
def cut(made, tmp_path, monkeypatch) -> Path:
    """A copy of the stopped run, alone in the current folder: the recipe is gone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("E2EDIFF_RUNS", raising=False)
    monkeypatch.delenv("E2EDIFF_PLUGIN_FILES", raising=False)
    shutil.copytree(made / "cut", "runs/mine")
    return Path("runs/mine")


def again(*words: object) -> Done:
    return e2ediff("run", *words, "--threads", 1)


def tensors(out: object) -> dict[str, bytes]:
    found = open_checkpoint(Store(str(out)))
    return {
        f"{file}:{name}": t.contiguous().numpy().tobytes()
        for file in found.files
        for name, t in found.tensors(file).items()
    }


@pytest.mark.parametrize("words", [["runs/mine"], ["runs/mine/"], ["--out", "runs/mine"]], ids=str)
def test_a_run_is_continued_by_its_directory_alone_bit_for_bit(words, cut, made) -> None:
    done = again("--resume", *words)
    assert (done.code, done.out.rstrip("/\n")) == (0, "runs/mine"), done.err
    assert "resumed runs/mine" in done.err
    assert tensors(cut) == tensors(made / "whole")
    assert (cut / "resolved.yaml").read_text() == (made / "cut/resolved.yaml").read_text()


def test_it_may_be_an_address_of_any_store(cut, made) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(str(cut), url, recursive=True)
    done = again("--resume", url)
    assert (done.code, done.out) == (0, f"{url}\n"), done.err
    assert tensors(url) == tensors(made / "whole")


@pytest.mark.parametrize("option", ["--resume", "--restart"])
def test_an_address_that_holds_no_run_is_not_taken_for_a_recipe(option, tmp_path) -> None:
    url = (tmp_path / "nothing").as_uri()
    done = again(option, url)
    assert done.code == 6
    assert done.err.startswith(f"error: {url}: not a run directory")


def test_data_at_a_relative_path_are_missed_with_the_folder_that_it_counts_from(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(f"images/{name}/{number}.png")
    data = "{name: image_folder, root: images, size: 16, classes: 2, workers: 0}"
    (tmp_path / "tiny.yaml").write_text(tiny(steps="2", data=data, diagnostics="[]"))
    assert again("tiny.yaml", "--out", "run").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    done = again("--resume", "../run", "--set", "steps=3")
    assert done.code == 5
    where = f"Relative paths of a run count from the current folder, now {tmp_path}/elsewhere."
    assert done.err.startswith("error: data.root: no folder images.")
    assert done.err.endswith(f"{where}\n")
    moved = f"data.root={tmp_path}/images"
    done = again("--resume", "../run", "--set", "steps=3", "--set", moved)
    assert done.code == 0, done.err


def test_changes_are_kept_with_the_run_and_others_are_refused_as_before(cut) -> None:
    done = again("--resume", cut, "--set", "steps=8", "--set", "name=other")
    assert done.code == 0, done.err
    events = [e for e in RunDirectory.open(cut).read_events() if e["kind"] == "continued"]
    assert events[0]["changes"] == {"name": ['"tiny"', '"other"'], "steps": ["6", "8"]}
    done = again("--resume", cut)
    assert "8 steps of 8 images" in done.err
    assert RunDirectory.open(cut).status()["step"] == 8
    kinds = [event["kind"] for event in RunDirectory.open(cut).read_events()]
    assert kinds.count("continued") == 1, "the second time nothing differed"
    done = again("--resume", cut, "--set", "seed=4")
    assert done.code == 3
    assert done.err == (
        "error: runs/mine/resolved.yaml (--resume): 1 problem\n"
        "  seed: was 3 in runs/mine, is 4 here. A run cannot change it. Start another run, or "
        "continue this one as it was: e2ediff run --resume runs/mine\n"
    )


def test_a_run_starts_over_by_its_own_recipe(cut, made) -> None:
    """Also where it was killed while it moved what was there, at whatever file."""
    done = again("--restart", cut)
    assert (done.code, done.out) == (0, "runs/mine\n"), done.err
    assert tensors(cut) == tensors(made / "whole")
    assert (cut / "recipe.yaml").read_text().startswith("# mine\n")
    assert (cut / "attempts/1/checkpoints").is_dir()
    for file in ("recipe.yaml", "resolved.yaml"):
        shutil.rmtree(cut)
        shutil.copytree(made / "cut", cut)
        (cut / "attempts/1").mkdir(parents=True)
        for name in ("run.json", "recipe.yaml", "resolved.yaml"):
            (cut / name).rename(cut / "attempts/1" / name)
            if name == file:
                break
        assert "If --restart was interrupted here, repeat it" in again("--resume", cut).err
        done = again("--restart", cut, "--set", "steps=2")
        assert done.code == 0, done.err
        assert "seed: 3\n" in (cut / "resolved.yaml").read_text()


def test_a_run_that_was_killed_before_it_began_starts_from_its_directory(cut, made) -> None:
    for name in [p.name for p in cut.iterdir() if not p.name.endswith(".yaml")]:
        shutil.rmtree(cut / name) if (cut / name).is_dir() else (cut / name).unlink()
    done = again("--resume", cut)
    assert done.code == 0, done.err
    assert "a run was killed here before it began; it starts now" in done.err
    assert tensors(cut) == tensors(made / "whole")
    assert not (cut / "attempts").exists()


def test_the_recipe_and_its_changes_still_do(cut, made) -> None:
    sets = [word for change in CHANGES for word in ("--set", change)]
    done = again(made / "tiny.yaml", *sets, "--resume", "--out", "runs/mine")
    assert done.code == 0, done.err
    shutil.rmtree(cut)
    shutil.copytree(made / "cut", "runs/tiny")
    done = again(made / "tiny.yaml", *sets, "--resume")
    assert (done.code, done.out) == (0, "runs/tiny\n"), done.err
    assert tensors("runs/tiny") == tensors(made / "whole")


def test_what_is_missing_or_too_much_is_named(cut) -> None:
    for words, code, said in (
        (["--resume"], 2, "e2ediff run --resume runs/NAME"),
        (["--restart"], 2, "give the directory of the run"),
        ([], 2, "Missing argument 'RECIPE'."),
        (["runs/mine"], 2, "to continue it: e2ediff run --resume runs/mine"),
        (["runs/mine", "--resume", "--out", "x"], 2, "leave out --out"),
        (["runs/yours", "--resume"], 6, "runs/yours: not a run directory: no such directory"),
        (["runs", "--resume"], 6, "runs: not a run directory: it has no run.json"),
        (["mine.yaml", "--resume"], 3, "mine.yaml: recipe: there is no such file"),
    ):
        done = again(*words)
        assert done.code == code, done.err
        assert said in done.err
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["runs"]


def test_a_plugin_file_is_asked_for_and_the_printed_command_has_it(cut) -> None:
    """Its copy is not run unasked, as the run may be someone else's."""
    Path("mine.py").write_text(PLUGIN)
    Path("tiny.yaml").write_text(tiny(steps="4", objective="mine"))
    done = again("tiny.yaml", "--plugin", "mine.py", "--out", "runs/own")
    assert done.err.endswith("next: e2ediff sample runs/own --plugin mine.py\n")
    for words in (["--resume"], ["--restart"]):
        done = again("runs/own", *words)
        assert done.code == 4
        assert "add --plugin mine.py" in done.err
    done = again("runs/own", "--resume", "--plugin", "mine.py", "--set", "seed=1")
    assert done.err.endswith("e2ediff run --resume runs/own --plugin mine.py\n")
    Path("mine.py").write_text(PLUGIN + "# changed\n")
    assert again("runs/own", "--resume", "--plugin", "mine.py").code == 4
    assert again("runs/own", "--resume", "--plugin", "runs/own/plugins/mine.py").code == 0
    assert again("runs/own", "--restart", "--plugin", "mine.py").code == 0
