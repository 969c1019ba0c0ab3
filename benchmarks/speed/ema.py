"""An update of an average of the weights, against torch-ema's and the fewest bytes.

    python benchmarks/speed/ema.py
    python benchmarks/speed/ema.py --size base --averages 2

The floor is one `lerp_` of two vectors as long as all parameters, which reads and writes every
number once. With several averages each contestant updates all of them.
"""

from __future__ import annotations

import click
import torch
from measuring import Report, benchmark, contest
from networks import read
from torch_ema import ExponentialMovingAverage

from e2ediff.model.averages import Average, update_all
from e2ediff.model.build import build_nets
from e2ediff.parts.averages import Constant


@benchmark(rounds=9)
@click.option("--size", "sizes", multiple=True, default=("quickstart", "small"), show_default=True)
@click.option("--averages", default=1, show_default=True, type=click.IntRange(1))
def main(report: Report, rounds: int, sizes: tuple[str, ...], averages: int) -> None:
    """Time updates of networks of each size."""
    recipes = {size: read(size) for size in sizes}
    report.probe()
    for size, recipe in recipes.items():
        net = build_nets(recipe, report.device)[0].online
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.02)
        law = Constant(decay=0.999)
        ours = [Average(net, law) for _ in range(averages)]
        theirs = [ExponentialMovingAverage(net.parameters(), 0.999) for _ in range(averages)]
        count = sum(p.numel() for p in net.parameters())
        flat = [torch.randn(count, device=report.device) for _ in range(averages + 1)]

        def torch_ema(theirs=theirs) -> None:
            for one in theirs:
                one.update()

        def floor(flat=flat) -> None:
            for one in flat[1:]:
                one.lerp_(flat[0], 0.001)

        found = contest(
            {"ours": lambda ours=ours: update_all(ours), "torch-ema": torch_ema, "floor": floor},
            report.device, rounds,
        )  # fmt: skip
        gain = found.ratio("torch-ema", "ours")
        report.row(
            f"{size} ({count / 1e6:.2f}M, {averages} averages): {1e3 * found.median('ours'):.3f} "
            f"ms, {found.against('ours', 'floor')}; {gain:.2f} times as fast as torch-ema",
            size=size, parameters=count, averages=averages,
            ms={name: 1e3 * found.median(name) for name in found.seconds},
            of_floor=found.ratio("ours", "floor"), gain=gain,
        )  # fmt: skip
        report.probe()


if __name__ == "__main__":
    main()
