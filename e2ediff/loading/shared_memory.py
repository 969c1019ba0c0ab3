"""Divide batches over the processes that read them, and bound the shared memory between them.

A worker process hands over images through shared memory, of which a container has 64 MB by
default.
"""

from __future__ import annotations

import mmap
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from e2ediff.data import ImageSpec

SHARED = Path("/dev/shm")  # noqa: S108 - looked at, not written
_SMALL = 1 << 20  # bytes: below that, handing over takes as long as decoding
_ITEMS = 64  # of a batch: each that is ready holds a few open files


class Division(NamedTuple):
    """How a batch is divided into items, which worker processes read and the main one joins.

    Args:
        rows: Images of an item; the last one of a batch may have fewer.
        items: Items of a batch.
        ahead: Items that each worker reads ahead.
        needed: Bytes of shared memory that all items which are ready, and the one being joined,
            take at most, over all processes of the run; 0 without workers.
    """

    rows: int
    items: int
    ahead: int
    needed: int


def divide(
    image: ImageSpec, batch: int, microshards: int, workers: int, processes: int = 1
) -> Division:
    """Divide what each process of a run computes of a batch over its workers.

    Each worker reads an equal share of every batch, so that the first one does not wait for a
    single worker, in items of at most a micro-shard. As handing over an item costs about a
    millisecond, none is made smaller than 1 MiB or a 64th of the batch. Two batches are read
    ahead, and at least two items a worker.

    Args:
        image: The images.
        batch: Images in a whole batch.
        microshards: Micro-shards in a whole batch.
        workers: Worker processes of each process; without any, an item is all of its rows.
        processes: Processes that share the batch equally.
    """
    rows = _up(batch, processes)
    if not workers:
        return Division(rows, 1, 0, 0)
    condition = image.conditioning.null(1, "meta").tensors().values()
    sizes = [image.channels * image.height * image.width, *(t.nbytes for t in condition)]
    least = min(rows, max(_SMALL // sum(sizes), _up(rows, _ITEMS), 1))
    share = max(_up(rows, workers), least)
    each = _up(share, _up(share, max(_up(batch, microshards), least)))
    items = _up(rows, each)
    ahead = max(2, _up(2 * items, workers))
    item = sum(_up(each * size, mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes)
    return Division(each, items, ahead, processes * (workers * ahead + 1) * item)


def _up(value: int, by: int) -> int:
    return -(-value // by)


def usable(workers: int) -> int:
    """Return the number of worker processes that are started here: at most one for each core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return min(workers, cores)


def shortage(needed: int) -> str:
    """Say that less than `needed` bytes of shared memory are free; empty if they are."""
    if not SHARED.is_dir() or needed <= (free := shutil.disk_usage(SHARED).free):
        return ""
    return (
        f"{SHARED} has {free / 1e6:,.0f} MB free, and the processes that read images need up to "
        f"{needed / 1e6:,.0f} MB of it"
    )


def remedy(needed: int, option: str) -> str:
    """Say how to provide `needed` bytes, 0 if that is unknown, and how to need none.

    `option` is the one that sets the number of workers.
    """
    gigabytes = _up(needed, 1 << 30) + 1 if needed else 8  # others use it, too
    return f"provide more (docker run --shm-size={gigabytes}g), or set {option} to 0"
