"""The denoiser: what a sampler asks.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from e2ediff.backbone import Backbone
from e2ediff.condition import Condition
from e2ediff.interpolant import Estimate, Interpolant, Kind


class Denoiser(ABC):
    """A function from a noised latent to an `Estimate`, on one interpolant.

    All latents of a call share one time, a Python float, so that samplers and guidance compare
    times without waiting for the device.
    """

    @property
    @abstractmethod
    def path(self) -> Interpolant:
        """The interpolant on which z_t lies."""

    @abstractmethod
    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        """Estimate at time t of z_t (B, N, D), for a condition a row."""

    def between(self, t: float, s: float) -> Denoiser:
        """The denoiser for a sampler's step from t to s.

        Itself, but for guidance that depends on the step's length or on the steps before.
        A sampler asks each step's denoiser for the next one's; a denoiser that wraps others
        hands the question on to them.
        """
        return self


class Plain(Denoiser):
    """The network's own answer, one denoise pass a call.

    Counts its calls in `calls` and the latents of all calls in `rows`.
    """

    def __init__(self, net: Backbone, path: Interpolant, predicts: Kind) -> None:
        self.net = net
        self.predicts = predicts
        self.calls = 0
        self.rows = 0
        self._path = path

    @property
    def path(self) -> Interpolant:
        """The interpolant that the network was trained on."""
        return self._path

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        """One denoise pass."""
        self.calls += 1
        self.rows += len(z_t)
        times = torch.full((len(z_t),), t, device=z_t.device)  # (B,)
        out = self.net.denoise(z_t, times, condition)  # (B, N, D)
        return self._path.estimate(out, z_t, times, self.predicts)
