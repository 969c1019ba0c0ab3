"""Derive the memory of one of several devices from that of one: DDP adds, FSDP2 splits."""

from __future__ import annotations

import attrs

from e2ediff.host.recipe import Recipe
from e2ediff_plan.memory import Memory

GATHERED = "gathered for a pass"
# Every device holds these in full.
_WHOLE = ("images of the probe", "feature networks")
# Blocks that FSDP2 has in memory at once: the one that computes, its gradient, the next one, and
# the buffer that one of them travels in.
BLOCKS = 4


def spread(memory: Memory, recipe: Recipe, gpus: int) -> Memory:
    """Return memory on each of `gpus` devices, under the recipe's `parallel`."""
    if gpus == 1:
        return memory
    shards = recipe.microshards // gpus
    return _fsdp2(memory, gpus, shards) if recipe.parallel == "fsdp2" else _ddp(memory, shards)


def _ddp(memory: Memory, shards: int) -> Memory:
    """Add the gradient buckets, which exist before the first backward pass.

    From the second micro-shard of a device on, gradients are in memory anyway.
    """
    if shards > 1:
        return memory
    return attrs.evolve(memory, passing=memory.passing + memory.state["gradients"])


def _fsdp2(memory: Memory, gpus: int, shards: int) -> Memory:
    """Split weights, averages, gradients and optimizer state over the devices.

    Weights outside of blocks are gathered for the whole pass, blocks one after another.
    Gradients of several micro-shards are accumulated in full before they are split.
    """
    whole = {k: v for k, v in memory.state.items() if k in _WHOLE}
    split = {k: v // gpus for k, v in memory.state.items() if k not in _WHOLE}
    gradients = memory.state["gradients"]
    kept = sum(memory.state.values()) - sum(whole.values()) - gradients
    gathered = memory.outside_blocks + BLOCKS * memory.largest_block
    passing = memory.passing - kept + kept // gpus + gathered
    if shards > 1:
        passing += gradients // gpus
        split["gradients"] += gradients
    unsplit = sum(whole.values()) + memory.batch
    return attrs.evolve(
        memory,
        state={**split, **whole, GATHERED: gathered},
        passing=passing,
        updating=unsplit + (memory.updating - unsplit) // gpus,
    )
