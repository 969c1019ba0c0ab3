"""Averages of the weights: how much of the old average stays at each update."""

from __future__ import annotations

from abc import ABC, abstractmethod

WIDEST = 12**-0.5
"""The largest width of a power-function average: that of the mean over all of training."""


class Averaging(ABC):
    """The law of one average of the weights; the recipe names it by `kind`.

    After each optimizer step an average becomes d * average + (1 - d) * weights, where d is the
    decay of that update. The first average is the initial weights.
    """

    @abstractmethod
    def decay_at(self, update: int) -> float:
        """Return the share of the old average that stays, in [0, 1]; updates count from 1.

        A function of `update` alone: nothing else of an average's law is kept in a checkpoint.
        """
