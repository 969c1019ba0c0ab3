"""What would fail, or do nothing, only in training or in sampling is found by `check`."""

from __future__ import annotations

import shutil

import pytest
from command_line import e2ediff, needs, needs_dsd, trained
from tiny_recipe import tiny

from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe

DETACHED = "objective={name: detached, reconstruction: {perceptual: %s}}"
SCORES = "scores={every: 16, images: 8, features: %s, metrics: [%s]}"
PROJECTION = "{name: random_projection}"


@pytest.fixture
def checked(tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny())

    def run(*settings: str):
        words = [word for setting in settings for word in ("--set", setting)]
        return e2ediff("check", tmp_path / "tiny.yaml", *words)

    return run


@pytest.mark.parametrize(
    ("setting", "where", "said"),
    [
        ("optimizer={name: adamw, betas: [0.9, 1.0]}", "optimizer.betas", "'betas' must be < 1"),
        ("optimizer={name: adamw, betas: [-1, 0.9]}", "optimizer.betas", "'betas' must be >= 0"),
        ("optimizer={name: muon, adamw: {betas: [1.5, 0.5]}}", "optimizer.adamw", "must be < 1"),
        (
            "optimizer={name: adamw, cooldown: 0.5}",
            "optimizer.schedule",
            "a constant rate has none: set schedule",
        ),
        (
            "optimizer={name: muon, decay_images: 16}",
            "optimizer.schedule",
            "a constant rate has none: set schedule",
        ),
        (
            "sampler={name: euler, steps: 2, t_start: 0.999, spacing: karras}",
            "sampler",
            "sampling begins at noise level 0.001001, and its last step at sigma_min",
        ),
        (
            "sampler={name: heun, steps: 2, spacing: {rho: 0.001}}",
            "sampler",
            "its times do not rise in each step: they cannot be computed",
        ),
        (
            "sampler={name: euler, steps: 3, shift: 1.0e+30}",
            "sampler",
            "its times do not rise in each step: 0, 1, 1, 1",
        ),
        (
            DETACHED % "{name: torchvision, model: squeezenet1_1, nodes: [classifier]}",
            "objective.reconstruction.perceptual",
            "the network does not compute on images of (3, 16, 16)",
        ),
        (
            DETACHED % "{name: torchvision, model: resnet18, nodes: [fc]}",
            "objective.reconstruction.perceptual",
            "an output of shape (1, 1000) is no map",
        ),
        (
            DETACHED % "{name: torchvision, model: resnet18, nodes: []}",
            "objective.reconstruction.perceptual",
            "the network returns no maps; name outputs of it",
        ),
        (
            DETACHED % "{name: torchvision, sha256: abc}",
            "objective.reconstruction.perceptual",
            "sha256 is the hash of weights, which are not given",
        ),
        (
            DETACHED % "{name: random_projection, side: 100000}",
            "objective.reconstruction.perceptual",
            "make a matrix of over 134,217,728 numbers: lower them",
        ),
        (
            "backbone.width=1000000000000000000000",
            "backbone",
            "is larger than any size",
        ),
        (
            SCORES % (PROJECTION, "sfid"),
            "scores.metrics.0",
            "needs the features spatial, and Random",
        ),
        (SCORES % (PROJECTION, "cmmd"), "scores.metrics.0", "CMMD needs a clip network"),
        (
            SCORES % ("{name: inception2015, weights: nowhere.pth}", "fid"),
            "scores.features.weights",
            "cannot read the weights at nowhere.pth",
        ),
        (SCORES % ("{name: torchvision, model: nope}", "fid"), "scores.features", "no model"),
        (
            "scores={every: 16, features: random_projection, metrics: []}",
            "scores.metrics",
            "are none",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else "",
)
def test_check_refuses_it_and_says_where(checked, setting, where, said) -> None:
    done = checked(setting)
    assert done.code == 3, done.out + done.err
    assert said in done.err
    assert where in done.err


@needs_dsd
@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ("model: resnet18, nodes: [fc]", "an output of shape (1, 1000) is no map"),
        ("model: resnet18, nodes: [flatten]", "an output of shape (1, 512) is no map"),
        ("model: vit_b_16, nodes: [encoder.ln]", "does not compute on images of (3, 16, 16)"),
    ],
)
def test_a_teacher_without_a_map_is_refused(checked, nodes, said) -> None:
    taught = "{name: dsd, align_with: features, repr_with: ema, features: {name: torchvision, %s}}"
    done = checked("objective=" + taught % nodes, "backbone.latent_norm=batch")
    assert done.code == 3
    assert "objective.features" in done.err
    assert said in done.err


def test_a_model_that_names_another_one_s_weights_fetches_nothing(checked, monkeypatch) -> None:
    import torch.hub

    def refuse(*args, **more):
        raise AssertionError("fetched weights")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    features = "{name: torchvision, model: fcn_resnet50, nodes: [backbone.layer1]}"
    assert checked(DETACHED % features).code == 0


@needs("e2ediff-sampling")
def test_an_adaptive_sampler_that_begins_at_its_end_is_refused(checked) -> None:
    done = checked("sampler={name: dopri5, t_start: 0.999}")
    assert done.code == 3
    assert "sampling begins at 0.999, not before it; lower t_start, or sigma_min" in done.err


def test_guidance_of_images_without_classes_is_warned_of(checked) -> None:
    alone = "data={name: synthetic, size: 16, count: 64, classes: 0}"
    done = checked(alone, "guidance={name: classifier_free, scale: 3}")
    assert done.code == 0
    assert "these images have no classes: both answers are the same, at twice the work" in done.err
    assert "no classes: both" not in checked("guidance={name: classifier_free}").err
    assert "no classes: both" not in checked(alone).err


def test_a_group_with_a_constant_rate_needs_nothing_of_the_others_fall() -> None:
    group = "groups: [{match: 'online.embed*', schedule: constant}]"
    text = tiny(optimizer=f"{{name: adamw, schedule: cosine, cooldown: 0.5, floor: 0.1, {group}}}")
    rate = parse_recipe(load(), text, "tiny").optimizer
    assert rate.group_factor("online.embed*", 1000, 1000) == 1
    assert rate.group_factor("", 1000, 1000) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    objective = "{name: detached, weight: eps}"
    sampler = "{name: euler, steps: 2, t_start: 0.01}"
    text = tiny(predicts="eps", objective=objective, sampler=sampler)
    return trained(tmp_path_factory.mktemp("eps"), text)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("sampler.t_start=0", "z_t holds almost nothing of the latent"),
        ("sampler={name: euler, steps: 2, t_start: 0.999, spacing: karras}", "noise level"),
        ("sampler={name: euler, steps: 3, t_start: 0.01, shift: 1.0e+30}", "do not rise"),
    ],
)
def test_samples_are_asked_for_by_the_same_rules(run, tmp_path, setting, said) -> None:
    words = ("--count", 2, "--out", tmp_path / "images", "--set", setting)
    done = e2ediff("sample", run, *words)
    assert done.code == 3, done.out
    assert said in done.err


def test_images_that_are_not_finite_are_not_stored(run, tmp_path) -> None:
    out = tmp_path / "images"
    words = ("--count", 2, "--set", "guidance={name: classifier_free, scale: 1.0e+38}")
    done = e2ediff("sample", run, "--out", out, *words)
    assert done.code == 7
    assert "images are not finite, the first is number 0; look at guidance.scale" in done.err
    assert not list(out.rglob("*.png"))
    shutil.rmtree(out, ignore_errors=True)
    assert e2ediff("sample", run, "--out", out, "--count", 2).code == 0


def test_a_recipe_of_a_run_that_was_made_before_a_rule_can_still_be_read(run, tmp_path) -> None:
    """Its recipe cannot be changed any more, and its rate was what it was."""
    old = tmp_path / "old"
    shutil.copytree(run, old)
    resolved = old / "resolved.yaml"
    text = resolved.read_text()
    assert "cooldown: 1.0" in text
    resolved.write_text(text.replace("cooldown: 1.0", "cooldown: 0.5"))
    before = parse_recipe(load(), resolved.read_text(), "old")
    assert before.optimizer.factor(1, 1000) == 1
