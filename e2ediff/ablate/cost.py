"""Count the cost of training, with phases that are active for a part of it."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from e2ediff.host.recipe import Recipe
from e2ediff.step.count import count


@attrs.frozen
class TrainingCost:
    """Parameters, FLOPs of an image by phase, and the active range of each phase.

    Forward and backward, counted as by `e2ediff check`; updates of averages, diagnostics and
    previews are left out.
    """

    parameters: int
    flops: Mapping[str, float]
    spans: Mapping[str, tuple[float, float]]
    batch: int
    total_steps: int

    @property
    def total_images(self) -> int:
        """Return the number of training images of the whole training."""
        return self.batch * self.total_steps

    @property
    def per_image(self) -> float:
        """Return FLOPs of an image, averaged over training."""
        shares = ((self.flops[p], end - start) for p, (start, end) in self.spans.items())
        return sum(flops * share for flops, share in shares)

    @property
    def total(self) -> float:
        """Return FLOPs of the whole training."""
        return self.per_image * self.total_images

    def at(self, images: float) -> float:
        """Return FLOPs spent after this many images."""
        whole = self.total_images
        spent = 0.0
        for phase, (start, end) in self.spans.items():
            active = min(images, end * whole) - start * whole
            spent += self.flops[phase] * max(0.0, active)
        return spent


def cost_of(recipe: Recipe) -> TrainingCost:
    """Count a recipe on the meta device; needs neither data nor memory for weights."""
    counted = count(recipe)
    spans = {phase: recipe.objective.span(phase) for phase in recipe.objective.phases}
    return TrainingCost(counted.parameters, counted.flops, spans, recipe.batch, recipe.total_steps)


def matched_steps(cost: TrainingCost, baseline: TrainingCost) -> int:
    """Return the steps that the baseline's FLOPs pay for, at least one."""
    return max(1, round(baseline.total / (cost.per_image * cost.batch)))
