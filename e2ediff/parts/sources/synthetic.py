"""Images made from their index, for tests and benchmarks.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from attrs import validators
from torch import Tensor
from typing_extensions import override

from e2ediff.data import (
    DataSource,
    ImageSpec,
    Size,
    SourceConfig,
    as_size,
    height_width,
    pixel_values,
    positive_size,
)


@attrs.frozen(kw_only=True)
class Synthetic(SourceConfig):
    """Smooth random images with a class-dependent pattern, made from the index alone.

    For tests and benchmarks that need no real data.
    `count` images in `channels` channels, of `classes` classes (0: unlabelled).
    `size` is the side of square images in pixels, or `[height, width]`.
    `flip` lets the loader mirror them.
    """

    size: Size = attrs.field(default=32, converter=as_size, validator=positive_size)
    classes: int = attrs.field(default=10, validator=validators.ge(0))
    channels: int = attrs.field(default=3, validator=validators.in_((1, 3)))
    count: int = attrs.field(default=1024, validator=validators.gt(0))
    flip: bool = False

    @property
    @override
    def image(self) -> ImageSpec:
        return ImageSpec(self.channels, *height_width(self.size), self.classes)

    def open(self, *, held_out: bool = False) -> DataSource:
        """Images that are computed when read; the held-out ones have other indices."""
        return _Patterns(self, self.count if held_out else 0)


class _Patterns(DataSource):
    def __init__(self, config: Synthetic, first: int) -> None:
        self.config = config
        self.first = first

    def __len__(self) -> int:
        return self.config.count

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A wave whose direction is the class and whose phase and colour are the index's."""
        c = self.config
        index = torch.as_tensor(indices) + self.first
        label = index % max(1, c.classes)
        angle = label * torch.pi / max(1, c.classes)  # (B,)
        down, across = (torch.linspace(-1, 1, side) for side in height_width(c.size))
        along = (
            angle.cos()[:, None, None] * across[None, None, :]
            + angle.sin()[:, None, None] * down[None, :, None]
        )  # (B, H, W)
        phase = (index * 0.618034) % 1 * 2 * torch.pi
        shade = torch.stack([(index * k) % 1 for k in (0.7548777, 0.5698403, 0.8191725)])
        wave = torch.sin(6 * along + phase[:, None, None])[:, None]
        colour = (0.3 + 0.7 * shade.T)[:, : c.channels, None, None]
        x = pixel_values(wave * colour).to(torch.uint8)
        return x, label.long() if c.classes else torch.zeros_like(label)
