"""An optimizer whose learning rates fall in steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import nn
from typing_extensions import override

from e2ediff.optimizer import OptimizerConfig


@attrs.frozen(kw_only=True)
class RateSteps:
    """A rate that is multiplied by `factor` after every `every_images`, and is 0 from `until` on.

    `match` is the pattern of a group of the inner optimizer, or "" for all that is in none.
    `until` counts images too; 0 is never.
    """

    match: str = ""
    every_images: int = attrs.field(validator=validators.gt(0))
    factor: float = attrs.field(validator=[validators.ge(0), validators.le(1)])
    until: int = attrs.field(default=0, validator=validators.ge(0))

    def at(self, images: int) -> float:
        """Return the multiplier after so many images, in [0, 1]."""
        if 0 < self.until <= images:
            return 0.0
        return float(self.factor ** (images // self.every_images))


@attrs.frozen(kw_only=True)
class Stepped(OptimizerConfig):
    """Another optimizer, whose groups' learning rates fall in steps besides.

    `inner` is that optimizer, such as `adamw`, with its groups.
    `steps` has at most one entry for each of these groups, whose `match` is the group's, and one
    without `match` for what is in none; each multiplies the rate that `inner` gives:
    `[{match: "online.dit_e.*", every_images: 1000, factor: 0.5, until: 4000}]`.

    Source: LDM-is-AE (arXiv 2609.37080), where the encoder's rate falls to a third every 50 epochs
    and to 0 after 200; its released script, where the other rate falls to a tenth every 200.
    """

    trial: ClassVar[tuple[str, ...]] = ("optimizer.inner=adamw",)

    inner: OptimizerConfig
    steps: tuple[RateSteps, ...] = attrs.field(default=())

    @steps.validator
    def _once(self, field: attrs.Attribute[object], value: tuple[RateSteps, ...]) -> None:
        names = [step.match for step in value]
        if both := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two steps have the pattern {min(both)!r}; make it one.")

    @property
    def groups(self) -> Sequence[object]:
        """Return the groups of the inner optimizer, each with a `match`, for one around this."""
        return getattr(self.inner, "groups", ())

    @override
    def build(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return self.inner.build(named)

    @override
    def factor(self, images: int, total: int) -> float:
        return self.inner.factor(images, total) * self._step("", images)

    @override
    def group_factor(self, name: str, images: int, total: int) -> float:
        return self.inner.group_factor(name, images, total) * self._step(name, images)

    @override
    def problems(self, parameters: Sequence[str]) -> Sequence[tuple[str, str]]:
        """Find steps of groups that the inner optimizer lacks, and list what it finds itself."""
        groups = [str(getattr(group, "match", "")) for group in self.groups]
        found = [
            (f"steps.{i}.match", f"{step.match!r} is no group of inner, which has {groups}")
            for i, step in enumerate(self.steps)
            if step.match not in ("", *groups)
        ]
        return [
            *found,
            *((f"inner.{field}", what) for field, what in self.inner.problems(parameters)),
        ]

    @property
    @override
    def clip(self) -> float:
        return self.inner.clip

    def _step(self, name: str, images: int) -> float:
        found = [step.at(images) for step in self.steps if step.match == name]
        return found[0] if found else 1.0
