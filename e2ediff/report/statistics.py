"""Means over seeds, and paired differences with Student's t intervals; no SciPy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import attrs

CONFIDENCE = 0.95
"""Of every interval in a report."""


@attrs.frozen
class Spread:
    """Mean of `n` values and their sample standard deviation, which one value has not."""

    n: int
    mean: float
    std: float | None


@attrs.frozen
class Difference:
    """Mean of `n` paired differences, and its interval, which one pair has not."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is there and lies on one side of zero."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation (n - 1) of at least one value.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("no values")
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(len(values), statistics.fmean(values), std)


def paired(
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    confidence: float = CONFIDENCE,
) -> Difference | None:
    """Values minus the baseline's, paired by seed.

    Args:
        values: By seed.
        baseline: By seed; seeds that only one of both has are left out.
        confidence: Of the interval for the mean difference, by Student's t with n - 1 degrees
            of freedom.

    Returns:
        None if they share no seed; without an interval if they share one.
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not differences:
        return None
    found = spread(differences)
    if found.std is None:
        return Difference(1, found.mean, None, None)
    quantile = t_quantile((1 + confidence) / 2, found.n - 1)
    half = quantile * found.std / math.sqrt(found.n)
    return Difference(found.n, found.mean, found.mean - half, found.mean + half)


def t_quantile(p: float, freedom: int) -> float:
    """Where Student's t distribution has the share `p` below.

    By bisection of its distribution function, to nine digits or more.

    Args:
        p: In (0, 1).
        freedom: Degrees of freedom, at least 1.

    Raises:
        ValueError: Either is out of range.
    """
    if not 0 < p < 1 or freedom < 1:
        raise ValueError(f"no quantile {p} of Student's t with {freedom} degrees of freedom")
    if p < 0.5:
        return -t_quantile(1 - p, freedom)
    low, high = 0.0, 1.0
    while t_below(high, freedom) < p:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_below(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def t_below(t: float, freedom: int) -> float:
    """Share of Student's t distribution below `t`.

    Source: Abramowitz & Stegun 26.7.1 and 26.5.27, by the incomplete beta function.
    """
    whole = freedom + t * t
    if t * t < freedom:  # the middle: of two small numbers none is lost beside 1
        half = 0.5 * incomplete_beta(t * t / whole, 0.5, freedom / 2)
        return 0.5 + half if t > 0 else 0.5 - half
    tail = 0.5 * incomplete_beta(freedom / whole, freedom / 2, 0.5)
    return 1 - tail if t > 0 else tail


def incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b), for x in [0, 1] and a, b > 0.

    Source: the continued fraction of Abramowitz & Stegun 26.5.8, by Lentz's method.
    """
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - incomplete_beta(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for i in range(500):
        m = i // 2
        if i == 0:
            step = 1.0
        elif i % 2 == 0:
            step = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            step = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + step * d or tiny)
        c = 1 + step / c or tiny
        value *= c * d
        if i and abs(c * d - 1) < 1e-15:
            break
    return front * (value - 1) / a
