"""Averaged weights: a copy of the network that follows the trained one."""

from __future__ import annotations

import copy

import torch
from torch_ema import ExponentialMovingAverage

from e2ediff.backbone import Backbone
from e2ediff.distributed.tensors import mine
from e2ediff.model.power_averages import Profile


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
