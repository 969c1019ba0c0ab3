"""What objectives around another objective share."""

from __future__ import annotations

from e2ediff.interpolant import Interpolant
from e2ediff.objective import Nets, Objective


class Around(Objective):
    """An objective around another, `of`, whose declarations about the denoiser it repeats."""

    of: Objective

    @property
    def trains_averages(self) -> bool:  # type: ignore[override]
        """The other objective's."""
        return self.of.trains_averages

    @property
    def trains_guidance(self) -> bool:  # type: ignore[override]
        """The other objective's."""
        return self.of.trains_guidance

    @property
    def trains_latents(self) -> bool:  # type: ignore[override]
        """The other objective's."""
        return self.of.trains_latents

    @property
    def compares_images(self) -> bool:  # type: ignore[override]
        """The other objective's."""
        return self.of.compares_images

    @property
    def needs_whole_weights(self) -> bool:  # type: ignore[override]
        """The other objective's."""
        return self.of.needs_whole_weights

    def trained_until(self, path: Interpolant) -> float:
        """The other objective's."""
        return self.of.trained_until(path)


def inner_problems(of: Objective, nets: Nets) -> list[tuple[str, str]]:
    """List what the objective inside finds, its options named as those of `objective.of`."""
    return [
        (_inside(where), what.replace("objective.", "objective.of."))
        for where, what in of.problems(nets)
    ]


def _inside(where: str) -> str:
    inside = where == "objective" or where.startswith("objective.")
    return f"objective.of{where.removeprefix('objective')}" if inside else where
