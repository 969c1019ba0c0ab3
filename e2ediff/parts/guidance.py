"""Guidance: denoisers that wrap denoisers.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.denoiser import Denoiser, Guidance
from e2ediff.interpolant import Estimate, Interpolant


@attrs.frozen(kw_only=True)
class ClassifierFree(Guidance):
    """x0_u + scale (x0_c - x0_u) at some times, the plain answer elsewhere.

    Guided are the times from `t_min` to `t_max`.
    `scale` 1 is no guidance and costs one pass.

    Source: Ho & Salimans 2022 (arXiv 2207.12598), eq. 6 with scale = 1 + w; the interval is
    Kynkäänniemi et al. 2024 (arXiv 2404.07724).
    """

    scale: float = attrs.field(default=1.5, validator=validators.ge(0))
    t_min: float = attrs.field(default=0.0, validator=[validators.ge(0), validators.le(1)])
    t_max: float = attrs.field(default=1.0, validator=[validators.ge(0), validators.le(1)])

    def wrap(self, inner: Denoiser, null_label: int) -> Denoiser:
        """The guided denoiser; `inner` itself at scale 1."""
        return inner if self.scale == 1 else _Guided(inner, self, null_label)


class _Guided(Denoiser):
    """Classifier-free guidance over `inner`; both answers come from one batch of 2 B rows."""

    def __init__(self, inner: Denoiser, guidance: ClassifierFree, null_label: int) -> None:
        self.inner = inner
        self.guidance = guidance
        self.null_label = null_label

    @property
    def path(self) -> Interpolant:
        """The inner denoiser's interpolant."""
        return self.inner.path

    def __call__(self, z_t: Tensor, t: float, label: Tensor) -> Estimate:
        """The guided estimate."""
        g = self.guidance
        if not g.t_min <= t <= g.t_max:
            return self.inner(z_t, t, label)
        null = torch.full_like(label, self.null_label)
        both = self.inner(torch.cat([z_t, z_t]), t, torch.cat([label, null]))
        conditional, unconditional = both.x0.chunk(2)
        x0 = unconditional + g.scale * (conditional - unconditional)
        return self.path.estimate(x0, z_t, torch.full((len(z_t),), t, device=z_t.device), "x0")
