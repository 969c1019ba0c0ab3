"""Feature networks: fixed networks whose features compare images.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class FeatureNetwork(nn.Module, ABC):
    """A fixed network.

    `forward` takes images (B, C, H, W) in [-1, 1] of any size and 1 or 3 channels and returns
    feature maps (B, K, h, w), from shallow to deep; gradients reach the images.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps of images in [-1, 1]."""


class FeatureConfig(ABC):
    """Names a feature network in a recipe, with the place and hash of its weights."""

    @abstractmethod
    def build(self) -> FeatureNetwork:
        """The network with its weights, in eval mode and without gradients of its own.

        Raises:
            DataError: The weights are missing or are not those whose hash the recipe gives.
        """
