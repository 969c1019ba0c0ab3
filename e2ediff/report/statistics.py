"""Means over seeds, and paired differences with Student's t intervals."""

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
    # What `stats.t.ppf` calls, in a module that is imported in a fourth of the time.
    from scipy.special import stdtrit

    half = float(stdtrit(found.n - 1, (1 + confidence) / 2)) * found.std / math.sqrt(found.n)
    return Difference(found.n, found.mean, found.mean - half, found.mean + half)
