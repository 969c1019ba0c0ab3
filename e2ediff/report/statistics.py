"""Compute means over seeds, and paired differences with Student's t intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import attrs

CONFIDENCE = 0.95
"""Level of every interval in a report."""


@attrs.frozen
class MeanStd:
    """Mean of `n` values and their sample standard deviation (None for a single value)."""

    n: int
    mean: float
    std: float | None


@attrs.frozen
class Difference:
    """Mean of `n` paired differences, and its interval (None for a single pair)."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Return whether there is an interval, on one side of zero."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def spread(values: Sequence[float]) -> MeanStd:
    """Return mean and sample standard deviation (n - 1) of at least one value.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("no values")
    std = statistics.stdev(values) if len(values) > 1 else None
    return MeanStd(len(values), statistics.fmean(values), std)


def paired(
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    confidence: float = CONFIDENCE,
) -> Difference | None:
    """Compare values with the baseline's, paired by seed.

    Args:
        values: Values by seed.
        baseline: Values by seed; seeds that only one of them has are left out.
        confidence: Level of the interval for the mean difference, by Student's t with n - 1
            degrees of freedom.

    Returns:
        None if they share no seed; without an interval if they share one.
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not differences:
        return None
    found = spread(differences)
    if found.std is None:
        return Difference(1, found.mean, None, None)
    # `stats.t.ppf` calls this function, whose module imports in a quarter of the time.
    from scipy.special import stdtrit

    half = float(stdtrit(found.n - 1, (1 + confidence) / 2)) * found.std / math.sqrt(found.n)
    return Difference(found.n, found.mean, found.mean - half, found.mean + half)
