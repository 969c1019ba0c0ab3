"""What the engine reads: image shapes, batches and data sources.

Shapes: B batch, C H W image.
Images are uint8 in a source and float in [-1, 1] in a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import attrs
from torch import Tensor


@attrs.frozen
class ImageSpec:
    """Shape of the images and number of classes; `classes` is 0 for unlabelled data."""

    channels: int
    height: int
    width: int
    classes: int
    class_names: tuple[str, ...] = ()

    @property
    def null_label(self) -> int:
        """The label that means "no class": one past the last class."""
        return self.classes


@attrs.frozen
class Batch:
    """Images x (B, C, H, W), float in [-1, 1], and their labels (B,), int64."""

    x: Tensor
    label: Tensor


class DataSource(ABC):
    """Images that can be read by index, in any order and from any process."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), uint8, and labels (B,), int64, at these indices.

        Deterministic: the same indices give the same values in every process.

        Raises:
            DataError: An image cannot be read; the message has its path.
        """


class SourceConfig(ABC):
    """The recipe's `data:` block: knows the images' shape before any file is opened."""

    @property
    @abstractmethod
    def image(self) -> ImageSpec:
        """Shape and classes, without touching the data: `check` works on a bare machine."""

    @property
    def flip(self) -> bool:
        """Whether the loader may mirror images left to right."""
        return False

    @property
    def has_held_out(self) -> bool:
        """Whether `open(held_out=True)` gives other images than the training ones."""
        return True

    @abstractmethod
    def open(self, *, held_out: bool = False) -> DataSource:
        """The images to train on, or with `held_out` those for the probe and for scores.

        A source without a held-out set returns its training images for both.

        Raises:
            DataError: The data are missing or not what this block says.
        """
