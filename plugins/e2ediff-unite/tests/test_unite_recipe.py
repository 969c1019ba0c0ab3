"""The recipe of UNITE-B trains at the rates, weights and split of the released code.

The code (commit 2389f2c) trains on 8 GPUs, each with two micro-batches of 64 images a step.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from e2ediff.host.plugins import load
from e2ediff.host.recipe import Recipe, load_recipe

BATCH, IMAGES, EPOCHS = 1024, 1_281_167, 240
# Micro-batches of an epoch on one of 8 GPUs: what its sampler and loader leave of 1,281,167.
LOADED = math.ceil(IMAGES / 8) // 64
# Matrices that the code gives to AdamW: of its final layer, patches, registers and class tokens.
ADAMW_MATRICES = {
    "embed_pixels.weight",  # patch_embed, a convolution there
    "embed_register",  # latent_tokens
    "embed_context",  # in_context_posemb
    "trunk.final.weight",  # final_layer.adaLN_modulation
    "head_latent.weight",  # final_layer.linear
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(load(), Path(__file__).parents[3] / "recipes" / "unite_in256.yaml")


@pytest.fixture(scope="module")
def net(recipe):
    with torch.device("meta"):
        return recipe.backbone.build(recipe.data.image)


def released_rate(step: int) -> float:
    """The rate of a step by the released schedule, whose epochs count micro-batches."""
    first, second = 1e-4 * BATCH / 384, 5e-5 * BATCH / 384
    warm, hold, fallen = (epochs * LOADED for epochs in (20, 30, 50))
    if step < warm:
        return first * step / warm
    if step < hold:
        return first
    if step < fallen:
        done = (step - hold) / (fallen - hold)
        return second + (first - second) * (1 + math.cos(math.pi * done)) / 2
    return second  # the second fall would begin with epoch 3000


def test_its_rate_is_the_released_one_in_every_step(recipe) -> None:
    assert LOADED == 2502
    optimizer, total = recipe.optimizer, recipe.total_images
    steps = range(1, EPOCHS * LOADED // 2, 97)
    ours = [optimizer.lr * optimizer.factor(step * BATCH, total) for step in steps]
    theirs = [released_rate(step) for step in steps]
    # The first steps differ by a thousandth of a step of the warm-up, the rate by its digits.
    assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-11)
    assert max(ours) == pytest.approx(2.6667e-4, rel=1e-4)
    assert sum(ours) / len(ours) == pytest.approx(1.5556e-4, rel=1e-3)
    assert ours[-1] == pytest.approx(1.3333e-4, rel=1e-4)


def test_its_losses_weigh_as_in_the_released_sum(recipe) -> None:
    """L1 of images in [0, 1], plus the sum over draws: half of the recipe's."""
    objective, optimizer = recipe.objective, recipe.optimizer
    g = torch.Generator().manual_seed(0)
    x, x_hat = torch.rand(2, 2, 3, 8, 8, generator=g) * 2 - 1
    released = ((x_hat + 1) / 2 - (x + 1) / 2).abs().mean()
    whole = objective.reconstruction(x_hat, x, torch.nn.ModuleDict())
    scale = float(whole / released)
    assert scale == pytest.approx(2.0)
    assert (objective.denoising_weight / scale, objective.reduce) == (1.0, "sum")
    assert optimizer.clip / scale == pytest.approx(3.0)
    assert optimizer.adamw.eps / scale == pytest.approx(1e-6)


def test_muon_has_the_matrices_of_the_released_split(recipe, net) -> None:
    named = {f"online.{name}": p for name, p in net.named_parameters()}
    matrices = {name for name, p in named.items() if p.ndim == 2}
    mine = {name for name, p in named.items() if recipe.optimizer.hidden(name, p)}
    assert mine == matrices - {f"online.{name}" for name in ADAMW_MATRICES}
    # among them what is AdamW's by the default
    assert {"online.embed_label.weight", "online.decoder.head.weight"} < mine


def test_its_optimizers_have_the_released_options(recipe, net) -> None:
    named = [(f"online.{name}", p) for name, p in net.named_parameters()]
    groups = recipe.optimizer.build(named).param_groups
    muon = [g for g in groups if "momentum" in g]
    adamw = [g for g in groups if "betas" in g]
    assert len(muon) + len(adamw) == len(groups)
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(2.6667e-4, 0.0)}
    (one,) = muon
    assert (one["momentum"], one["nesterov"], one["ns_steps"]) == (0.95, True, 5)
    assert one["adjust_lr_fn"] == "match_rms_adamw"
    assert {tuple(g["betas"]) for g in adamw} == {(0.9, 0.999)}
