"""A request for images: which ones, made by which model, and where they are stored."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from e2ediff import addresses
from e2ediff.data import to_pixels
from e2ediff.errors import DivergedError
from e2ediff.model.inference import Model
from e2ediff.sample.conditions import Conditions, SetLaw
from e2ediff.sample.load import ModelRef
from e2ediff.sample.outputs import Format, ImageOutput, open_output
from e2ediff.store.storage import Store


@attrs.frozen(kw_only=True)
class SampleRequest:
    """Which images to make, by which model, and where to store them; can be sent to a process.

    `labels` has a class for each image, or the number that `Conditions` gives to a condition of
    another kind; `batch` is the number of images made and stored together.
    """

    model: ModelRef
    seed: int = 0
    law: SetLaw = "balanced"
    labels: tuple[int, ...] = ()
    format: Format = "png"
    out: str = attrs.field(default="", converter=addresses.plain)
    batch: int = 256

    def output(self, model: Model) -> ImageOutput:
        """Open the output that the images are stored in."""
        image = model.recipe.data.image
        shape = (image.height, image.width, image.channels)
        return open_output(self.format, Store(self.out), shape, self.labels)

    def make(
        self, model: Model, conditions: Conditions, output: ImageOutput, numbers: range
    ) -> Iterator[SampleCost]:
        """Make and store some images; yield each tile's cost, the last one after storing."""
        labels, cost = conditions[numbers.start : numbers.stop], SampleCost()
        finished: list[Tensor] = []
        for tile in model.tiles(labels, seed=self.seed, first=numbers.start):
            if finished:
                yield cost
            finished.append(tile.x)
            n = len(tile.x)
            cost = SampleCost(images=n, calls=tile.calls * n, passes=tile.passes * n)
        made = torch.cat(finished)
        finite = made.isfinite().flatten(1).all(1)
        broken = [i for i, ok in zip(numbers, finite.tolist(), strict=True) if not ok]
        if broken:
            raise DivergedError(
                f"sampling: {len(broken)} of {len(made)} images are not finite, the first is "
                f"number {broken[0]}; look at guidance.scale and the sampler's options, or take "
                "other weights"
            )
        x = to_pixels(made).permute(0, 2, 3, 1)
        output.put(numbers, x.contiguous().numpy())
        yield cost

    def missing(self, output: ImageOutput) -> list[range]:
        """Return the missing numbers, in blocks of at most `batch` aligned to tiles."""
        have, found = output.finished(), list[range]()
        size = max(1, self.batch // self.model.rows) * self.model.rows
        for start in range(0, len(self.labels), self.model.rows):
            tile = range(start, min(start + self.model.rows, len(self.labels)))
            if all(i in have for i in tile):
                continue
            before = found[-1] if found else range(0)
            if before.stop == tile.start and tile.stop - before.start <= size and found:
                found[-1] = range(before.start, tile.stop)
            else:
                found.append(tile)
        return found


@attrs.frozen(kw_only=True)
class SampleCost:
    """Sums over images: sequential network calls, and latents passed through a network."""

    images: int = 0
    calls: float = 0.0
    passes: float = 0.0

    def __add__(self, other: SampleCost) -> SampleCost:
        return SampleCost(
            images=self.images + other.images,
            calls=self.calls + other.calls,
            passes=self.passes + other.passes,
        )
