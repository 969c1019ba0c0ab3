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


def test_the_history_is_of_surveys_diagnoses_and_alarms(study) -> None:
    at_start = {"psnr": 7.01234, "unexplained@0.1": 1.0, "unexplained@0.5": 1.0}
    later = {"psnr": 25.89548, "unexplained@0.1": 0.786585, "unexplained@0.5": 0.230478}
    metrics = [
        {"step": 0, "images": 0, **at_start},
        {"step": 1, "images": 16, "loss/reconstruction": 0.1},
        {"step": 1, "images": 16, "rank_fraction": 0.123456, "positional": 0.5, "raw_std": 2.0},
        {"step": 2, "images": 32, **later, "rank_fraction": 0.2, "positional": 0.6, "raw_std": 1},
    ]
    events = [
        {"kind": "kernels"},
        {"kind": "collapse", "step": 1, "images": 16, "signs": ["rank"]},
        {"kind": "recovered", "step": 2, "images": 32, "signs": []},
    ]
    assert study.history(metrics, events) == {
        "images": [0, 32],
        "psnr": [7.012, 25.9],
        "unexplained@0.1": [1.0, 0.7866],
        "unexplained@0.5": [1.0, 0.2305],
        "diagnosed": [16, 32],
        "rank_fraction": [0.1235, 0.2],
        "positional": [0.5, 0.6],
        "raw_std": [2.0, 1.0],
        "collapse": [16],
    }
