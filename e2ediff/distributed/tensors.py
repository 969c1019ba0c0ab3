"""Gather, split and clip tensors that may be split over the processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from e2ediff.distributed.world import World

if TYPE_CHECKING:  # takes half a second to import, and only FSDP2 needs it
    from torch.distributed.tensor import DTensor

_SHORT = 2**15  # elements of a gradient whose norm is taken at once in float32, on a CPU
_PIECE = 2**13  # elements of the pieces of longer ones


def is_split(value: Tensor) -> TypeGuard[DTensor]:
    """Return whether each process holds a part of this tensor."""
    return hasattr(value, "full_tensor")  # an attribute of split tensors only


def whole(value: Tensor) -> Tensor:
    """Gather a tensor that may be split; a collective call."""
    return value.full_tensor() if is_split(value) else value


def split_as(value: Tensor, like: Tensor) -> Tensor:
    """Split a full tensor that every process has like `like`; return it if that is not split."""
    if not is_split(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    # Every process has the value, so nothing needs to be sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def mine(values: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of each tensor that this process holds, sharing its memory."""
    return [v.to_local() if is_split(v) else v for v in values]


@torch.no_grad()
def clip_gradients(
    parameters: Sequence[nn.Parameter], largest: float, world: World, *, wait: bool = True
) -> Tensor:
    """Scale all gradients so that their total norm is at most `largest`; return the norm.

    With 0 for `largest` gradients stay as they are. Without `wait` the norm is not read, as on a
    GPU, where that would wait for the device.

    As torch's `clip_grad_norm_`, but squares are added in float64, so that the norm depends on how
    the gradients are grouped or split in its seventh digit at most.

    Returns:
        The norm before clipping, a scalar in float64.
    """
    with_gradient = [p.grad for p in parameters if p.grad is not None]
    if not with_gradient:
        return torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    grads = mine(with_gradient)
    cpu = grads[0].device.type == "cpu" and type(grads[0]) is Tensor  # not fake tensors
    squares = _squares(grads) if cpu else _squares_at_once(grads)
    read = float(squares) if cpu and wait else math.nan
    if cpu and not math.isfinite(read):
        # A finite gradient may have squares that exceed float32.
        squares = squares.where(squares.isfinite(), _squares_at_once(grads))
    if any(is_split(g) for g in with_gradient):
        squares, read = world.total(squares), math.nan
    norm = squares.sqrt()
    if largest <= 0:
        return norm
    if not math.isfinite(read) or math.sqrt(read) + 1e-6 > largest:
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, factor.to(grads[0].dtype))
    return norm


def _squares(gradients: Sequence[Tensor]) -> Tensor:
    """Sum all squares in float64, on a CPU.

    Norms of short pieces are taken in float32, and their squares added in float64: a float32 norm
    of millions of elements has five correct digits, and converting all of them to float64 takes
    three times as long.
    """
    short, norms = [], []
    for gradient in gradients:
        if gradient.dtype.itemsize < 4:
            gradient = gradient.float()
        if gradient.numel() <= _SHORT:
            short.append(gradient)
            continue
        flat, rest = gradient.reshape(-1), gradient.numel() % _PIECE
        if rest:  # hardly ever, and each call takes as long as the norm of a piece
            short.append(flat[-rest:])
            flat = flat[:-rest]
        norms.append(torch.linalg.vector_norm(flat.view(-1, _PIECE), dim=1))
    if short:
        norms.append(torch.stack(list(torch._foreach_norm(short))))
    return torch.cat(norms).double().square().sum()


def _squares_at_once(gradients: list[Tensor]) -> Tensor:
    """Sum all squares in float64, with one operation on a GPU."""
    # pieces of a split gradient may be empty
    filled = [g for g in gradients if g.numel()] or gradients
    norms = torch._foreach_norm(filled, 2, dtype=torch.float64)
    return torch.stack(list(norms)).square().sum()
