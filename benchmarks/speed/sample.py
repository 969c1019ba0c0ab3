"""Sampling, per network call: against the network alone, a hand-written loop, and diffusers' DiT.

    python benchmarks/speed/sample.py recipes/quickstart.yaml --rows 1 --rows 32
    python benchmarks/speed/sample.py --compile --device cuda --json
    python benchmarks/speed/sample.py --shape 6x384 --rows 4 --rounds 7

The hand-written loop has the same network, times and solver on the linear path, and draws and
decodes as well. FLOPs are those of matrix products, convolutions and attention of a call.
`--shape` DEPTHxWIDTH compares a network of dsd_in256's options with diffusers'
`DiTTransformer2DModel` of the same shape, on 16 x 16 tokens of 32 channels, and needs diffusers.

Shapes: B images, N latent tokens, D latent channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

import click
import torch
from measuring import Report, benchmark, contest
from networks import RECIPES, counted
from torch import Tensor

from e2ediff.backbone import Backbone
from e2ediff.condition import concatenate
from e2ediff.host.plugins import load
from e2ediff.host.recipe import Recipe, load_recipe
from e2ediff.model.build import build_nets
from e2ediff.model.inference import Model

DIT = "diffusers' DiT"
_CFG = "{name: classifier_free, scale: 1.5}"


def built(recipe: Recipe, device: torch.device) -> Backbone:
    """Return the recipe's network with random weights, ready to sample."""
    net = build_nets(recipe, device, frozen=False)[0].online
    net.prepare(device, torch.float32)
    return net.eval().requires_grad_(requires_grad=False)


def by_hand(model: Model, rows: int) -> Callable[[], Tensor]:
    """Return an Euler loop on the linear path, written for a network that predicts x0."""
    net, device, scale = model.net, model.device, getattr(model.guidance, "scale", None)
    times, spec = model.recipe.sampler.grid(model.recipe.interpolant), net.latent
    asked = model.image.conditioning.null(rows, device)
    both = concatenate([asked, asked.null()])

    def answer(z: Tensor, t: float) -> Tensor:
        if scale is None:
            return net.denoise(z, torch.full((rows,), t, device=device), asked)
        at = torch.full((2 * rows,), t, device=device)
        with_, without = net.denoise(torch.cat([z, z]), at, both).chunk(2)
        return without + scale * (with_ - without)

    @torch.no_grad()
    def sample() -> Tensor:
        z = torch.randn(rows, spec.tokens, spec.dim).to(device)
        for t, s in pairwise(times[:-1]):
            z = z + (s - t) / (1 - t) * (answer(z, t) - z)
        return net.decode(answer(z, times[-2])).clamp(-1, 1).cpu()

    return sample


def sampled(path: str, guidance: str) -> Recipe:
    """Return a recipe that samples with 25 steps of Euler."""
    changes = ["sampler={name: euler, steps: 25, spacing: karras}", f"guidance={guidance}"]
    return load_recipe(load(), path, changes)


def compare_loops(
    report: Report, recipe: Recipe, rows: int, rounds: int, *, compiled: bool
) -> None:
    """Report the time of a network call in `Model.sample`, in a hand-written loop, and alone."""
    device, guided = report.device, recipe.guidance is not None
    model = Model(recipe=recipe, net=built(recipe, device), rows=rows)
    for block in model.net.blocks() if compiled else ():
        block.compile()
    passed = rows * (2 if guided else 1)
    spec, steps = model.net.latent, recipe.sampler.steps
    z = torch.randn(passed, spec.tokens, spec.dim, device=device)
    condition = model.image.conditioning.null(passed, device)
    t = torch.full((passed,), 0.5, device=device)
    labels = model.image.conditioning.null(rows)

    @torch.no_grad()
    def alone() -> None:
        for _ in range(steps):
            model.net.denoise(z, t, condition)

    found = contest(
        {"sample": lambda: model.sample(labels), "hand": by_hand(model, rows), "network": alone},
        device,
        rounds,
    )
    ms = {name: 1e3 * found.median(name) / steps for name in found.seconds}
    kind = "guided" if guided else "plain"
    report.row(
        f"{recipe.name} {rows:>3} images {kind:<7} {ms['sample']:8.3f} ms a call, network "
        f"{ms['network']:.3f}; {found.against('sample', 'hand')}",
        recipe=recipe.name, rows=rows, guidance=kind, compiled=compiled, ms=ms,
        against_hand=found.ratios("sample", "hand"),
    )  # fmt: skip


def parsed(shape: str) -> tuple[int, int]:
    """Return depth and width of a `--shape`, for which diffusers must be there.

    Raises:
        click.UsageError: It is no shape, or diffusers is missing.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if found is None or int(found[2]) % 64:
        raise click.UsageError(
            f"--shape {shape}: is the number of blocks, x, and a width that 64 divides, as 6x384."
        )
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        name = "diffusers"
        raise click.UsageError(f"--shape needs {name}: pip install {name}") from error
    assert DiTTransformer2DModel
    return int(found[1]), int(found[2])


def compare_networks(
    report: Report, depth: int, width: int, rows: int, rounds: int, *, compiled: bool
) -> None:
    """Report the time of one call of our network and of diffusers' DiT of the same shape."""
    from diffusers import DiTTransformer2DModel

    shape = f"{depth}x{width}"
    heads, device = width // 64, report.device
    lines = [f"backbone.width={width}", f"backbone.depth={depth}", f"backbone.heads={heads}"]
    recipe = load_recipe(load(), str(RECIPES / "dsd_in256.yaml"), lines)
    net = built(recipe, device)
    spec = net.latent
    peer = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=64, in_channels=spec.dim,
        out_channels=spec.dim, num_layers=depth, sample_size=16, patch_size=1,
        num_embeds_ada_norm=1000,
    ).to(device).eval().requires_grad_(requires_grad=False)  # fmt: skip
    z = torch.randn(rows, spec.tokens, spec.dim, device=device)
    image = z.transpose(1, 2).reshape(rows, spec.dim, 16, 16).contiguous()
    t, label = torch.full((rows,), 0.5, device=device), torch.zeros(rows, device=device).long()
    condition = recipe.data.image.conditioning.null(rows, device)

    @torch.no_grad()
    def ours() -> Tensor:
        return net.denoise(z, t, condition)

    @torch.no_grad()
    def theirs() -> Tensor:
        found: Tensor = peer(image, t, label, return_dict=False)[0]
        return found

    gflop = {name: counted(call) / 1e9 for name, call in (("ours", ours), (DIT, theirs))}
    for block in [*net.blocks(), *peer.transformer_blocks] if compiled else ():
        block.compile()
    found = contest({"ours": ours, DIT: theirs}, device, rounds)
    ms = {name: 1e3 * found.median(name) for name in found.seconds}
    report.probe()
    report.row(
        f"{shape} {rows:>3} images, {gflop['ours']:.1f} and {gflop[DIT]:.1f} "
        f"GFLOP: {ms['ours']:.1f} ms, {found.against('ours', DIT)}",
        shape=shape, rows=rows, compiled=compiled, ms=ms, gflop=gflop,
        against=found.ratios("ours", DIT),
    )  # fmt: skip


@benchmark(rounds=15)
@click.argument("recipes", nargs=-1)
@click.option("--rows", multiple=True, default=(1, 32), show_default=True, type=click.IntRange(1))
@click.option("--compile", "compiled", is_flag=True, help="Compile the networks' blocks.")
@click.option("--shape", metavar="DEPTHxWIDTH", help="Compare with diffusers' DiT instead.")
def main(
    report: Report,
    rounds: int,
    recipes: tuple[str, ...],
    rows: tuple[int, ...],
    compiled: bool,
    shape: str | None,
) -> None:
    """Compare at each number of images, without and with guidance."""
    if shape is not None:
        depth, width = parsed(shape)
        for count in rows:
            compare_networks(report, depth, width, count, rounds, compiled=compiled)
        return
    paths = recipes or (str(RECIPES / "quickstart.yaml"),)
    read = [sampled(path, guidance) for path in paths for guidance in ("null", _CFG)]
    for count in rows:
        for recipe in read:
            compare_loops(report, recipe, count, rounds, compiled=compiled)


if __name__ == "__main__":
    main()
