"""Steps that the device has no memory for: split into smaller parts, or refused with a remedy."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from look import Look
from measuring import forget_peak, peak
from steps import numbers, random_batch, read_recipe, told
from torch import nn

from e2ediff.data import Batch
from e2ediff.distributed.world import World
from e2ediff.errors import ResourceError
from e2ediff.host.recipe import Recipe
from e2ediff.step.assembly import assemble
from e2ediff.step.update import Update

_SHARE = 0.7  # of the memory that a step needs beyond what is held between steps


def run(look: Look) -> None:
    """Take a first step with enough memory, and with less in a fresh state."""
    device = torch.device(look.device)
    own = [] if look.tiny else ["batch=128", "microshards=1"]
    for expected, norm in (("split", "layer"), ("refused", "batch")):
        with look.attempt(expected=expected) as row:
            recipe = read_recipe(look, "dsd_in256_s", f"backbone.latent_norm={norm}", *own)
            batch = random_batch(recipe, device)
            wanted, needed = _with_enough(recipe, batch, device)
            found, said = _with_less(recipe, batch, device, needed)
            end = "refused" if not found else "split" if said else "computed whole"
            gap = [abs(v - wanted[k]) / max(abs(wanted[k]), 1e-6) for k, v in found.items()]
            look.note(
                **row, ok=end == expected, end=end, largest_relative_gap=max(gap, default=None),
                said=said, step_needs_gib=needed / 2**30,
            )  # fmt: skip


def _with_less(
    recipe: Recipe, batch: Batch, device: torch.device, needed: int
) -> tuple[dict[str, float], str]:
    """Return a first step's figures, none if it is refused, and what was said."""
    said: list[str] = []
    parts = assemble(recipe, device)
    update = Update(recipe, parts, World(), lambda kind, text, **_: said.append(text))
    rows = recipe.batch // recipe.microshards
    try:
        with _shortage(device, needed, parts.step, rows):
            found = numbers(update(batch, 0))
    except ResourceError as refused:
        return {}, str(refused)
    return found, " / ".join(said)


def _with_enough(
    recipe: Recipe, batch: Batch, device: torch.device
) -> tuple[dict[str, float], int]:
    """Return a first step's figures, and the bytes that it needs beyond those held before."""
    update = Update(recipe, assemble(recipe, device), World(), told)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    forget_peak(device)
    found = numbers(update(batch, 0))
    return found, (peak(device) or 0) - held


@contextlib.contextmanager
def _shortage(device: torch.device, needed: int, step: nn.Module, rows: int) -> Iterator[None]:
    """Leave a part of the memory that a step needs; the rest of the card is filled.

    A CPU has no such error: there the step itself raises it for more than half a micro-shard.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        filling = torch.empty(free - int(_SHARE * needed), dtype=torch.uint8, device=device)
        try:
            yield
        finally:
            del filling
            torch.cuda.empty_cache()
        return

    def refuse(module: nn.Module, given: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and len(given[0].x) > rows // 2:
            raise torch.OutOfMemoryError("more than half a micro-shard")

    hook = step.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()
