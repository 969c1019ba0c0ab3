"""An ablation is checked as a whole: before anything is made, with every problem at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import e2ediff

from e2ediff.ablate.cost import cost_of
from e2ediff.ablate.grid import Assignment, Cell
from e2ediff.ablate.plan import plan_ablation, plan_cells
from e2ediff.errors import RecipeError
from e2ediff.host.recipe import load_recipe

NOWHERE = "{name: image_folder, root: /nowhere, size: 16, classes: 4}"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, tiny_text) -> Path:
    """An empty working directory but for tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_text)
    return tmp_path


def refused(code: int, *words: object) -> str:
    done = e2ediff("ablate", "tiny.yaml", *words)
    assert (done.code, done.out) == (code, ""), done
    assert sorted(p.name for p in Path().iterdir()) == ["tiny.yaml"]
    return done.err


def test_the_problems_of_all_cells_are_told_at_once_and_nothing_is_made():
    axis = "objective=coupled,coupld,{name: detached, flor: 1}"
    told = refused(3, "--vary", axis, "--vary", "backbone.patch=8,7", "--seeds", "0,1")
    assert "cells coupld-patch=8, coupld-patch=7, --vary objective=coupld: objective" in told
    assert "Did you mean 'coupled'?" in told
    assert "cells detached-flor=1-patch=8, detached-flor=1-patch=7, --vary objective=" in told
    assert "cell coupled-patch=7: backbone.patch: " in told
    assert told.startswith("error: tiny.yaml: 3 problems\n")


def test_a_problem_of_every_cell_is_told_once():
    told = refused(3, "--vary", "objective=coupled,detached", "--set", "batch=zero")
    assert told.count("batch") == 1
    assert "every cell, --set 1: batch: expected int" in told


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        ((), 2, "Nothing varies"),
        (("--vary", "objective="), 2, "there is no value"),
        (("--vary", "no.such.path=1,2"), 3, "unknown"),
        (("--vary", "objective=coupled,detached", "--baseline", "x"), 2, "--baseline 'x'"),
        (("--vary", "optimizer.lr=1e-3,0.001"), 2, "are the same recipe"),
        (("--vary", "objective=coupled", "--seeds", "x"), 2, "is not a seed"),
        (("--vary", "objective=coupled", "--set", "batch"), 2, "is not path=value"),
        (("--vary", "steps=4,8", "--match", "compute"), 2, "Leave one of them out"),
        (("--vary", "objective=a", "--jobs", "0"), 2, "--jobs"),
        (("--vary", "objective=coupled", "--resume"), 6, "no ablation of 'tiny'"),
        (("--vary", "objective=coupled", "--resume", "--out", "x"), 6, "spec.json"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_made(words, code, what):
    assert what in refused(code, *words)


def test_an_out_that_is_taken_is_refused():
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    done = e2ediff("ablate", "tiny.yaml", "--vary", "objective=coupled", "--out", "taken")
    assert done.code == 6
    assert "taken: exists and is not empty" in done.err
    assert [p.name for p in Path("taken").iterdir()] == ["file"]


def test_a_dry_run_prints_cells_and_writes_nothing():
    done = e2ediff(
        "ablate", "tiny.yaml", "--vary", "objective=coupled,detached", "--vary",
        "backbone.latent_dim=6,4", "--seeds", "0,1", "--baseline", "detached-latent_dim=4",
        "--dry-run",
    )  # fmt: skip
    assert done.code == 0
    head, *rows, last = done.out.splitlines()
    assert head.split()[:2] == ["cell", "parameters"]
    assert len(rows) == 4
    assert rows[3].startswith("detached-latent_dim=4 (baseline)")
    assert rows[3].endswith("objective=detached backbone.latent_dim=4")
    assert last.startswith("8 runs: 4 cells, seeds 0, 1; ")
    assert sorted(p.name for p in Path().iterdir()) == ["tiny.yaml"]


def test_data_that_are_missing_are_no_reason_to_refuse(host):
    """They may be there on another machine, or when the run starts: the run itself says so."""
    plan = plan_ablation(host, "tiny.yaml", [f"data={NOWHERE}"], "0")
    assert len(plan.jobs) == 1


def test_cells_share_their_seed_and_everything_that_is_not_varied(host):
    plan = plan_ablation(host, "tiny.yaml", ["objective=coupled,detached"], "3,5", ["batch=4"])
    assert [(job.cell, job.seed) for job in plan.jobs] == [
        ("coupled", 3), ("detached", 3), ("coupled", 5), ("detached", 5)
    ]  # fmt: skip
    assert plan.jobs[2].overrides == ("batch=4", "objective=coupled", "seed=5")
    assert plan.jobs[2].place == "coupled-seed5"
    one, other = (plan.resolved[cell].splitlines() for cell in plan.cells)
    assert len(set(one) - set(other)) <= 2


def test_matched_compute_gives_steps_that_the_baseline_pays_for(host):
    axes = ["backbone.width=32,64", "batch=8,16"]
    plan = plan_ablation(host, "tiny.yaml", axes, "0", ["steps=1000"], None, "compute")
    totals = {name: cost.total for name, cost in plan.costs.items()}
    base = totals["width=32-batch=8"]
    assert plan.costs["width=32-batch=8"].total_steps == 1000
    assert plan.costs["width=32-batch=16"].total_steps == 500
    assert plan.costs["width=64-batch=8"].total_steps < 500
    # Steps are whole: half a step of the dearest cell is the most that can be missing.
    assert all(abs(total / base - 1) < 0.005 for total in totals.values())
    for job in plan.jobs:
        assert f"steps={plan.costs[job.cell].total_steps}" in job.overrides


def test_the_command_of_a_plan_makes_the_same_plan(host):
    axes = ["objective=coupled,{name: detached}", "backbone.latent_dim=[6, 4]"]
    plan = plan_ablation(host, "tiny.yaml", axes, "0,1", ["batch=4"], None, "compute")
    words = plan.command()[3:]
    options = list(zip(words[::2], words[1::2], strict=True))
    given = {key: [v for k, v in options if k == key] for key, _ in options}
    again = plan_ablation(
        host,
        "tiny.yaml",
        given["--vary"],
        given["--seeds"][0],
        given["--set"],
        given["--baseline"][0],
        given["--match"][0],
    )
    assert again == plan


def test_a_cell_may_have_a_recipe_of_its_own_and_a_budget_may_be_nobodys(host, tiny_text):
    """Checked, counted and changed like the others."""
    Path("other.yaml").write_text(tiny_text.replace("batch: 8", "batch: 16"))
    wide = (Assignment("backbone.width", "64", "wide"),)
    grid = [Cell("small", ()), Cell("big", (), Path("other.yaml")), Cell("wide", wide)]
    budget = cost_of(load_recipe(host, "tiny.yaml", ["steps=50"]))
    plan = plan_cells(
        host, "tiny.yaml", grid, [0, 1], ["steps=1000"], "small", "compute", budget=budget
    )
    assert plan.costs["small"].total_steps == 50
    assert plan.costs["big"].total_steps == 25
    assert [job.recipe for job in plan.jobs] == [None, Path("other.yaml"), None] * 2
    assert ["batch: 16" in text for text in plan.resolved.values()] == [False, True, False]
    Path("other.yaml").write_text(tiny_text.replace("batch: 8", "batch: x"))
    with pytest.raises(RecipeError, match=r"cell big, other.yaml:\d+:\d+: batch: expected int"):
        plan_cells(host, "tiny.yaml", grid, [0], [], "small", "steps")


def test_cells_that_do_not_measure_samples_are_remarked_with_what_would():
    words = ("ablate", "tiny.yaml", "--vary", "objective=coupled,detached", "--dry-run")
    done = e2ediff(*words)
    (setting,) = re.findall(r"--set '(scores=.*)'", done.err)
    assert "judged by their reconstructions" in done.err
    done = e2ediff(*words, "--set", setting, "--set", "data.count=600")
    assert (done.code, "scores" in done.err) == (0, False), done.err


def test_options_that_a_named_part_loses_are_remarked_with_what_would_keep_them():
    words = ("ablate", "tiny.yaml", "--set", "objective={name: coupled, denoising_weight: 0.1}")
    grid = ("--vary", "backbone.latent_dim=4,6", "--dry-run")
    plain = "objective={name: coupled, denoising_weight: 0.1},detached"
    done = e2ediff(*words, "--vary", plain, *grid)
    (line,) = [line for line in done.err.splitlines() if "its own defaults" in line]
    assert "objective.denoising_weight 1.0 (not 0.1)" in line
    assert line.startswith("cells detached-latent_dim=4, detached-latent_dim=6: not as in ")
    keep = line.rpartition(": ")[2]
    assert keep == "+objective.denoising_weight=0.1"
    for kept in (plain + keep, plain.replace("detached", "{name: detached, denoising_weight: 1}")):
        done = e2ediff(*words, "--vary", kept, *grid)
        assert (done.code, "its own defaults" in done.err) == (0, False), done.err


def test_advice_to_set_an_option_says_how_one_value_gets_it():
    words = ("ablate", "tiny.yaml", "--dry-run", "--vary")
    done = e2ediff(*words, "objective=coupled,two_stage")
    (advised,) = re.findall(r"\(In --vary, append to the value: (\+\S+)\.\)", done.err)
    assert done.code == 3
    assert e2ediff(*words, f"objective=coupled,two_stage{advised}").code == 0
    assert "In --vary" not in e2ediff(*words, "objective=two_stage").err
