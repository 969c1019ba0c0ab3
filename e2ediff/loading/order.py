"""Order and flips of training images, as functions of (seed, images seen) alone.

Shapes: M images of a source.
"""

from __future__ import annotations

import torch
from torch import Tensor

from e2ediff.seeds import generator

_CPU = torch.device("cpu")


class Order:
    """The order in which a run sees images.

    The k-th image of a run is order(epoch)[k mod M] with epoch = k div M, and order(epoch)
    depends on (seed, epoch) alone.
    Without `labels` it is a permutation. With the labels of all images, (M,), it shows all
    classes equally often, to within one image in each epoch: classes take turns, in a new
    random order each time, and no image of a class repeats before all its others were shown.
    """

    def __init__(self, size: int, seed: int, labels: Tensor | None = None) -> None:
        self.size = size
        self.seed = seed
        self.labels = labels
        self._epoch = -1
        self._places = self._mirrored = torch.empty(0, dtype=torch.long)

    def indices(self, start: int, count: int) -> list[int]:
        """Return the indices of images `start` to `start + count` of the run."""
        return self.seen(start, count)[0]

    def seen(self, start: int, count: int) -> tuple[list[int], Tensor]:
        """Return `indices`, and which of these images are flipped if flipping is on.

        Whether an image is flipped in an epoch depends on (seed, epoch, its index) alone.
        """
        found: list[int] = []
        mirrored = []
        while len(found) < count:
            epoch, place = divmod(start + len(found), self.size)
            if epoch != self._epoch:
                self._draw(epoch)
            places = self._places[place : place + count - len(found)]
            mirrored.append(self._mirrored[places])
            found += places.tolist()
        return found, torch.cat(mirrored) if mirrored else torch.empty(0, dtype=torch.bool)

    def _draw(self, epoch: int) -> None:
        g = generator(_CPU, self.seed, "order", epoch)
        if self.labels is None:
            self._places = torch.randperm(self.size, generator=g)
        else:
            self._places = _balanced(self.labels, g)
        g = generator(_CPU, self.seed, "flip", epoch)
        self._mirrored = torch.rand(self.size, generator=g) < 0.5
        self._epoch = epoch


def _balanced(labels: Tensor, g: torch.Generator) -> Tensor:
    """Return indices (M,) in which classes take turns."""
    present: Tensor = torch.unique(labels)
    turns = -(-len(labels) // len(present))
    classes = torch.cat([torch.randperm(len(present), generator=g) for _ in range(turns)])
    classes = classes[: len(labels)]
    order = torch.empty_like(labels)
    for number, label in enumerate(present):
        places = (classes == number).nonzero()[:, 0]
        images = (labels == label).nonzero()[:, 0]
        rounds = -(-len(places) // len(images))
        drawn = [images[torch.randperm(len(images), generator=g)] for _ in range(rounds)]
        order[places] = torch.cat(drawn)[: len(places)] if drawn else images[:0]
    return order
