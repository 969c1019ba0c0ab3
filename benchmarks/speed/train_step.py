"""A recipe's whole training step against the matmul ceiling, and a peer's beside it.

    python benchmarks/speed/train_step.py
    python benchmarks/speed/train_step.py --size recipes/quickstart.yaml --compile step
    python benchmarks/speed/train_step.py --peer ../UNITE-tokenization-generation --compile off

Images are random, so no data is read. Our step is the real one: micro-shards, gradients, clipping,
optimizer, averages. Its FLOPs are those that `e2ediff check` prints: products of matrices,
convolutions and attention, forward and backward once, whatever the optimizer multiplies and
whatever is computed again; perceptual networks are left out. The ceiling is the best product of
matrices of the same process in the recipe's precision.
`--peer` takes a checkout of UNITE, SiT, LightningDiT or JiT, which is imported and run in that
precision: uncompiled against our uncompiled step, and compiled against our compiled ones. Its
FLOPs are those of its loss and gradients.
"""

from __future__ import annotations

import resource
from collections.abc import Callable

import attrs
import click
import torch
from measuring import Report, benchmark, clock, contest
from networks import SEEN, counted, read, stepper
from peers import Peer, compile_networks, load_peer
from peers import stepper as peer_stepper
from torch import Tensor

from e2ediff.host.recipe import Recipe
from e2ediff.model.build import DTYPES
from e2ediff.step.count import count
from e2ediff.step.update import active_phases


@attrs.frozen(eq=False)
class Contestant:
    """A step, the FLOPs of an image, how it is compiled, and the peer's entry of the same kind."""

    step: Callable[[], object]
    flops: float
    kind: str
    against: str | None = None


def flops_of(recipe: Recipe) -> float:
    """Return the FLOPs of an image in the phases of the step that is timed, as `check` counts."""
    by_phase = count(recipe).flops
    return sum(by_phase[phase] for phase in active_phases(recipe, SEEN * recipe.batch))


def enter_peer(
    path: str, recipe: Recipe, device: torch.device, kinds: set[str]
) -> dict[str, Contestant]:
    """Return a peer's step uncompiled, compiled, or both, as our steps are."""
    dtype = DTYPES[recipe.precision]

    def loaded(*, compiled: bool) -> Peer:
        return in_precision(
            load_peer(path, recipe.batch, device, compiled=compiled), device, dtype
        )

    plain, entered = loaded(compiled=False), dict[str, Contestant]()
    flops = counted(lambda: plain.loss().backward()) / recipe.batch
    for p in plain.net.parameters():
        p.grad = None
    if "off" in kinds:
        entered[f"{plain.name}, off"] = Contestant(peer_stepper(plain), flops, "off")
    if kinds - {"off"}:
        peer = loaded(compiled=True)
        compile_networks(peer)
        entered[f"{peer.name}, compiled"] = Contestant(peer_stepper(peer), flops, "compiled")
    return entered


def in_precision(peer: Peer, device: torch.device, dtype: torch.dtype) -> Peer:
    """Return the peer with its loss in this type, as these projects train in bfloat16."""

    def loss() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return peer.loss()

    return attrs.evolve(peer, loss=loss)


@benchmark(rounds=7)
@click.option("--size", default="small", show_default=True, help="Of a recipe, or its path.")
@click.option("--set", "changes", multiple=True, help="As of `e2ediff run`.")
@click.option("--compile", "kinds", multiple=True, default=("off",), show_default=True,
              type=click.Choice(["off", "blocks", "step"]))  # fmt: skip
@click.option("--peer", metavar="PATH", help="Checkout of another project.")
def main(
    report: Report,
    rounds: int,
    size: str,
    changes: tuple[str, ...],
    kinds: tuple[str, ...],
    peer: str | None,
) -> None:
    """Time the steps by turns."""
    device = report.device
    plain = read(size, *changes, f"device={device}", "compile=off")
    dtype = DTYPES[plain.precision]
    # First, because what a peer lacks is to be known before anything is counted.
    theirs = enter_peer(peer, plain, device, {*kinds}) if peer is not None else {}
    flops, entered = flops_of(plain), dict[str, Contestant]()
    for kind in kinds:
        step, _ = stepper(attrs.evolve(plain, compile=kind), device)
        alike = [n for n, one in theirs.items() if (one.kind == "off") == (kind == "off")]
        entered[f"ours, {kind}"] = Contestant(step, flops, kind, *alike)
    entered |= theirs
    firsts = {}
    for name, one in entered.items():
        began = clock(device)
        one.step()
        firsts[name] = clock(device) - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    report.probe(dtype)
    found = contest({n: c.step for n, c in entered.items()}, device, rounds)
    best = report.probe(dtype)
    for name, one in entered.items():
        seconds = found.median(name)
        speed, share = plain.batch / seconds, one.flops * plain.batch / seconds / best
        against, ratio = "", None
        if one.against is not None:
            # Seconds a FLOP of theirs over ours, by rounds.
            ratio = one.flops / entered[one.against].flops / found.ratio(name, one.against)
            against = f", {ratio:.3f} times {one.against} per FLOP"
        report.row(
            f"{name}: {1e3 * seconds:.1f} ms a step, {speed:.2f} images/s, "
            f"{one.flops / 1e9:.3f} GFLOP an image, {share:.3f} of the ceiling"
            f"{against}; first step {firsts[name]:.1f} s",
            name=name, size=size, batch=plain.batch, ms=1e3 * seconds, images_per_second=speed,
            compile=one.kind, precision=plain.precision, gflop_per_image=one.flops / 1e9,
            share_of_ceiling=share, first_step_seconds=firsts[name], peer=one.against,
            per_flop_of_peer=ratio,
        )  # fmt: skip
    kinds_of = [n for n in entered if n.startswith("ours")]
    for name in kinds_of[1:]:
        gain = found.ratio(kinds_of[0], name)
        report.row(f"{name} is {gain:.3f} times as fast as {kinds_of[0]}",
                   name=name, gain=gain, over=kinds_of[0])  # fmt: skip
    peak = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    report.row(f"peak memory of all together {peak / 2**20:.0f} MiB", peak_mib=peak / 2**20)


if __name__ == "__main__":
    main()
