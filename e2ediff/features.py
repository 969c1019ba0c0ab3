"""Feature networks: fixed networks whose features compare images.

Shapes: B batch, C H W image, K channels of a map, F features of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection

from torch import Tensor, nn

from e2ediff.data import from_pixels


class FeatureNetwork(nn.Module, ABC):
    """A fixed network.

    `forward` takes images (B, C, H, W) in [-1, 1] of any size and 1 or 3 channels and returns
    feature maps (B, K, h, w), from shallow to deep; gradients reach the images.
    `vectors` is what scores are read off.

    `title` names the network in the names of scores, by default its class.
    `family` is what some metrics insist on, such as `clip`.
    `published` is True for the Inception weights in whose features a Fréchet distance is an FID.
    `taps` are the vectors that it offers; all have `pool`.
    `size` is the height and width to which `vectors` brings images; 0 leaves them as they are.
    """

    title: str = ""
    family: str = ""
    published: bool = False
    taps: tuple[str, ...] = ("pool",)
    size: int = 0

    @abstractmethod
    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps of images in [-1, 1]."""

    def vectors(self, pixels: Tensor, taps: Collection[str] = ("pool",)) -> dict[str, Tensor]:
        """Vectors (B, F) of images, by tap; here the last map's mean over places.

        Args:
            pixels: Images (B, C, H, W), float, from 0 to 255.
            taps: Which vectors; each is one of `self.taps`.
        """
        return {"pool": self(from_pixels(pixels))[-1].mean(dim=(2, 3))}


class FeatureConfig(ABC):
    """Names a feature network in a recipe, with the place and hash of its weights."""

    @abstractmethod
    def build(self) -> FeatureNetwork:
        """The network with its weights, in eval mode and without gradients of its own.

        Raises:
            DataError: The weights are missing or are not those whose hash the recipe gives.
        """

    def blank(self) -> FeatureNetwork:
        """The same network with whatever weights need no file: for its shapes and its cost."""
        return self.build()
