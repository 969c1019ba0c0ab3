"""What the images of a set are conditioned on: classes, or what is known of held-out images.

A set refers to its conditions by number, so that a list of them is short and cheap to send to
other processes: a number is a class or, for conditions of another kind, a held-out image whose
condition is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from e2ediff.condition import ClassLabels, Condition
from e2ediff.data import DataSource
from e2ediff.host.recipe import Recipe
from e2ediff.loading.bad_images import open_source
from e2ediff.model.labels import LabelLaw, lay_out

SetLaw = LabelLaw | Literal["held_out"]
"""The law of class labels, or `held_out`: those of held-out images in order, again and again."""


def numbers_of(
    recipe: Recipe, images: int, law: LabelLaw, seed: int, classes: Sequence[int] = ()
) -> tuple[list[int], SetLaw]:
    """Number the conditions of a set over all classes or held-out images; also return their law.

    With `classes` only these are taken.

    Raises:
        DataError: The held-out images cannot be read.
    """
    conditioning = recipe.data.image.conditioning
    if isinstance(conditioning, ClassLabels):
        return lay_out(classes or range(conditioning.kinds), images, law, seed), law
    held_out = range(len(open_source(recipe.data, held_out=True)))
    return lay_out(held_out, images, "balanced", seed), "held_out"


class Conditions:
    """The conditions of these numbers, for `Model.sample`; reads held-out images on demand."""

    def __init__(self, recipe: Recipe, numbers: Sequence[int]) -> None:
        self.recipe = recipe
        self.numbers = numbers
        self._source: DataSource | None = None

    def __getitem__(self, rows: slice) -> Sequence[int] | Condition:
        """Return the conditions of these images of the set.

        Raises:
            DataError: A held-out image cannot be read.
        """
        numbers, conditioning = self.numbers[rows], self.recipe.data.image.conditioning
        if isinstance(conditioning, ClassLabels):
            return numbers
        if self._source is None:
            self._source = open_source(self.recipe.data, held_out=True)
        return conditioning.accept(self._source.read(numbers)[1], "data")
