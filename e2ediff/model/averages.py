"""Averaged weights: a copy of the network that follows the trained one."""

from __future__ import annotations

import copy

import torch
from torch_ema import ExponentialMovingAverage

from e2ediff.averaging import Averaging
from e2ediff.backbone import Backbone
from e2ediff.distributed.tensors import mine
from e2ediff.parts.averages import Constant


class Average:
    """An average of a backbone by the law of its kind; that of `constant` is torch-ema's.

    torch-ema keeps an ordered list of tensors without names, and no buffers.
    Here that list is the copy's own parameters, so that the average is a network with names, in
    one copy; buffers are taken over at each update, but for the latent norm's statistics, which
    belong to one set of weights and are calibrated before the copy is used.
    """

    def __init__(self, online: Backbone, averaging: Averaging) -> None:
        self.online, self.averaging = online, averaging
        self.net = copy.deepcopy(online).requires_grad_(requires_grad=False).eval()
        self.net.latent_norm.train()  # batch statistics during training, as the online network
        decay, counts = 1.0, True
        if isinstance(averaging, Constant):
            decay, counts = averaging.decay, averaging.warmup
        self.ema = ExponentialMovingAverage(online.parameters(), decay, use_num_updates=counts)
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
        if self.ema.num_updates is not None:
            self.ema.num_updates += 1
        decay = self.averaging.decay_at(self.ema.num_updates or 1)
        torch._foreach_lerp_(self._mine, self._theirs, 1.0 - decay)
        for copied, buffer in self._buffers:
            copied.copy_(buffer)

    @property
    def updates(self) -> int:
        """Number of updates so far, which sets the decay; 0 where the decay never changes."""
        return self.ema.num_updates or 0

    @updates.setter
    def updates(self, count: int) -> None:
        if self.ema.num_updates is not None:
            self.ema.num_updates = count
