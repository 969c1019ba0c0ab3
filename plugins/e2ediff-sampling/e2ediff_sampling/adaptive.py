"""The sampler that chooses its own steps.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.condition import Condition
from e2ediff.denoiser import Denoiser
from e2ediff.errors import Problem, RecipeError
from e2ediff.interpolant import Interpolant
from e2ediff.sampler import Noise, Sampler, times_of_levels

# Dormand & Prince 1980, table 2: where the stages lie, what leads to each, and the difference
# between the solutions of order 5 (the last row of _STAGES) and 4.
_PLACES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_FIRST = 0.05  # share of the interval that is tried first


def dormand_prince(
    f: Denoiser, z: Tensor, t: float, h: float, condition: Condition, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of length h in six network calls, `k1` being the velocity at its beginning.

    Returns:
        The latent of order 5, the estimate of its error, and the velocity there, each (B, N, D).
    """
    k, end = [k1], z
    for place, row in zip(_PLACES, _STAGES, strict=True):
        end = z + h * sum((a * v for a, v in zip(row, k, strict=True) if a), 0 * z)
        k.append(f(end, t + place * h, condition).v)
    error = h * sum((e * v for e, v in zip(_ERROR, k, strict=True) if e), 0 * z)
    return end, error, k[-1]


@attrs.frozen(kw_only=True)
class Dopri5(Sampler):
    """Dormand-Prince 5(4) with steps chosen so that each one's error is below the tolerance.

    Six network calls a step, and as many for each that is refused.
    `rtol` and `atol` bound a step's root mean square error for every image of a batch, relative
    to the latent and absolutely.
    `t_start` is where sampling begins, `sigma_min` the noise level, in units of the signal, at
    which the clean estimate is taken, and `max_calls` the number of network calls after which it
    gives up.
    `t_eps` is that of `euler`; with it the interval from `sigma_min` on is an Euler step.
    Images that are computed together share their steps.

    Source: Dormand & Prince 1980; step control as Hairer, Norsett & Wanner 1993, eq. II.4.13.
    """

    couples_images: ClassVar[bool] = True  # by their step sizes

    rtol: float = attrs.field(default=1e-3, validator=validators.gt(0))
    atol: float = attrs.field(default=1e-4, validator=validators.gt(0))
    t_start: float = attrs.field(default=0.0, validator=[validators.ge(0), validators.lt(1)])
    t_eps: float = attrs.field(default=0.0, validator=[validators.ge(0), validators.lt(1)])
    sigma_min: float = attrs.field(default=0.01, validator=validators.gt(0))
    max_calls: int = attrs.field(default=1000, validator=validators.ge(7))

    @property
    def steps(self) -> int:
        """The adaptive interval and the last one."""
        return 2

    def grid(self, path: Interpolant | None = None) -> list[float]:
        """The ends of the adaptive interval, and 1."""
        level = torch.tensor([self.sigma_min], dtype=torch.float64)
        stop = float(times_of_levels(path, level))
        if stop <= self.t_start:
            raise ValueError(
                f"the noise level is sigma_min, {self.sigma_min:g}, at t = {stop:.4g}, and "
                f"sampling begins at {self.t_start:g}, not before it; lower t_start, or sigma_min"
            )
        return [self.t_start, stop, 1.0]

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, condition: Condition, noise: Noise
    ) -> Tensor:
        """From t to s in as many steps as the tolerance takes.

        Raises:
            RecipeError: That would be more than `max_calls` network calls.
        """
        k, calls, h = f(z, t, condition).v, 1, _FIRST * (s - t)
        while t < s:
            last = t + h >= s
            h = s - t if last else h
            if calls + 6 > self.max_calls:
                what = f"{calls} network calls have reached t = {t:.4g}."
                raise RecipeError(
                    "sampling",
                    [Problem("sampler.max_calls", what, hint="Raise it, or rtol and atol.")],
                )
            end, error, k_end = dormand_prince(f, z, t, h, condition, k)
            calls += 6
            scale = self.atol + self.rtol * z.abs().maximum(end.abs())
            # The worst image decides, so that none is worse for being among others.
            worst = float((error / scale).square().mean(dim=(1, 2)).max().sqrt())
            if worst <= 1:
                t, z, k = s if last else t + h, end, k_end
            # A value that is not finite shrinks the step until max_calls is reached.
            h *= (
                min(5.0, max(0.2, 0.9 * worst**-0.2))
                if 0 < worst < float("inf")
                else (5.0 if worst == 0 else 0.2)
            )
        return z
