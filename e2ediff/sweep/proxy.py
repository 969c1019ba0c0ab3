"""The score that candidates are compared by: a kernel distance with a share for each image.

Shapes: n made rows, m real rows, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

_BLOCK = 2048
Z = 1.96
"""Standard errors in half a 95 % interval."""


@attrs.frozen(eq=False)
class Proxy:
    """Unbiased squared MMD with KID's kernel, of made rows to real rows (m, F).

    `own` is the mean kernel between different real rows.
    """

    real: Tensor
    own: float

    @classmethod
    def of(cls, real: Tensor) -> Proxy:
        """The proxy that compares with these rows."""
        real = real.double()
        sums = sum(float(_kernel(part, real).sum()) for part in torch.split(real, _BLOCK))
        sums -= float(_norms(real).sum())
        return cls(real, sums / (len(real) * (len(real) - 1)))

    def shares(self, made: Tensor) -> list[float]:
        """The jackknife's pseudo-value of each made row (n, F), n at least 3.

        Their mean is the distance, and the standard deviation over the root of n its standard
        error over the choice of noise and labels. The real rows are taken as given: their own
        error is the same for all candidates.

        Source: Efron & Tibshirani 1993, chapter 11; the distance is Binkowski et al. 2018 (KID,
        arXiv 1801.01401), eq. 4.
        """
        made, n = made.double(), len(made)
        parts = torch.split(made, _BLOCK)
        between = torch.cat([_kernel(part, self.real).mean(1) for part in parts])  # (n,)
        within = torch.cat([_kernel(part, made).sum(1) for part in parts]) - _norms(made)
        within = within / (n - 1)
        # What leaving row i out of the mean over pairs does, in closed form.
        pairs = (2 * (n - 1) * within - n * within.mean()) / (n - 2)
        found: list[float] = (self.own + pairs - 2 * between).tolist()
        return found


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _norms(a: Tensor) -> Tensor:
    return (a.square().sum(1) / a.shape[1] + 1) ** 3


@attrs.frozen
class Mean:
    """A mean, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, shares: Sequence[float]) -> Mean:
        """Of independent shares, at least two."""
        x = np.asarray(shares, dtype=np.float64)
        return cls(float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5))


def difference(a: Sequence[float], b: Sequence[float]) -> Mean:
    """By how much a's distance is larger than b's: image i of both has the same noise and label.

    So what an image's noise and label do to both cancels.
    """
    return Mean.of(np.subtract(a, b).tolist())
