"""The sampler: one abstract step and the shared loop from noise to a clean latent.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from e2ediff.denoiser import Denoiser

# Fresh unit noise of the shape of its argument; row i belongs to image i alone.
Noise = Callable[[Tensor], Tensor]


class Sampler(ABC):
    """Integrates from noise (t = 0) to data (t = 1) in `steps` intervals.

    The last interval ends in the denoiser's own clean estimate, which for an ODE equals an
    Euler step that lands on t = 1, where the velocity itself cannot be evaluated.
    """

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of intervals, at least 1."""

    @property
    def shift(self) -> float:
        """Warps the grid: below 1 more steps near the noise, above 1 nearer the data."""
        return 1.0

    @property
    def t_start(self) -> float:
        """Where sampling begins; above 0 for predictions that say nothing about x0 at t = 0."""
        return 0.0

    @abstractmethod
    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, label: Tensor, noise: Noise
    ) -> Tensor:
        """Move z (B, N, D) from time t to the later time s, with t < s < 1."""

    def grid(self) -> list[float]:
        """Times of the intervals' ends, from `t_start` to 1; steps + 1 numbers.

        Source: t' = a t / (1 + (a - 1) t), the time shift of UNITE and SD3, written so that 1
        stays 1 exactly.
        """
        first, a = self.t_start, self.shift
        uniform = [i / self.steps for i in range(self.steps + 1)]
        return [first + (1 - first) * (t / (t + (1 - t) / a)) for t in uniform]

    def integrate(
        self, f: Denoiser, z: Tensor, times: Sequence[float], label: Tensor, noise: Noise
    ) -> Tensor:
        """Follow the path through `times`, all below 1, and return the noised latent there."""
        for t, s in pairwise(times):
            z = self.step(f, z, t, s, label, noise)
        return z

    @torch.no_grad()
    def sample(self, f: Denoiser, start: Tensor, label: Tensor, noise: Noise) -> Tensor:
        """Clean latents from noise.

        Args:
            f: The denoiser, guided or plain.
            start: Unit normal noise, (B, N, D); scaled here to the path's noise at the start.
            label: (B,).
            noise: Further noise, for stochastic samplers.

        Returns:
            (B, N, D), the denoiser's clean estimate at the last time before 1.
        """
        times = self.grid()
        z = start * float(f.path.sigma(torch.tensor([self.t_start])))
        z = self.integrate(f, z, times[:-1], label, noise)
        return f(z, times[-2], label).x0
