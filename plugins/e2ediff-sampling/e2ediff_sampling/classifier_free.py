"""Further guidance by the network's own answer without the condition.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.condition import Condition
from e2ediff.denoiser import Denoiser
from e2ediff.guidance import Guidance, GuidedDenoiser, conditional_and_unconditional
from e2ediff.interpolant import Estimate
from e2ediff.sampler import Sampler

_SCALE = validators.ge(0.0)
_TIME = [validators.ge(0.0), validators.le(1.0)]


@attrs.frozen(kw_only=True)
class CFGPlusPlus(Guidance):
    """CFG++: x0 is guided as far as `strength`, in [0, 1], and renoised without the condition.

    This is classifier-free guidance whose scale, strength / (1 - e^-h), follows from the step's
    length h in half the logSNR, so it is exact for steps that hold x0 constant: `euler` on the
    linear interpolant, and first-order steps of `dpmpp_2m` and `unipc` on any.
    Samplers that ask more than once a step are refused: the scale is that of a whole step.
    `strength` 0 is unconditional and costs one pass; no strength is the plain conditional answer.

    Source: Chung et al. 2024 (arXiv 2406.08070), algorithm 2.
    """

    strength: float = attrs.field(default=0.6, validator=_TIME)

    @property
    def asks_null(self) -> bool:
        """At any strength."""
        return True

    def wrap(self, inner: Denoiser) -> Denoiser:
        """The guided denoiser."""
        return _Renoised(inner, self)

    def problems(self, sampler: Sampler) -> Sequence[tuple[str, str]]:
        """A sampler that asks within its steps."""
        if sampler.one_call_per_step or self.strength == 0:
            return ()
        what = (
            "cfg_plus_plus scales by a step's length and needs a sampler that asks once a step; "
            "this one asks more often: choose euler, dpmpp_2m or unipc, or classifier_free"
        )
        return [("strength", what)]


@attrs.frozen(kw_only=True)
class CFGZeroStar(Guidance):
    """CFG-Zero*: classifier-free guidance of the velocity, whose unconditional part is rescaled.

    v = s v_u + scale (v_c - s v_u) with s the length of v_c along v_u over that of v_u, for each
    image; steps that end at `zero_until` or before leave the latent where it is.
    Samplers that remember earlier answers are refused unless `zero_until` is 0, for such a step
    has none.
    `scale` 1 is no guidance and costs one pass.

    Source: Fan et al. 2025 (arXiv 2503.18886), with the scale of the released code; it leaves the
    latent alone in the first 4 % of the steps.
    """

    scale: float = attrs.field(default=1.5, validator=_SCALE)
    zero_until: float = attrs.field(default=0.04, validator=_TIME)

    @property
    def asks_null(self) -> bool:
        """Unless the scale is 1."""
        return self.scale != 1

    def wrap(self, inner: Denoiser) -> Denoiser:
        """The guided denoiser; `inner` itself at scale 1."""
        return inner if self.scale == 1 else _Rescaled(inner, self)

    def problems(self, sampler: Sampler) -> Sequence[tuple[str, str]]:
        """A sampler that would extrapolate from steps that were left out."""
        if self.zero_until == 0 or self.scale == 1 or sampler.stepper() is sampler:
            return ()
        what = (
            "cfg_zero_star leaves its first steps out, and this sampler would extrapolate from "
            "them: set zero_until: 0, or choose euler or heun"
        )
        return [("zero_until", what)]


@attrs.frozen(kw_only=True)
class APG(Guidance):
    """Adaptive projected guidance: classifier-free guidance without its push to saturation.

    The part of x0_c - x0_u along x0_c is weighed by `eta`, 1 being classifier-free guidance.
    `norm` bounds the length of the difference, over all of an image's latent; 0 leaves it free.
    `momentum` times the difference at the step before is added to it; negative values push away
    from where guidance has gone already.
    `scale` 1 is no guidance and costs one pass.

    Source: Sadat et al. 2024 (arXiv 2410.02416): momentum, then the norm, then the projection.
    """

    scale: float = attrs.field(default=1.5, validator=_SCALE)
    eta: float = 0.0
    norm: float = attrs.field(default=0.0, validator=validators.ge(0))
    momentum: float = attrs.field(default=-0.5, validator=[validators.gt(-1), validators.lt(1)])

    @property
    def asks_null(self) -> bool:
        """Unless the scale is 1."""
        return self.scale != 1

    def wrap(self, inner: Denoiser) -> Denoiser:
        """The guided denoiser; `inner` itself at scale 1."""
        return inner if self.scale == 1 else _Projected(inner, self)

    def problems(self, sampler: Sampler) -> Sequence[tuple[str, str]]:
        """Momentum over the steps of a sampler that does not show them."""
        if self.momentum == 0 or self.scale == 1 or not sampler.couples_images:
            return ()
        what = (
            "momentum adds up the steps of a sampler, and this one chooses its own, which "
            "guidance does not see: set momentum: 0, or choose another sampler"
        )
        return [("momentum", what)]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of whole latents, (B, N, D) twice -> (B, 1, 1)."""
    return (a * b).sum(dim=(1, 2), keepdim=True)


class _Renoised(GuidedDenoiser):
    def __init__(self, inner: Denoiser, guidance: CFGPlusPlus, gain: float = 1.0) -> None:
        super().__init__(inner)
        self.guidance = guidance
        self.gain = gain  # 1 / (1 - e^-h); 1 for the step that ends at the data

    def for_step(self, t: float, s: float) -> Denoiser:
        at = torch.tensor([t, s], dtype=torch.float64)
        (a, a_end), (b, b_end) = self.path.alpha(at).tolist(), self.path.sigma(at).tolist()
        gain = 1 / (1 - a * b_end / (a_end * b))
        return _Renoised(self.inner.for_step(t, s), self.guidance, gain)

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        if self.guidance.strength == 0:
            return self.inner(z_t, t, condition.null())
        both = conditional_and_unconditional(self.inner, z_t, t, condition)
        conditional, unconditional = both.x0.chunk(2)
        scale = self.guidance.strength * self.gain
        return self.clean(unconditional + scale * (conditional - unconditional), z_t, t)


class _Rescaled(GuidedDenoiser):
    def __init__(self, inner: Denoiser, guidance: CFGZeroStar, *, waits: bool = False) -> None:
        super().__init__(inner)
        self.guidance = guidance
        self.waits = waits  # through a whole step

    def for_step(self, t: float, s: float) -> Denoiser:
        waits = s <= self.guidance.zero_until and s < 1  # the last step has an answer to give
        inner = self.inner.for_step(t, s)
        return _Rescaled(inner, self.guidance, waits=waits)

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        if self.waits:
            return self.path.estimate(torch.zeros_like(z_t), z_t, t, "v")
        both = conditional_and_unconditional(self.inner, z_t, t, condition)
        conditional, unconditional = both.v.chunk(2)
        along = _dot(conditional, unconditional) / _dot(unconditional, unconditional).clamp_min(
            1e-8
        )
        base = along * unconditional
        v = base + self.guidance.scale * (conditional - base)
        return self.path.estimate(v, z_t, t, "v")


class _Projected(GuidedDenoiser):
    """Remembers the difference that a step began with, for the next step's momentum.

    Each step has an object of its own, so that the same question has the same answer.
    """

    def __init__(
        self,
        inner: Denoiser,
        guidance: APG,
        before: Tensor | None = None,
        *,
        stepping: bool = False,
    ) -> None:
        super().__init__(inner)
        self.guidance = guidance
        self.before = before
        self.stepping = stepping
        self.first: Tensor | None = None

    def for_step(self, t: float, s: float) -> Denoiser:
        inner = self.inner.for_step(t, s)
        return _Projected(inner, self.guidance, self.first, stepping=True)

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        g = self.guidance
        both = conditional_and_unconditional(self.inner, z_t, t, condition)
        conditional, unconditional = both.x0.chunk(2)
        difference = conditional - unconditional
        if self.before is not None:
            difference = difference + g.momentum * self.before
        if self.stepping and self.first is None:
            self.first = difference
        if g.norm > 0:
            length = _dot(difference, difference).sqrt()
            difference = difference * (g.norm / length.clamp_min(1e-8)).clamp_max(1.0)
        share = _dot(difference, conditional) / _dot(conditional, conditional).clamp_min(1e-8)
        along = share * conditional
        x0 = conditional + (g.scale - 1) * (difference - along + g.eta * along)
        return self.clean(x0, z_t, t)
