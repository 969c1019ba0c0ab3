"""Batches as a function of the number of images seen.

The k-th image of a run is image order(epoch)[k mod n], where order(epoch) is a permutation
that depends on (seed, epoch) alone.
A run therefore resumes in the middle of an epoch with the image it would have seen next, for
any number of worker processes.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from e2ediff.data import Batch, DataSource
from e2ediff.errors import DataError
from e2ediff.run.seeds import generator

_CPU = torch.device("cpu")
_ALL = slice(None)


class Order:
    """Which images a run sees, in order."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.long)

    def indices(self, start: int, count: int) -> list[int]:
        """Indices of images `start` to `start + count` of the run."""
        found: list[int] = []
        while len(found) < count:
            epoch, place = divmod(start + len(found), self.size)
            if epoch != self._epoch:
                g = generator(_CPU, self.seed, "order", epoch)
                self._permutation = torch.randperm(self.size, generator=g)
                self._epoch = epoch
            found += self._permutation[place : place + count - len(found)].tolist()
        return found


class _Steps(Dataset[tuple[Tensor, Tensor] | str]):
    """Item s is the batch of optimizer step s, as bytes; what worker processes hold.

    An item that cannot be read is the message that says so: an exception that crosses a
    process arrives as a page of traceback.
    """

    def __init__(
        self, source: DataSource, order: Order, batch: int, *, flip: bool, rows: slice
    ) -> None:
        self.source = source
        self.order = order
        self.batch = batch
        self.rows = rows
        self.flip = flip

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | str:
        start = step * self.batch
        try:
            x, label = self.source.read(self.order.indices(start, self.batch)[self.rows])
        except DataError as error:
            return str(error)
        if self.flip:
            g = generator(_CPU, self.order.seed, "flip", start)
            mirrored = torch.rand(self.batch, generator=g)[self.rows] < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x, label


def to_batch(x: Tensor, label: Tensor, device: torch.device) -> Batch:
    """Bytes (B, C, H, W) to a batch in [-1, 1] on the device; the bytes travel, not the floats."""
    x = x.to(device, non_blocking=True)
    return Batch(x=x.float() / 127.5 - 1, label=label.to(device, non_blocking=True))


def check_enough(source: DataSource, batch: int) -> None:
    """Refuse a source smaller than one batch.

    Raises:
        DataError: It is.
    """
    if len(source) < batch:
        raise DataError(
            f"data: {len(source)} images are fewer than one batch of {batch}; lower `batch` or "
            "give more images"
        )


def batches(
    source: DataSource,
    *,
    batch: int,
    seed: int,
    first: int,
    last: int,
    flip: bool,
    workers: int,
    device: torch.device,
    rows: slice = _ALL,
) -> Iterator[Batch]:
    """Batches of the optimizer steps `first` to `last`, or these rows of each of them.

    Raises:
        DataError: The source is smaller than one batch, or an image cannot be read.
    """
    check_enough(source, batch)
    steps = _Steps(source, Order(len(source), seed), batch, flip=flip, rows=rows)
    items: Iterable[tuple[Tensor, Tensor] | str] = DataLoader(
        steps,
        sampler=range(first, last),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_quiet_worker,
    )
    for item in items:
        if isinstance(item, str):
            raise DataError(item)
        yield to_batch(*item, device)


def _quiet_worker(worker: int) -> None:
    """One thread a worker; signals are the main process's business."""
    import signal

    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def fixed_images(
    source: DataSource, count: int, seed: int, purpose: str, device: torch.device
) -> Batch:
    """The same `count` images at every call, chosen by (seed, purpose); all if fewer."""
    g = generator(_CPU, seed, purpose)
    chosen: Sequence[int] = torch.randperm(len(source), generator=g)[:count].tolist()
    return to_batch(*source.read(chosen), device)
