"""A feature network of any kind, from a file of `torch.export.save`.

Shapes: B batch, H W image, K features, N tokens, h w places of a map.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor
from torch.nn import functional

from e2ediff import addresses
from e2ediff.errors import DataError
from e2ediff.features import FeatureConfig, FeatureNetwork, read_file
from e2ediff.files.trial import tried
from e2ediff_features.torch_export import Program

Layout = Literal["vectors", "maps", "tokens"]
_FORMS = {"vectors": "(B, K)", "maps": "(B, K, h, w)", "tokens": "(B, N, K)"}


@attrs.frozen(kw_only=True)
class Exported(FeatureConfig):
    """Any network that `torch.export` can trace, from an archive that is read as data.

    `weights` is the path or URL of a `.pt2` file of `torch.export.save`, traced in eval mode for
    images (B, 3, size, size) with a batch that may vary; `sha256` its hash, checked before it is
    parsed. Nothing in it is unpickled or executed as code: an archive that would need that is
    refused.
    `size` is the side to which images are resized, bilinear with antialiasing, before they are
    scaled to [0, 1] and `mean` is subtracted and `std` divided by.
    `output` says what the network returns: `vectors` (B, K), `maps` (B, K, h, w) or `tokens`
    (B, N, K) of a square of patches, after `skip` others such as a class token. Several outputs
    count as maps from shallow to deep; scores read the mean over the places of the last.

    Source: the format is that of torch's `torch._export.serde.schema`.
    """

    weights: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    sha256: str | None = None
    size: int = attrs.field(default=224, validator=validators.ge(1))
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = attrs.field(
        default=(0.229, 0.224, 0.225), validator=validators.deep_iterable(validators.gt(0.0))
    )
    output: Layout = "vectors"
    skip: int = attrs.field(default=0, validator=validators.ge(0))

    def build(self) -> FeatureNetwork:
        """The network, fixed, after a first batch has shown that its outputs are as said.

        That batch, two images of zeros, is computed in a process of its own.
        """
        data, _ = read_file(self.weights, self.sha256)
        try:
            network = _Exported(self, Program(data))
        except ValueError as error:
            raise DataError(f"feature network: {self.weights}: {error}") from error

        def first_batch() -> None:
            with torch.no_grad():
                network(torch.zeros(2, 3, self.size, self.size))

        if what := tried(first_batch):
            raise DataError(f"feature network: {self.weights}: {what}")
        return network


class _Exported(FeatureNetwork):
    mean: Tensor
    std: Tensor

    def __init__(self, config: Exported, program: Program) -> None:
        super().__init__()
        self.title = f"exported-{PurePosixPath(config.weights).stem}"
        self.config, self.program, self.size = config, program, config.size
        self.register_buffer("mean", torch.tensor(config.mean).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).reshape(3, 1, 1))
        self.eval()
        batch, *image = [*program.shape]
        if batch:
            raise ValueError(
                f"it was exported for batches of {batch} alone; export it with dynamic_shapes="
                '({0: torch.export.Dim("batch")},)'
            )
        if len(image) != 3 or any(
            n not in (0, own) for n, own in zip(image, (3, self.size, self.size), strict=True)
        ):
            raise ValueError(
                f"it takes {tuple(image)} and not images (3, {self.size}, {self.size}); set `size`"
                " to their side, or export it for three channels"
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, K, h, w) of images in [-1, 1]."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        side = (self.size, self.size)
        if x.shape[2:] != side:
            x = functional.interpolate(x, side, mode="bilinear", antialias=True)
        return [self._map(y) for y in self.program(((x + 1) / 2 - self.mean) / self.std)]

    def _map(self, y: Tensor) -> Tensor:
        """One output (B, ...) as a map (B, K, h, w)."""
        layout, skip = self.config.output, self.config.skip
        if y.ndim != {"vectors": 2, "maps": 4, "tokens": 3}[layout]:
            raise ValueError(
                f"it returns {tuple(y.shape)}, and `output: {layout}` is {_FORMS[layout]}; set "
                "`output`, or export what it says"
            )
        if layout == "vectors":
            return y[:, :, None, None]
        if layout == "maps":
            return y
        patches = y[:, skip:]
        side = math.isqrt(patches.shape[1])
        if side == 0 or side * side != patches.shape[1]:
            raise ValueError(
                f"it returns {y.shape[1]} tokens, and without the first {skip} these are no "
                "square; set `skip` to the number of tokens that are no patches"
            )
        return patches.mT.reshape(len(y), -1, side, side)
