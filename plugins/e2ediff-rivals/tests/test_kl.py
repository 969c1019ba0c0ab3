"""The VAE: its KL in closed form, what its losses reach, and its learned and fixed variance."""

from __future__ import annotations

import math

import pytest
import torch
from e2ediff_rivals.kl import KL, unit_normal_kl
from e2ediff_testing import TinyBackbone, check_objective, make_batch, make_draw, make_nets
from hypothesis import given
from hypothesis import strategies as st
from reached_modules import reached, shaken_nets
from torch import distributions


@given(mean=st.floats(-3, 3), log_variance=st.floats(-8, 4))
def test_the_kl_is_that_of_torch_distributions(mean, log_variance) -> None:
    q = distributions.Normal(mean, math.exp(log_variance / 2))
    expected = distributions.kl_divergence(q, distributions.Normal(0.0, 1.0))
    found = unit_normal_kl(torch.full((2, 3, 4), mean), torch.full((2, 3, 4), log_variance))
    assert found.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


def test_the_kl_of_an_autoencoder_is_that_of_its_latents_and_std() -> None:
    objective, batch = KL(std=0.3), make_batch()
    nets = make_nets(objective=objective)
    terms = objective.terms(nets, batch, make_draw(batch), "joint")
    z = nets.online.encode(batch.x)
    q = distributions.Normal(z, torch.full_like(z, 0.3))
    expected = distributions.kl_divergence(q, distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(terms.losses["kl"], expected)
    assert terms.weights == {"reconstruction": 1.0, "denoising": 1.0, "kl": 1e-6}


@pytest.mark.parametrize("std", [None, 0.2])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_vae_keeps_the_contract_with_a_learned_and_a_fixed_variance(std, norm) -> None:
    check_objective(KL(std=std, draws=2), TinyBackbone(latent_norm=norm))


def test_a_learned_variance_starts_small_and_falls_where_reconstruction_pays_for_it() -> None:
    objective, batch = KL(kl_weight=0.0), make_batch()
    nets = make_nets(objective=objective)
    head = nets.heads["log_variance"]
    assert math.exp(head.bias[0].item() / 2) == pytest.approx(0.135, abs=1e-3)
    with torch.no_grad():
        nets.online.pixels.weight.mul_(10)  # a decoder in which noise shows
    grads = []
    for seed in range(8):
        loss = objective.terms(nets, batch, make_draw(batch, seed=seed), "joint").losses
        grads.append(torch.autograd.grad(loss["reconstruction"], head.bias)[0].mean())
    assert torch.stack(grads).mean() > 0, "descent lowers the variance"


@pytest.mark.parametrize("predicts", ["x0", "v", "eps", "score"])
@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (
            KL(),
            {
                "reconstruction": {"encode", "decode", "heads"},
                "denoising": {"denoise"},
                "kl": {"encode", "heads"},
            },
        ),
        (
            KL(std=0.1),
            {"reconstruction": {"encode", "decode"}, "denoising": {"denoise"}, "kl": {"encode"}},
        ),
    ],
    ids=["learned", "fixed"],
)
def test_each_loss_reaches_exactly_its_modules(objective, expected, predicts) -> None:
    nets, batch = shaken_nets(objective, predicts=predicts), make_batch()
    terms = objective.terms(nets, batch, make_draw(batch), "joint")
    assert {name: reached(nets, loss) for name, loss in terms.losses.items()} == expected


def test_a_learned_variance_needs_features() -> None:
    nets = make_nets(device="meta")
    nets.online.depth = 0
    assert [where for where, _ in KL().problems(nets)] == ["objective.std"]
    assert not KL(std=0.1).problems(nets)
