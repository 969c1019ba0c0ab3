"""The denoiser: what a sampler asks.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from e2ediff.backbone import Backbone, Denoise
from e2ediff.condition import Condition
from e2ediff.interpolant import Estimate, Interpolant, Kind


class Denoiser(ABC):
    """A function from a noised latent to an `Estimate`, on one interpolant.

    All latents of a call share one time, a Python float, so that samplers and guidance compare
    times without waiting for the device.
    A subclass has `path`, the interpolant on which z_t lies, as an attribute or a property.
    """

    path: Interpolant

    @abstractmethod
    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        """Return the estimate at time t of z_t (B, N, D), for a condition a row."""

    def for_step(self, t: float, s: float) -> Denoiser:
        """Return the denoiser for a sampler's step from t to s.

        Itself, but for guidance that depends on the step's length or on the steps before.
        A sampler asks each step's denoiser for the next one's; a denoiser that wraps others
        hands the question on to them.
        """
        return self


class Plain(Denoiser):
    """The network's own answer, one denoise pass a call.

    Counts its calls in `calls` and the latents of all calls in `rows`.
    With `averages` a network that has a second time answers a step with its average velocity;
    without, with velocities at single times.
    A network that was trained up to the time `until` alone is asked there for the clean estimate
    of later latents, scaled to that time; they have less noise than it expects.
    """

    def __init__(
        self, net: Backbone, path: Interpolant, predicts: Kind, *, averages: bool = True,
        until: float = 1.0,
    ) -> None:  # fmt: skip
        self.net = net
        self.averages = averages and net.second_time
        self.until = until
        self.predicts = predicts
        self.calls = 0
        self.rows = 0
        self.path = path

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        """Make one denoise pass."""
        return self.ask(z_t, t, condition)

    def ask(self, z_t: Tensor, t: float, condition: Condition, r: float | None = None) -> Estimate:
        """Make one denoise pass, with the second time `r` for a network that takes one."""
        if t > self.until:
            return self._held(z_t, t, condition)
        self.calls += 1
        self.rows += len(z_t)
        times = torch.full((len(z_t),), t, device=z_t.device)  # (B,)
        if r is None:
            out = self.net.denoise(z_t, times, condition)  # (B, N, D)
        else:
            ends = torch.full_like(times, r)
            (out,) = self.net.run(Denoise(z_t=z_t, t=times, condition=condition, r=ends))
        return self.path.estimate(out, z_t, t, self.predicts)

    def _held(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        """Ask at `until` for the clean estimate at a later time."""
        now, last = self.path.alpha(torch.tensor([t, self.until])).tolist()
        x0 = self.ask(last / now * z_t, self.until, condition).x0
        return self.path.estimate(x0, z_t, t, "x0")

    def for_step(self, t: float, s: float) -> Denoiser:
        """Return a denoiser that gives the step's end to a network with a second time."""
        return _UpTo(self, s) if self.averages else self


class _UpTo(Denoiser):
    """A network with a second time, in a step that ends at `end`.

    An Euler step along its velocity is then one along the average velocity of the step.
    """

    def __init__(self, plain: Plain, end: float) -> None:
        self.plain = plain
        self.end = end
        self.path = plain.path

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        """Make one denoise pass from t to the step's end."""
        return self.plain.ask(z_t, t, condition, max(t, self.end))

    def for_step(self, t: float, s: float) -> Denoiser:
        """Return the denoiser of the next step."""
        return self.plain.for_step(t, s)
