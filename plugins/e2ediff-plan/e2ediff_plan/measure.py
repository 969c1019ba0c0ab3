"""Measure this machine: its rate of matrix products, and time and memory of a real step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import attrs
import torch

from e2ediff.host.recipe import Recipe
from e2ediff.model.build import DTYPES, choose_device
from e2ediff.step.assembly import assemble
from e2ediff_plan.devices import Device, memory_of_machine
from e2ediff_plan.rehearsal import blank_batch, optimizer_step

_SECONDS = 4.0  # approximate limit of a measured step on a CPU
_ROUNDS = 5


@attrs.frozen
class Measured:
    """A real step with micro-shards of `rows` images: its seconds, and peak memory in bytes.

    `peak` is None on a CPU, where torch does not record it.
    """

    rows: int
    seconds: float
    peak: int | None


def measured_device(recipe: Recipe) -> Device:
    """Return the device of the recipe, with timed matrix products in its precision.

    Raises:
        ResourceError: The recipe asks for a device that is not available.
    """
    device = choose_device(recipe.device)
    dtype = DTYPES[recipe.precision]
    cuda = device.type == "cuda"
    side = 8192 if cuda else 1024 if dtype == torch.float32 else 256
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = _best(lambda: torch.mm(a, b), device)
    threads = torch.get_num_threads()
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else memory_of_machine()
    name = torch.cuda.get_device_name(device) if cuda else f"cpu, {threads} threads"
    source = f"the best of {_ROUNDS} products of {side} x {side} matrices, timed just now"
    return Device(name, {recipe.precision: 2 * side**3 / seconds}, float(memory), source)


def measured_step(recipe: Recipe, device: Device, flops_per_image: float) -> Measured:
    """Time real steps on this machine, on grey images, with the recipe's micro-shards.

    On a CPU the micro-shard is reduced so that a step takes a few seconds.
    """
    where, rows = choose_device(recipe.device), recipe.batch // recipe.microshards
    if where.type == "cpu":
        per_second = 0.3 * device.flops[recipe.precision] / flops_per_image
        fewest = max([1, *(r.fewest for r in recipe.regularizers)])
        rows = max(fewest, min(rows, int(_SECONDS * per_second)))
    parts, batch = assemble(recipe, where), blank_batch(recipe, rows, where)

    def step() -> None:
        optimizer_step(recipe, parts, batch, rows, 1)

    step()  # creates the optimizers' state
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    seconds = _best(step, where, statistics.median)
    peak = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None
    return Measured(rows, seconds, peak)


def _best(
    call: Callable[[], object], device: torch.device, choose: Callable[[list[float]], float] = min
) -> float:
    times = []
    call()
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return choose(times)
