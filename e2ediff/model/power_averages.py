"""Power-function averages: their profiles over training time, and reconstruction of widths.

An average of profile p holds the integral of p(tau) theta(tau) over training time tau, with
p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) up to its own time t, and 0 from there on.
Time is counted in optimizer steps; theta is constant during a step.

Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from e2ediff.parts.averages import gamma_of

Floats = NDArray[np.float64]

TOLERANCE = 0.05
"""Largest error of a profile, relative to its norm, that a reconstruction may have."""


def sigma_rel_of(gamma: float) -> float:
    """Return the width of a profile with exponent gamma >= 0: its standard deviation over t."""
    return float((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


def tracked_name(width: float) -> str:
    """Return the name in a checkpoint of the tracked average of this width."""
    return f"ema-{width:g}"


@attrs.frozen
class Point:
    """A stored tracked average: its width, and the optimizer step after which it was stored."""

    sigma_rel: float
    step: int


@attrs.frozen
class Mixture:
    """Coefficients of points, which add up to 1, and the error of the resulting profile."""

    coefficients: tuple[float, ...]
    error: float


def mixture(points: Sequence[Point], wanted: Point) -> Mixture:
    """Return the mixture of points whose profile is nearest to the wanted one, by least squares.

    Unlike in the paper, coefficients add up to 1, as profiles do: then a weight that never moved
    is returned as it is, however few points there are.
    The error is the norm of the difference of the profiles over the norm of the wanted one.
    """
    t = np.array([p.step for p in points], dtype=np.float64) / wanted.step
    gamma = np.array([gamma_of(p.sigma_rel) for p in points])
    last, goal = np.ones(1), np.array([gamma_of(wanted.sigma_rel)])
    gram = inner_products(t, gamma, t, gamma)
    right = inner_products(t, gamma, last, goal)
    norm = float(inner_products(last, goal, last, goal)[0, 0])
    ones = np.ones((len(t), 1))
    system = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])
    # Not `solve`: two nearly equal widths make the system singular.
    solution = np.linalg.lstsq(system, np.vstack([right, [[1.0]]]), rcond=1e-15)[0]
    x = solution[: len(t)]
    rest = float((x.T @ gram @ x - 2 * x.T @ right)[0, 0]) + norm
    return Mixture(tuple(x[:, 0].tolist()), (max(0.0, rest) / norm) ** 0.5)


def inner_products(t_a: Floats, gamma_a: Floats, t_b: Floats, gamma_b: Floats) -> Floats:
    """Return the integrals of products of A and B profiles, (A, B).

    Source: appendix C.3; the ratio of times is at most 1, so that no power overflows.
    """
    t_a, gamma_a = t_a[:, None], gamma_a[:, None]
    t_b, gamma_b = t_b[None], gamma_b[None]
    low, high = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    power = np.where(t_a < t_b, gamma_b, gamma_a)
    found: Floats = (gamma_a + 1) * (gamma_b + 1) * (low / high) ** power
    return found / ((gamma_a + gamma_b + 1) * high)


def reachable(points: Sequence[Point], step: int) -> list[float]:
    """Return widths in thousandths, ascending, that points give at a step within `TOLERANCE`."""
    grid = [i / 1000 for i in (*range(5, 100, 5), *range(100, 290, 10))]
    return [w for w in grid if mixture(points, Point(w, step)).error <= TOLERANCE]
