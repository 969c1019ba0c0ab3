"""Regularisers: losses of the online latents alone, added to any objective.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

from torch import Tensor

from e2ediff.objective import Draw, Nets

Rows = Literal["token", "image"]
ROWS: tuple[Rows, ...] = get_args(Rows)


class Regularizer(ABC):
    """A loss that shapes the latents, whatever the objective does.

    A subclass has a field `weight`, which multiplies the loss; 0 keeps it in the log alone.
    `term` is the loss's name, by default the class's own in snake_case; a second regulariser
    of the same name is numbered.
    `fewest` is the smallest number of images it can be computed from.

    It is added in every phase whose `Terms.z` has a gradient, and left out of the others.
    """

    term: ClassVar[str] = ""
    fewest: ClassVar[int] = 2
    weight: float

    @abstractmethod
    def loss(self, z: Tensor, draw: Draw) -> Tensor:
        """Return a scalar in float32.

        Args:
            z: Online latents, (B, N, D), after the latent norm, with their gradient.
            draw: The step's randomness, from which the objective has drawn before.
        """

    def problems(self, nets: Nets, images: int) -> Sequence[tuple[str, str]]:
        """List what in the recipe does not fit: (option of this regulariser, complaint) pairs.

        Args:
            nets: On the meta device: shapes and options without numbers.
            images: How many images are computed at once, `batch` over `microshards`.
        """
        return ()


def names_of(regularizers: Sequence[Regularizer]) -> list[str]:
    """Return the losses' names: `vicreg`, `vicreg_2`, in the order given."""
    found = [part.term or _snake_case(type(part).__name__) for part in regularizers]
    nth = [found[: i + 1].count(name) for i, name in enumerate(found)]
    return [name if n == 1 else f"{name}_{n}" for name, n in zip(found, nth, strict=True)]


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def rows_of(z: Tensor, of: Rows) -> Tensor:
    """Return latents (B, N, D) as a matrix whose rows are samples, in float32.

    `token`: every token is one, (B N, D); what is constant for a position counts as variance.
    `image`: every image is one, (B, N D).
    """
    return z.float().flatten(0, 1) if of == "token" else z.float().flatten(1)
