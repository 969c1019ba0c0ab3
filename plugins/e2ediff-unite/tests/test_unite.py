"""UNITE: what its losses reach, how draws are combined, and what it refuses."""

from __future__ import annotations

import itertools

import attrs
import pytest
import torch
from declared_stops import holds_its_declaration
from e2ediff_testing import TinyBackbone, make_batch, make_draw, make_nets
from e2ediff_testing.tiny import IMAGE
from e2ediff_unite.objective import Unite

from e2ediff.backbone import Denoise
from e2ediff.host.plugins import load
from e2ediff.losses import DecodeNoise
from e2ediff.parts.backbones import ViTConfig
from e2ediff.parts.objectives import Detached

VIT = ViTConfig(
    width=16, depth=3, heads=2, patch=8, latent_dim=4, latent_norm="batch", trunks="three"
)
GROUPS = {
    "encode": ("embed_pixels", "trunks.encode", "head_latent"),
    "decode": ("embed_decode", "trunks.decode", "head_pixels"),
    "denoise": ("embed_denoise", "trunks.denoise", "head_denoise"),
}
BATCH = make_batch()


def shaken(objective, vit=VIT):
    """Without the zeros of a fresh start, which stop gradients by themselves."""
    nets, g = make_nets(vit, objective), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in nets.online.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return nets


def losses(objective, nets):
    return objective.terms(nets, BATCH, make_draw(BATCH), "joint").losses


@pytest.mark.parametrize("changes", [{}, {"reduce": "mean", "draws": 1}, {"weight": "x0"}])
@pytest.mark.parametrize("backbone", [VIT, attrs.evolve(VIT, trunks="one"), TinyBackbone()])
def test_unite_keeps_the_contract_of_objectives(changes, backbone) -> None:
    holds_its_declaration(Unite(**changes), backbone)


def test_the_plugin_registers_unite() -> None:
    host = load()
    assert "unite" not in host.broken
    assert host.registries["objectives"].get("unite") is Unite


def test_each_loss_reaches_exactly_its_modules() -> None:
    nets = shaken(Unite())
    named, reached = dict(nets.online.named_parameters()), {}
    for name, loss in losses(Unite(), nets).items():
        grads = torch.autograd.grad(
            loss, list(named.values()), retain_graph=True, allow_unused=True
        )
        pairs = zip(named, grads, strict=True)
        moved = [k for k, g in pairs if g is not None and g.abs().sum() > 0]
        reached[name] = {
            group for group, own in GROUPS.items() if any(k.startswith(own) for k in moved)
        }
    assert reached == {"reconstruction": {"encode", "decode"}, "denoising": {"denoise"}}


def test_draws_are_summed_or_averaged() -> None:
    nets = shaken(Unite())
    summed = losses(Unite(draws=4), nets)["denoising"]
    averaged = losses(Unite(draws=4, reduce="mean"), nets)["denoising"]
    torch.testing.assert_close(summed, 4 * averaged)


@pytest.mark.parametrize("draws", [1, 3])
def test_an_average_is_the_denoising_loss_of_detached(draws) -> None:
    nets = shaken(Unite())
    mine = losses(Unite(draws=draws, reduce="mean"), nets)
    theirs = losses(
        Detached(draws=draws, weight="v", decode_noise=DecodeNoise(probability=0.5)), nets
    )
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_its_loss_is_the_released_one_of_velocities() -> None:
    """|v_hat - v|^2 with v = (z - z_t) / max(1 - t, 0.05), for both."""
    from e2ediff.losses import noise_levels

    nets = shaken(Unite())
    with torch.no_grad():
        z = nets.online.encode(BATCH.x)
        (level,) = noise_levels(z, make_draw(BATCH), nets.path, 1)
        t = level.draw.t
        f = nets.online.denoise(level.z_t, t, level.draw.condition)
        span = (1 - t).clamp_min(0.05)[:, None, None]
        expected = ((f - level.z_t) / span - (z - level.z_t) / span).square().mean()
    # differences of numbers up to 20 in float32
    torch.testing.assert_close(
        losses(Unite(draws=1), nets)["denoising"].detach(), expected, rtol=1e-4, atol=0
    )


def test_each_noise_level_drops_labels_anew() -> None:
    """The released code draws the dropped rows in each call of its network."""
    seen = []

    class Listening(type(VIT.build(IMAGE))):
        def outputs(self, *passes):
            seen.extend(p.condition.label for p in passes if isinstance(p, Denoise))
            return super().outputs(*passes)

    nets = make_nets(VIT, Unite())
    nets.online.__class__ = Listening
    batch = make_batch(size=64)
    draw = attrs.evolve(make_draw(batch), label_drop=0.5)
    draw = attrs.evolve(draw, condition=draw.drop(batch.condition))
    Unite(draws=4).terms(nets, batch, draw, "joint")
    null = batch.condition.null().label
    dropped = [label == null for label in seen]
    assert len(dropped) == 4
    assert torch.equal(seen[0], draw.condition.label)
    for label, gone in zip(seen, dropped, strict=True):
        assert 10 < int(gone.sum()) < 54
        assert torch.equal(label[~gone], batch.condition.label[~gone])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(dropped, 2))


def test_free_scale_is_refused_while_latents_are_noised() -> None:
    nets = make_nets(TinyBackbone(latent_norm="none"), device="meta")
    ((where, what),) = Unite().problems(nets)
    assert where == "backbone.latent_norm"
    assert "objective.decode_noise.probability: 0" in what
    assert not Unite(decode_noise=DecodeNoise()).problems(nets)


def test_an_unbounded_weight_is_refused() -> None:
    nets = make_nets(predicts="eps", device="meta")
    assert [where for where, _ in Unite().problems(nets)] == ["predicts"]
    assert not Unite(weight="eps").problems(nets)
