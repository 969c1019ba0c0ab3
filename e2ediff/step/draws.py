"""Draw a step's randomness from the seed and its purpose."""

from __future__ import annotations

import attrs
import torch

from e2ediff.condition import Condition
from e2ediff.host.recipe import Recipe
from e2ediff.objective import Draw
from e2ediff.seeds import generator


def draw_for(
    recipe: Recipe, condition: Condition, purpose: str, *numbers: int, progress: float = 0.0
) -> Draw:
    """Draw times, conditions with some rows dropped, and a generator, for images of a condition.

    The draw depends on the recipe's seed, the purpose and the numbers alone; `progress` is the
    completed share of training.
    """
    device, n = condition.device, len(condition)
    g = generator(device, recipe.seed, purpose, *numbers)
    draw = Draw(
        t=recipe.times.draw(n, g, device),
        condition=condition,
        generator=g,
        times=recipe.times,
        progress=torch.full((), progress, device=device),
        label_drop=recipe.label_drop,
    )
    return attrs.evolve(draw, condition=draw.drop(condition))


def training_draw(
    recipe: Recipe, phase: str, images: int, attempt: int, condition: Condition, shard: int
) -> Draw:
    """Draw the randomness of a micro-shard of a training step.

    Args:
        recipe: The run's recipe, which has the seed.
        phase: Phase of the objective; each has its own draws.
        images: Images that the run has seen before this step.
        attempt: Number of rollbacks so far; each changes all later draws.
        condition: Condition of the micro-shard's images, S rows.
        shard: Number of the micro-shard in the step, over all processes.
    """
    purpose = "draw" if phase == recipe.objective.phases[0] else f"draw-{phase}"
    if attempt:
        purpose = f"{purpose}@{attempt}"
    progress = images / recipe.total_images
    return draw_for(recipe, condition, purpose, images, shard, progress=progress)
