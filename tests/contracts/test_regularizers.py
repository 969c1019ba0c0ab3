"""Regularisers compose with any objective: names, phases, weights, and what does not fit."""

from __future__ import annotations

import attrs
import e2ediff_testing as testing
import pytest
import torch
from command_line import needs

from e2ediff.errors import ShapeError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.model.build import check_fits, problems
from e2ediff.parts.objectives import Detached, TwoStage
from e2ediff.parts.regularizers import SIGReg, VarianceExpansion, VICReg
from e2ediff.regularizer import Regularizer, names_of
from e2ediff.step.step import Step

BATCH = testing.make_batch()
HOST = load(entry_points=False)
ALL = [part.cls for part in HOST.registries["regularizers"]]


@attrs.frozen(kw_only=True)
class Denoising(Regularizer):
    """Takes the name of an objective's loss."""

    weight: float = 1.0

    def loss(self, z, draw):
        return z.square().mean()


def step(objective, *parts, **options) -> Step:
    return Step(objective, testing.make_nets(objective=objective, **options), torch.float32, parts)


def test_a_loss_is_named_by_its_class_and_numbered() -> None:
    parts = [VICReg(), SIGReg(), VICReg(of="image"), VarianceExpansion(), VICReg(), Denoising()]
    assert names_of(parts) == [
        "vicreg", "sigreg", "vicreg_2", "variance_expansion", "vicreg_3", "denoising",
    ]  # fmt: skip


@pytest.mark.parametrize("part", ALL, ids=lambda c: c.__name__)
@pytest.mark.parametrize("of", ["token", "image"])
@pytest.mark.parametrize(
    "name", ["coupled", "detached", pytest.param("kl", marks=needs("e2ediff-rivals"))]
)
def test_any_regulariser_composes_with_any_objective(part, of, name) -> None:
    """Its gradient reaches the encoder, and the objective's own losses stay what they were."""
    objective = load().registries["objectives"].get(name)()
    plain = step(objective).terms(BATCH, testing.make_draw(BATCH), "joint")
    both = step(objective, part(of=of, weight=0.5))
    terms = both.terms(BATCH, testing.make_draw(BATCH), "joint")
    (name,) = set(terms.losses) - set(plain.losses)
    assert terms.weights[name] == 0.5
    assert all(torch.equal(terms.losses[k], v) for k, v in plain.losses.items())
    (grad,) = torch.autograd.grad(terms.losses[name], both.online.patches.weight)
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


def test_a_phase_without_a_gradient_to_the_latents_has_no_regulariser() -> None:
    both = step(TwoStage(), VICReg())
    assert "vicreg" in both.terms(BATCH, testing.make_draw(BATCH), "autoencoder").losses
    assert set(both.terms(BATCH, testing.make_draw(BATCH), "denoiser").losses) == {"denoising"}


def test_a_weight_of_zero_logs_a_regulariser_without_training_on_it() -> None:
    quiet = step(Detached(), VICReg(weight=0.0)).terms(BATCH, testing.make_draw(BATCH), "joint")
    plain = step(Detached()).terms(BATCH, testing.make_draw(BATCH), "joint")
    assert quiet.losses["vicreg"] > 0
    assert torch.equal(quiet.total, plain.total)


def test_a_name_that_the_objective_uses_is_refused() -> None:
    with pytest.raises(ShapeError) as caught:
        step(Detached(), Denoising()).terms(BATCH, testing.make_draw(BATCH), "joint")
    assert str(caught.value) == (
        "regularizers: objective Detached has a loss named 'denoising' of its own; leave that "
        "regularizer out, or rename its `term`"
    )


def test_a_recipe_lists_regularisers_and_the_run_logs_them(tiny_text, tmp_path) -> None:
    import io
    import json

    from e2ediff.train.progress import Progress
    from e2ediff.train.session import train

    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_text)
    changes = ["steps=2", "regularizers=[vicreg, {name: sigreg, directions: 8}, vicreg]"]
    train(HOST, str(path), changes, str(tmp_path / "run"), progress=Progress(io.StringIO()))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    assert {"loss/vicreg", "loss/sigreg", "loss/vicreg_2", "loss/reconstruction"} <= logged


def test_too_few_images_at_once_are_found_before_training(tiny_text) -> None:
    changes = ["batch=4", "microshards=4", "regularizers=[vicreg]", "backbone.latent_norm=layer"]
    (problem,) = problems(parse_recipe(HOST, tiny_text, "tiny", changes))
    assert str(problem) == (
        "regularizers.0: vicreg compares images and needs at least 2 at once; batch over "
        "microshards is 1: raise batch, or lower microshards"
    )


def test_a_regulariser_s_own_complaints_are_found_before_training(tiny_text) -> None:
    @attrs.frozen(kw_only=True)
    class Picky(VICReg):
        def problems(self, nets, images):
            return [("floor", f"does not fit {nets.online.latent.dim} channels and {images}")]

    recipe = parse_recipe(HOST, tiny_text, "tiny")
    recipe = attrs.evolve(recipe, regularizers=(SIGReg(), Picky()))
    assert [str(p) for p in problems(recipe)] == [
        "regularizers.1.floor: does not fit 6 channels and 8"
    ]


# What objectives refuse


@pytest.mark.parametrize(
    ("changes", "where", "way_out"),
    [
        (
            ["objective={name: detached, decode_noise: {probability: 0.5}}",
             "backbone.latent_norm=none"],
            "backbone.latent_norm",
            "set objective.decode_noise.probability: 0",
        ),
        (
            ["objective=detached", "predicts=eps", "sampler.t_start=0.01"],
            "predicts",
            "set objective.weight: eps, or predicts: x0 or v",
        ),
        (
            ["objective={name: two_stage, weight: v}", "backbone.trunks=three", "predicts=score",
             "sampler.t_start=0.01"],
            "predicts",
            "set objective.weight: eps, or predicts: x0 or v",
        ),
        (
            ["objective=coupled", "predicts=score", "sampler.t_start=0.01"],
            "predicts",
            "which has no bound next to noise; set predicts: x0 or v",
        ),
        (["objective=two_stage"], "objective", "`--set backbone.trunks=denoiser_apart`"),
    ],
)  # fmt: skip
def test_an_objective_that_does_not_fit_says_which_setting_to_change(
    changes, where, way_out, tiny_text
) -> None:
    (problem,) = problems(parse_recipe(HOST, tiny_text, "tiny", changes))
    assert problem.where == where
    assert way_out in problem.what


@pytest.mark.parametrize(
    "changes",
    [
        ["objective={name: detached, weight: eps}", "predicts=eps", "sampler.t_start=0.01"],
        ["objective=detached", "predicts=eps", "interpolant=ve"],
        ["objective=detached", "backbone.latent_norm=none"],
    ],
)
def test_what_fits_is_not_refused(changes, tiny_text) -> None:
    check_fits(parse_recipe(HOST, tiny_text, "tiny", changes), "tiny")
