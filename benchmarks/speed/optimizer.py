"""Updates of AdamW and Muon as recipes build them, against torch's other forms.

    python benchmarks/speed/optimizer.py
    python benchmarks/speed/optimizer.py --device cuda --size base

AdamW moves all of a network: ours is torch's fused form, beside a loop and `foreach`. Its bytes
are four numbers read of a parameter and three written, whose time is that of copying as many.
Muon moves its hidden matrices: ours takes those of a shape together, torch's one after another.
"""

from __future__ import annotations

from collections.abc import Sequence

import click
import torch
from measuring import Report, benchmark, contest, copying
from networks import read
from torch import nn

from e2ediff.model.build import build_nets
from e2ediff.parts.optimizers.muon import Muon
from e2ediff.parts.optimizers.scheduled import AdamW

_BYTES = 28  # read parameter, gradient and two moments, write all but the gradient, in float32


def copied(named: Sequence[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Return copies of parameters, with random gradients."""
    found = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    for _, p in found:
        p.grad = torch.randn_like(p)
    return found


def forms_of_adamw(
    named: Sequence[tuple[str, nn.Parameter]],
) -> dict[str, torch.optim.Optimizer]:
    """Return AdamW as recipes build it, and torch's other forms with the same options."""
    ours = AdamW(lr=1e-4)
    alike = {"lr": ours.lr, "betas": ours.betas, "eps": ours.eps, "weight_decay": 0.0}
    built: dict[str, torch.optim.Optimizer] = {"ours": ours.build(copied(named))}
    for name, foreach in {"loop": False, "foreach": True}.items():
        built[name] = torch.optim.AdamW([p for _, p in copied(named)], foreach=foreach, **alike)
    return built


def time_adamw(
    report: Report,
    rounds: int,
    size: str,
    named: Sequence[tuple[str, nn.Parameter]],
    rate: float,
) -> None:
    """Report an update of all parameters; `rate` is that of copying, in bytes a second."""
    built = forms_of_adamw(named)
    found = contest({n: o.step for n, o in built.items()}, report.device, rounds)
    count = sum(p.numel() for _, p in named)
    floor = found.median("ours") * rate / (_BYTES * count)
    report.row(
        f"{size} ({count / 1e6:.2f}M), AdamW: {1e3 * found.median('ours'):.3f} ms, "
        f"{found.ratio('loop', 'ours'):.1f} times as fast as a loop, "
        f"{found.ratio('foreach', 'ours'):.1f} as fast as foreach; {floor:.2f}x the time of "
        f"copying {_BYTES} bytes a parameter",
        what="adamw", size=size, parameters=count,
        ms={name: 1e3 * found.median(name) for name in found.seconds},
        against_loop=found.ratio("loop", "ours"), of_copying=floor,
    )  # fmt: skip


def time_muon(
    report: Report, rounds: int, size: str, named: Sequence[tuple[str, nn.Parameter]]
) -> None:
    """Report an update of the hidden matrices alone, without AdamW's for the rest."""
    ours = Muon(lr=1e-4)
    hidden = [(name, p) for name, p in named if ours.hidden(name, p)]
    if not hidden:
        return
    theirs = torch.optim.Muon(
        [p for _, p in copied(hidden)], lr=ours.lr, weight_decay=ours.weight_decay,
        momentum=ours.momentum, nesterov=ours.nesterov, ns_steps=ours.steps,
        adjust_lr_fn=ours.scale,
    )  # fmt: skip
    built = {"ours": ours.build(copied(hidden)), "torch's": theirs}
    found = contest({n: o.step for n, o in built.items()}, report.device, min(rounds, 5), warm=1)
    count = sum(p.numel() for _, p in hidden)
    report.row(
        f"{size} ({count / 1e6:.2f}M in {len(hidden)} matrices), Muon: "
        f"{1e3 * found.median('ours'):.3f} ms, " + found.against("ours", "torch's"),
        what="muon", size=size, parameters=count, matrices=len(hidden),
        ms={name: 1e3 * found.median(name) for name in found.seconds},
        of_torchs=found.ratio("ours", "torch's"),
    )  # fmt: skip


@benchmark(rounds=9)
@click.option("--size", "sizes", multiple=True, default=("quickstart", "small"), show_default=True)
def main(report: Report, rounds: int, sizes: tuple[str, ...]) -> None:
    """Time updates of networks of each size."""
    recipes = {size: read(size) for size in sizes}
    report.probe()
    rate = copying(report.device)
    for size, recipe in recipes.items():
        named = [*build_nets(recipe, report.device)[0].online.named_parameters()]
        time_adamw(report, rounds, size, named, rate)
        time_muon(report, rounds, size, named)
        report.probe()


if __name__ == "__main__":
    main()
