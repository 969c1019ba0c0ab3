"""Optimizers with their learning-rate schedules, counted in images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import attrs
import torch
from attrs import validators
from torch import nn

from e2ediff.optimizer import OptimizerConfig

Schedule = Literal["constant", "cosine", "linear"]


def schedule_factor(
    schedule: Schedule, images: int, total: int, warmup: int, cooldown: float
) -> float:
    """Multiplier of the learning rate after `images` of `total`.

    A linear rise over `warmup` images; then 1, falling over the last `cooldown` share of
    training to 0, along a half cosine or a line; `constant` never falls.
    """
    rise = min(1.0, (images + 1) / warmup) if warmup > 0 else 1.0
    if schedule == "constant":
        return rise
    start = total * (1 - cooldown)
    done = min(1.0, max(0.0, (images - start) / max(1.0, total - start)))
    fall = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return rise * fall


@attrs.frozen(kw_only=True)
class _Scheduled(OptimizerConfig):
    lr: float = attrs.field(default=2e-4, validator=validators.gt(0))
    weight_decay: float = attrs.field(default=0.0, validator=validators.ge(0))
    warmup_images: int = attrs.field(default=0, validator=validators.ge(0))
    schedule: Schedule = "constant"
    cooldown: float = attrs.field(default=1.0, validator=[validators.gt(0), validators.le(1)])
    clip: float = attrs.field(default=1.0, validator=validators.ge(0))

    def factor(self, images: int, total: int) -> float:
        """Warm-up, then the schedule."""
        return schedule_factor(self.schedule, images, total, self.warmup_images, self.cooldown)

    def groups(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Two groups: matrices with weight decay, everything else without."""
        matrices = [p for name, p in named if p.ndim >= 2 and "embed" not in name]
        rest = [p for name, p in named if p.ndim < 2 or "embed" in name]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]


@attrs.frozen(kw_only=True)
class AdamW(_Scheduled):
    """AdamW, fused, without weight decay on vectors, embeddings and norms.

    `lr` is the peak learning rate; `warmup_images` its linear rise.
    `betas`, `eps` and `weight_decay` are the algorithm's.
    `schedule` is `constant`, or `cosine` or `linear` down to 0 over the last `cooldown` share
    of training (1: all of it).
    `clip` bounds the gradient's norm; 0 leaves it.

    Source: Loshchilov & Hutter 2017 (arXiv 1711.05101), algorithm 2.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = attrs.field(default=1e-8, validator=validators.gt(0))

    def build(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Fused AdamW."""
        return torch.optim.AdamW(
            self.groups(named), lr=self.lr, betas=self.betas, eps=self.eps, fused=True
        )


@attrs.frozen(kw_only=True)
class SGD(_Scheduled):
    """Stochastic gradient descent with `momentum`, a control: transformers train poorly with it.

    `lr`, `weight_decay`, `warmup_images`, `schedule`, `cooldown` and `clip` are those of `adamw`.
    """

    momentum: float = attrs.field(default=0.9, validator=[validators.ge(0), validators.lt(1)])

    def build(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Fused SGD."""
        return torch.optim.SGD(self.groups(named), lr=self.lr, momentum=self.momentum, fused=True)
