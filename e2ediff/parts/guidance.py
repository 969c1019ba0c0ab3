"""Guidance by the network's own answer without the condition: a denoiser that wraps another.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.condition import Condition, concatenate
from e2ediff.denoiser import Denoiser
from e2ediff.guidance import Guidance, GuidedDenoiser, check_interval, in_interval
from e2ediff.interpolant import Estimate

_TIME = [validators.ge(0.0), validators.le(1.0)]


@attrs.frozen(kw_only=True)
class ClassifierFree(Guidance):
    """x0_u + scale (x0_c - x0_u) at some times, the plain answer elsewhere.

    Guided are the times from `t_min` to `t_max`; with `exclusive` the two ends are not, except a
    `t_min` of 0.
    `scale` 1 is no guidance and costs one pass.

    Source: Ho & Salimans 2022 (arXiv 2207.12598), eq. 6 with scale = 1 + w; the interval is
    Kynkäänniemi et al. 2024 (arXiv 2404.07724); JiT's and UNITE's code have it `exclusive`.
    """

    scale: float = attrs.field(default=1.5, validator=validators.ge(0.0))
    t_min: float = attrs.field(default=0.0, validator=_TIME)
    t_max: float = attrs.field(default=1.0, validator=_TIME)
    exclusive: bool = False

    @t_max.validator
    def _some_time(self, field: attrs.Attribute[float], value: float) -> None:
        check_interval(self.t_min, value, exclusive=self.exclusive)

    @property
    def asks_null(self) -> bool:
        """Unless the scale is 1."""
        return self.scale != 1

    def wrap(self, inner: Denoiser) -> Denoiser:
        """The guided denoiser; `inner` itself at scale 1."""
        return inner if self.scale == 1 else _Guided(inner, self)


class _Guided(GuidedDenoiser):
    def __init__(self, inner: Denoiser, guidance: ClassifierFree) -> None:
        super().__init__(inner)
        self.guidance = guidance
        self._asked: tuple[Condition, Condition] | None = None

    def for_step(self, t: float, s: float) -> Denoiser:
        inner = self.inner.for_step(t, s)
        return self if inner is self.inner else _Guided(inner, self.guidance)

    def _with_null(self, condition: Condition) -> Condition:
        """Return rows with the condition and without; every call of a batch has the same."""
        if self._asked is None or self._asked[0] is not condition:
            self._asked = (condition, concatenate([condition, condition.null()]))
        return self._asked[1]

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        g = self.guidance
        if not in_interval(t, g.t_min, g.t_max, exclusive=g.exclusive):
            return self.inner(z_t, t, condition)
        both = self.inner(torch.cat([z_t, z_t]), t, self._with_null(condition))
        conditional, unconditional = both.x0.chunk(2)
        return self.clean(unconditional + g.scale * (conditional - unconditional), z_t, t)
