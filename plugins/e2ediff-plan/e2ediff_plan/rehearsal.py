"""Run one optimizer step as the engine does, on real or fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from e2ediff.data import Batch
from e2ediff.distributed.tensors import clip_gradients
from e2ediff.distributed.world import World
from e2ediff.host.recipe import Recipe
from e2ediff.step.assembly import Assembly
from e2ediff.step.draws import draw_for


@attrs.frozen
class Passage:
    """Memory and FLOPs of one optimizer step, by phase.

    `saved` is the bytes that a micro-shard's forward pass saved for its backward pass: each
    storage once, parameters and the batch left out.
    `gradients` is the bytes of the gradients.
    `optimizer_flops` is the FLOPs of the optimizer.
    """

    saved: Mapping[str, int]
    gradients: Mapping[str, int]
    optimizer_flops: Mapping[str, float]


def blank_batch(recipe: Recipe, images: int, device: torch.device) -> Batch:
    """Make a batch of this many grey images on the device."""
    shape = recipe.data.image
    x = torch.zeros(images, shape.channels, shape.height, shape.width, device=device)
    return Batch(x=x, condition=shape.conditioning.null(images, device))


def optimizer_step(
    recipe: Recipe,
    parts: Assembly,
    batch: Batch,
    rows: int,
    shards: int,
    turn: Callable[[bool], None] = lambda passing: None,
) -> Passage:
    """Run a step of every phase on the first `shards` micro-shards of `rows` images of the batch.

    Averages are updated as the engine does.
    `turn` is called with True before forward and backward passes, and with False after them.
    """
    saved: dict[str, int] = {}
    gradients: dict[str, int] = {}
    flops: dict[str, float] = {}
    for phase, optimizer in parts.optimizers.items():
        config = recipe.optimizers.get(phase, recipe.optimizer)
        parts.step.zero_grad(set_to_none=True)
        turn(True)
        for shard in range(shards):
            mine = slice(shard * rows, (shard + 1) * rows)
            part = batch.rows(mine)
            kept = _Kept([*parts.step.parameters(), *parts.step.buffers(), batch.x])
            with saved_tensors_hooks(kept.pack, _same):
                draw = draw_for(recipe, part.condition, "draw", 0, shard)
                total, _, _ = parts.step(part, draw, phase)
            saved[phase] = kept.bytes
            (total / shards).backward()
            del total
        turn(False)
        held = [p.grad for p in parts.step.parameters() if p.grad is not None]
        gradients[phase] = sum(g.untyped_storage().nbytes() for g in held)
        del held
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        clip_gradients(trained, config.clip, World())
        counter = FlopCounterMode(display=False)
        with counter:
            optimizer.step()
        flops[phase] = float(counter.get_total_flops())
    for average in parts.averages.values():
        average.update()
    return Passage(saved, gradients, flops)


class _Kept:
    """Counts bytes of the storages saved for the backward pass."""

    def __init__(self, others: Sequence[Tensor]) -> None:
        self._others = {t.untyped_storage()._cdata for t in others}
        self._held: dict[int, int] = {}

    def pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._others and key not in self._held:
            self._held[key] = storage.nbytes()
            weakref.finalize(storage, self._held.pop, key, 0)
        # Not t itself: an operation that saves its own output would never be freed.
        return t.detach()

    @property
    def bytes(self) -> int:
        return sum(self._held.values())


def _same(kept: Tensor) -> Tensor:
    return kept
