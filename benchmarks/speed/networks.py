"""Recipes at the sizes that several benchmarks time, and their steps on random images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from e2ediff.data import Batch
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import Recipe, load_recipe
from e2ediff.step.assembly import Assembly, assemble
from e2ediff.step.update import Update

RECIPES = Path(__file__).parents[2] / "recipes"
_QUICKSTART, _FULL = str(RECIPES / "quickstart.yaml"), str(RECIPES / "dsd_in256.yaml")
SIZES: dict[str, tuple[str, tuple[str, ...]]] = {
    # name: recipe and what is changed
    "quickstart": (_QUICKSTART, ()),
    "block": (
        _QUICKSTART,
        ("backbone.depth=1", "backbone.width=16", "backbone.heads=1", "batch=2"),
    ),
    "small": (
        _FULL,
        ("backbone.width=384", "backbone.depth=6", "backbone.heads=6", "batch=4", "microshards=1",
         "precision=float32"),
    ),
    "base": (_FULL, ()),
}  # fmt: skip
"""The quickstart, one with a single block, 6 blocks of 384 at 256 tokens, and the full recipe."""


SEEN = 2
"""Steps of the run before the one that is timed."""


def read(size: str, *changes: str) -> Recipe:
    """Return a recipe by the name of its size, or by its path.

    Raises:
        click.UsageError: It is neither.
        RecipeError: The recipe is wrong.
    """
    if size not in SIZES and "://" not in size and not Path(size).exists():
        known = ", ".join(SIZES)
        raise click.UsageError(f"--size {size}: is no file of a recipe, and no size of {known}.")
    path, own = SIZES.get(size, (size, ()))
    return load_recipe(load(), path, [*own, *changes])


def random_batch(recipe: Recipe, device: torch.device) -> Batch:
    """Return a batch of random images on the device."""
    image, g = recipe.data.image, torch.Generator().manual_seed(0)
    x = torch.rand(recipe.batch, image.channels, image.height, image.width, generator=g) * 2 - 1
    condition = image.conditioning.example(recipe.batch)
    return Batch(x=x.to(device), condition=condition.to(device))


def random_weights(net: torch.nn.Module) -> None:
    """Replace weights that begin as zeros, whose products cost what others cost but round to 0."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=g))


def stepper(recipe: Recipe, device: torch.device) -> tuple[Callable[[], object], Assembly]:
    """Return a function that takes the real training step again and again, and what it trains."""
    parts = assemble(recipe, device)
    random_weights(parts.step)
    update = Update(recipe, parts, World(), _show)
    batch = random_batch(recipe, device)
    return lambda: update(batch, SEEN * recipe.batch), parts


def counted(work: Callable[[], object]) -> float:
    """Return the FLOPs of what is not compiled; torch counts attention in its written-out form."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def _show(kind: str, text: str, **fields: Any) -> None:
    click.echo(f"{kind}: {text}", err=True)
