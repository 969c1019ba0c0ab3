"""What objectives around another objective share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from e2ediff.backbone import Backbone
from e2ediff.errors import DataError
from e2ediff.interpolant import Interpolant
from e2ediff.objective import Nets, Objective


class Around(Objective):
    """An objective around another, `of`, whose declarations about the denoiser it repeats."""

    of: Objective

    @property
    def trains_averages(self) -> bool:  # type: ignore[override]
        """Return the other objective's."""
        return self.of.trains_averages

    @property
    def trains_guidance(self) -> bool:  # type: ignore[override]
        """Return the other objective's."""
        return self.of.trains_guidance

    @property
    def trains_latents(self) -> bool:  # type: ignore[override]
        """Return the other objective's."""
        return self.of.trains_latents

    @property
    def compares_images(self) -> bool:  # type: ignore[override]
        """Return the other objective's."""
        return self.of.compares_images

    @property
    def needs_whole_weights(self) -> bool:  # type: ignore[override]
        """Return the other objective's."""
        return self.of.needs_whole_weights

    def trained_until(self, path: Interpolant) -> float:
        """Return the other objective's."""
        return self.of.trained_until(path)

    def heads(self, backbone: Backbone) -> nn.ModuleDict:
        """Return the other objective's."""
        with _inner_names():
            return self.of.heads(backbone)

    def frozen(self, backbone: Backbone) -> nn.ModuleDict:
        """Return the other objective's."""
        with _inner_names():
            return self.of.frozen(backbone)


@contextlib.contextmanager
def _inner_names() -> Iterator[None]:
    """Name options of the objective inside as those of `objective.of` in its errors."""
    try:
        yield
    except DataError as error:
        raise type(error)(_renamed(str(error))) from error


def _renamed(text: str) -> str:
    return text.replace("objective.", "objective.of.")


def inner_problems(of: Objective, nets: Nets) -> list[tuple[str, str]]:
    """List what the objective inside finds, its options named as those of `objective.of`."""
    return [(_inside(where), _renamed(what)) for where, what in of.problems(nets)]


def _inside(where: str) -> str:
    inside = where == "objective" or where.startswith("objective.")
    return f"objective.of{where.removeprefix('objective')}" if inside else where
