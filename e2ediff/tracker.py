"""Trackers: where a run's figures and pictures go besides its own directory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor


class Tracker(ABC):
    """An open sink of one run's figures.

    An error in a tracker is reported once, switches it off, and never stops training.
    """

    @abstractmethod
    def log(self, images: int, values: Mapping[str, float]) -> None:
        """Log figures at this number of images seen."""

    @abstractmethod
    def picture(self, images: int, name: str, x: Tensor) -> None:
        """Log images (P, C, H, W) in [-1, 1]."""

    @abstractmethod
    def close(self) -> None:
        """Flush and end."""


class TrackerConfig(ABC):
    """One entry of the recipe's `trackers:` list."""

    @abstractmethod
    def open(self, directory: str) -> Tracker:
        """Start tracking the run whose directory is this; also called again on resume."""
