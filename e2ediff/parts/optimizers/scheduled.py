"""Optimizers with their learning-rate schedules, counted in images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import attrs
import torch
from attrs import validators
from torch import nn
from typing_extensions import override

from e2ediff.optimizer import OptimizerConfig

Schedule = Literal["constant", "cosine", "linear", "wsd"]


def schedule_factor(
    schedule: Schedule, images: int, total: int, warmup: int, cooldown: float, floor: float = 0.0
) -> float:
    """Multiplier of the learning rate after `images` of `total`, in [0, 1].

    A linear rise over `warmup` images; then 1, falling over the last `cooldown` share of
    `total` to `floor` along a half cosine (`cosine`), a line (`linear`) or 1 minus a square root
    (`wsd`), and staying there; `constant` never falls.

    Source: warm-up, stable, decay of MiniCPM (Hu et al. 2024, arXiv 2404.06395), section 4.2,
    with the square-root decay of Hägele et al. 2024 (arXiv 2405.18392), section 3.1.
    """
    rise = min(1.0, (images + 1) / warmup) if warmup > 0 else 1.0
    if schedule == "constant":
        return rise
    start = total * (1 - cooldown)
    done = min(1.0, max(0.0, (images - start) / max(1.0, total - start)))
    if schedule == "cosine":
        height = (1 + math.cos(math.pi * done)) / 2
    else:
        height = 1 - (math.sqrt(done) if schedule == "wsd" else done)
    return rise * (floor + (1 - floor) * height)


@attrs.frozen(kw_only=True)
class ParameterGroup:
    """Parameters with a learning rate, or a schedule, of their own.

    `match` is a pattern of their names, with `*` for any text, as `heads.*` or `online.trunks.*`.
    `factor` multiplies the peak rate; 0 leaves the parameters as they are.
    `schedule`, `warmup_images`, `cooldown` and `decay_images` are the optimizer's where they are
    not given; `decay_from` and `floor` always are.
    """

    match: str = attrs.field(validator=validators.min_len(1))
    factor: float = attrs.field(default=1.0, validator=validators.ge(0))
    schedule: Schedule | None = None
    warmup_images: int | None = None
    cooldown: float | None = None
    decay_images: int | None = None


Named = Sequence[tuple[str, nn.Parameter]]

BETAS = validators.deep_iterable(validators.and_(validators.ge(0), validators.lt(1)))
"""What AdamW's decay rates are held to."""


@attrs.frozen(kw_only=True)
class Scheduled(OptimizerConfig):
    """What every optimizer here has: a peak rate, its schedule, clipping, and parameter groups."""

    lr: float = attrs.field(default=2e-4, validator=validators.gt(0))
    weight_decay: float = attrs.field(default=0.0, validator=validators.ge(0))
    warmup_images: int = attrs.field(default=0, validator=validators.ge(0))
    schedule: Schedule = "constant"
    cooldown: float = attrs.field(default=1.0, validator=[validators.gt(0), validators.le(1)])
    decay_images: int = attrs.field(default=0, validator=validators.ge(0))
    decay_from: int | None = attrs.field(
        default=None, validator=validators.optional(validators.ge(0))
    )
    floor: float = attrs.field(default=0.0, validator=[validators.ge(0), validators.le(1)])
    clip: float = attrs.field(default=1.0, validator=validators.ge(0))
    groups: tuple[ParameterGroup, ...] = attrs.field(default=())

    @groups.validator
    def _falls(self, field: attrs.Attribute[object], value: tuple[ParameterGroup, ...]) -> None:
        schedules = {self.schedule, *(group.schedule for group in value)}
        if schedules <= {"constant", None} and (self.floor > 0 or self.decay_from is not None):
            raise ValueError(
                "'floor' and 'decay_from' are of a fall, and a constant rate has none: set "
                "'schedule', or leave them out."
            )

    @groups.validator
    def _fit(self, field: attrs.Attribute[object], value: tuple[ParameterGroup, ...]) -> None:
        names = [group.match for group in value]
        if both := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two groups have the pattern {min(both)!r}; make it one.")
        for group in value:
            self._of(group)  # its schedule as a whole

    def _of(self, group: ParameterGroup) -> Scheduled:
        """This schedule with what a group has of its own."""
        keys = ("schedule", "warmup_images", "cooldown", "decay_images")
        own = {key: value for key in keys if (value := getattr(group, key)) is not None}
        if own.get("schedule") == "constant":  # nothing of the others' fall is its own
            own = {"cooldown": 1.0, "decay_images": 0, "floor": 0.0, "decay_from": None, **own}
        return attrs.evolve(self, groups=(), **own)

    @decay_images.validator
    def _one_fall(self, field: attrs.Attribute[int], value: int) -> None:
        if value > 0 and self.cooldown < 1:
            raise ValueError("give 'cooldown' or 'decay_images'; both are given.")
        if self.schedule == "wsd" and value == 0 and self.cooldown == 1:
            raise ValueError(
                "'wsd' holds the rate and then lets it fall: give 'decay_images', or 'cooldown' "
                "below 1, as the length of the fall."
            )

    @decay_from.validator
    def _length_of_fall(self, field: attrs.Attribute[int | None], value: int | None) -> None:
        if value is not None and self.decay_images == 0:
            raise ValueError(
                "'decay_from' says where a fall begins: give 'decay_images' as its length too."
            )

    @override
    def factor(self, images: int, total: int) -> float:
        end = total if self.decay_from is None else self.decay_from + self.decay_images
        fall = min(1.0, self.decay_images / end) if self.decay_images else self.cooldown
        return schedule_factor(self.schedule, images, end, self.warmup_images, fall, self.floor)

    def group_factor(self, name: str, images: int, total: int) -> float:
        """The schedule of the group with this pattern, or that of all others."""
        own = [self._of(group) for group in self.groups if group.match == name]
        return (own[0] if own else self).factor(images, total)

    def problems(self, parameters: Sequence[str]) -> list[tuple[str, str]]:
        """Patterns that match nothing, or nothing that an earlier one leaves; a fall of none."""
        left, found = list(parameters), []
        schedules = {self.schedule, *(group.schedule for group in self.groups)}
        if schedules <= {"constant", None} and (self.cooldown < 1 or self.decay_images > 0):
            what = (
                "cooldown and decay_images are the length of a fall, and a constant rate has "
                "none: set schedule to one that falls, or cooldown: 1 and decay_images: 0"
            )
            found.append(("schedule", what))
        for i, group in enumerate(self.groups):
            rest = [name for name in left if not fnmatchcase(name, group.match)]
            if len(rest) == len(left):
                all_of_it = any(fnmatchcase(name, group.match) for name in parameters)
                why = "an earlier group has all of it" if all_of_it else "matches no parameter"
                near = ", ".join(parameters[:3])
                what = f"{group.match!r}: {why}; parameters are called {near}, ..."
                found.append((f"groups.{i}.match", what))
            left = rest
        return found

    def divided(self, named: Named, lr: float) -> list[tuple[dict[str, Any], Named]]:
        """Parameters by group, those of none first: what their torch groups have, and they.

        `lr` is the peak rate of those of none.
        """
        found, left = [], list(named)
        for group in self.groups:
            mine = [(name, p) for name, p in left if fnmatchcase(name, group.match)]
            left = [(name, p) for name, p in left if not fnmatchcase(name, group.match)]
            found.append(({"name": group.match, "lr": lr * group.factor}, mine))
        return [({}, left), *found]


def grouped(
    config: Scheduled, named: Named, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for torch: of each of the optimizer's, matrices and then the rest."""
    return [
        {**group, **own}
        for own, mine in config.divided(named, lr)
        for group in decay_groups(mine, weight_decay)
    ]


def decay_groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay, vectors and embeddings without."""
    matrices = [p for name, p in named if p.ndim >= 2 and "embed" not in name]
    rest = [p for name, p in named if p.ndim < 2 or "embed" in name]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


@attrs.frozen(kw_only=True)
class AdamW(Scheduled):
    """AdamW, fused, without weight decay on vectors, embeddings and norms.

    `lr` is the peak learning rate; `warmup_images` its linear rise.
    `betas`, `eps` and `weight_decay` are the algorithm's.
    `schedule` is `constant`, or falls to 0 over the last `cooldown` share of training (1: all of
    it), or over the last `decay_images` images: `cosine`, `linear`, or `wsd`, which holds the
    rate and then falls along 1 minus a square root.
    With `decay_from` the fall over `decay_images` begins after so many images and not at the end;
    `floor` is the share of the peak that a fall ends at, where the rate then stays.
    `clip` bounds the gradient's norm; 0 leaves it.
    `groups` gives parameters, by patterns of their names, a factor of the rate or a schedule of
    their own: `[{match: "heads.*", factor: 0.1}]`.

    Source: Loshchilov & Hutter 2017 (arXiv 1711.05101), algorithm 2.
    """

    betas: tuple[float, float] = attrs.field(default=(0.9, 0.95), validator=BETAS)
    eps: float = attrs.field(default=1e-8, validator=validators.gt(0))

    @override
    def build(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = grouped(self, named, self.lr, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@attrs.frozen(kw_only=True)
class SGD(Scheduled):
    """Stochastic gradient descent with `momentum`, a control: transformers train poorly with it.

    `lr`, `weight_decay`, `warmup_images`, `schedule`, `cooldown`, `decay_images`, `decay_from`,
    `floor`, `clip` and `groups` are those of `adamw`.
    """

    momentum: float = attrs.field(default=0.9, validator=[validators.ge(0), validators.lt(1)])

    @override
    def build(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = grouped(self, named, self.lr, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, fused=True)
