"""An update of AdamW as recipes build it, against torch's other forms and the fewest bytes.

    python benchmarks/speed/optimizer.py
    python benchmarks/speed/optimizer.py --device cuda --size base

Its bytes are four numbers read of a parameter and three written, whose time is that of copying as
many.
"""

from __future__ import annotations

import copy

import click
import torch
from measuring import Report, benchmark, contest, copying
from networks import read

from e2ediff.host.recipe import Recipe
from e2ediff.model.build import build_nets

_BYTES = 28  # read parameter, gradient and two moments, write all but the gradient, in float32


@benchmark(rounds=9)
@click.option("--size", "sizes", multiple=True, default=("quickstart", "small"), show_default=True)
def main(report: Report, rounds: int, sizes: tuple[str, ...]) -> None:
    """Time updates of networks of each size."""
    report.probe()
    rate = copying(report.device)
    for size in sizes:
        recipe: Recipe = read(size)
        net = build_nets(recipe, report.device)[0].online
        count = sum(p.numel() for p in net.parameters())
        forms = {"loop": {"foreach": False}, "foreach": {"foreach": True}}

        def ready(net: torch.nn.Module) -> torch.nn.Module:
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            return net

        own = ready(copy.deepcopy(net))
        built = {"ours": recipe.optimizer.build([*own.named_parameters()])}
        for name, form in forms.items():
            other = ready(copy.deepcopy(net))
            built[name] = torch.optim.AdamW(other.parameters(), lr=1e-4, **form)
        found = contest({n: o.step for n, o in built.items()}, report.device, rounds)
        floor = found.median("ours") * rate / (_BYTES * count)
        report.row(
            f"{size} ({count / 1e6:.2f}M): {1e3 * found.median('ours'):.3f} ms, "
            f"{found.ratio('loop', 'ours'):.1f} times as fast as a loop, "
            f"{found.ratio('foreach', 'ours'):.1f} as fast as foreach; {floor:.2f}x the time of "
            f"copying {_BYTES} bytes a parameter",
            size=size, parameters=count,
            ms={name: 1e3 * found.median(name) for name in found.seconds},
            against_loop=found.ratio("loop", "ours"), of_copying=floor,
        )  # fmt: skip
        report.probe()


if __name__ == "__main__":
    main()
