"""Images a second of the sampler; what guidance costs; what a CUDA graph would give."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from look import Look
from measuring import seconds_of, synchronize
from steps import read_recipe
from torch import Tensor

from e2ediff.backbone import Backbone
from e2ediff.host.recipe import Recipe
from e2ediff.model.build import build_nets
from e2ediff.model.inference import Model, Precision

_STEPS = "sampler.steps=4"
_GUIDANCE = "guidance={name: classifier_free, scale: 2.0}"


def run(look: Look, name: str = "dsd_in256") -> None:
    """Note the sampler's rates in both types, then a call of the denoiser in three ways."""
    device = torch.device(look.device)
    plain = read_recipe(look, name, _STEPS)
    guided = read_recipe(look, name, _STEPS, _GUIDANCE)
    net = build_nets(plain, device, frozen=False)[0].online
    net = net.eval().requires_grad_(requires_grad=False)
    kinds: tuple[Precision, ...] = ("bfloat16", "float32")
    for kind in kinds:
        net.prepare(device, getattr(torch, kind))
        for rows in (4,) if look.tiny else (32, 128):
            for title, recipe in (("plain", plain), ("guided", guided)):
                with look.attempt(precision=kind, rows=rows, guidance=title) as row:
                    model = Model(recipe, net, rows=rows, precision=kind)
                    tile = next(model.tiles([0] * rows))
                    seconds = seconds_of(partial(model.sample, [0] * rows), device, 3, 1)
                    look.note(
                        **row, calls=tile.calls, passes=tile.passes,
                        images_per_second=rows / seconds, seconds_a_call=seconds / tile.calls,
                    )  # fmt: skip
    net.prepare(device, torch.bfloat16)
    for rows in (4,) if look.tiny else (1, 32, 128):
        _one_call(look, net, _denoiser(plain, net, rows, device), rows, device)


def _denoiser(
    recipe: Recipe, net: Backbone, rows: int, device: torch.device
) -> Callable[[], Tensor]:
    spec, t = net.latent, torch.full((rows,), 0.5, device=device)
    z = torch.randn(rows, spec.tokens, spec.dim, device=device)
    condition = recipe.data.image.conditioning.null(rows, device)

    def call() -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            return net.denoise(z, t, condition)

    return call


def _one_call(
    look: Look, net: Backbone, call: Callable[[], Tensor], rows: int, device: torch.device
) -> None:
    """Note the time of a call of the denoiser: as it is, as a CUDA graph, and compiled."""
    with look.attempt(denoise="eager", rows=rows) as row:
        look.note(**row, ms=1e3 * seconds_of(call, device, 10, 3))
    if device.type != "cuda":
        return
    with look.attempt(denoise="CUDA graph", rows=rows) as row:
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            out = call()
        graph.replay()
        gap = float((out - call()).abs().max())
        look.note(**row, ms=1e3 * seconds_of(graph.replay, device, 10, 3), gap=gap)
    if rows != 32:
        return
    with look.attempt(denoise="compiled blocks", rows=rows) as row:
        for block in net.blocks():
            block.compile()
        began = time.perf_counter()
        call()
        synchronize(device)
        compiling = time.perf_counter() - began
        look.note(**row, compile_seconds=compiling, ms=1e3 * seconds_of(call, device, 10, 3))
    for block in net.blocks():
        block._compiled_call_impl = None
