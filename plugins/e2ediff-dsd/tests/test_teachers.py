"""Whom DSD's auxiliary losses learn from: the EMA encoder, or a network trained before."""

from __future__ import annotations

import attrs
import pytest
import torch
from command_line import e2ediff, needs
from e2ediff_dsd.augment import Augmentation
from e2ediff_dsd.objective import DSD
from e2ediff_testing import check_objective, make_batch, make_draw, make_nets
from pooled import Coarse, Pooled, exported_pooled
from safetensors.torch import save_file
from torch.nn import functional

from e2ediff.backbone import Encode
from e2ediff.errors import AbsentDataError
from e2ediff.losses import noise_levels
from e2ediff.parts.backbones import ViTConfig

BATCH = make_batch()
VIT = ViTConfig(width=16, depth=3, heads=2, patch=8, latent_dim=4, latent_norm="batch")
FIXED = {"align_with": "features", "repr_with": "features", "features": Pooled()}
TAUGHT = DSD(**FIXED)
VIT_BLOCK = (
    "{name: vit, width: 16, depth: 3, heads: 2, patch: 8, latent_dim: 4, latent_norm: batch}"
)


@pytest.mark.parametrize(
    "changes",
    [{}, {"repr_with": "ema"}, {"align_with": "ema"}, {"draws": 2, "feature_dim": 6}],
    ids=str,
)
def test_dsd_with_a_fixed_teacher_keeps_the_contract_of_objectives(changes) -> None:
    check_objective(attrs.evolve(TAUGHT, **changes), VIT)


@pytest.mark.parametrize("name", ["align", "repr"])
def test_a_fixed_teachers_loss_is_one_minus_the_cosine_with_its_map_at_the_grid(name) -> None:
    plain = attrs.evolve(TAUGHT, augmentation=Augmentation(mask_probability=0.0))
    nets = make_nets(VIT, plain)
    with torch.no_grad():
        (encoded,) = nets.online.outputs(Encode(x=BATCH.x, taps=(3,)))
        (level,) = noise_levels(encoded.value, make_draw(BATCH), nets.path, 1)
        (answer,) = nets.online.outputs(level.denoise((1,)))
        tokens = {"align": answer.features[1], "repr": encoded.features[3]}[name]
        guess = nets.heads[name](tokens)
        # 16 pixels of 8 a patch: two rows of two tokens, each the mean of a 2 x 2 square
        small = functional.avg_pool2d(BATCH.x, 4)
        goal = functional.avg_pool2d(torch.cat([small, small.square()], dim=1), 2)
        goal = goal.flatten(2).transpose(1, 2)
        cosine = (guess * goal).sum(-1) / guess.norm(dim=-1) / goal.norm(dim=-1)
    found = plain.terms(nets, BATCH, make_draw(BATCH), "joint").losses[name].detach()
    torch.testing.assert_close(found, 1 - cosine.mean(), rtol=1e-4, atol=1e-5)


def test_two_losses_with_a_fixed_teacher_run_it_once_and_give_it_no_gradient() -> None:
    nets = make_nets(VIT, TAUGHT)
    terms = TAUGHT.terms(nets, BATCH, make_draw(BATCH), "joint")
    assert nets.frozen["features"].runs - 1 == 1, "one to learn its width, one in the step"
    terms.total.backward()
    assert nets.heads["align"][-1].weight.grad.abs().sum() > 0
    assert nets.heads["repr"][-1].weight.grad.abs().sum() > 0


def test_a_fixed_teacher_leaves_the_losses_of_the_ema_encoder_as_they_are() -> None:
    found = [
        o.terms(make_nets(VIT, o), BATCH, make_draw(BATCH), "joint").losses
        for o in (DSD(), attrs.evolve(TAUGHT, repr_with="ema"))
    ]
    for name in ("reconstruction", "denoising"):
        assert torch.equal(*(losses[name] for losses in found))
    assert found[0]["align"] != found[1]["align"]


@pytest.mark.parametrize(
    ("changes", "where", "said"),
    [
        ({"features": None}, "objective.features", "name one, such as"),
        (
            {"align_with": "ema", "repr_with": "ema"},
            "objective.features",
            "set objective.align_with: features",
        ),
        ({"align_weight": 0.0}, "objective.align_with", "has no effect with align_weight: 0"),
        (
            {"features": None, "feature_dim": 6},
            "objective.feature_dim",
            "name it in features",
        ),
        ({"feature_dim": 7}, "objective.feature_dim", "set objective.feature_dim: 6"),
        ({"align_teacher": 2}, "objective.align_teacher", "set objective.align_with: ema"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_with_the_setting(changes, where, said) -> None:
    ((place, what),) = attrs.evolve(TAUGHT, **changes).problems(make_nets(VIT, device="meta"))
    assert place == where
    assert said in what


@pytest.mark.parametrize("losses", [{}, {"repr_with": "ema"}, {"align_with": "ema"}], ids=str)
def test_a_teacher_whose_map_has_a_place_for_many_tokens_is_refused(losses) -> None:
    nets = make_nets(attrs.evolve(VIT, patch=4), device="meta")  # 4 x 4 tokens
    for places, fits in (((1, 1), False), ((2, 1), False), ((2, 2), True), ((5, 5), True)):
        taught = attrs.evolve(TAUGHT, features=Coarse(places=places), **losses)
        found = dict(taught.problems(nets))
        assert found.keys() == (set() if fits else {"objective.features"})
        if not fits:
            assert "choose an earlier block" in found["objective.features"]


@needs("e2ediff-features")
def test_an_exported_network_teaches_as_the_module_it_was_exported_from(tmp_path) -> None:
    file = exported_pooled(tmp_path / "pooled.pt2", BATCH.x.shape[-1])
    found, expected = (
        o.terms(make_nets(VIT, o), BATCH, make_draw(BATCH), "joint").losses
        for o in (attrs.evolve(TAUGHT, features=file), TAUGHT)
    )
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name])


@needs("e2ediff-unite")
def test_a_fixed_teacher_is_refused_by_tokens_without_a_place_on_the_image(tmp_path) -> None:
    taught = (
        "{name: dsd, features: {name: random_projection}, align_with: features, repr_weight: 0"
    )
    unite = "{name: unite, width: 16, depth: 2, heads: 2, patch: 8, registers: 4, latent_dim: 4, "
    unite += "context_start: 1, latent_norm: layer}"
    done = check(tmp_path, unite, taught + ", augmentation: {mask_probability: 0}}")
    assert done.code == 3
    assert "backbone: its latent tokens have no place on the image plane" in done.err
    assert "choose another, such as vit" in done.err


@needs("e2ediff-features")
@pytest.mark.parametrize("shapes_from", ["feature_dim: 768", "model"])
def test_a_teachers_missing_weights_are_refused_by_check(tmp_path, shapes_from) -> None:
    """Also where shapes and cost are known without them, which are printed first."""
    model = "model: vit_b14, " if shapes_from == "model" else ""
    width = "" if shapes_from == "model" else f", {shapes_from}"
    taught = f"{{name: dsd, features: {{name: dinov2, {model}weights: lost.pth}}, "
    done = check(tmp_path, VIT_BLOCK, taught + f"align_with: features{width}}}")
    assert done.code == 3
    assert "parameters " in done.out
    assert not done.out.endswith("ok\n")
    why = "cannot read the weights at lost.pth: No such file"
    assert f"objective.features.weights: feature network: {why}" in done.err
    assert "Give the path or URL of the weights." in done.err


@needs("e2ediff-features")
def test_missing_weights_that_alone_know_the_shapes_are_refused_too(tmp_path) -> None:
    taught = "{name: dsd, features: {name: dinov2, weights: lost.pth}, align_with: features}"
    lost = check(tmp_path, VIT_BLOCK, taught)
    assert lost.code == AbsentDataError.exit_code
    assert "cannot read the weights at lost.pth: No such file" in lost.err
    assert "Give the path or URL of its weights" in lost.err


@needs("e2ediff-features")
@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("''", "cannot read weights at an empty address. Give the path or URL"),
        (".", "cannot read the weights at .: Is a directory"),
        (
            "file:///nowhere/x.pth",
            "the weights at file:///nowhere/x.pth: No such file",
        ),
        ("taught.yaml", "is not a file of tensors: it is damaged, or of another format"),
        ("more.pth", "it is damaged, or has more than tensors, which alone are read"),
        ("other.safetensors", "does not fit"),
    ],
)
def test_weights_that_cannot_be_those_are_refused_with_the_setting(
    tmp_path, monkeypatch, weights, said
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"pos_embed": torch.zeros(1, 5, 64)}, tmp_path / "other.safetensors")
    torch.save({"where": tmp_path}, tmp_path / "more.pth")
    taught = f"{{name: dsd, features: {{name: dinov2, model: vit_s14, weights: {weights}}}, "
    done = check(tmp_path, VIT_BLOCK, taught + "align_with: features}")
    assert done.code == 3
    assert "objective.features.weights: " in done.err
    assert said in done.err
    assert "weights_only" not in done.err, "advice to unpickle"


@needs("e2ediff-features")
def test_weights_in_a_store_are_not_looked_at(tmp_path) -> None:
    where = "https://example.org/vit.pth"
    taught = f"{{name: dsd, features: {{name: dinov2, model: vit_s14, weights: '{where}'}}, "
    done = check(tmp_path, VIT_BLOCK, taught + "align_with: features}")
    assert done.code == 0, done.err
    assert "features    objective.features: weights in a store, not looked at" in done.out


def test_a_network_that_is_random_for_lack_of_weights_is_said(tmp_path) -> None:
    network = "{name: torchvision, model: squeezenet1_1, nodes: [features.2]}"
    taught = f"{{name: dsd, features: {network}, align_with: features}}"
    done = check(tmp_path, VIT_BLOCK, taught)
    assert done.code == 0, done.err
    assert "warning: objective.features has no weights: a random network" in done.err
    assert "set objective.features.weights" in done.err


@needs("e2ediff-features")
def test_missing_weights_hide_no_other_problem_and_say_their_place(tmp_path) -> None:
    taught = "{name: dsd, features: {name: dinov2, weights: lost.pth}, align_with: features, "
    both = check(tmp_path, VIT_BLOCK, taught + "reconstruction: {scales: 9}}")
    assert both.code == 3
    assert "objective.features: feature network: cannot read the weights at lost.pth" in both.err
    assert "set objective.feature_dim to the channels of its last map" in both.err
    assert "objective.reconstruction.scales: 9 halves images of 16 x 16 pixels" in both.err


def test_a_teacher_that_cannot_compute_is_refused_in_words(tmp_path) -> None:
    why = "needs `pip install efficientnet-lite-pytorch`"
    pytest.importorskip("efficientnet_lite_pytorch", reason=why)
    taught = "{name: dsd, features: {name: efficientnet_lite0, map_size: 3}, align_with: features}"
    done = check(tmp_path, VIT_BLOCK, taught)
    assert done.code == 3
    assert "objective.features: the network does not compute on images of (3, 16, 16)" in done.err
    assert "Traceback" not in done.err


def check(tmp_path, backbone: str, objective: str):
    (tmp_path / "taught.yaml").write_text(
        f"""\
e2ediff: 1
name: taught
requires: [e2ediff-dsd]
steps: 2
batch: 4
data: {{name: synthetic, size: 16}}
backbone: {backbone}
interpolant: linear
times: uniform
objective: {objective}
optimizer: adamw
sampler: euler
"""
    )
    return e2ediff("check", tmp_path / "taught.yaml")
