"""GenFirst: where its latents settle, what its losses reach, and its two phases."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from e2ediff_rivals.genfirst import GenFirst
from e2ediff_testing import TinyBackbone, check_objective, make_batch, make_draw, make_nets
from reached_modules import reached, shaken_nets

from e2ediff.backbone import Backbone, BackboneConfig, LatentSpec
from e2ediff.condition import ClassLabels
from e2ediff.data import Batch, ImageSpec
from e2ediff.latent import LatentNorm
from e2ediff.objective import Draw
from e2ediff.parts.objectives import Coupled
from e2ediff.parts.time_samplers import Uniform

DOT = ImageSpec(1, 1, 1, 0)


class ExactPrior(Backbone):
    """Encodes every image as zero; its denoiser is the exact one of N(0, s^2)."""

    def __init__(self, image: ImageSpec, s: float) -> None:
        super().__init__()
        self.image, self.latent, self.s = image, LatentSpec(1, 1, "none"), s
        self.latent_norm = LatentNorm("none", 1, 1)

    def encode(self, x):
        return torch.zeros(len(x), 1, 1)

    def decode(self, z):
        return z[..., None]

    def denoise(self, z_t, t, condition):
        t = t[:, None, None]
        return t * self.s**2 / (t.square() * self.s**2 + (1 - t).square()) * z_t


@attrs.frozen(kw_only=True)
class ExactPriorConfig(BackboneConfig):
    s: float

    def build(self, image):
        return ExactPrior(image, self.s)


class Signs(Draw):
    """Noise of signs, first the posterior's and then the path's: all four pairs, at each time."""

    def noise(self, like):
        self.turns.append(1)
        pairs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        return pairs[:, len(self.turns) - 1].repeat(len(like) // 4)[:, None, None]


@attrs.frozen(eq=False)
class Exact(Signs):
    turns: list = attrs.field(factory=list)


def losses_at(s: float, objective: GenFirst, times: int = 2000):
    """The losses of latents N(0, s^2) under their exact prior, over uniform times."""
    own = attrs.evolve(objective, std=s, clamp=1e9)
    nets = make_nets(ExactPriorConfig(s=s), own, image=DOT)
    t = ((torch.arange(times) + 0.5) / times).repeat_interleave(4)
    condition = ClassLabels(0).null(len(t))
    draw = Exact(t=t, condition=condition, generator=None, times=Uniform())
    batch = Batch(x=torch.zeros(len(t), 1, 1, 1), condition=condition)
    terms = own.terms(nets, batch, draw, "joint")
    return terms.losses["denoising"], terms.losses["negative_entropy"]


@pytest.mark.parametrize(("prior", "entropy"), [(0.01, 0.01), (0.2, 0.05)])
def test_without_reconstruction_latents_settle_where_the_prior_s_loss_is_the_weights_ratio(
    prior, entropy
) -> None:
    """w_p (pi/2) s - w_e log s is least at s = 2 w_e / (pi w_p)."""
    objective = GenFirst(prior_weight=prior, entropy_weight=entropy)
    best = 2 * entropy / (math.pi * prior)
    totals = []
    for s in (best / 1.3, best, best * 1.3):
        denoising, negative_entropy = losses_at(s, objective)
        assert denoising.item() == pytest.approx(math.pi / 2 * s, rel=0.01)
        gaussian = torch.distributions.Normal(0.0, s).entropy()
        assert negative_entropy.item() == pytest.approx(-gaussian.item(), rel=1e-4)
        totals.append(prior * denoising + entropy * negative_entropy)
    assert totals[1] < min(totals[0], totals[2])
    assert losses_at(best, objective)[0].item() == pytest.approx(entropy / prior, rel=0.01)


@pytest.mark.parametrize("std", [None, 0.2])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_genfirst_keeps_the_contract_with_a_learned_and_a_fixed_variance(std, norm) -> None:
    objective = GenFirst(std=std, draws=2, entropy_weight=0.01 if std is None else 0.0)
    check_objective(objective, TinyBackbone(latent_norm=norm))


@pytest.mark.parametrize("predicts", ["x0", "v"])
def test_every_loss_of_genfirst_trains_the_encoder(predicts) -> None:
    objective, batch = GenFirst(), make_batch()
    nets = shaken_nets(objective, predicts=predicts)
    terms = objective.terms(nets, batch, make_draw(batch), "joint")
    assert {name: reached(nets, loss) for name, loss in terms.losses.items()} == {
        "reconstruction": {"encode", "decode", "heads"},
        "denoising": {"encode", "denoise", "heads"},
        "negative_entropy": {"encode", "heads"},
    }


def test_the_second_phase_divides_the_weights_of_prior_and_entropy_by_ten() -> None:
    objective, batch = GenFirst(first_phase=0.4), make_batch()
    nets = make_nets(TinyBackbone(), objective)
    found = {}
    for progress in (0.0, 0.39, 0.4, 0.9):
        draw = attrs.evolve(make_draw(batch), progress=torch.tensor(progress))
        weights = objective.terms(nets, batch, draw, "joint").weights
        found[progress] = {name: pytest.approx(float(w)) for name, w in weights.items()}
    first = {"reconstruction": 1.0, "denoising": 0.03, "negative_entropy": 0.03}
    later = {"reconstruction": 1.0, "denoising": 0.003, "negative_entropy": 0.003}
    assert found == {0.0: first, 0.39: first, 0.4: later, 0.9: later}


def test_without_a_posterior_genfirst_is_coupled() -> None:
    """A variance of nothing: the same values and gradients, so entropy is what differs."""
    bare, batch = GenFirst(std=1e-12, entropy_weight=0.0), make_batch()
    nets, coupled = make_nets(objective=bare), Coupled()
    ours, theirs = (
        o.terms(nets, batch, draw_after(batch, skipped), "joint").losses["denoising"]
        for o, skipped in ((bare, 0), (coupled, 1))
    )
    torch.testing.assert_close(ours, theirs)
    named = [p for p in nets.online.parameters() if p.requires_grad]
    pairs = (torch.autograd.grad(loss, named, allow_unused=True) for loss in (ours, theirs))
    for a, b in zip(*pairs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def draw_after(batch, skipped: int):
    """The same draw, from whose generator the noise of `skipped` latents has been taken."""
    draw = make_draw(batch)
    latent = torch.zeros(len(batch.x), *make_nets().online.encode(batch.x).shape[1:])
    for _ in range(skipped):
        draw.noise(latent)
    return draw


def test_an_entropy_that_is_constant_or_has_no_features_is_refused() -> None:
    nets = make_nets(device="meta")
    assert [where for where, _ in GenFirst(std=0.1).problems(nets)] == ["objective.std"]
    assert not GenFirst(std=0.1, entropy_weight=0.0).problems(nets)
    nets.online.depth = 0
    assert [where for where, _ in GenFirst().problems(nets)] == ["objective.std"]
