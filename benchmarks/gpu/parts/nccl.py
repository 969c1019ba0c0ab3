"""One process in a process group: collectives, and the step by DDP and by FSDP2.

Several processes need several GPUs; with one, it shows that the libraries are there and that the
code paths run. On a CPU gloo takes NCCL's place.
"""

from __future__ import annotations

import time

import attrs
import torch
import torch.distributed as dist
from look import Look
from measuring import seconds_of, synchronize
from steps import numbers, random_batch, read_recipe, told
from torch import Tensor

from e2ediff.distributed.tensors import whole
from e2ediff.distributed.world import World
from e2ediff.host.recipe import Recipe
from e2ediff.step.assembly import Assembly, assemble
from e2ediff.step.parallel import Kind, Parallel
from e2ediff.step.update import Update

_STEPS = 4


def run(look: Look) -> None:
    """Join a group, then take the same steps alone, by DDP and by FSDP2."""
    device = torch.device(look.device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    began = time.perf_counter()
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    on_device = torch.ones((1 << 16) if look.tiny else (1 << 26), device=device)
    dist.all_reduce(on_device)
    synchronize(device)
    look.note(group=backend, joined_seconds=time.perf_counter() - began)
    if device.type == "cuda":
        version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        look.note(group="nccl", version=".".join(map(str, version)))
    reduced = seconds_of(lambda: dist.all_reduce(on_device), device)
    look.note(group=backend, all_reduce_ms=1e3 * reduced, mib=on_device.nbytes / 2**20)
    dist.broadcast(torch.ones(1), 0)  # by gloo, as processes agree on what to do

    recipe = read_recipe(look, "quickstart", "precision=bfloat16", "microshards=2")
    states: dict[str, list[Tensor]] = {}
    kinds: tuple[Kind, ...] = ("one", "ddp", "fsdp2")
    for kind in kinds:
        with look.attempt(parallel=kind) as row:
            parts = _assembled(recipe, device, kind)
            update, batch = Update(recipe, parts, World(), told), random_batch(recipe, device)
            began = time.perf_counter()
            for i in range(_STEPS):
                record = update(batch, i * recipe.batch)
            losses = numbers(record)
            states[kind] = [whole(p.detach()).cpu() for p in parts.step.parameters()]
            gap = max(float((a - b).abs().max()) for a, b in
                      zip(states[kind], states["one"], strict=True))  # fmt: skip
            look.note(**row, seconds=time.perf_counter() - began, weights_gap=gap, losses=losses)
    dist.destroy_process_group()


def _assembled(recipe: Recipe, device: torch.device, kind: Kind) -> Assembly:
    """Return what `assemble` builds for several processes, in one."""
    parts = assemble(recipe, device)
    if kind == "one":
        return parts
    parallel = Parallel(parts.step, kind, World(), device)
    for average in parts.averages.values():
        average.bind()
    optimizers = {
        phase: recipe.optimizers.get(phase, recipe.optimizer).build(
            parts.step.named_trained(phase)
        )
        for phase in recipe.objective.phases
    }
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
    return attrs.evolve(parts, parallel=parallel, optimizers=optimizers)
