"""The stochastic sampler: Euler-Maruyama with a chosen diffusion coefficient.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.condition import Condition
from e2ediff.denoiser import Denoiser
from e2ediff.interpolant import Interpolant
from e2ediff.sampler import FixedGridSampler, Noise

Diffusion = Literal["sigma", "constant", "sin2", "sbdm"]


@attrs.frozen(kw_only=True)
class SDE(FixedGridSampler):
    """Euler-Maruyama: dz = (v + w / 2 score) dt + sqrt(w) dW, one network call a step.

    Every w >= 0 has the marginals of the ODE; more of it forgets early errors and needs more
    steps.
    `diffusion` is w over time: `sigma`, `constant` (1), `sin2` (sin^2 of pi t), or `sbdm`, that
    of score-based diffusion, 2 sigma (sigma alpha' / alpha - sigma'), which on paths with
    alpha(0) = 0 needs `t_start` above 0.
    `strength` multiplies it; 0 is `euler`.
    `steps`, `spacing`, `shift`, `t_start` and `t_eps` are those of `euler`.

    Source: Ma et al. 2024 (SiT, arXiv 2401.08740), eq. 6 and table 7, with t counted from noise.
    """

    one_call_per_step: ClassVar[bool] = True

    diffusion: Diffusion = "sigma"
    strength: float = attrs.field(default=1.0, validator=validators.ge(0))

    def coefficient(self, path: Interpolant, t: float) -> float:
        """w at time t."""
        at = torch.tensor([t], dtype=torch.float64)
        if self.diffusion == "constant":
            w = 1.0
        elif self.diffusion == "sin2":
            w = math.sin(math.pi * t) ** 2
        elif self.diffusion == "sigma":
            w = float(path.sigma(at))
        else:
            a, s, a_dot, s_dot = (
                float(c(at)) for c in (path.alpha, path.sigma, path.alpha_dot, path.sigma_dot)
            )
            # Bounded at alpha = 0, where the score says nothing of the data: no noise there.
            w = 2 * s * (s * a_dot / a - s_dot) if a > 0 else 0.0
        return self.strength * w

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, condition: Condition, noise: Noise
    ) -> Tensor:
        """z + (s - t) (v + w / 2 score) + sqrt(w (s - t)) noise."""
        h, w, found = s - t, self.coefficient(f.path, t), f(z, t, condition)
        if w == 0:
            return z + h * found.v
        return z + h * (found.v + w / 2 * found.score) + math.sqrt(w * h) * noise(z)
