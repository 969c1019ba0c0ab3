"""What changes in the course of training: weights of losses, and rates of parameter groups."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import e2ediff
from e2ediff_testing import make_batch

from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.step.assembly import assemble
from e2ediff.step.draws import training_draw
from e2ediff.step.splitting import part_of

SCHEDULED = """
import attrs
from e2ediff import hookimpl
from e2ediff.parts.objectives import Detached

@attrs.frozen(kw_only=True)
class Rising(Detached):
    "Detached, whose denoising weight rises from 0 in the course of training."

    def terms(self, nets, batch, draw, phase):
        found = super().terms(nets, batch, draw, phase)
        weights = {**found.weights, "denoising": draw.progress}
        info = {**found.info, "progress": draw.progress}
        return attrs.evolve(found, weights=weights, info=info)

@hookimpl
def register(add):
    add("objectives", "rising", Rising)
"""


@pytest.fixture
def folder(tmp_path, tiny_text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    (tmp_path / "rising.py").write_text(SCHEDULED)
    return tmp_path


def figures(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/denoising" in line]


RISING = ("tiny.yaml", "--plugin", "rising.py", "--set", "objective=rising",
          "--set", "cadence.log=1", "--set", "steps=4")  # fmt: skip


def test_a_weight_may_be_a_function_of_the_share_of_training_that_is_done(folder) -> None:
    done = e2ediff("run", *RISING, "--out", "run")
    assert done.code == 0, done.err
    assert [line["progress"] for line in figures(folder / "run")] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.usefixtures("forks")
def test_such_a_run_is_the_same_after_a_stop_and_in_another_number_of_processes(folder) -> None:
    assert e2ediff("run", *RISING, "--out", "whole").code == 0
    done = e2ediff("plugins", "check", "rising.py", "--part", "rising")
    assert done.code == 0, done.out + done.err  # resume, bfloat16, compile, two processes


def test_a_part_of_a_draw_has_its_progress(tiny_text) -> None:
    recipe = parse_recipe(load(entry_points=False), tiny_text, "tiny", ["objective=detached"])
    draw = training_draw(recipe, "joint", recipe.total_images // 2, 0, make_batch().condition, 0)
    assert float(draw.progress) == float(part_of(draw, slice(0, 2)).progress) == 0.5
    assert float(draw.again().progress) == 0.5


# Rates of parameter groups

GROUPS = "optimizer={name: %s, lr: 0.01, schedule: linear, groups: %s}"


def rates(recipe):
    """Peak rates by parameter, and the names of groups."""
    parts = assemble(recipe, torch.device("cpu"))
    names = {p: name for name, p in parts.step.named_parameters()}
    groups = parts.optimizers["joint"].param_groups
    return (
        {names[p]: group["lr"] for group in groups for p in group["params"]},
        {names[p]: group.get("name", "") for group in groups for p in group["params"]},
    )


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_group_s_factor_multiplies_the_rate_of_the_parameters_that_match(
    tiny_text, name
) -> None:
    groups = "[{match: 'online.trunks.*', factor: 0.1}, {match: 'online.*bias', factor: 0}]"
    host = load(entry_points=False)
    text = GROUPS % (name, groups)
    found, owner = rates(parse_recipe(host, tiny_text, "tiny", ["objective=detached", text]))
    for parameter, rate in found.items():
        trunk, bias = parameter.startswith("online.trunks."), parameter.endswith("bias")
        assert rate == pytest.approx(0.001 if trunk else 0.0 if bias else 0.01), parameter
        assert owner[parameter] == ("online.trunks.*" if trunk else "online.*bias" if bias else "")
    plain, _ = rates(
        parse_recipe(
            host, tiny_text, "tiny", ["objective=detached", text.partition(", groups")[0] + "}"]
        )
    )
    assert set(plain.values()) == {0.01}
    assert {*plain} == {*found}, "every parameter once"


def test_a_group_has_a_schedule_of_its_own_and_its_rate_is_logged(folder) -> None:
    groups = "[{match: 'online.trunks.*', schedule: constant, factor: 0.5}]"
    words = ("tiny.yaml", "--set", GROUPS % ("adamw", groups), "--set", "objective=detached",
             "--set", "cadence.log=1", "--set", "steps=4")  # fmt: skip
    done = e2ediff("run", *words, "--out", "run")
    assert done.code == 0, done.err
    found = figures(folder / "run")
    assert [line["lr"] for line in found] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert [line["lr/online.trunks.*"] for line in found] == pytest.approx([0.005] * 4)


def test_a_parameter_of_factor_0_stays_as_it_is(tiny_text) -> None:
    groups = "[{match: 'online.trunks.*', factor: 0}]"
    text = GROUPS % ("adamw", groups)
    host = load(entry_points=False)
    recipe = parse_recipe(host, tiny_text, "tiny", ["objective=detached", text])
    parts = assemble(recipe, torch.device("cpu"))
    before = {name: p.clone() for name, p in parts.step.online.named_parameters()}
    from e2ediff.distributed.world import World
    from e2ediff.step.update import Update

    Update(recipe, parts, World(), lambda *a, **k: None)(
        make_batch(recipe.data.image, recipe.batch), 0
    )
    moved = {n for n, p in parts.step.online.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert not [name for name in moved if name.startswith("trunks.")]


def test_patterns_that_match_nothing_are_refused_with_the_names_that_there_are(folder) -> None:
    groups = "[{match: 'trunks.*'}, {match: 'online.*'}, {match: 'online.trunks.*'}]"
    done = e2ediff(
        "check", "tiny.yaml", "--set", GROUPS % ("adamw", groups), "--set", "objective=detached"
    )
    assert done.code == 3
    assert (
        "optimizer.groups.0.match: 'trunks.*': matches no parameter; parameters are called online."
        in done.err
    )
    assert (
        "optimizer.groups.2.match: 'online.trunks.*': an earlier group has all of it" in done.err
    )
    twice = "[{match: 'online.*'}, {match: 'online.*'}]"
    done = e2ediff(
        "check", "tiny.yaml", "--set", GROUPS % ("adamw", twice), "--set", "objective=detached"
    )
    assert "two groups have the pattern 'online.*'" in done.err
    wrong = "[{match: 'online.*', schedule: wsd}]"
    done = e2ediff(
        "check", "tiny.yaml", "--set", GROUPS % ("adamw", wrong), "--set", "objective=detached"
    )
    assert "'wsd' holds the rate and then lets it fall" in done.err


def test_a_scheduled_weight_s_loss_is_in_the_total_whatever_it_is() -> None:
    from e2ediff.objective import Terms

    losses = {"a": torch.tensor(2.0), "b": torch.tensor(3.0), "c": torch.tensor(5.0)}
    terms = Terms(losses, {"a": 0.0, "b": torch.tensor(0.0), "c": torch.tensor(0.5)}, losses["a"])
    assert float(terms.total) == 2.5
    assert [terms.counts(name) for name in losses] == [False, True, True]
