"""MeanFlow on jointly trained latents: average velocities, sampled in one call.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.backbone import Decode, Denoise
from e2ediff.condition import Condition
from e2ediff.data import Batch
from e2ediff.guidance import check_interval
from e2ediff.interpolant import Interpolant, spread
from e2ediff.losses import AutoencoderObjective, DecodeNoise, unfit_prediction
from e2ediff.nn.forward_mode import derivative_along
from e2ediff.objective import Draw, Nets, Terms, sg

_SHARE = [validators.ge(0.0), validators.le(1.0)]


@attrs.frozen(kw_only=True)
class TrainedGuidance:
    """Classifier-free guidance that a network is trained on, so that samples need one pass a call.

        v_g = omega v + kappa u(z_t, t, t, condition) + (1 - omega - kappa) u(z_t, t, t, null),
        omega = `scale` (1 - `kappa`)

    with the network's own answers, stopped, where `t_min` <= t <= `t_max`; elsewhere, and where
    the condition was dropped, v_g = v. A network that has learned it is guided by `scale`.

    Source: MeanFlow (arXiv 2505.13447) and its released code, which has omega 1 and kappa 0.5: a
    scale of 2. Improved mean flows (arXiv 2512.02012) have omega 1 and kappa 1 - 1 / scale.
    """

    scale: float = attrs.field(default=1.0, validator=validators.gt(0))
    kappa: float = attrs.field(default=0.0, validator=[validators.ge(0), validators.lt(1)])
    t_min: float = attrs.field(default=0.0, validator=_SHARE)
    t_max: float = attrs.field(default=1.0, validator=_SHARE)

    @t_max.validator
    def _after_t_min(self, field: attrs.Attribute[float], value: float) -> None:
        check_interval(self.t_min, value, exclusive=False)

    @property
    def changes_nothing(self) -> bool:
        """Return whether v_g is v at every time."""
        return self.scale == 1 and self.kappa == 0

    def __call__(self, v: Tensor, z_t: Tensor, t: Tensor, nets: Nets, known: Condition) -> Tensor:
        """Return v_g (B, N, D) in place of v, by two passes without gradients."""
        if self.changes_nothing:
            return v
        with torch.no_grad():
            passes = [Denoise(z_t=z_t, t=t, r=t, condition=c) for c in (known, known.null())]
            with_condition, without = (
                nets.path.estimate(out, z_t, t, nets.predicts).v
                for out in nets.online.run(*passes)
            )
            omega = self.scale * (1 - self.kappa)
            guided = omega * v + self.kappa * with_condition + (1 - omega - self.kappa) * without
            where = (t >= self.t_min) & (t <= self.t_max) & ~known.nulls()
            return torch.where(spread(where, v), guided, v)


@attrs.frozen(kw_only=True)
class MeanFlow(AutoencoderObjective):
    """The denoiser learns average velocities between two times, of latents that it does not train.

        u(z_t, t, r) = 1 / (r - t) integral_t^r v,    t <= r
        u = v + (r - t) du/dt,    du/dt = w . grad_z u + d_t u
        loss = |u - (r - t) sg(du/dt) - v|^2 / sg(the same + `floor`)^`power`

    with v = dz_t/dt of the sample, or `guidance` of it, and w = v (`tangent: path`) or the
    network's own u(z_t, t, t) (`tangent: network`). du/dt is exact, by forward-mode
    differentiation in a pass of its own; where r = t the loss is that of velocities.
    z_t carries a stopped latent: reconstruction alone shapes the latents, as in `detached`.
    Samples take one network call with `sampler: average_velocity`.

    Options:
        apart: The share of latents with r > t.
        tangent: What du/dt is taken along.
        guidance: What the network learns to be guided by, for samples of one pass a call; the
            recipe's own `guidance` must then be null.
        power, floor: Of the adaptive weight; the squares are summed over a latent's elements.
        denoising_weight: Weight of the loss.
        decode_noise: Noise on latents before decoding.
        reconstruction: Compares decoded images with the originals.

    Times are the recipe's; of two draws the smaller is t, and where r = t there is one. Time
    counts from noise to data here, and from data to noise in the papers, whose logit-normal law of
    mean -0.4 is one of 0.4.
    Needs `backbone.second_time: true` and the straight path.

    Source: MeanFlow (Geng et al. 2025, arXiv 2505.13447), abstract, summaries and the released
    code, for the average velocity, its identity, the loss, the share of 0.25, the power of 1, the
    floor of 0.01, the sum and the guidance, of which the code has a scale of 2 with kappa 0.5;
    loss, gradients and samples are those of its code: docs/results/parity.md. Improved mean flows
    (arXiv 2512.02012) for the loss written as one of v and for `tangent: network`. Ours: jointly
    trained latents, where they have fixed ones, and no guidance by default.
    """

    static_graph: ClassVar[bool] = True

    trial: ClassVar[tuple[str, ...]] = ("predicts=v", "backbone.second_time=true")

    apart: float = attrs.field(default=0.25, validator=_SHARE)
    tangent: Literal["path", "network"] = "path"
    guidance: TrainedGuidance = attrs.field(factory=TrainedGuidance)
    power: float = attrs.field(default=1.0, validator=validators.ge(0))
    floor: float = attrs.field(default=0.01, validator=validators.gt(0))
    denoising_weight: float = attrs.field(default=1.0, validator=validators.ge(0))
    decode_noise: DecodeNoise = attrs.field(factory=DecodeNoise)

    @property
    def trains_averages(self) -> bool:  # type: ignore[override]
        """Return whether any latent has two times."""
        return self.apart > 0

    @property
    def trains_guidance(self) -> bool:  # type: ignore[override]
        """Return whether `guidance` changes anything."""
        return not self.guidance.changes_nothing

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Return the reconstruction, and the average velocity's loss of stopped latents."""
        z = nets.online.encode(batch.x)  # (B, N, D)
        eps, (t, r) = draw.noise(z), self._times(draw)
        z_t = nets.path.mix(sg(z), eps, t)
        v = self.guidance(nets.path.velocity(sg(z), eps, t), z_t, t, nets, draw.condition)
        x_hat, out = nets.online.run(
            Decode(z=self.decode_noise(z, draw, nets.path)),
            Denoise(z_t=z_t, t=t, r=r, condition=draw.condition),
        )
        u = nets.path.estimate(out, z_t, t, nets.predicts).v
        with torch.no_grad():
            along = v if self.tangent == "path" else _average(nets, z_t, t, t, draw.condition)
            slope = slope_along(nets, z_t, t, r, along, draw.condition)
        error = (u - spread(r - t, z) * slope - v).square().flatten(1).sum(dim=1)  # (B,)
        losses = {
            "reconstruction": self.reconstruction(x_hat, batch.x, nets.frozen),
            "denoising": (error / (sg(error) + self.floor) ** self.power).mean(),
        }
        weights = {"reconstruction": 1.0, "denoising": self.denoising_weight}
        info = {"velocity_error": sg(error).mean() / z[0].numel()}
        return Terms(losses, weights, z, info, decoded=x_hat)

    def _times(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return t and r, both (B,), which are equal but for the share `apart`."""
        one, other = draw.t, draw.again().t
        apart = draw.uniform(len(one)) < self.apart
        t = torch.where(apart, torch.minimum(one, other), one)
        return t, torch.where(apart, torch.maximum(one, other), t)

    def stops(self, phase: str) -> Collection[str]:
        """Return the denoiser's loss, which learns from stopped latents."""
        return ("denoising",)

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """Find a missing second time, an unbounded velocity, latents that outgrow the noise."""
        found = [*self.decode_noise.problems(nets)]
        if not self.guidance.changes_nothing and nets.online.image.conditioning.kinds == 1:
            what = "there is no condition to be guided by: leave objective.guidance out"
            found.append(("objective.guidance", what))
        if self.power < 1:  # the adaptive weight does not bound the loss
            found += unfit_prediction(nets, "v", "")
        if not nets.online.second_time:
            what = (
                "mean_flow trains averages between two times, and this network takes one; set "
                "backbone.second_time: true of a backbone that has it, such as vit"
            )
            found.append(("backbone.second_time", what))
        if not _is_straight(nets.path):
            what = (
                "bends, and an average velocity leads to the end of a step on a straight path "
                "alone; set interpolant: linear"
            )
            found.append(("interpolant", what))
        return found


def _is_straight(path: Interpolant) -> bool:
    """Return whether z_t = t z + (1 - t) eps."""
    t = torch.linspace(0.0, 1.0, 5)
    return torch.allclose(path.alpha(t), t) and torch.allclose(path.sigma(t), 1 - t)


def _average(nets: Nets, z_t: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    """Return the network's average velocity (B, N, D) from t to r, both (B,)."""
    (out,) = nets.online.run(Denoise(z_t=z_t, t=t, r=r, condition=condition))
    return nets.path.estimate(out, z_t, t, nets.predicts).v


def slope_along(
    nets: Nets, z_t: Tensor, t: Tensor, r: Tensor, along: Tensor, condition: Condition
) -> Tensor:
    """Return du/dt (B, N, D) where z_t moves with the velocity `along` and r stays."""

    def u(z_t: Tensor, t: Tensor) -> Tensor:
        return _average(nets, z_t, t, r, condition)

    return derivative_along(nets.online, u, (z_t, t), (along, torch.ones_like(t)))
