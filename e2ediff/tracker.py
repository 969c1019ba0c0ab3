"""Trackers: where a run's figures and pictures go besides its own directory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from typing import ClassVar

from torch import Tensor

from e2ediff.errors import ResourceError


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
    """One entry of the recipe's `trackers:` list.

    `needs` names the packages that `open` imports, as pip and Python call them: `("wandb",)`.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def check(self) -> None:
        """Refuse a tracker that cannot be opened here; called before a run's directory is made.

        Raises:
            ResourceError: A package of `needs` is not installed.
        """
        for package in self.needs:
            if find_spec(package) is None:
                name = type(self).__name__
                raise ResourceError(
                    f"trackers: {name} needs {package}, which is not installed: "
                    f"`pip install {package}`"
                )

    @abstractmethod
    def open(self, directory: str) -> Tracker:
        """Start tracking the run whose directory is this; also called again on resume."""
