"""Lay out the weights of two networks for operations that pair them.

The parameters of a small network are kept one after another in memory: an operation on the vector
of all of them costs what its bytes cost, and one on a list of tensors half a microsecond more for
each, which is more than its bytes.
On a CPU large ones are paired in pieces that fit its caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeGuard

import torch
from torch import Tensor, nn

SMALL = 2**22
"""Elements up to which parameters are joined; beyond, a list of tensors costs hardly more."""

_PIECE = 2**20  # elements, on a CPU

_ALIGNED = 64  # bytes at which each parameter begins, as torch allocates them on a CPU


@torch.no_grad()
def join(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Move parameters to places one after another, with gaps of zeros that align them.

    Returns:
        The vector of them all, which shares their memory; None if they stay where they are, as
        they are large, of several types or devices, or share memory with one another. Parameters
        that were joined before stay, too, and have the same vector.
    """
    first, starts, total = parameters[0], [], 0
    for p in parameters:
        if (p.dtype, p.device) != (first.dtype, first.device) or p.is_meta:
            return None
        starts.append(total)
        size = p.numel() * p.itemsize
        total += (size + -size % _ALIGNED) // p.itemsize
    if total > SMALL:
        return None
    memory = first.untyped_storage()
    begin = first.data_ptr()
    placed = [
        p.data_ptr() - begin == at * p.itemsize for p, at in zip(parameters, starts, strict=True)
    ]
    if memory.nbytes() == total * first.itemsize and all(placed):
        return first.new_empty(0).set_(memory, 0, (total,), (1,))
    if _overlap(parameters):
        return None
    vector = first.new_zeros(total)
    for p, start in zip(parameters, starts, strict=True):
        part = vector[start : start + p.numel()].view_as(p)
        part.copy_(p)
        p.data = part
    return vector


def _overlap(parameters: Sequence[nn.Parameter]) -> bool:
    """Return whether two of them have numbers in the same place, which each would lose here."""
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.itemsize) for p in parameters)
    return any(end > begin for (_, end), (begin, _) in pairwise(spans))


class Pairs:
    """The parameters of two networks of one architecture, in lists of corresponding pieces."""

    def __init__(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
        self._sides = [*ours], [*theirs]
        self._pair()

    def _pair(self) -> None:
        self._lists: list[tuple[list[Tensor], list[Tensor]]] = [self._sides] * any(self._sides)
        self._watched: list[nn.Parameter] = []
        ours, theirs = ([p for p in side if _plain(p)] for side in self._sides)
        if not ours or len(ours) + len(theirs) < sum(map(len, self._sides)):
            return
        vectors = join(ours), join(theirs)
        if vectors[0] is not None and vectors[1] is not None:
            self._lists = [([vectors[0]], [vectors[1]])]
        elif ours[0].device.type == "cpu":
            pieces = zip(_pieces(ours), _pieces(theirs), strict=True)
            self._lists = [([a], [b]) for a, b in pieces]
        else:
            return
        self._watched = [*ours, *theirs]
        self._addresses = [*map(Tensor.data_ptr, self._watched)]

    def current(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Return the lists; those of the new places if the `data` of a parameter was replaced."""
        if self._watched and self._addresses != [*map(Tensor.data_ptr, self._watched)]:
            self._pair()
        return self._lists


def _plain(value: Tensor) -> TypeGuard[nn.Parameter]:
    """Return whether this is a parameter as it was made: not split, not fake, not turned."""
    return type(value) is nn.Parameter and value.is_contiguous()


def _pieces(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [piece for p in parameters for piece in torch.split(p.detach().view(-1), _PIECE)]
