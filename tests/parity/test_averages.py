"""Averages by kind: those that ship, and one of a plugin that trains, samples and resumes."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import one_of_each
import pytest
import torch

from e2ediff.errors import RecipeError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.sample.load import load_model
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

HOST = load(one_of_each, entry_points=False)
SETS = ["steps=12", "cadence.checkpoint=6", "cadence.diagnose=100", "post_hoc={}",
        "target={kind: power, width: 0.2}",
        "ema=[{name: few, kind: last_few, window: 4}, {name: broad, kind: power, width: 0.1}, "
        "{name: slow, decay: 0.9}]"]  # fmt: skip


def run(recipe: Path, out: Path, *changes: str, resume: bool = False) -> None:
    quiet = Progress(io.StringIO())
    outcome = train(HOST, str(recipe), [*SETS, *changes], str(out), resume=resume, progress=quiet)
    assert outcome.exit_code == 0, outcome.reason


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_text) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(tiny_text)
    return path


@pytest.fixture(scope="module")
def trained(recipe) -> Path:
    run(recipe, recipe.parent / "run")
    return recipe.parent / "run"


def weights(run: Path, name: str | None) -> dict[str, torch.Tensor]:
    return load_model(str(run), weights=name, host=HOST).net.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_plugin_s_average_is_sampled_from_by_its_name(trained) -> None:
    model = load_model(str(trained), weights="few", host=HOST)
    assert model.sample([0, 1]).isfinite().all()
    assert same(model.net.state_dict(), weights(trained, None)), "the first of `ema:` by default"
    assert not any(
        same(weights(trained, "few"), weights(trained, n)) for n in ("online", "target")
    )


def test_averages_of_every_kind_continue_bit_for_bit(trained, recipe, tmp_path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/images-000000000096")  # back to step 6
    run(recipe, tmp_path / "run", resume=True)
    for name in ("online", "target", "few", "broad", "slow"):
        assert same(weights(trained, name), weights(tmp_path / "run", name))


def test_the_kind_power_is_what_post_hoc_tracks(trained) -> None:
    assert same(weights(trained, "broad"), weights(trained, "ema-0.1"))


def test_a_kind_that_is_not_named_is_constant(tiny_text) -> None:
    named = tiny_text + "ema: [{name: slow, kind: constant, decay: 0.9, warmup: true}]\n"
    bare = tiny_text + "ema: [{name: slow, decay: 0.9}]\n"
    assert parse_recipe(HOST, named, "named") == parse_recipe(HOST, bare, "bare")
    kinds = (
        "target: {kind: constant, decay: 0.999, warmup: true}",
        "target: {}",
        "target: constant",
    )
    lines = tiny_text.splitlines(keepends=True)
    rest = "".join(line for line in lines if not line.startswith("target:"))
    recipes = [parse_recipe(HOST, f"{rest}{line}\n", "r") for line in (*kinds, "")]
    assert recipes == recipes[:1] * 4


def test_an_average_with_another_law_is_not_continued(trained, recipe) -> None:
    with pytest.raises(RecipeError) as refused:
        run(recipe, trained, "target={kind: last_few}", resume=True)
    (problem,) = refused.value.problems
    assert problem.where == "target.kind"
    assert 'was "power"' in problem.what
