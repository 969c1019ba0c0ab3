"""Samplers of the probability-flow ODE, from noise (t = 0) to data (t = 1).

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

import attrs
from attrs import validators
from torch import Tensor

from e2ediff.denoiser import Denoiser
from e2ediff.sampler import Noise, Sampler


@attrs.frozen(kw_only=True)
class _Grid(Sampler):
    steps: int = attrs.field(default=50, validator=validators.ge(1))
    shift: float = attrs.field(default=1.0, validator=validators.gt(0))
    t_start: float = attrs.field(default=0.0, validator=[validators.ge(0), validators.lt(1)])


@attrs.frozen(kw_only=True)
class Euler(_Grid):
    """First order, one network call a step.

    `steps` counts intervals; `shift` below 1 puts more of them near the noise.
    `t_start` is where sampling begins; `eps` and `score` predictions need 0.01 or more.
    """

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, label: Tensor, noise: Noise
    ) -> Tensor:
        """Z + (s - t) v(z, t)."""
        return z + (s - t) * f(z, t, label).v


@attrs.frozen(kw_only=True)
class Heun(_Grid):
    """Second order, two network calls a step and one for the last.

    `steps` counts intervals; `shift` below 1 puts more of them near the noise.
    `t_start` is where sampling begins; `eps` and `score` predictions need 0.01 or more.

    Source: Karras et al. 2022 (EDM, arXiv 2206.00364), algorithm 1, on the ODE of v.
    """

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, label: Tensor, noise: Noise
    ) -> Tensor:
        """Z + (s - t) times the mean of v at both ends of the Euler step."""
        v = f(z, t, label).v
        end = f(z + (s - t) * v, s, label).v
        return z + (s - t) * (v + end) / 2
