"""Unified Latents: its noise, its KL in closed form, and the two pulls on the encoder's scale."""

from __future__ import annotations

import json
import math
import shutil

import attrs
import pytest
import torch
from command_line import e2ediff, trained
from e2ediff_rivals.adversary import Adversary
from e2ediff_rivals.unified_latents import UnifiedLatents, image_rate, kl_rate, least_noise
from e2ediff_testing import TinyBackbone, make_batch, make_draw, make_nets
from reached_modules import VIT, shaken_nets
from tiny_recipe import tiny
from torch import nn

import e2ediff as package
from e2ediff.backbone import Decode
from e2ediff.denoiser import Plain
from e2ediff.losses import PixelLoss
from e2ediff.parts.backbones import ViTConfig
from e2ediff.parts.interpolants import Cosine, Linear, VarianceExploding

BATCH = make_batch()


@pytest.mark.parametrize("path", [Linear(), Cosine(), VarianceExploding()], ids=str)
@pytest.mark.parametrize("logsnr", [0.0, 5.0])
def test_the_least_noise_is_where_the_path_has_that_signal_to_noise_ratio(path, logsnr) -> None:
    t = torch.tensor([least_noise(path, logsnr)], dtype=torch.float64)
    assert path.logsnr(t).item() == pytest.approx(logsnr, abs=1e-6)


def test_a_path_need_not_be_hashable() -> None:
    @attrs.define(kw_only=True)
    class Own(Linear):
        notes: list[int] = attrs.field(factory=list)
        __hash__ = None

    assert UnifiedLatents().trained_until(Own()) == UnifiedLatents().trained_until(Linear())


def test_the_prior_is_asked_at_its_last_time_for_latents_past_it() -> None:
    objective, path = UnifiedLatents(), Linear()
    last = objective.trained_until(path)
    assert last == least_noise(path, 5.0)
    nets = shaken_nets(objective, attrs.evolve(VIT, latent_norm="none"))
    asked, own = [], nets.online.denoise

    def denoise(z_t, t, condition):
        asked.append((float(t[0]), z_t))
        return own(z_t, t, condition)

    nets.online.denoise = denoise
    plain = Plain(nets.online, path, "x0", until=last)
    z, condition = torch.randn(6, 4, 4), BATCH.condition
    with torch.no_grad():
        early, late = plain(z, 0.9, condition), plain(z, 0.98, condition)
        same = own(z * last / 0.98, torch.full((6,), last), condition)
    assert [t for t, _ in asked] == pytest.approx([0.9, last])
    torch.testing.assert_close(late.x0, same)
    torch.testing.assert_close(late.v, (same - z) / 0.02, rtol=1e-3, atol=1e-3)
    assert not torch.equal(early.x0, late.x0)
    with pytest.raises(ValueError, match="'logsnr' must be <= 20: 100"):
        UnifiedLatents(logsnr=100.0)


def test_a_model_of_unified_latents_holds_its_last_time(tmp_path) -> None:
    model = package.load(trained(tmp_path, RECIPE), device="cpu")
    assert model._plain().until == pytest.approx(1 / (1 + math.exp(-2.5)))


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


# The diffusion decoder

DENOISING = ViTConfig(
    width=16, depth=2, heads=2, patch=8, latent_dim=4, latent_norm="none", trunks="three",
    decoder="denoising", decode_steps=3,
)  # fmt: skip


@pytest.mark.parametrize("bias", [-2.0, 0.0, 3.0])
def test_the_image_s_rate_is_the_bound_s_with_finer_noise_counted_less(bias) -> None:
    g = torch.Generator().manual_seed(0)
    x, clean = torch.randn(2, 50, 3, 2, 2, generator=g)
    t = torch.rand(50, generator=g) * 0.98 + 0.01
    rates = torch.stack([image_rate(c[None], i[None], s[None], bias)
                         for c, i, s in zip(clean, x, t, strict=True)])  # fmt: skip
    plain = torch.stack([kl_rate(c[None], i[None], Linear(), s[None])
                         for c, i, s in zip(clean, x, t, strict=True)])  # fmt: skip
    share = 1 / (1 + (t / (1 - t)).square() * math.exp(-bias))
    torch.testing.assert_close(rates, plain * share, rtol=1e-4, atol=1e-5)
    if bias == 0:
        weight = t / ((1 - t) * (t.square() + (1 - t).square()))
        error = (x - clean).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(rates, weight * error, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(image_rate(clean, x, t, bias), rates.mean())


def test_the_reconstruction_is_the_rate_of_the_noised_image_s_clean_estimate() -> None:
    objective = UnifiedLatents(decoder="diffusion", decoder_bias=1.0)
    nets = shaken_nets(objective, DENOISING)
    seen, run = [], nets.online.outputs

    def watched(*passes):
        outs = run(*passes)
        seen.extend((p, o.value) for p, o in zip(passes, outs, strict=True)
                    if isinstance(p, Decode))  # fmt: skip
        return outs

    nets.online.outputs = watched
    terms = objective.terms(nets, BATCH, make_draw(BATCH), "joint")
    ((decode, clean),) = seen
    last = 1 / (1 + math.exp(-5))
    t = decode.t[:, None, None, None]
    assert 0 < t.min() < t.max() < last
    noise = (decode.x_t - t * BATCH.x) / (1 - t)
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert not torch.equal(decode.t, make_draw(BATCH).t), "its own times"
    expected = last * image_rate(clean, BATCH.x, decode.t, 1.0)
    torch.testing.assert_close(terms.losses["reconstruction"], expected)
    assert terms.decoded is None


def test_the_last_time_bounds_the_weight_of_an_image() -> None:
    worst = image_rate(0 * BATCH.x, BATCH.x, torch.full((6,), 1 / (1 + math.exp(-5))), 0.0)
    assert worst < 150, "the last time bounds the weight"


def test_objective_and_decoder_must_fit_and_no_critic_judges_a_diffusion_decoder() -> None:
    nets = make_nets(DENOISING, device="meta")
    diffusion = UnifiedLatents(decoder="diffusion")
    assert not diffusion.problems(nets)
    ((where, what),) = UnifiedLatents().problems(nets)
    assert (where, "set objective.decoder: diffusion" in what) == ("objective.decoder", True)
    direct = make_nets(attrs.evolve(DENOISING, decoder="direct"), device="meta")
    ((where, what),) = diffusion.problems(direct)
    assert (where, "set backbone.decoder: denoising" in what) == ("objective.decoder", True)
    odd = UnifiedLatents(decoder="diffusion", reconstruction=PixelLoss(kind="l2"))
    assert [where for where, _ in odd.problems(nets)] == ["objective.reconstruction"]
    judged = dict(Adversary(of=diffusion, layers=1).problems(nets))
    assert "hands on no decoded images" in judged["objective.of"]
    biased = UnifiedLatents(decoder_bias=1.0)
    assert [where for where, _ in biased.problems(direct)] == ["objective.decoder_bias"]


RECIPE = tiny(
    requires="[e2ediff-rivals]",
    backbone="{name: vit, width: 16, depth: 1, heads: 1, patch: 8, latent_dim: 4, "
    "latent_norm: none, decoder: denoising, decode_steps: 2}",
    objective="{name: unified_latents, decoder: diffusion}",
)


def test_a_run_trains_samples_reconstructs_and_goes_on(tmp_path) -> None:
    run = trained(tmp_path, RECIPE)
    newest = max((run / "checkpoints").iterdir(), key=lambda p: p.name)
    before = newest.name, {p.name: p.read_bytes() for p in newest.glob("*.safetensors")}
    shutil.rmtree(newest)
    done = e2ediff("run", run, "--resume")
    assert done.code == 0, done.err
    assert {p.name: p.read_bytes() for p in (run / "checkpoints" / before[0]).glob("*.safetensors")
            } == before[1]  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("psnr" in line for line in lines), "diagnoses decode"
    model = package.load(run, device="cpu")
    x = model.sample([0, 1, 1], seed=2)
    assert torch.equal(model.sample([0, 1, 1], seed=2), x)
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))


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
