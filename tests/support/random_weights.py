"""Random weights for networks whose published ones are not here."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def random_state(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Weights of the size that keeps activations near 1 through all layers."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(value.shape, generator=g)
        elif value.ndim > 1:
            scale = (2 / value[0].numel()) ** 0.5
            state[name] = scale * torch.randn(value.shape, generator=g)
        elif value.is_floating_point():
            state[name] = value + 0.1 * torch.randn(value.shape, generator=g)
        else:
            state[name] = value
    return state
