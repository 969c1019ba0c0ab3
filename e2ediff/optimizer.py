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
        """An optimizer of these parameters, its learning rate the peak one.

        The engine multiplies each group's `initial_lr` by `factor` before every step.
        """

    @abstractmethod
    def factor(self, images: int, total: int) -> float:
        """Multiplier of the learning rate after `images` of `total` images, in [0, 1]."""

    @property
    def clip(self) -> float:
        """Largest norm of the gradient over all parameters; 0 leaves gradients alone."""
        return 0.0
