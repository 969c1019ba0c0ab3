"""The norm of gradients and their scaling, against torch's `clip_grad_norm_`.

    python benchmarks/speed/clip.py
    python benchmarks/speed/clip.py --size base --rounds 5

Measured where gradients are within the norm, as in nearly every step of a run, and where all are
scaled; there they are grown again before each call, outside the clock. torch adds squares in
float32; the error of both norms is relative to one in float64.
"""

from __future__ import annotations

import click
import torch
from measuring import Report, benchmark, contest
from networks import read

from e2ediff.distributed.tensors import clip_gradients
from e2ediff.distributed.world import World
from e2ediff.host.recipe import Recipe
from e2ediff.model.build import build_nets


def compare(report: Report, rounds: int, size: str, recipe: Recipe) -> None:
    """Report the time of both at the network of a recipe, and their errors."""
    world = World()
    trained = [*build_nets(recipe, report.device)[0].online.parameters()]
    for p in trained:
        p.grad = torch.randn_like(p)
    grads = [p.grad for p in trained if p.grad is not None]
    exact = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
    ours = clip_gradients(trained, 0, world)
    theirs = torch.nn.utils.get_total_norm(grads)
    count = sum(p.numel() for p in trained)
    for case, largest in {"within": 1e9, "scaled": float(exact) / 2}.items():

        def own(largest: float = largest) -> None:
            clip_gradients(trained, largest, world, wait=report.device.type == "cpu")

        def torchs(largest: float = largest) -> None:
            torch.nn.utils.clip_grad_norm_(trained, largest)

        def grow() -> None:
            torch._foreach_mul_(grads, 2.0)

        found = contest(
            {"ours": own, "torch's": torchs}, report.device, rounds,
            before=grow if case == "scaled" else None,  # so that every call has to scale
        )  # fmt: skip
        report.row(
            f"{size} ({count / 1e6:.2f}M), {case}: {1e3 * found.median('ours'):.3f} ms, "
            + found.against("ours", "torch's"),
            size=size, parameters=count, case=case,
            ms={name: 1e3 * found.median(name) for name in found.seconds},
            of_torchs=found.ratio("ours", "torch's"),
        )  # fmt: skip
    wrong = {n: abs(float(v / exact - 1)) for n, v in (("ours", ours), ("torch", theirs))}
    report.row(f"{size}: relative error of the norm {wrong['ours']:.1e}, torch's "
               f"{wrong['torch']:.1e}", size=size, error=wrong)  # fmt: skip


@benchmark(rounds=9)
@click.option("--size", "sizes", multiple=True, default=("quickstart", "small"), show_default=True)
def main(report: Report, rounds: int, sizes: tuple[str, ...]) -> None:
    """Time both at networks of each size."""
    recipes = {size: read(size) for size in sizes}
    report.probe()
    for size, recipe in recipes.items():
        compare(report, rounds, size, recipe)
        report.probe()


if __name__ == "__main__":
    main()
