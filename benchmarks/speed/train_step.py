"""A recipe's whole training step against the matmul ceiling, and a peer's beside it.

    python benchmarks/speed/train_step.py
    python benchmarks/speed/train_step.py --size recipes/quickstart.yaml --compile step
    python benchmarks/speed/train_step.py --peer ~/UNITE-tokenization-generation --compile off

Images are random, so no data is read. Our step is the real one: micro-shards, gradients, clipping,
optimizer, averages. FLOPs are those of matrix products, convolutions and attention, forward and
backward, counted on the step itself, without what is recomputed. The ceiling is the best matrix
product of the same process. `--peer` takes a checkout of UNITE, SiT, LightningDiT or JiT, which is
imported and run; with `--compile` other than `off` its network is compiled, too.
"""

from __future__ import annotations

import resource
from collections.abc import Callable

import attrs
import click
import torch
from measuring import Report, benchmark, clock, contest
from networks import read, stepper
from peers import compile_networks, load_peer
from peers import stepper as peer_stepper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from e2ediff.model.build import DTYPES


@attrs.frozen(eq=False)
class Contestant:
    """A step, the FLOPs of one, and its images."""

    step: Callable[[], object]
    flops: float
    images: int


def counted(step: Callable[[], object]) -> float:
    """Return the FLOPs of an uncompiled step; torch counts attention in its written-out form."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


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
    step, _ = stepper(plain, device)
    flops = counted(step)
    entered: dict[str, Contestant] = {}
    for kind in kinds:
        recipe = attrs.evolve(plain, compile=kind)
        if kind != "off":
            step, _ = stepper(recipe, device)
        entered[f"ours, {kind}"] = Contestant(step, flops, plain.batch)
    if peer is not None:
        compiled = "off" not in kinds
        theirs = load_peer(peer, plain.batch, device, compiled=compiled)
        step = peer_stepper(theirs)
        if not compiled or theirs.name in ("unite", "sit"):
            own = counted(step)
        else:  # blocks that are compiled as they are defined
            with torch.compiler.set_stance("force_eager"):
                own = counted(step)
        if compiled:
            compile_networks(theirs)
        entered[theirs.name] = Contestant(step, own, plain.batch)
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
        speed, share = one.images / seconds, one.flops / seconds / best
        against = ""
        if peer is not None and name != theirs.name:
            # Seconds a FLOP of theirs over ours, by rounds.
            scale = one.flops / entered[theirs.name].flops
            ratio = scale / found.ratio(name, theirs.name)
            against = f", {ratio:.3f} times {theirs.name} per FLOP"
        report.row(
            f"{name}: {1e3 * seconds:.1f} ms a step, {speed:.2f} images/s, "
            f"{one.flops / one.images / 1e9:.1f} GFLOP an image, {share:.3f} of the ceiling"
            f"{against}; first step {firsts[name]:.1f} s",
            name=name, size=size, batch=one.images, ms=1e3 * seconds, images_per_second=speed,
            gflop_per_image=one.flops / one.images / 1e9, share_of_ceiling=share,
            first_step_seconds=firsts[name],
            per_flop_of_peer=ratio if against else None,
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
