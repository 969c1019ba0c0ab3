"""Interpolants (noise schedules); t = 0 is noise, t = 1 is data."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor
from typing_extensions import override

from e2ediff.interpolant import Interpolant


@attrs.frozen(kw_only=True)
class Linear(Interpolant):
    """alpha = t, sigma = 1 - t: the straight path.

    Source: Lipman et al. 2023 (arXiv 2210.02747), section 4.1 with sigma_min = 0; Liu et al.
    2023 (arXiv 2209.03003).
    """

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return t

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    @override
    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    @override
    def sigma_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


@attrs.frozen(kw_only=True)
class Cosine(Interpolant):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): keeps the variance of unit-variance data.

    Source: Ma et al. 2024 (SiT, arXiv 2401.08740), the "GVP" path.
    """

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        """cos(pi t / 2), exactly 0 at t = 1."""
        return torch.sin(math.pi / 2 * (1 - t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """pi / 2 cos(pi t / 2)."""
        return math.pi / 2 * torch.cos(math.pi / 2 * t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-pi / 2 sin(pi t / 2)."""
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)


@attrs.frozen(kw_only=True)
class VarianceExploding(Interpolant):
    """alpha = 1, sigma = sigma_max (1 - t): noise is added to data of full scale.

    `sigma_max` is the standard deviation at t = 0, in units of the latents' scale.
    Steps even in time are even in sigma, too coarse near the data: give the sampler a `shift`
    of about sigma_max / 3.

    Source: Karras et al. 2022 (EDM, arXiv 2206.00364), table 1, with sigma linear in time.
    """

    sigma_max: float = attrs.field(default=80.0, validator=attrs.validators.gt(1))

    @override
    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    @override
    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * (1 - t)

    @override
    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    @override
    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -self.sigma_max)
