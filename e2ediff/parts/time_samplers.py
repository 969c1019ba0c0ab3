"""Laws of training times; t = 0 is noise, t = 1 is data."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor
from typing_extensions import override

from e2ediff.times import TimeSampler


@attrs.frozen(kw_only=True)
class Uniform(TimeSampler):
    """Every time equally often."""

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return u


@attrs.frozen(kw_only=True)
class LogitNormal(TimeSampler):
    """logit(t) is normal, with `mean` and standard deviation `std`.

    A negative mean moves weight to the noise end.

    Source: Esser et al. 2024 (SD3, arXiv 2403.03206), eq. 19, with t counted from noise.
    """

    mean: float = 0.0
    std: float = attrs.field(default=1.0, validator=attrs.validators.gt(0))

    @override
    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


@attrs.frozen(kw_only=True)
class Shifted(TimeSampler):
    """Another law, `inner`, warped by t' = a t / (1 + (a - 1) t).

    The factor a is `shift`; below 1 it moves times towards the noise.

    Source: the time shift of SD3 (arXiv 2403.03206), eq. 23, in our direction of time; UNITE
    (arXiv 2603.22283) uses 0.5.
    """

    inner: TimeSampler = attrs.field(factory=LogitNormal)
    shift: float = attrs.field(default=0.5, validator=attrs.validators.gt(0))

    @override
    def quantile(self, u: Tensor) -> Tensor:
        t = self.inner.quantile(u)
        return self.shift * t / (1 + (self.shift - 1) * t)
