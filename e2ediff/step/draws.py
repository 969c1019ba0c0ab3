"""A step's randomness, from the seed and what it is for."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from e2ediff.errors import ShapeError
from e2ediff.host.recipe import Recipe
from e2ediff.objective import Draw
from e2ediff.seeds import generator


def draw_for(recipe: Recipe, label: Tensor, purpose: str, *numbers: int) -> Draw:
    """Times, conditioning labels and a generator for images of these labels (B,).

    A function of the recipe's seed, the purpose and the numbers alone.
    """
    device, n = label.device, len(label)
    g = generator(device, recipe.seed, purpose, *numbers)
    t = recipe.times.draw(n, g, device)
    dropped = torch.rand(n, generator=g, device=device) < recipe.label_drop
    label = torch.where(dropped, recipe.data.image.null_label, label)
    return Draw(t=t, label=label, generator=g, times=recipe.times)


class UnclearDrawError(ShapeError):
    """A part of a draw is asked for in a shape that does not say which axis counts images."""


@attrs.frozen(eq=False, kw_only=True)
class PartDraw(Draw):
    """The part of a draw that belongs to some of its images.

    Everything is drawn for all `images` and cut: an image's noise does not depend on how many
    are computed at once.
    """

    images: int
    rows: slice

    def _shape(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """The shape for all images, and the axis that they lie along."""
        axes = [axis for axis, size in enumerate(shape) if size == len(self.t)]
        if len(axes) > 1:
            raise UnclearDrawError(f"a draw of shape {shape}: which axis counts images?")
        if not axes:
            return shape, -1
        whole = tuple(self.images if axis == axes[0] else n for axis, n in enumerate(shape))
        return whole, axes[0]

    def _cut(self, value: Tensor, axis: int) -> Tensor:
        start, stop, _ = self.rows.indices(self.images)
        return value if axis < 0 else value.narrow(axis, start, stop - start)

    def noise(self, like: Tensor) -> Tensor:
        """As `Draw.noise`; images lie along the first axis of `like`."""
        axis = 0 if like.shape[:1] == self.t.shape else -1
        shape = (self.images, *like.shape[1:]) if axis == 0 else tuple(like.shape)
        return self._cut(torch.randn(shape, generator=self.generator, device=like.device), axis)

    def uniform(self, *shape: int) -> Tensor:
        """As `Draw.uniform`; the axis as long as there are images here is theirs."""
        whole, axis = self._shape(shape)
        return self._cut(torch.rand(whole, generator=self.generator, device=self.t.device), axis)

    def again(self) -> Draw:
        """As `Draw.again`."""
        t = self.times.draw(self.images, self.generator, self.t.device)
        return attrs.evolve(self, t=self._cut(t, 0))


def part_of(draw: Draw, rows: slice) -> PartDraw:
    """The part of a fresh draw for these of its images; nothing may have been drawn from it."""
    return PartDraw(
        t=draw.t[rows],
        label=draw.label[rows],
        generator=draw.generator,
        times=draw.times,
        images=len(draw.t),
        rows=rows,
    )
