"""Laws of averages of the weights: a constant decay, and the power-function profiles of EDM2."""

from __future__ import annotations

from functools import lru_cache

import attrs
import numpy as np
from attrs.validators import ge, gt, le, lt

from e2ediff.averaging import WIDEST, Averaging


@attrs.frozen(kw_only=True)
class Constant(Averaging):
    """An exponential moving average: every update keeps the same share of the old average.

    `decay` is that share, in [0, 1).
    `warmup` begins with smaller decays, min(decay, (1 + k) / (10 + k)) at update k, so that early
    averages forget the initial weights.

    Source: the warm-up is that of torch-ema, and of TensorFlow's ExponentialMovingAverage.
    """

    decay: float = attrs.field(default=0.999, validator=(ge(0.0), lt(1.0)))
    warmup: bool = True

    def decay_at(self, update: int) -> float:
        """`decay`, or less during the warm-up."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay


@attrs.frozen(kw_only=True)
class Power(Averaging):
    """A power-function average: a profile whose width grows with the length of training.

    After k updates weights of update j weigh about (j / k)^gamma, so that the initial weights are
    forgotten at once and the average covers the same share of every training.
    `width` is the profile's standard deviation over training time, as a share of the time so far,
    in (0, 0.288]; it sets gamma.

    Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), section 3.1.
    """

    width: float = attrs.field(default=0.1, validator=(gt(0.0), le(WIDEST)))

    def decay_at(self, update: int) -> float:
        """(1 - 1 / update)^(gamma + 1)."""
        return float((1.0 - 1.0 / update) ** (gamma_of(self.width) + 1.0))


@lru_cache
def gamma_of(width: float) -> float:
    """The exponent of the power-function profile of this width, in (0, 12^-0.5].

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / width^2.
    Source: Karras et al. 2024 (EDM2), appendix C.
    """
    s = width**-2.0
    return float(max(0.0, np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max()))
