"""Recipes at the size of a look, and the real step of a recipe without its data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from look import Look

from e2ediff.data import Batch
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import Recipe, load_recipe
from e2ediff.step.assembly import Assembly, assemble
from e2ediff.step.update import Record, Update

TINY = ["backbone.width=32", "backbone.depth=2", "backbone.heads=2", "batch=8", "microshards=2"]
_CONTEXT = ["backbone.context=2", "backbone.context_start=1"]


def read_recipe(look: Look, name: str, *sets: str) -> Recipe:
    """Return a shipped recipe; in a rehearsal a tiny one of the same kind."""
    small = TINY if look.tiny else []
    if look.tiny and name.startswith(("jit", "unite")):
        small = [*small, *_CONTEXT]
    given = [*small, *sets, f"device={look.device}"]
    return load_recipe(load(), str(look.recipe(name)), given)


def assignments(words: tuple[str, ...]) -> list[str]:
    """Return assignments from a part's arguments, which have `~` in place of `=`."""
    return [word.replace("~", "=") for word in words]


def random_batch(recipe: Recipe, device: torch.device, seed: int = 0) -> Batch:
    """Return a whole batch of random images on the device."""
    image, g = recipe.data.image, torch.Generator().manual_seed(seed)
    x = torch.rand(recipe.batch, image.channels, image.height, image.width, generator=g) * 2 - 1
    condition = image.conditioning.example(recipe.batch)
    return Batch(x=x.to(device), condition=condition.to(device))


def stepper(
    recipe: Recipe, device: torch.device, tiny: bool
) -> tuple[Callable[[Batch, int], Record], Assembly]:
    """Return a function that takes step number i on a batch, and what it trains."""
    if tiny and recipe.compile != "off":  # a rehearsal has no time for the last stage
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    parts = assemble(recipe, device)
    update = Update(recipe, parts, World(), told)

    def step(batch: Batch, number: int) -> Record:
        return update(batch, number * recipe.batch)

    return step, parts


def told(kind: str, text: str, **fields: Any) -> None:
    """Print what a run would report."""
    print(f"{kind}: {text}", flush=True)


def numbers(record: Record) -> dict[str, float]:
    """Return a step's figures as numbers, learning rates left out."""
    return {k: float(v) for k, v in record.items() if not k.startswith("lr")}
