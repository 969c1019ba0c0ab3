"""What a study hands on from its recipe to a variant's objective, and that it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import needs

from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import study

    return study


@needs("e2ediff-dsd", "e2ediff-rivals")
def test_options_that_replace_an_objective_s_own_defaults_are_named(study) -> None:
    """A prior compared as clean latents is not the velocity loss that GenFirst has by default."""
    host = load()
    recipe = load_recipe(host, str(ROOT / "recipes" / "quickstart.yaml"), [])
    block = study.shared_objective(host, recipe, "genfirst")
    assert block["weight"] == "x0"
    assert study.handed_on(host, block, []) == ["weight: x0 of the recipe, by default v"]
    assert study.handed_on(host, block, ["objective.weight=v", "steps=2"]) == []


@needs("e2ediff-dsd", "e2ediff-rivals")
def test_a_plan_says_what_it_hands_on(study, tmp_path, capsys) -> None:
    (tmp_path / "study.yaml").write_text(
        f"""\
recipe: {ROOT / "recipes" / "quickstart.yaml"}
variants:
  dsd: {{}}
  own: {{objective: genfirst, set: [backbone.latent_norm=none, objective.weight=v]}}
  theirs: {{objective: genfirst, set: [backbone.latent_norm=none]}}
"""
    )
    study.Study.read(tmp_path / "study.yaml").plan(load(), [0], [])
    said = capsys.readouterr().err
    assert said == "theirs: objective.weight: x0 of the recipe, by default v\n"
