"""Prepare a network for use: eval mode, and a latent norm calibrated for its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from e2ediff.backbone import Backbone, Encode

_CHUNK = 256  # images in one calibration pass


@torch.no_grad()
def calibrate(net: Backbone, images: Tensor) -> None:
    """Calibrate the latent norm for these weights, from images (M, C, H, W)."""
    if net.latent_norm.has_statistics:
        norm_training = net.latent_norm.training
        net.latent_norm.train()
        raws = [_raw(net, chunk) for chunk in torch.split(images, _CHUNK)]
        net.latent_norm.calibrate(torch.cat(raws))
        net.latent_norm.train(norm_training)


@torch.no_grad()
def own_latents(net: Backbone, x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images (M, C, H, W) to latents, and those before the norm, (M, N, D), in one pass.

    The norm takes its statistics from these images and keeps them, so that `decode` and
    `denoise` agree with the latents; the network is in eval mode.
    """
    if not net.latent_norm.has_statistics:
        (out,) = net.outputs(Encode(x=x))
        return out.value, out.value if out.raw is None else out.raw
    net.latent_norm.train()
    raw = torch.cat([_raw(net, chunk) for chunk in torch.split(x, _CHUNK)])
    return normalised(net, raw), raw


def normalised(net: Backbone, raw: Tensor) -> Tensor:
    """Normalise latents (M, N, D) by their own statistics, which the norm keeps."""
    net.latent_norm.calibrate(raw)
    z: Tensor = net.latent_norm.eval()(raw)
    return z


def _raw(net: Backbone, x: Tensor) -> Tensor:
    (out,) = net.outputs(Encode(x=x))
    if out.raw is None:
        raise ValueError(
            f"{type(net).__name__}.outputs must fill Output.raw for encode passes, because its "
            f"latent norm '{net.latent.norm}' needs statistics"
        )
    return out.raw


@contextlib.contextmanager
def at_rest(net: Backbone) -> Iterator[Backbone]:
    """Put the network in eval mode; restore its modes on exit."""
    modes = [(m, m.training) for m in net.modules()]
    net.eval()
    try:
        yield net
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def in_use(net: Backbone, images: Tensor) -> Iterator[Backbone]:
    """Put the network in eval mode, with norm statistics of its own weights.

    Args:
        net: Any set of weights.
        images: Training images (M, C, H, W) for the statistics.

    Its modes are restored on exit.
    """
    calibrate(net, images)
    with at_rest(net):
        yield net
