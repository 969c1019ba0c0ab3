"""The denoiser: what a sampler asks, and what guidance wraps.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from e2ediff.backbone import Backbone
from e2ediff.interpolant import Estimate, Interpolant, Kind

if TYPE_CHECKING:
    from e2ediff.sampler import Sampler


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

    def __call__(self, z_t: Tensor, t: float, label: Tensor) -> Estimate:
        """One denoise pass."""
        self.calls += 1
        self.rows += len(z_t)
        times = torch.full((len(z_t),), t, device=z_t.device)  # (B,)
        out = self.net.denoise(z_t, times, label)  # (B, N, D)
        return self._path.estimate(out, z_t, times, self.predicts)


@attrs.frozen(kw_only=True)
class Reference:
    """Weights outside of the network that is sampled: a run, its checkpoint, one set of weights.

    Empty strings stand for the run that is sampled, its newest checkpoint, and the weights that
    are used for sampling by default.
    """

    run: str = ""
    checkpoint: str = ""
    weights: str = ""


class Guidance(ABC):
    """The recipe's `guidance:` block: wraps a denoiser into a guided one."""

    @property
    def references(self) -> tuple[Reference, ...]:
        """Further networks that it asks; who samples loads them and calls `given` first."""
        return ()

    def given(self, others: Mapping[Reference, Denoiser]) -> Guidance:
        """This guidance with the denoisers of its `references`."""
        return self

    def problems(self, sampler: Sampler) -> Sequence[tuple[str, str]]:
        """Options that this sampler would make mean something else: (field, what and what to do).

        Asked when a recipe is checked and before anything is sampled.
        """
        return ()

    @abstractmethod
    def wrap(self, inner: Denoiser, null_label: int) -> Denoiser:
        """The guided denoiser; `inner` itself where the guidance changes nothing."""
