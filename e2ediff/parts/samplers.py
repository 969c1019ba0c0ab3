"""Samplers of the probability-flow ODE that take each step by itself.

Noise is at t = 0, data at t = 1.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import attrs
from torch import Tensor

from e2ediff.condition import Condition
from e2ediff.denoiser import Denoiser
from e2ediff.sampler import FixedGridSampler, Noise


@attrs.frozen(kw_only=True)
class Euler(FixedGridSampler):
    """First order, one network call a step.

    `steps` counts intervals; `spacing` is `uniform`, `karras` or a block of its options.
    `shift` below 1 puts more of the uniform ones near the noise.
    `t_start` is where sampling begins; `eps` and `score` predictions need 0.01 or more.
    `t_eps` holds 1 - t above it in every velocity (x0 - z_t) / (1 - t), so that the last step, if
    it is shorter, stops short of the clean estimate, as in the released code of JiT and UNITE,
    which have 0.05; at 0 sampling ends in the clean estimate.
    """

    one_call_per_step: ClassVar[bool] = True
    averages: ClassVar[Literal["unused", "used", "needed"]] = "used"

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, condition: Condition, noise: Noise
    ) -> Tensor:
        """z + (s - t) v(z, t)."""
        return z + (s - t) * f(z, t, condition).v


@attrs.frozen(kw_only=True)
class AverageVelocity(Euler):
    """Steps along the average velocities of a network with a second time, by default a single one.

    `steps`, `spacing`, `shift`, `t_start` and `t_eps` are those of `euler`, which follows average
    velocities too where a network offers them; this sampler refuses a network that does not.

    Source: MeanFlow (Geng et al. 2025, arXiv 2505.13447), sampling.
    """

    averages: ClassVar[Literal["unused", "used", "needed"]] = "needed"

    steps: int = attrs.field(default=1, validator=attrs.validators.ge(1))


@attrs.frozen(kw_only=True)
class Heun(FixedGridSampler):
    """Second order, two network calls a step and one for the last.

    `steps`, `spacing`, `shift`, `t_start` and `t_eps` are those of `euler`.

    Source: Karras et al. 2022 (EDM, arXiv 2206.00364), algorithm 1, on the ODE of v.
    """

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, condition: Condition, noise: Noise
    ) -> Tensor:
        """z + (s - t) times the mean of v at both ends of the Euler step."""
        v = f(z, t, condition).v
        end = f(z + (s - t) * v, s, condition).v
        return z + (s - t) * (v + end) / 2


@attrs.frozen(kw_only=True)
class Midpoint(FixedGridSampler):
    """Second order, two network calls a step and one for the last.

    `steps`, `spacing`, `shift`, `t_start` and `t_eps` are those of `euler`.
    """

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, condition: Condition, noise: Noise
    ) -> Tensor:
        """z + (s - t) v at the middle of the Euler step."""
        middle = z + (s - t) / 2 * f(z, t, condition).v
        return z + (s - t) * f(middle, (t + s) / 2, condition).v


@attrs.frozen(kw_only=True)
class RK4(FixedGridSampler):
    """The classical Runge-Kutta method: fourth order, four network calls a step, one for the last.

    `steps`, `spacing`, `shift`, `t_start` and `t_eps` are those of `euler`.
    """

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, condition: Condition, noise: Noise
    ) -> Tensor:
        """z + (s - t) (k1 + 2 k2 + 2 k3 + k4) / 6."""
        h, middle = s - t, (t + s) / 2
        k1 = f(z, t, condition).v
        k2 = f(z + h / 2 * k1, middle, condition).v
        k3 = f(z + h / 2 * k2, middle, condition).v
        k4 = f(z + h * k3, s, condition).v
        return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
