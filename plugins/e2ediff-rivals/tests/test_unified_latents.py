"""Unified Latents: its noise, its KL in closed form, and the two pulls on the encoder's scale."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from e2ediff_rivals.unified_latents import UnifiedLatents, kl_rate, least_noise
from e2ediff_testing import TinyBackbone, make_batch, make_draw, make_nets
from torch import nn

from e2ediff.parts.interpolants import Cosine, Linear, VarianceExploding

BATCH = make_batch()


@pytest.mark.parametrize("path", [Linear(), Cosine(), VarianceExploding()], ids=str)
@pytest.mark.parametrize("logsnr", [0.0, 5.0])
def test_the_least_noise_is_where_the_path_has_that_signal_to_noise_ratio(path, logsnr) -> None:
    t = torch.tensor([least_noise(path, logsnr)], dtype=torch.float64)
    assert path.logsnr(t).item() == pytest.approx(logsnr, abs=1e-6)


def test_on_the_linear_path_it_is_a_sigmoid() -> None:
    assert least_noise(Linear(), 5.0) == pytest.approx(1 / (1 + math.exp(-2.5)))


@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=str)
@pytest.mark.parametrize("std", [0.3, 1.0, 4.0])
def test_the_kl_of_gaussian_latents_is_their_mutual_information_with_the_noisy_one(
    path, std
) -> None:
    """I(z; z_0) = 1/2 ln(1 + std^2 snr): with the exact denoiser the bound is tight."""
    nodes, signs = 4000, torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    t_0 = least_noise(path, 5.0)
    t = (torch.arange(nodes, dtype=torch.float64) + 0.5).div(nodes).repeat_interleave(4) * t_0
    z = std * signs[:, 0].double().repeat(nodes)[:, None, None]
    eps = signs[:, 1].double().repeat(nodes)[:, None, None]
    a, s = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
    clean = a * std**2 / (a**2 * std**2 + s**2) * path.mix(z, eps, t)
    found = t_0 * kl_rate(clean, z, path, t)
    expected = 0.5 * math.log(1 + std**2 * math.exp(5.0))
    # `kl_rate` reads the network's answer in float32; midpoints leave 1e-4
    assert found.item() == pytest.approx(expected, rel=1e-3)


def test_the_kl_pulls_the_encoder_s_scale_down_and_reconstruction_pushes_it_up() -> None:
    """-d/d(ln scale) of each, for latents that nothing but their scale changes."""
    objective = UnifiedLatents()
    nets = make_nets(TinyBackbone(latent_norm="none"), objective)
    net = nets.online
    with torch.no_grad():  # a decoder that inverts the encoder, and nothing else
        net.to_latent.weight.copy_(torch.eye(6, 12) * 0.3)
        net.to_latent.bias.zero_()
        net.from_latent.weight.copy_(torch.eye(12, 6) / 0.3)
    scale = net.to_latent.weight.detach()
    pull = {}
    for name in ("reconstruction", "kl"):
        slopes = []
        for seed in range(20):
            w = nn.Parameter(scale.clone())
            inverse = net.from_latent.weight.detach() * (scale.norm() / w.norm())
            weights = {"to_latent.weight": w, "from_latent.weight": inverse}
            loss = functional_losses(objective, nets, weights, seed)[name]
            (grad,) = torch.autograd.grad(loss, w)
            slopes.append(-(grad * scale).sum())
        pull[name] = torch.stack(slopes).mean().item()
    assert pull["reconstruction"] > 0
    assert pull["kl"] < 0


def functional_losses(objective, nets, weights, seed):
    """The losses with other values of some parameters, differentiable in these."""
    found = {}

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nets.online

        def forward(self):
            draw = make_draw(BATCH, seed=seed)
            found.update(objective.terms(nets, BATCH, draw, "joint").losses)

    torch.func.functional_call(Call(), {f"net.{k}": v for k, v in weights.items()}, ())
    return found


@attrs.frozen(kw_only=True)
class Half(Linear):
    """Begins between noise and data."""

    def alpha(self, t):
        return (1 + t) / 2

    def sigma(self, t):
        return (1 - t) / 2


def test_a_path_that_keeps_some_data_at_its_noisy_end_has_no_such_kl() -> None:
    nets = make_nets(TinyBackbone(latent_norm="none"), path=Half(), device="meta")
    assert [where for where, _ in UnifiedLatents().problems(nets)] == ["interpolant"]
