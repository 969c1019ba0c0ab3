"""Times, rates, memory and waits of work on a device."""

from __future__ import annotations

import collections
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    work: Callable[[], object], device: torch.device, rounds: int = 5, warm: int = 2
) -> float:
    """Return the median seconds of a call, the device's work included."""
    taken = []
    for i in range(warm + rounds):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        if i >= warm:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def ceiling(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Return the FLOP/s of products of two random square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, device, rounds=8, warm=3)


def forget_peak(device: torch.device) -> None:
    """Begin to measure peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Return the bytes of tensors at their peak; None on a CPU, which does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def gib(size: float | None) -> float | None:
    """Return bytes in GiB."""
    return None if size is None else size / 2**30


def waits_of(work: Callable[[], object], device: torch.device) -> collections.Counter[str] | None:
    """Return by line of code how often a call waits for a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [one for one in seen if "synchroniz" in str(one.message).lower()]
    return collections.Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found)
