"""Which times a denoiser is trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

# Training times keep this distance from both ends, where a conversion would divide by zero.
MARGIN = 1e-4


class TimeSampler(ABC):
    """A law of training times on (0, 1); t = 0 is noise."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Map (n,) uniform in (0, 1) to (n,) in [0, 1]: the inverse distribution function."""

    def draw(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw times (n,), float32, at least `MARGIN` away from 0 and 1.

        Randomness: `n` uniform numbers from `generator`, which lives on `device`; `None` only
        on the meta device, where no numbers exist.
        """
        u = torch.rand(n, generator=generator, device=device).clamp(1e-6, 1 - 1e-6)
        return self.quantile(u).clamp(MARGIN, 1 - MARGIN)
