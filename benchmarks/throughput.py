"""Images a second of a recipe's training step, eager and compiled, against the matmul ceiling.

    python benchmarks/throughput.py recipes/dsd_in256.yaml
    python benchmarks/throughput.py recipes/quickstart.yaml --set batch=4 --steps 2 --compile off

Images are random, so no data is read. A step is the real one: micro-shards, gradients, clipping,
optimizer, averages. FLOPs are those that `e2ediff check` counts, without what is recomputed.
The ceiling is the best square matmul in the recipe's precision, measured before and after.
Prints a table, and the same as one line of JSON.
"""

from __future__ import annotations

import json
import resource
import statistics
import time

import click
import torch

from e2ediff.data import Batch
from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import Recipe, load_recipe
from e2ediff.model.build import DTYPES, choose_device
from e2ediff.step.assembly import assemble
from e2ediff.step.count import count
from e2ediff.step.update import Update


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling(device: torch.device, dtype: torch.dtype, side: int, rounds: int = 5) -> float:
    """FLOP/s of the best of some products of two square random matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def _show(kind: str, text: str, **fields: object) -> None:
    click.echo(text)


def images_per_second(
    recipe: Recipe, device: torch.device, steps: int, warmup: int
) -> dict[str, float]:
    """Speed and peak memory of a run's first training step, taken again and again."""
    update = Update(recipe, assemble(recipe, device), World(), _show)
    image, g = recipe.data.image, torch.Generator().manual_seed(0)
    shape = (recipe.batch, image.channels, image.height, image.width)
    condition = image.conditioning.example(recipe.batch)
    x = torch.rand(shape, generator=g) * 2 - 1
    batch = Batch(x=x.to(device), condition=condition.to(device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    taken = []
    for _ in range(warmup + steps):
        synchronize(device)
        began = time.perf_counter()
        update(batch, 0)
        synchronize(device)
        taken.append(time.perf_counter() - began)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = statistics.median(taken[warmup:])
    return {"images_per_second": recipe.batch / seconds, "peak_gib": peak / 2**30,
            "first_step_seconds": taken[0]}  # fmt: skip


@click.command()
@click.argument("recipe_path", default="recipes/quickstart.yaml")
@click.option("--set", "overrides", multiple=True, help="As of `e2ediff run`.")
@click.option("--compile", "kinds", multiple=True, default=("off", "blocks", "step"))
@click.option("--steps", default=30, show_default=True)
@click.option("--warmup", default=10, show_default=True)
@click.option("--side", type=int, help="Of the matmul; by default 8192 on CUDA, 1024 on the CPU.")
@click.option("--threads", default=1, show_default=True)
def main(
    recipe_path: str,
    overrides: tuple[str, ...],
    kinds: tuple[str, ...],
    steps: int,
    warmup: int,
    side: int | None,
    threads: int,
) -> None:
    """Time a recipe's step with each kind of compilation."""
    torch.set_num_threads(threads)
    host = load()
    rows = []
    for kind in kinds:
        recipe = load_recipe(host, recipe_path, [*overrides, f"compile={kind}"])
        device = choose_device(recipe.device)
        side = side or (8192 if device.type == "cuda" else 1024)
        dtype = DTYPES[recipe.precision]
        flops = count(recipe).flops[recipe.objective.phases[0]]
        before = ceiling(device, dtype, side)
        found = images_per_second(recipe, device, steps, warmup)
        best = max(before, ceiling(device, dtype, side))
        share = found["images_per_second"] * flops / best
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        row = {"recipe": recipe.name, "compile": kind, "device": name, "batch": recipe.batch,
               "microshards": recipe.microshards, "precision": recipe.precision,
               "gflop_per_image": flops / 1e9, "ceiling_tflops": best / 1e12,
               "share_of_ceiling": share, **found}  # fmt: skip
        rows.append(row)
        click.echo(
            f"{recipe.name} compile={kind:<7} {found['images_per_second']:9.1f} images/s  "
            f"{share:6.1%} of {best / 1e12:.3g} TFLOP/s  {found['peak_gib']:.2f} GiB  "
            f"first step {found['first_step_seconds']:.1f} s"
        )
    click.echo(json.dumps({"torch": str(torch.__version__), "threads": threads, "rows": rows}))


if __name__ == "__main__":
    main()
