"""The straight path from noise whose standard deviation need not be 1.

Shapes: B batch.
"""

from __future__ import annotations

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.interpolant import Interpolant


@attrs.frozen(kw_only=True)
class LinearScaled(Interpolant):
    """z_t = t x0 + (1 - t) `noise_scale` eps.

    At 1 it is `linear`; larger images need stronger noise, because neighbouring pixels are
    correlated.

    Source: JiT (Li & He 2025, arXiv 2511.13720), released code: 1 at 256 pixels, 2 at 512.
    """

    noise_scale: float = attrs.field(default=1.0, validator=validators.gt(0))

    def alpha(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def sigma(self, t: Tensor) -> Tensor:
        """noise_scale (1 - t)."""
        return self.noise_scale * (1 - t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-noise_scale."""
        return torch.full_like(t, -self.noise_scale)
