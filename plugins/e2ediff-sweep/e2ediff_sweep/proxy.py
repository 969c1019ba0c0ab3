"""The score that compares candidates: a kernel distance with a share for each image.

Shapes: n generated rows, m real rows, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
from torch import Tensor

from e2ediff.distances import polynomial_mean, polynomial_shares

Z = 1.96
"""Standard errors in half a 95 % interval."""


@attrs.frozen(eq=False)
class Proxy:
    """Unbiased squared MMD with KID's kernel, of generated rows to real rows (m, F).

    `own` is the mean kernel between different real rows.
    """

    real: Tensor
    own: float

    @classmethod
    def of(cls, real: Tensor) -> Proxy:
        """Make a proxy that compares with these rows."""
        return cls(real.double(), polynomial_mean(real))

    def shares(self, made: Tensor) -> list[float]:
        """Return the jackknife pseudo-value of each generated row (n, F), n at least 3.

        Their mean is the distance, and their standard deviation over the root of n its standard
        error over the choice of noise and labels. The real rows are fixed, as their error is the
        same for all candidates.

        Source: Efron & Tibshirani 1993, chapter 11; the distance is Binkowski et al. 2018 (KID,
        arXiv 1801.01401), eq. 4.
        """
        found: list[float] = polynomial_shares(made, self.real, self.own).tolist()
        return found


@attrs.frozen
class Mean:
    """A mean, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, shares: Sequence[float]) -> Mean:
        """Return mean and standard error of independent shares, at least two."""
        x = np.asarray(shares, dtype=np.float64)
        return cls(float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5))


def difference(a: Sequence[float], b: Sequence[float]) -> Mean:
    """Return a's distance minus b's, where image i of both has the same noise and label.

    Effects of noise and label that both share cancel.
    """
    return Mean.of(np.subtract(a, b).tolist())
