"""The denoiser: what a sampler asks, and what guidance wraps.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from e2ediff.backbone import Backbone
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
    def __call__(self, z_t: Tensor, t: float, label: Tensor) -> Estimate:
        """Estimate at time t of z_t (B, N, D) for labels (B,)."""


class Plain(Denoiser):
    """The network's own answer, one denoise pass a call; counts its calls in `calls`."""

    def __init__(self, net: Backbone, path: Interpolant, predicts: Kind) -> None:
        self.net = net
        self.predicts = predicts
        self.calls = 0
        self._path = path

    @property
    def path(self) -> Interpolant:
        """The interpolant that the network was trained on."""
        return self._path

    def __call__(self, z_t: Tensor, t: float, label: Tensor) -> Estimate:
        """One denoise pass."""
        self.calls += 1
        times = torch.full((len(z_t),), t, device=z_t.device)  # (B,)
        out = self.net.denoise(z_t, times, label)  # (B, N, D)
        return self._path.estimate(out, z_t, times, self.predicts)


class Guidance(ABC):
    """The recipe's `guidance:` block: wraps a denoiser into a guided one."""

    @abstractmethod
    def wrap(self, inner: Denoiser, null_label: int) -> Denoiser:
        """The guided denoiser; `inner` itself where the guidance changes nothing."""
