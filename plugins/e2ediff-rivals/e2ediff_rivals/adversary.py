"""A critic of reconstructions, around any objective that decodes images.

Shapes: B batch, C H W image, h w places of the critic's answers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor, nn
from torch.nn import functional

from e2ediff.backbone import Backbone
from e2ediff.data import Batch
from e2ediff.errors import ShapeError
from e2ediff.objective import Draw, Nets, Objective, Terms, sg
from e2ediff.times import TimeSampler
from e2ediff_rivals.wrapping import Around, inner_problems

_SHARE = [validators.ge(0.0), validators.le(1.0)]
_CRITIC = "critic"
_DEEPEST = 16  # for images of 200,000 pixels a side
_MOST = 1e4  # of the adaptive factor, as in VQGAN's code


@attrs.frozen(kw_only=True)
class Adversary(Around):
    """Another objective, and a patch critic that decoded images must pass.

        critic      mean relu(1 - D(x)) + mean relu(1 + D(sg(x_hat))),  of draws of its own
        adversarial -mean D(x_hat), with the weight
                    `weight` |d reconstruction / d x_hat| / |d adversarial / d x_hat|

    The critic is trained in a phase of its own, after the others of each step, by an optimizer of
    its own: `optimizers: {critic: {name: adamw, lr: 1.0e-4, betas: [0.5, 0.9]}}`.
    Draws of the other phases are those that they have without a critic.

    Options:
        of: The objective; each of its phases that decodes images gets the adversarial loss.
        weight: Weight of that loss; with `adaptive` in units of the reconstruction's gradient.
        adaptive: Whether the weight is multiplied by the ratio above, taken on the images of a
            micro-shard, as the adversarial gradient changes by orders of magnitude.
        critic_start: The share of training at which the critic begins to learn.
        start: The share at which decoded images begin to be judged, not before that.
        channels, layers: Of the critic: convolutions of stride 2, each with twice the channels of
            the last, up to eight times, before two of stride 1.

    Source: VQGAN (Esser et al. 2021, arXiv 2012.09841), eq. 6 and 7, whose factor is taken at the
    decoder's last layer (here at the images, which every decoder has) with weights of 0.8 to 1;
    hinge loss of Lim & Ye 2017 (arXiv 1705.02894); patch critic of Isola et al. 2017 (arXiv
    1611.07004). Ours: group norm in place of batch norm, so that micro-shards do not matter to
    the critic; shares of training in place of steps; the hinge loss without its half; the
    defaults. What it does to images in colour is in docs/results/rivals.md.
    """

    trial: ClassVar[tuple[str, ...]] = (
        "objective.of=detached",
        "objective.layers=1",
        "objective.channels=8",
        "objective.critic_start=0",
        "objective.start=0",
        "optimizers={critic: adamw}",
    )

    of: Objective
    weight: float = attrs.field(default=0.5, validator=validators.ge(0))
    adaptive: bool = True
    critic_start: float = attrs.field(default=0.2, validator=_SHARE)
    start: float = attrs.field(default=0.3, validator=_SHARE)
    channels: int = attrs.field(default=64, validator=validators.ge(1))
    layers: int = attrs.field(default=3, validator=[validators.ge(1), validators.le(_DEEPEST)])

    @start.validator
    def _after_the_critic(self, field: attrs.Attribute[float], value: float) -> None:
        if value < self.critic_start:
            raise ValueError(
                f"'start' must be >= critic_start, {self.critic_start:g}, as a critic that has "
                f"learned nothing would judge at random: {value:g}"
            )

    @property
    def phases(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the phases of the other objective, and the critic's after them."""
        return (*self.of.phases, _CRITIC)

    @property
    def own_optimizers(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the other objective's phases that need one, and the critic's."""
        return (*self.of.own_optimizers, _CRITIC)

    @property
    def compares_images(self) -> bool:  # type: ignore[override]
        """Return whether the weight is adaptive, taken on all images of a micro-shard."""
        return self.adaptive or self.of.compares_images

    def span(self, phase: str) -> tuple[float, float]:
        """Return the other objective's span; the critic's is from its start on."""
        return (self.critic_start, 1.0) if phase == _CRITIC else self.of.span(phase)

    def trains(self, phase: str, name: str) -> bool:
        """Train the critic in its phase alone."""
        if phase == _CRITIC or name.startswith(f"heads.{_CRITIC}."):
            return phase == _CRITIC and name.startswith(f"heads.{_CRITIC}.")
        return self.of.trains(phase, name)

    def stops(self, phase: str) -> Collection[str]:
        """Return what the other objective stops; the critic's loss in its phase."""
        return (_CRITIC,) if phase == _CRITIC else self.of.stops(phase)

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Return the other objective's losses and the adversarial one, or the critic's.

        Raises:
            ShapeError: The weight is adaptive, and there is no loss `reconstruction`.
        """
        critic = nets.heads[_CRITIC]
        if phase == _CRITIC:
            z, x_hat = self._judged(nets, batch, draw)
            real, made = critic(batch.x), critic(x_hat)
            loss = functional.relu(1 - real).mean() + functional.relu(1 + made).mean()
            info = {"critic_real": sg(real).mean(), "critic_decoded": sg(made).mean()}
            return Terms({_CRITIC: loss}, {_CRITIC: 1.0}, z, info)
        terms = self.of.terms(nets, batch, draw, phase)
        if terms.decoded is None:
            return terms  # as the second of two stages, which decodes nothing
        loss = -critic(terms.decoded).mean()
        factor = self._factor(terms, loss) if self.adaptive else loss.new_ones(())
        weight = self.weight * factor * (draw.progress >= self.start)
        return attrs.evolve(
            terms,
            losses={**terms.losses, "adversarial": loss},
            weights={**terms.weights, "adversarial": weight},
            info={**terms.info, "adversarial_factor": factor},
        )

    def _judged(self, nets: Nets, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return latents and decoded images as the other objective makes them now, fixed.

        The critic thus learns from what it judges: a noised latent's image, or that of a masked
        view, is not the image of the clean latent.
        """
        found: tuple[Tensor, Tensor] | None = None
        for phase in self.of.phases:
            with torch.no_grad():
                terms = self.of.terms(nets, batch, draw, phase)
            if terms.decoded is None:
                continue
            made = sg(terms.z), sg(terms.decoded)
            if found is not None:  # of stages the one that has begun last
                begun = draw.progress >= self.of.span(phase)[0]
                made = torch.where(begun, made[0], found[0]), torch.where(begun, made[1], found[1])
            found = made
        assert found is not None
        return found

    def _factor(self, terms: Terms, loss: Tensor) -> Tensor:
        """Return the reconstruction's gradient at the images over the adversarial one."""
        if "reconstruction" not in terms.losses:
            raise ShapeError(
                "objective.of: this objective has no loss `reconstruction`, from which "
                "the adaptive weight is taken; set objective.adaptive: false"
            )
        x_hat = terms.decoded
        assert x_hat is not None
        if not x_hat.requires_grad:
            return loss.new_ones(())
        norms = [
            torch.autograd.grad(one, x_hat, retain_graph=True)[0].float().norm()
            for one in (terms.losses["reconstruction"], loss)
        ]
        return sg(norms[0] / norms[1].clamp_min(1e-12)).clamp(0.0, _MOST)

    def heads(self, backbone: Backbone) -> nn.ModuleDict:
        """Return the other objective's heads, and the critic."""
        heads = super().heads(backbone)
        heads[_CRITIC] = PatchCritic(backbone.image.channels, self.channels, self.layers)
        return heads

    def _decodes(self, nets: Nets, phase: str) -> bool:
        """Return whether a phase of the other objective hands on decoded images, on `meta`."""
        image, n = nets.online.image, 2
        x = torch.empty(n, image.channels, image.height, image.width, device="meta")
        condition = image.conditioning.null(n, "meta")
        t = torch.empty(n, device="meta")
        draw = Draw(t=t, condition=condition, generator=None, times=_Half(), progress=t[0])
        return (
            self.of.terms(nets, Batch(x=x, condition=condition), draw, phase).decoded is not None
        )

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """List what the other objective finds, a missing decoder, and images too small."""
        found = inner_problems(self.of, nets)
        image = nets.online.image
        if not nets.online.latent.learned:
            what = "adversary judges decoded images, and this backbone has no decoder to train"
            found.insert(0, ("objective", f"{what}; choose another backbone, such as vit"))
        elif _CRITIC in self.of.phases:
            found.insert(0, ("objective.of", "an adversary is around an objective, not another"))
        elif not found:
            found += self._unjudged(nets)
        if (side := min(image.height, image.width)) < 3 * 2**self.layers:
            what = (
                f"{self.layers} leaves nothing of images of {side} pixels; set it to "
                f"{max(1, (side // 3).bit_length() - 1)}"
            )
            found.append(("objective.layers", what))
        return found

    def _unjudged(self, nets: Nets) -> list[tuple[str, str]]:
        """Find that no images are decoded, or none any more when judging begins."""
        decoding = [phase for phase in self.of.phases if self._decodes(nets, phase)]
        if not decoding:
            what = (
                "this objective hands on no decoded images that a critic could judge "
                "(`Terms.decoded`); choose another, or leave the critic out"
            )
            return [("objective.of", what)]
        end = max(self.of.span(phase)[1] for phase in decoding)
        if self.start < end:
            return []
        what = (
            f"images are judged from a share of {self.start:g} of training on, and the last are "
            f"decoded at {end:g}: the critic would change nothing; set it, and critic_start, "
            "below that"
        )
        return [("objective.start", what)]


class _Half(TimeSampler):
    """A law of times for a step of which only the shapes count."""

    def quantile(self, u: Tensor) -> Tensor:
        return torch.full_like(u, 0.5)


class PatchCritic(nn.Module):
    """Judges overlapping patches of images; the larger an answer, the more real."""

    def __init__(self, image_channels: int, channels: int, layers: int) -> None:
        super().__init__()
        sizes = [channels * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(sizes), start=1):
            stride = 1 if i == layers else 2
            parts += [
                nn.Conv2d(before, after, 4, stride, 1),
                nn.GroupNorm(1, after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(sizes[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Judge images (B, C, H, W) in [-1, 1]: (B, 1, h, w), float32."""
        out: Tensor = self.layers(x).float()
        return out
