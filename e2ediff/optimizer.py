"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn


class OptimizerConfig(ABC):
    """The recipe's `optimizer:` block."""

    @abstractmethod
    def build(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Build an optimizer of these parameters, its learning rate the peak one.

        Before every step each group's rate becomes its peak times `factor`; of a group that has a
        name (the key `name` of its dict), times `group_factor`.
        """

    @abstractmethod
    def factor(self, images: int, total: int) -> float:
        """Return the learning rate's multiplier after `images` of `total` images, in [0, 1]."""

    def group_factor(self, name: str, images: int, total: int) -> float:
        """Return `factor` for a named parameter group; "" is the default group."""
        return self.factor(images, total)

    def problems(self, parameters: Sequence[str]) -> Sequence[tuple[str, str]]:
        """List what does not fit parameters of these names: (field, what and what to do)."""
        return ()

    @property
    def clip(self) -> float:
        """Largest norm of the gradient over all parameters; 0 leaves gradients alone."""
        return 0.0
