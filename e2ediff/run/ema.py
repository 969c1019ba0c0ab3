"""Averaged weights: a copy of the network that follows the trained one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch_ema import ExponentialMovingAverage

from e2ediff.backbone import Backbone, Encode
from e2ediff.distributed.tensors import mine
from e2ediff.run.profiles import Profile

_CHUNK = 256  # images in one calibration pass


class Average:
    """An exponential moving average of a backbone, by torch-ema, or one by a profile.

    torch-ema keeps an ordered list of tensors without names, and no buffers.
    Here that list is the copy's own parameters, so that the average is a network with names, in
    one copy; buffers are taken over at each update, but for the latent norm's statistics, which
    belong to one set of weights and are calibrated before the copy is used.
    """

    def __init__(self, online: Backbone, decay: float | Profile, *, warmup: bool = False) -> None:
        self.online = online
        self.profile = decay if isinstance(decay, Profile) else None
        self.net = copy.deepcopy(online).requires_grad_(requires_grad=False).eval()
        self.net.latent_norm.train()  # batch statistics during training, as the online network
        counts = warmup or self.profile is not None
        constant = 0.0 if isinstance(decay, Profile) else decay
        self.ema = ExponentialMovingAverage(online.parameters(), constant, use_num_updates=counts)
        self.bind()
        norm = set(map(id, self.net.latent_norm.buffers()))
        self._buffers = [
            (copied, buffer)
            for copied, buffer in zip(self.net.buffers(), online.buffers(), strict=True)
            if id(copied) not in norm
        ]

    def bind(self) -> None:
        """Take up both networks' parameters as they are now; call after they were split."""
        self.ema.shadow_params = list(self.net.parameters())
        # What is split among processes is averaged piece by piece.
        self._mine, self._theirs = mine(self.ema.shadow_params), mine([*self.online.parameters()])

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the online weights; call after each optimizer step.

        The formula of torch-ema's own `update` as one operation on all tensors, which reads and
        writes every number once and needs no memory of its own.
        It rounds once less: after an update both agree to two units in the last place.
        """
        decay = self.ema.decay
        if self.ema.num_updates is not None:
            self.ema.num_updates += 1
            count = self.ema.num_updates
            early = (1 + count) / (10 + count)
            decay = self.profile.decay(count) if self.profile else min(decay, early)
        torch._foreach_lerp_(self._mine, self._theirs, 1.0 - decay)
        for copied, buffer in self._buffers:
            copied.copy_(buffer)

    @property
    def updates(self) -> int:
        """Number of updates so far, which sets the decay during warm-up, and a profile's."""
        return self.ema.num_updates or 0

    @updates.setter
    def updates(self, count: int) -> None:
        if self.ema.num_updates is not None:
            self.ema.num_updates = count


@torch.no_grad()
def calibrate(net: Backbone, images: Tensor) -> None:
    """Give the latent norm the statistics of these weights, from images (M, C, H, W)."""
    if net.latent_norm.has_statistics:
        norm_training = net.latent_norm.training
        net.latent_norm.train()
        raws = [_raw(net, chunk) for chunk in torch.split(images, _CHUNK)]
        net.latent_norm.calibrate(torch.cat(raws))
        net.latent_norm.train(norm_training)


@torch.no_grad()
def own_latents(net: Backbone, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of images (M, C, H, W) and those before the norm, (M, N, D), in one pass.

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
    """Latents (M, N, D) from those before the norm, whose statistics the norm takes and keeps."""
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
    """The network in eval mode; its modes are put back on leaving."""
    modes = [(m, m.training) for m in net.modules()]
    net.eval()
    try:
        yield net
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def in_use(net: Backbone, images: Tensor) -> Iterator[Backbone]:
    """The network as a user has it: eval mode, with the norm's statistics of its own weights.

    Args:
        net: Any set of weights.
        images: Training images (M, C, H, W) for the statistics.

    Its modes are put back on leaving.
    """
    calibrate(net, images)
    with at_rest(net):
        yield net
