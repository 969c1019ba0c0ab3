"""Samplers that reuse the clean estimates of earlier steps: one network call a step.

Both solve the ODE in half the logSNR, lambda = log(alpha / sigma), where it reads
z_s / sigma_s = z_t / sigma_t + integral of e^lambda x0 d lambda, and x0 alone is approximated.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.condition import Condition
from e2ediff.denoiser import Denoiser
from e2ediff.interpolant import Interpolant
from e2ediff.sampler import FixedGridSampler, Noise, Stepper


@attrs.frozen
class _Level:
    """The coefficients at one time; `half` is lambda, minus infinity where there is no signal."""

    alpha: float
    sigma: float

    @classmethod
    def at(cls, path: Interpolant, t: float) -> _Level:
        time = torch.tensor([t], dtype=torch.float64)
        return cls(float(path.alpha(time)), float(path.sigma(time)))

    @property
    def half(self) -> float:
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


def _exponential_euler(z: Tensor, x0: Tensor, now: _Level, then: _Level) -> Tensor:
    """The step with x0 held constant, which is DDIM's; finite where alpha is 0."""
    decay = now.alpha * then.sigma / (then.alpha * now.sigma)  # e^-h
    return then.sigma / now.sigma * z + then.alpha * (1 - decay) * x0


@attrs.frozen(kw_only=True)
class _Remembering(FixedGridSampler):
    """A sampler whose `stepper` uses earlier estimates, and whose step alone is of first order."""

    one_call_per_step: ClassVar[bool] = True

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, condition: Condition, noise: Noise
    ) -> Tensor:
        """A first-order step, for want of earlier ones."""
        now, then = _Level.at(f.path, t), _Level.at(f.path, s)
        return _exponential_euler(z, f(z, t, condition).x0, now, then)


@attrs.frozen(kw_only=True)
class DPMSolverPP2M(_Remembering):
    """DPM-Solver++ (2M): second order, one network call a step.

    `steps`, `spacing`, `shift`, `t_start` and `t_eps` are those of `euler`.
    The first step is of first order, and so is the one after it where alpha(t_start) = 0.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    """

    def stepper(self) -> Stepper:
        """Steps that remember the estimate before."""
        return _TwoM()


class _TwoM:
    """The last step's level and clean estimate, and a step that extrapolates from them."""

    def __init__(self) -> None:
        self.before: tuple[_Level, Tensor] | None = None

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, condition: Condition, noise: Noise
    ) -> Tensor:
        now, then = _Level.at(f.path, t), _Level.at(f.path, s)
        x0 = f(z, t, condition).x0
        used = x0
        if self.before is not None:
            level, old = self.before
            # h / h_before: 0 after a step from pure noise, which extrapolates nothing.
            ratio = (then.half - now.half) / (now.half - level.half)
            used = x0 + ratio / 2 * (x0 - old)
        self.before = now, x0
        return _exponential_euler(z, used, now, then)


@attrs.frozen(kw_only=True)
class UniPC(_Remembering):
    """UniPC: a predictor of `order` p with a corrector that costs no network call; order p + 1.

    `order` 1 to 3; the first steps are of lower order.
    `steps`, `spacing`, `shift`, `t_start` and `t_eps` are those of `euler`.

    Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 and 6 with B(h) = e^h - 1 on data
    predictions; the coefficients of orders 1 and 2 are those of the released code.
    """

    order: int = attrs.field(default=2, validator=[validators.ge(1), validators.le(3)])

    def stepper(self) -> Stepper:
        """Steps that remember the estimates before."""
        return _PredictCorrect(self.order)


class _PredictCorrect:
    """Corrects where the step before has led, once the network has seen it, and predicts on."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.known: list[tuple[_Level, Tensor]] = []  # latest last
        self.start: Tensor | None = None  # where the step before began

    def step(
        self, f: Denoiser, z: Tensor, t: float, s: float, condition: Condition, noise: Noise
    ) -> Tensor:
        now, then = _Level.at(f.path, t), _Level.at(f.path, s)
        x0 = f(z, t, condition).x0
        if self.start is not None and self.known[-1][0].alpha > 0:
            z = _unified(self.start, self.known, now, x0)
        # What lies infinitely far back says nothing about slopes.
        useful = [(level, old) for level, old in self.known if level.alpha > 0]
        self.known = [*useful, (now, x0)][-self.order :]
        self.start = z
        return _unified(z, self.known, then, None)


def _unified(
    z: Tensor, known: Sequence[tuple[_Level, Tensor]], then: _Level, x0_then: Tensor | None
) -> Tensor:
    """One step from the last of `known` to `then`: a predictor, or with `x0_then` a corrector."""
    now, x0 = known[-1]
    base = _exponential_euler(z, x0, now, then)
    earlier = known[:-1]
    if now.alpha == 0 or (x0_then is None and not earlier):
        return base
    h = then.half - now.half
    places = [(level.half - now.half) / h for level, _ in earlier]
    slopes = [(old - x0) / r for (_, old), r in zip(earlier, places, strict=True)]
    if x0_then is not None:
        places, slopes = [*places, 1.0], [*slopes, x0_then - x0]
    weights = _weights(places, h)
    total = sum((w * d for w, d in zip(weights, slopes, strict=True)), torch.zeros_like(z))
    return base - then.alpha * math.expm1(-h) * total


def _weights(places: Sequence[float], h: float) -> list[float]:
    """How much each slope counts: the solution of R rho = b of UniPC, 1/2 for a single one."""
    n = len(places)
    if n == 1:
        return [0.5]
    rows = [[r**i for r in places] for i in range(n)]
    phi, factorial, right = math.expm1(-h) / -h - 1, 1, []
    for i in range(1, n + 1):
        right.append(phi * factorial / math.expm1(-h))
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (rows, right))
    solved: list[float] = torch.linalg.solve(a, b).tolist()
    return solved
