"""A step's randomness, from the seed and what it is for."""

from __future__ import annotations

import torch
from torch import Tensor

from e2ediff.host.recipe import Recipe
from e2ediff.objective import Draw
from e2ediff.run.seeds import generator


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
