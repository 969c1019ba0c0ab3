"""Average weights: a copy of the network that follows the trained one."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch_ema import ExponentialMovingAverage

from e2ediff.averaging import Averaging
from e2ediff.backbone import Backbone
from e2ediff.distributed.tensors import mine
from e2ediff.model.contiguous import Pairs
from e2ediff.parts.averages import Constant


def update_all(averages: Iterable[Average]) -> None:
    """Move averages towards the weights of the networks that they follow.

    All are updated piece by piece, so that averages of one network read its weights from memory
    once.
    """
    with torch.no_grad():
        counted = [(average._pairs.current(), average._count()) for average in averages]
        for pieces in zip_longest(*(pairs for pairs, _ in counted)):
            for pair, (_, share) in zip(pieces, counted, strict=True):
                if pair is not None:
                    torch._foreach_lerp_(pair[0], pair[1], share)


class Average(ExponentialMovingAverage):  # type: ignore[misc]
    """A torch-ema average whose averaged tensors are the parameters of a network of their own.

    torch-ema keeps the averaged tensors, in the order of the parameters and without names, the
    count of updates and the decay; it copies them elsewhere (`copy_to`, `average_parameters`) and
    saves and loads them (`state_dict`). All of that is inherited. This class adds:

    - `net`, a copy of the online network whose parameters the averaged tensors are, so that the
      average has names and is sampled from in one copy. Its buffers are copied at each update,
      but for the latent norm's statistics, which belong to one set of weights and are calibrated
      before the copy is used.
    - `update`, one operation on all weights of a small network; `update_all` has several averages
      share one pass over the weights.
    - `averaging`, the law of the decay. That of the kind `constant` is torch-ema's own, and only
      the state of such an average can be continued by torch-ema itself.
    """

    decay: float
    num_updates: int | None

    def __init__(self, online: Backbone, averaging: Averaging) -> None:
        decay, counts = 1.0, True
        if isinstance(averaging, Constant):
            decay, counts = averaging.decay, averaging.warmup
        super().__init__(online.parameters(), decay, use_num_updates=counts)
        self.online, self.averaging = online, averaging
        self.net = copy.deepcopy(online).requires_grad_(requires_grad=False).eval()
        self.net.latent_norm.train()  # batch statistics during training, as the online network
        self.bind()
        norm = set(map(id, self.net.latent_norm.buffers()))
        self._buffers = [
            (copied, buffer)
            for copied, buffer in zip(self.net.buffers(), online.buffers(), strict=True)
            if id(copied) not in norm
        ]

    def bind(self) -> None:
        """Bind the current parameters of both networks; call after they were split."""
        self.shadow_params = list(self.net.parameters())
        # Each process averages the part that it holds.
        self._pairs = Pairs(mine(self.shadow_params), mine([*self.online.parameters()]))

    def update(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Move towards the online weights, or towards `parameters`; call after each step.

        The formula of torch-ema's own `update` in an operation that reads and writes every number
        once and needs no memory of its own.
        It rounds once less: after an update both agree to two units in the last place.
        """
        if parameters is None:
            update_all([self])
        else:
            with torch.no_grad():
                torch._foreach_lerp_(mine(self.shadow_params), mine([*parameters]), self._count())

    def _count(self) -> float:
        """Count an update and copy the buffers; return the share of the online weights in it."""
        if self.num_updates is not None:
            self.num_updates += 1
        for copied, buffer in self._buffers:
            copied.copy_(buffer)
        return 1.0 - self.averaging.decay_at(self.num_updates or 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an average, including the parameters of `net`.

        Its `decay` is ignored, as the recipe defines the decay.
        """
        decay = self.decay
        super().load_state_dict(state_dict)
        self.decay = decay
        self.copy_to(self.net.parameters())
        self.bind()

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Move `net`, and with it the averaged tensors, which are its parameters."""
        self.net.to(device=device, dtype=dtype)
        self.bind()

    @property
    def updates(self) -> int:
        """Return the number of updates, which sets the decay; 0 if the decay is constant."""
        return self.num_updates or 0

    @updates.setter
    def updates(self, count: int) -> None:
        if self.num_updates is not None:
            self.num_updates = count
