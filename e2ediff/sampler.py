"""The sampler: one abstract step and the shared loop from noise to a clean latent.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, Literal, Protocol

import attrs
import torch
from torch import Tensor

from e2ediff.condition import Condition
from e2ediff.denoiser import Denoiser
from e2ediff.interpolant import Estimate, Interpolant, last_time

# Fresh unit noise of the shape of its argument; row i belongs to image i alone.
Noise = Callable[[Tensor], Tensor]


@attrs.frozen(kw_only=True)
class Karras:
    """Times at which (sigma / alpha)^(1 / rho) falls evenly from `sigma_max` to `sigma_min`.

    `rho` 1 is even in the noise level, 7 is Karras's, and a large one is even in logSNR.
    The first time is the sampler's `t_start` and the last is 1, whatever the levels.

    Source: Karras et al. 2022 (EDM, arXiv 2206.00364), eq. 5, with the noise level counted in
    units of the signal so that it means the same on every interpolant.
    """

    rho: float = attrs.field(default=7.0, validator=attrs.validators.gt(0))
    sigma_min: float = attrs.field(default=0.002, validator=attrs.validators.gt(0))
    sigma_max: float = attrs.field(default=80.0, validator=attrs.validators.gt(0))

    @sigma_max.validator
    def _falls(self, field: attrs.Attribute[float], value: float) -> None:
        if value <= self.sigma_min:
            raise ValueError(f"'sigma_max' must be > sigma_min, {self.sigma_min}: {value}")

    def times(self, steps: int, t_start: float, path: Interpolant | None) -> list[float]:
        """Return steps + 1 times from `t_start` to 1; without a path on the straight one."""
        at = torch.tensor([t_start], dtype=torch.float64)
        alpha, sigma = (at, 1 - at) if path is None else (path.alpha(at), path.sigma(at))
        # A path that begins below sigma_max, as any with t_start > 0 does, begins where it can.
        top = min(self.sigma_max, float(sigma / alpha))
        if top <= self.sigma_min:
            raise ValueError(
                f"sampling begins at noise level {top:g}, and its last step at sigma_min, "
                f"{self.sigma_min:g}, which is not below that; lower t_start, or sigma_min of the "
                "spacing"
            )
        share = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
        high, low = top ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        ratios = (high + share * (low - high)) ** self.rho
        return [t_start, *times_of_levels(path, ratios)[1:].tolist(), 1.0]


def times_of_levels(path: Interpolant | None, levels: Tensor) -> Tensor:
    """Return times at which sigma / alpha, which falls, has these values, (n,), float64."""
    if path is None:
        return 1 / (1 + levels)
    return last_time(lambda t: path.sigma(t) > levels * path.alpha(t), torch.zeros_like(levels))


@lru_cache(maxsize=64)
def _kept_times(
    karras: Karras, steps: int, t_start: float, path: Interpolant | None
) -> tuple[float, ...]:
    """Return the times of `karras`, which are looked up for every batch of images."""
    return tuple(karras.times(steps, t_start, path))


Spacing = Literal["uniform", "karras"] | Karras


class Stepper(Protocol):
    """What takes the steps of one trajectory; may remember earlier ones."""

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, condition: Condition, noise: Noise
    ) -> Tensor:
        """Move z (B, N, D) from time t to the later time s, with t < s < 1."""


class Sampler(ABC):
    """Integrates from noise (t = 0) to data (t = 1) in `steps` intervals.

    The last interval ends in the denoiser's own clean estimate, which for an ODE equals an
    Euler step that lands on t = 1, where the velocity itself cannot be evaluated.
    With `t_eps` above 0 it ends where that step leads at the speed that `t_eps` allows.

    `couples_images` is True where an image depends on the others in its batch, as by a common
    step size; `one_call_per_step` is True where each step asks the denoiser once, at the time
    where it begins.
    `averages` says whether its steps follow average velocities: `used` where the network has
    learned them, `needed` where nothing else will do, and `unused` where a step is made of
    velocities at single times, as those of higher order are.
    """

    couples_images: ClassVar[bool] = False
    one_call_per_step: ClassVar[bool] = False
    averages: ClassVar[Literal["unused", "used", "needed"]] = "unused"

    @property
    @abstractmethod
    def steps(self) -> int:
        """Number of intervals, at least 1."""

    @property
    def spacing(self) -> Spacing:
        """How the times lie: evenly, or by noise level."""
        return "uniform"

    @property
    def shift(self) -> float:
        """Warps the even grid: below 1 more steps near the noise, above 1 nearer the data."""
        return 1.0

    @property
    def t_start(self) -> float:
        """Where sampling begins; above 0 for predictions that say nothing about x0 at t = 0."""
        return 0.0

    @property
    def t_eps(self) -> float:
        """Bounds every velocity to that of a `t_eps` before the data; 0 leaves them alone."""
        return 0.0

    @abstractmethod
    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, condition: Condition, noise: Noise
    ) -> Tensor:
        """Move z (B, N, D) from time t to the later time s, with t < s < 1."""

    def stepper(self) -> Stepper:
        """Return the object that takes one trajectory's steps: itself, unless it needs memory."""
        return self

    def grid(self, path: Interpolant | None = None) -> list[float]:
        """Return the times of the intervals' ends, from `t_start` to 1; steps + 1 numbers.

        `path` is where noise levels are looked up; without one, on the straight path.

        Source: t' = a t / (1 + (a - 1) t), the time shift of UNITE and SD3, written so that 1
        stays 1 exactly.
        """
        first, a, spacing = self.t_start, self.shift, self.spacing
        if spacing != "uniform":
            karras = Karras() if spacing == "karras" else spacing
            try:
                return [*_kept_times(karras, self.steps, first, path)]
            except TypeError:  # a plugin's path need not be hashable
                return karras.times(self.steps, first, path)
        uniform = [i / self.steps for i in range(self.steps + 1)]
        return [first + (1 - first) * (t / (t + (1 - t) / a)) for t in uniform]

    def integrate(
        self, f: Denoiser, z: Tensor, times: Sequence[float], condition: Condition, noise: Noise
    ) -> Tensor:
        """Follow the path through `times`, all below 1, and return the noised latent there."""
        return self._follow(f, z, times, condition, noise)[1]

    def _follow(
        self, f: Denoiser, z: Tensor, times: Sequence[float], condition: Condition, noise: Noise
    ) -> tuple[Denoiser, Tensor]:
        """Return the denoiser of the last step, which may remember, and the latent after it."""
        stepper = self.stepper()
        if self.t_eps > 0:
            f = _Held(f, self.t_eps)
        for t, s in pairwise(times):
            f = f.for_step(t, s)
            z = stepper.step(f, z, t, s, condition, noise)
        return f, z

    @torch.no_grad()
    def sample(self, f: Denoiser, start: Tensor, condition: Condition, noise: Noise) -> Tensor:
        """Sample clean latents from noise.

        Args:
            f: The denoiser, guided or plain.
            start: Unit normal noise, (B, N, D); scaled here to the path's noise at the start.
            condition: One a row.
            noise: Further noise, for stochastic samplers.

        Returns:
            (B, N, D), the denoiser's clean estimate at the last time before 1, as far as `t_eps`
            lets it be reached.
        """
        times = self.grid(f.path)
        z = start * float(f.path.sigma(torch.tensor([self.t_start])))
        f, z = self._follow(f, z, times[:-1], condition, noise)
        return f.for_step(times[-2], 1.0)(z, times[-2], condition).x0


class _Held(Denoiser):
    """A denoiser with 1 - t held above `t_eps` in its velocities, and answers to match.

    A straight path has v = (x0 - z_t) / (1 - t). Slower by (1 - t) / t_eps, it is
    (x0 - z_t) / t_eps, and the clean estimate that goes with it is z_t + (1 - t) v, where an
    Euler step to t = 1 ends. Velocities of other paths are slowed by the same factor.

    Source: JiT (arXiv 2511.13720) and UNITE (arXiv 2603.22283), released code, both with 0.05.
    """

    def __init__(self, inner: Denoiser, t_eps: float) -> None:
        self.inner = inner
        self.t_eps = t_eps
        self.path = inner.path

    def for_step(self, t: float, s: float) -> Denoiser:
        return _Held(self.inner.for_step(t, s), self.t_eps)

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        found, left = self.inner(z_t, t, condition), 1 - t
        if left >= self.t_eps:
            return found
        return self.path.estimate(left / self.t_eps * found.v, z_t, t, "v")


@attrs.frozen(kw_only=True)
class FixedGridSampler(Sampler):
    """A sampler whose times are chosen beforehand, with the options of all such: see `euler`.

    A subclass defines `step`, and may add options of its own.
    """

    steps: int = attrs.field(default=50, validator=attrs.validators.ge(1))
    spacing: Spacing = "uniform"
    shift: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))
    t_start: float = attrs.field(
        default=0.0, validator=[attrs.validators.ge(0), attrs.validators.lt(1)]
    )
    t_eps: float = attrs.field(
        default=0.0, validator=[attrs.validators.ge(0), attrs.validators.lt(1)]
    )

    @shift.validator
    def _of_the_even_grid(self, field: attrs.Attribute[float], value: float) -> None:
        if value != 1 and self.spacing != "uniform":
            raise ValueError(
                f"'shift' warps the uniform spacing alone: {value}. Give `spacing` a `rho`."
            )
